r"""Instructions from instructions, from texts, and from talk: Evol-Instruct, back-translation, self-chat, topics.

    harder, refused = evolve.evolve(write, records, key)
    found = evolve.back_translate(write, rate, texts, key)
    talks = evolve.self_chat(write, ['Why is the sky blue?'], key)

write: as in `synthesize.py`. The requests are our own wording of what the papers ask.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import curate
from llm_jax.data.synthesize import Records, Write

IN_DEPTH = dict(
  constrain='Add one more condition or requirement to it.',
  deepen='If it asks about something, make it ask for more depth and breadth.',
  concretise='Replace general notions in it by more specific ones.',
  reason='If it can be solved in a few simple steps, make it need several steps of reasoning.',
  complicate='Add an input to it, such as a table, code or a formula, that has to be used.',
)
IN_BREADTH = dict(mutate='Write a new one of the same field instead, about something rarer.')
OPERATORS = IN_DEPTH | IN_BREADTH
REWRITE = (
  'Rewrite the given prompt into one that is a little harder, but that people can still understand and answer. '
  '{operator} Add at most 20 words.\n\nGiven prompt:\n{instruction}\n\nRewritten prompt:\n'
)
LEAKED = ('given prompt', 'rewritten prompt', 'created prompt')
STOP_WORDS = set(
  'a an and are as at be but by for i if in is it no not of on or so that the this to was with you'.split()
)


def evolve(
  write: Write,
  told: Sequence[Mapping[str, str]],
  key: jax.Array,
  *,
  operators: Mapping[str, str] = OPERATORS,
  equal: Callable[[str, str], bool] = lambda old, new: curate.rouge_l(old, new) > 0.95,
) -> tuple[Records, dict[str, int]]:
  """One round of Evol-Instruct (Xu et al. 2023, arXiv:2304.12244): each instruction rewritten by an operator drawn for
  it and answered anew; what the eliminator refuses goes back as it was.

  told: records with `instruction` and `output`. equal: whether a rewritten instruction says nothing new, which the
  paper asks a model. Returns (records, also with `operator` and `evolved`; how many each rule of `eliminated` refused).
  """
  names = list(operators)
  drawn, first, second = jax.random.split(key, 3)
  which = [names[i] for i in np.asarray(jax.random.randint(drawn, (len(told),), 0, len(names)))]
  olds = [record['instruction'] for record in told]
  asked = [
    REWRITE.format(operator=operators[n], instruction=o) for n, o in zip(which, olds, strict=True)
  ]
  news = [text.strip() for text in write(asked, first)]
  answers = [text.strip() for text in write(news, second)]
  made, refused = [], {}
  for record, name, old, new, answer in zip(told, which, olds, news, answers, strict=True):
    rule = eliminated(old, new, answer, equal)
    if rule:
      refused[rule] = refused.get(rule, 0) + 1
      made.append(dict(record, operator=name, evolved=False))
    else:
      made.append(dict(instruction=new, output=answer, operator=name, evolved=True))
  return made, refused


def eliminated(old: str, new: str, answer: str, equal: Callable[[str, str], bool]) -> str | None:
  """The rule of the eliminator that refuses a rewritten instruction, None if none does (arXiv:2304.12244, section 3.2):
  nothing new; the answer is a short apology; it has nothing but stop words; words of the request leaked."""
  if not new or equal(old, new):
    return 'nothing new'
  if any(mark in new.lower() for mark in LEAKED):
    return 'leaked'
  if 'sorry' in answer.lower() and len(answer.split()) < 80:
    return 'refusal'
  return 'empty answer' if not set(curate.words(answer)) - STOP_WORDS else None


def topics(
  write: Write, instructions: Sequence[str], names: Sequence[str], key: jax.Array
) -> list[tuple[str, str]]:
  """Instructions rewritten to topics drawn for them, (instruction, topic): more diverse ones, as the survey's Table 9
  made out of 70K with 293 topics."""
  drawn, own = jax.random.split(key)
  which = [
    names[i] for i in np.asarray(jax.random.randint(drawn, (len(instructions),), 0, len(names)))
  ]
  ask = 'Rewrite this instruction so that it is about {topic}, with the same kind of task.\n\n{text}\n\nRewritten:\n'
  texts = write(
    [ask.format(topic=t, text=i) for t, i in zip(which, instructions, strict=True)], own
  )
  return [(text.strip(), topic) for text, topic in zip(texts, which, strict=True)]


# --- back-translation ---------------------------------------------------------------------------------

BACK = (
  'Write the instruction that this text is a good answer to.\n\nText:\n{text}\n\nInstruction:\n'
)
RATE = (
  'How good an answer is this to the instruction, from 1 (not at all) to 5 (perfect, as an expert would give it)? '
  'End with "Score: " and the number.\n\nInstruction:\n{instruction}\n\nAnswer:\n{output}\n\nRating:\n'
)


def back_translate(
  write: Write, rate: Write, texts: Sequence[str], key: jax.Array, *, least: float = 4.5
) -> tuple[Records, dict[str, int]]:
  """Instruction back-translation (Li et al. 2023, arXiv:2308.06259): self-augmentation, an instruction written for each
  human text, then self-curation, those that `rate` gives at least `least` of 5. Returns (records with `score`, how many
  were refused for their score, for having none and for having no instruction)."""
  first, second = jax.random.split(key)
  found = [text.strip() for text in write([BACK.format(text=t) for t in texts], first)]
  asked = [RATE.format(instruction=i, output=t) for i, t in zip(found, texts, strict=True)]
  made, refused = [], dict(score=0, unrated=0, empty=0)
  for instruction, text, said in zip(found, texts, rate(asked, second), strict=True):
    value = rating(said)
    rule = (
      'empty'
      if not instruction
      else 'unrated'
      if value is None
      else 'score'
      if value < least
      else None
    )
    if rule:
      refused[rule] += 1
    else:
      made.append(dict(instruction=instruction, output=text, score=value))
  return made, refused


def rating(text: str) -> float | None:
  """The number after the last 'Score:', None without one between 1 and 5."""
  found = re.findall(r'score:\s*(\d+(?:\.\d+)?)', text, re.I)
  return float(found[-1]) if found and 1 <= float(found[-1]) <= 5 else None


# --- self-chat ----------------------------------------------------------------------------------------

CHAT = (
  "A conversation between a person and an AI assistant about the topic below. The person's turns begin with [Human], "
  "the assistant's with [AI].\n\nTopic: {topic}\n\n[Human]"
)


def self_chat(
  write: Write, seeds: Sequence[str], key: jax.Array, *, least: int = 1
) -> tuple[Records, int]:
  """Both sides of conversations by one model, from a seed question each (Baize, Xu et al. 2023, arXiv:2304.01196).

  Returns (records with `messages`, how many had fewer than `least` exchanges or broke the form).
  """
  if least < 1:
    raise UserError(f'least={least}: a conversation has at least one exchange')
  texts = write([CHAT.format(topic=seed) for seed in seeds], key)
  made = [turns(f'[Human]{text}') for text in texts]
  kept = [dict(messages=m) for m in made if m is not None and len(m) >= 2 * least]
  return kept, len(made) - len(kept)


def turns(text: str) -> list[dict[str, str]] | None:
  """The messages of a transcript, up to the last turn of the assistant; None where the turns do not alternate."""
  parts = re.split(r'\[(Human|AI)\]', text)[1:]
  said = [(parts[i], parts[i + 1].strip()) for i in range(0, len(parts), 2)]
  said = said[: len(said) - len(said) % 2]
  if any(name != ('Human', 'AI')[i % 2] or not content for i, (name, content) in enumerate(said)):
    return None
  roles = dict(Human='user', AI='assistant')
  return [dict(role=roles[name], content=content) for name, content in said]
