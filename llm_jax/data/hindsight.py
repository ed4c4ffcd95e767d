"""Chain of Hindsight: a better and a worse answer in one conversation, each told what it is before it begins.

The model learns to write both kinds, and is then asked for the better one (Liu et al. 2023, arXiv:2302.02676).
"""

import functools
from collections.abc import Callable

from llm_jax.data import examples, formats, preferences, records
from llm_jax.data.formats import Conversation
from llm_jax.data.records import Record

GOOD, BAD = 'A helpful answer:', 'An unhelpful answer:'


def chain(
  record: Record, *, format: Callable = preferences.hh_rlhf, good: str = GOOD, bad: str = BAD
) -> list[Conversation]:
  """Every pair of a record as a conversation that asks for both answers; the loss is on the answers alone.

  format: from `preferences`. good, bad: what is asked for, after the prompt's last message and between the answers. The
  good answer comes first; where answers differ in more than their last message only that one counts.
  """
  found = []
  for one in format(record):
    for pair in [one] if isinstance(one, preferences.Pair) else preferences.pairs_of(one):
      *before, asked = pair.prompt
      first = dict(role='user', content=f'{asked["content"]}\n\n{good}')
      answers = [
        dict(role='assistant', content=a[-1]['content']) for a in (pair.chosen, pair.rejected)
      ]
      turns = [*before, first, answers[0], dict(role='user', content=bad), answers[1]]
      found.append(formats.checked(turns, pair.where))
  return found


def hh_harmless(
  *, template: str | None = None, heldout: float = 0.15, left_out: float = 0.0
) -> examples.Set:
  """The bundled pairs of HH-RLHF as chains; see `pairs.hh_harmless`."""
  path = records.bundled('hh_harmless/harmless-base_test.jsonl.gz')
  told = dict(template=template, heldout=heldout, left_out=left_out, bad=4, name='hh_harmless')
  return examples.conversations(path=path, format=chain, **told)


def politeness(
  *, template: str | None = None, heldout: float = 0.1, left_out: float = 0.0
) -> examples.Set:
  """The bundled polite and impolite answers as chains; see `pairs.politeness`."""
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  format = functools.partial(
    chain, format=preferences.alpaca, good='A polite answer:', bad='An impolite answer:'
  )
  told = dict(template=template, heldout=heldout, left_out=left_out, bad=6, name='politeness')
  return examples.conversations(path=path, format=format, **told)
