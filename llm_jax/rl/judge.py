"""A model that is asked: about an answer (rule-based rewards, AI labels), or about each step of a solution.

    chance = judge.probabilities(model, params, vocab, ['Is fire hot? The answer is'], [' yes', ' no'])
    reward = judge.stepwise(grade, combine=judge.least)

`judged` and what `asked` and `stepwise` return are reward functions (rl/reward.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core.errors import UserError, nearest
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import score as score_lib
from llm_jax.rl import reward as reward_lib
from llm_jax.rl.reward import Reward, Told

# --- a model that is asked ----------------------------------------------------------------------------


def probabilities(
  model: Any,
  params: Any,
  vocab: Any,
  questions: Sequence[str],
  choices: Sequence[str],
  *,
  batch: int = 16,
) -> np.ndarray:
  """P(choice | question) of a prompted model among `choices` alone, f32 [n, choices]: a zero-shot classifier.

  Each choice is scored as the text after the question, the sum over its tokens.
  """
  if len(choices) < 2 or not all(choices):
    raise UserError(
      f'a classifier needs two or more choices, none of them empty, got {list(choices)}'
    )
  ids = [prompts_lib.encode(model, vocab, q) for q in questions for _ in choices]
  own = [list(vocab.encode(c)) for _ in questions for c in choices]
  width = max(map(len, own))
  found = np.zeros(len(own), np.float32)
  for first in range(0, len(own), batch):
    some = own[first : first + batch]
    rows = [*ids[first : first + batch], *[ids[first]] * (batch - len(some))]
    answers = np.zeros((batch, width), np.int32)
    lengths = np.ones(batch, np.int32)
    for i, row in enumerate(some):
      answers[i, : len(row)], lengths[i] = row, len(row)
    padded = prompts_lib.pad(model, rows)
    told = score_lib.tokens(model, params, *padded, answers, lengths, start=vocab.start)
    found[first : first + len(some)] = np.asarray(told.logp).sum(-1)[: len(some)]
  logp = found.reshape(len(questions), len(choices))
  return np.asarray(jax.nn.softmax(logp, axis=-1))


def asked(
  model: Any,
  params: Any,
  vocab: Any,
  *,
  template: str,
  choices: Mapping[str, float],
  batch: int = 16,
) -> Reward:
  """A reward by asking: the mean of the values of `choices` under the model's probabilities of them.

  template: the question, with {prompt}, {answer} and any field of the record; the choice follows it. With one value per
  style of refusal this is GPT-4's rule-based reward model (arXiv:2303.08774, appendix A of the system card); with
  {' yes': 1, ' no': 0} the probability that a rule is broken.
  """

  def reward(prompts: Sequence[str], answers: Sequence[str], told: Told) -> np.ndarray:
    questions = []
    for prompt, answer, record in zip(prompts, answers, told, strict=True):
      fields = dict(record, prompt=prompt, answer=answer)
      try:
        questions.append(template.format(**fields))
      except KeyError as e:
        raise UserError(f'the template asks for {e}; {nearest(e.args[0], fields)}') from e
    found = probabilities(model, params, vocab, questions, list(choices), batch=batch)
    return (found @ np.array(list(choices.values()), np.float32)).astype(np.float32)

  return reward


def judged(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  model: Callable,
  path: str,
  vocab: Callable,
  template: str,
  choices: Mapping,
  batch: int = 16,
) -> np.ndarray:
  """`asked` of the run in `path`, whose weights are read once."""
  made = reward_lib.opened(model, path, vocab)
  return asked(*made, template=template, choices=choices, batch=batch)(prompts, answers, told)


# --- steps --------------------------------------------------------------------------------------------


def steps(text: str, mark: str = '\n') -> list[str]:
  """The steps of a solution, each with the mark that ends it; together they are the text."""
  parts = text.split(mark)
  return [p + mark for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def product(values: Sequence[float]) -> float:
  """The probability that all steps are right (Lightman et al. 2023, arXiv:2305.20050, section 3.4)."""
  return float(np.prod(values))


def least(values: Sequence[float]) -> float:
  """The probability that the weakest step is right (likewise)."""
  return float(np.min(values, initial=1.0))


def stepwise(
  judge: Callable[[str, list[str], Mapping], Sequence[float]],
  *,
  combine: Callable[[Sequence[float]], float] = product,
  mark: str = '\n',
) -> Reward:
  """A process reward model as a reward: `combine` over the steps of an answer.

  judge: (prompt, steps, record) -> the probability that each step is right. A step judged neutral counts as right
  (arXiv:2305.20050, appendix F).
  """

  def reward(prompts: Sequence[str], answers: Sequence[str], told: Told) -> np.ndarray:
    found = []
    for prompt, answer, record in zip(prompts, answers, told, strict=True):
      parts = steps(answer, mark)
      values = list(judge(prompt, parts, record))
      if len(values) != len(parts):
        raise UserError(
          f'the judge gave {len(values)} numbers for {len(parts)} steps of {reward_lib.short(prompt)}'
        )
      found.append(combine(values) if parts else 0.0)
    return np.array(found, np.float32)

  return reward


def search(
  propose: Callable[[str, Any], list[str]],
  judge: Callable[[str, list[str], Mapping], Sequence[float]],
  prompt: str,
  key: Any,
  *,
  beams: int = 1,
  most: int = 16,
  combine: Callable[[Sequence[float]], float] = product,
  done: Callable[[str], bool] = lambda step: not step.endswith('\n'),
  told: Mapping | None = None,
) -> str:
  """A solution found step by step: of all proposed continuations the `beams` best, until each is done.

  propose: (prompt and steps so far, key) -> candidates for the next step. judge: as in `stepwise`. most: steps. done:
  whether a step is the last one; default: it has no end of line. One beam is greedy search by the process reward
  (GRACE, arXiv:2305.14934); more keep the way back to other beginnings open. Returns the steps, joined.
  """
  alive: list[tuple[float, list[str]]] = [(combine([]), [])]
  for number in range(most):
    reached = []
    for rank, (value, taken) in enumerate(alive):
      if taken and done(taken[-1]):
        reached.append((value, taken))
        continue
      own = jax.random.fold_in(jax.random.fold_in(key, number), rank)
      for step in dict.fromkeys(propose(prompt + ''.join(taken), own)):
        grown = [*taken, step]
        reached.append((combine(list(judge(prompt, grown, told or {}))), grown))
    if not reached:
      break
    alive = sorted(reached, key=lambda found: -found[0])[:beams]
    if all(done(taken[-1]) for _, taken in alive):
      break
  return ''.join(alive[0][1])
