"""The three kinds of instructions of the survey's Table 9 at small scale, and the four ways to improve one of them.

All are lists of `formats.Conversation`. Tasks are made here, with rules that know the answer; chat and synthetic
instructions are what comes with the package, or files of one's own.
"""

import glob
import os
from collections.abc import Callable, Sequence

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import curate, examples, formats, records
from llm_jax.data.formats import Conversation

WORDS = (
  'apple bear bird boat book box boy bread bus cake car cat chair clock cloud coat cow cup dog door dress duck egg '
  'farm fish flower fox frog game garden girl goat hat hill horse house kite lake lamp leaf lion milk moon mouse nest '
  'park pen pig plane pond rain ring river road rock room rose sea ship shoe sky snow sock soup star stone sun table '
  'tea toy train tree truck wall water wind window wolf zoo'
).split()
OPPOSITES = dict(
  big='small', hot='cold', happy='sad', fast='slow', up='down', day='night', old='new', wet='dry', good='bad',
  high='low', hard='soft', long='short', open='closed', light='dark', full='empty', loud='quiet', clean='dirty',
  strong='weak', early='late', near='far',
)  # fmt: skip
HELD_OUT = 0.15


def _word(rng: np.random.Generator) -> str:
  return str(rng.choice(WORDS))


def _few(rng: np.random.Generator) -> list[str]:
  return [str(w) for w in rng.choice(WORDS, 3, replace=False)]


def _two(rng: np.random.Generator) -> tuple[int, int]:
  a, b = rng.choice(30, 2, replace=False)
  return int(a), int(b)


def _opposite(rng: np.random.Generator) -> tuple[str, str]:
  pair = list(OPPOSITES.items())[rng.integers(len(OPPOSITES))]
  return pair if rng.integers(2) else pair[::-1]


# name -> (draw, answer of what was drawn, what is asked of it in three wordings)
TASKS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = dict(
  copy=(_word, str, ('Repeat the word: {}', 'Say "{}".', 'Write this word again: {}')),
  larger=(
    _two,
    lambda x: str(max(x)),
    ('Which is larger, {0} or {1}?', 'Name the larger number: {0}, {1}', 'Is {0} or {1} more?'),
  ),
  opposite=(
    _opposite,
    lambda x: x[1],
    ('What is the opposite of {0}?', 'Name an antonym of {0}.', 'Not {0} but'),
  ),
  first=(
    _few,
    lambda x: x[0],
    (
      'Which comes first: {0}, {1}, {2}?',
      'The first of {0}, {1}, {2}',
      'List: {0} {1} {2}. First?',
    ),
  ),
  letter=(
    _word,
    lambda x: x[0],
    ('What is the first letter of {}?', '{} begins with which letter?', 'First letter: {}'),
  ),
  last=(
    _few,
    lambda x: x[2],
    ('Which comes last: {0}, {1}, {2}?', 'The last of {0}, {1}, {2}', 'List: {0} {1} {2}. Last?'),
  ),
  capitals=(
    _word,
    str.upper,
    ('Write {} in capitals.', 'Shout: {}', 'Capital letters, please: {}'),
  ),
  sum=(
    lambda rng: tuple(int(x) for x in rng.integers(0, 10, 2)),
    lambda x: str(sum(x)),
    ('What is {0} + {1}?', 'Add {0} and {1}.', 'Sum: {0}, {1}'),
  ),
)


def tasks(count: int, seed: int, *, heldout: bool, kinds: Sequence[str] = tuple(TASKS)) -> list:
  """`count` different questions with one right answer, of each kind as many, in wordings drawn for each.

  heldout: whether what is asked about (a word, a pair of numbers) is of those that training never sees, in any wording.
  """
  rng, found = np.random.default_rng(seed), {}
  for i in range(count * 40):
    if len(found) == count:
      break
    name = kinds[i % len(kinds)]
    draw, answer, wordings = TASKS[name]
    given = draw(rng)
    asked = wordings[rng.integers(len(wordings))]
    asked = asked.format(*given) if isinstance(given, (tuple, list)) else asked.format(given)
    if _is_held_out(name, given) == heldout:
      found[asked] = formats.task(asked, '', answer(given), f'{name}:{i}', dict(kind=name))
  if len(found) < count:
    raise UserError(
      f'there are fewer than {count} different tasks of {kinds}: ask for {len(found)}'
    )
  return list(found.values())


def _is_held_out(name: str, given: object) -> bool:
  mark = sum(ord(c) * (i + 1) for i, c in enumerate(f'{name} {given}'))
  return (mark * 2654435761 % 2**32) / 2**32 < HELD_OUT


def chat(folder: str | None) -> list[Conversation]:
  """chat.* of the folder (ShareGPT), or the bundled 500 conversations about who the assistant is."""
  path = records.bundled('identity/dummy_conversation.json.gz')
  return _read(folder, 'chat', formats.sharegpt, path)


def synthetic(folder: str | None) -> list[Conversation]:
  """synthetic.* of the folder (Alpaca), or the bundled 1,100 instructions that a language model wrote."""
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  return _read(folder, 'synthetic', formats.alpaca, path)


def seeds() -> list[Conversation]:
  """The 175 tasks that people wrote for Self-Instruct: a kind on which nobody trains here."""
  path = records.bundled('self_instruct/seed_tasks.jsonl.gz')
  return _read(None, 'seeds', formats.self_instruct, path)


def _read(folder: str | None, name: str, format: Callable, path: str) -> list[Conversation]:
  own = sorted(glob.glob(os.path.join(folder, f'{name}.*'))) if folder else []
  return examples.parsed(tuple(own) or path, format, bad=0)


# --- the four ways ------------------------------------------------------------------------------------


def _chained(a: Conversation, b: Conversation) -> tuple[str, str]:
  return f'Do both.\n1. {_asked(a)}\n2. {_asked(b)}', f'1. {_said(a)}\n2. {_said(b)}'


def _capitals(a: Conversation, b: Conversation) -> tuple[str, str]:
  del b
  return f'{_asked(a)}\nWrite the answer in capital letters.', _said(a).upper()


def _ended(a: Conversation, b: Conversation) -> tuple[str, str]:
  del b
  return f'{_asked(a)}\nEnd with the word done.', f'{_said(a)} Done.'


def complex_(
  found: Sequence[Conversation], fits: Callable[[Conversation], bool] = lambda one: True
) -> list[Conversation]:
  """Each with one more thing to heed, by rules whose effect on the answer is known: two tasks in one, capitals, a last
  word. What WizardLM had a model write (Evol-Instruct), as far as that goes without one. Of the three in turn the first
  that fits; as it was where none does."""
  made, changes = [], (_chained, _capitals, _ended)
  for i, one in enumerate(found):
    following = found[(i + 1) % len(found)]
    told = (changes[(i + k) % 3](one, following) for k in range(3))
    tried = (formats.task(asked, '', said, one.where) for asked, said in told)
    made.append(next((new for new in tried if fits(new)), one))
  return made


def diverse(found: Sequence[Conversation], count: int, first: int = 0) -> list[Conversation]:
  """`count` that cover the words of all (`curate.k_centre`)."""
  x = curate.features([_asked(one) for one in found])
  return [found[i] for i in curate.k_centre(x, count, first=first % len(found))]


def moderate(
  found: Sequence[Conversation], nats: Sequence[float], count: int
) -> list[Conversation]:
  """`count` of middling difficulty. nats: of each answer, per token, under the base model."""
  return [found[i] for i in curate.moderate(nats, count)]


def progressive(
  found: Sequence[Conversation], nats: Sequence[float], stages: int
) -> list[list[Conversation]]:
  """The easiest first."""
  return [[found[i] for i in part] for part in curate.progressive(nats, stages)]


def asked(found: Sequence[Conversation]) -> list[str]:
  """What the user says first in each."""
  return [_asked(one) for one in found]


def _asked(one: Conversation) -> str:
  return next(m['content'] for m in one.messages if m['role'] == 'user')


def _said(one: Conversation) -> str:
  return next(m['content'] for m in one.messages if m['role'] == 'assistant')
