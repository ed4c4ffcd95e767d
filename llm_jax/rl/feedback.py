"""Better answers from answers and their rewards: data makers whose outside world is a function that writes text.

    write = feedback.of_model(model, params, vocab, max_new=64)              # (prompts, key) -> answers
    found = feedback.sample(write, reward, prompts, told, key, n=8)
    examples = feedback.best_of_each(found)                                   # best-of-n, rejection sampling, RAFT

What comes out are records for the readers of data: {'instruction', 'output', ...} for tuning, {'prompt', 'chosen',
'rejected', ...} for preferences. `save` writes them as JSON lines.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import files
from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.rl import reward as reward_lib
from llm_jax.rl.reward import Reward, Told

Generate = Callable[[Sequence[str], jax.Array], list[str]]
Records = list[dict[str, Any]]


class Sampled(NamedTuple):
  """The answers to one prompt. scores: f32 [n]. told: the prompt's record."""

  prompt: str
  answers: list[str]
  scores: np.ndarray
  told: Mapping[str, Any]


def of_model(model: Any, params: Any, vocab: Any, **settings: Any) -> Generate:
  """Answers of a model. settings: those of `generate.text`, such as max_new and temperature."""
  return lambda prompts, key: generate_lib.text(model, params, vocab, prompts, key, **settings)


def sample(
  write: Generate, reward: Reward, prompts: Sequence[str], told: Told, key: jax.Array, *, n: int = 8
) -> list[Sampled]:
  """`n` answers to each prompt and their rewards. Raises `UserError` for a reward that is no number."""
  if n < 1 or len(prompts) != len(told):
    raise UserError(
      f'{len(prompts)} prompts need as many records and n >= 1, got {len(told)} and n={n}'
    )
  asked = [prompt for prompt in prompts for _ in range(n)]
  records = [record for record in told for _ in range(n)]
  answers = list(write(asked, key))
  if len(answers) != len(asked):
    raise UserError(f'{len(asked)} prompts got {len(answers)} answers: give one answer to each')
  scores = reward_lib.checked(reward, asked, answers, records)
  cut = lambda rows, i: rows[i * n : (i + 1) * n]
  return [
    Sampled(prompt, cut(answers, i), cut(scores, i), record)
    for i, (prompt, record) in enumerate(zip(prompts, told, strict=True))
  ]


def save(records: Records, path: str) -> None:
  """Writes records as JSON lines; the file appears once all is written."""
  files.write(path, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records))


# --- which answers are kept ---------------------------------------------------------------------------


def best_of_each(found: Sequence[Sampled]) -> Records:
  """The best answer to each prompt, of equal ones the first: best-of-n, LLaMA 2's rejection sampling."""
  return [_example(one, int(one.scores.argmax())) for one in found]


def top(found: Sequence[Sampled], *, share: float | None = None) -> Records:
  """RAFT (Dong et al. 2023, arXiv:2304.06767): of all answers to all prompts the best `share`, by default one of n."""
  every = [(one.scores[i], k, i) for k, one in enumerate(found) for i in range(len(one.scores))]
  share = share or 1 / max(len(found[0].scores), 1)
  order = sorted(every, key=lambda row: (-row[0], row[1], row[2]))
  return [_example(found[k], i) for _, k, i in order[: max(1, round(share * len(every)))]]


def right(found: Sequence[Sampled], *, least: float = 1.0) -> Records:
  """Every different answer with a reward of at least `least`: expert iteration on what can be verified (Polu et al.
  2022, arXiv:2202.01344; STaR, arXiv:2203.14465)."""
  kept = {}
  for one in found:
    for i in np.flatnonzero(one.scores >= least):
      kept.setdefault((one.prompt, one.answers[i]), _example(one, int(i)))
  return list(kept.values())


def pairs(found: Sequence[Sampled]) -> Records:
  """The best and the worst answer to each prompt whose answers differ in reward, with both rewards."""
  made = []
  for one in found:
    best, worst = int(one.scores.argmax()), int(one.scores.argmin())
    if one.scores[best] > one.scores[worst]:
      answers = dict(chosen=one.answers[best], rejected=one.answers[worst])
      scores = dict(score_chosen=one.scores[best], score_rejected=one.scores[worst])
      made.append(dict(prompt=one.prompt, **answers, **{k: float(v) for k, v in scores.items()}))
  return made


def _example(one: Sampled, i: int) -> dict[str, Any]:
  return dict(instruction=one.prompt, output=one.answers[i], reward=float(one.scores[i]))


# --- rounds -------------------------------------------------------------------------------------------


def newest(rounds: Sequence[Records]) -> Records:
  """Learn from the last round alone (RAFT)."""
  return rounds[-1]


def all_rounds(rounds: Sequence[Records]) -> Records:
  """Learn from every different example of all rounds (expert iteration)."""
  kept = {(r['instruction'], r['output']): r for records in rounds for r in records}
  return list(kept.values())


def best_of_all(rounds: Sequence[Records]) -> Records:
  """Learn from the best answer that any round had for each prompt: LLaMA 2 took the top samples of all its earlier
  versions in too, which undid what was forgotten between them (arXiv:2307.09288, section 3.2.3)."""
  kept: dict[str, dict[str, Any]] = {}
  for records in rounds:
    for r in records:
      old = kept.get(r['instruction'])
      if old is None or r['reward'] > old['reward']:
        kept[r['instruction']] = r
  return list(kept.values())


def iterate(
  policy: Any,
  write: Callable[[Any], Generate],
  learn: Callable[[Any, Records], Any],
  reward: Reward,
  prompts: Sequence[str],
  told: Told,
  key: jax.Array,
  *,
  rounds: int = 5,
  n: int = 8,
  keep: Callable[[Sequence[Sampled]], Records] = best_of_each,
  remember: Callable[[Sequence[Records]], Records] = newest,
) -> tuple[Any, list[float]]:
  """Writes, keeps, learns, `rounds` times. Returns the last policy and the mean reward of each round's samples.

  write(policy) -> its `Generate`. learn(policy, records) -> the policy after tuning on them, a whole run of the loop or
  a few steps. RAFT: the defaults; expert iteration: keep=right, remember=all_rounds; LLaMA 2: remember=best_of_all.
  """
  made, means = [], []
  for number in range(rounds):
    own = jax.random.fold_in(key, number)
    found = sample(write(policy), reward, prompts, told, own, n=n)
    means.append(float(np.mean([one.scores for one in found])))
    made.append(keep(found))
    if chosen := remember(made):
      policy = learn(policy, chosen)
  return policy, means


# --- what was good or bad is told as data -------------------------------------------------------------


def quantiles(scores: Any, k: int) -> np.ndarray:
  """int [n]: in which k-th of all each score lies, 0 the lowest; parts of equal size, equal scores in order."""
  order = np.argsort(np.argsort(np.asarray(scores), kind='stable'), kind='stable')
  return order * k // max(len(order), 1)


def quark(found: Sequence[Sampled], *, k: int = 5) -> Records:
  """Quark's pool (Lu et al. 2022, arXiv:2205.13636): every sample with the `quantile` of its reward, of `k` over all, 0
  the lowest. The token that says so goes in front of the text; samples are then drawn with that of the highest."""
  flat = [(one, i) for one in found for i in range(len(one.answers))]
  parts = quantiles([one.scores[i] for one, i in flat], k)
  return [_example(one, i) | dict(quantile=int(q)) for (one, i), q in zip(flat, parts, strict=True)]


def relabel(
  found: Sequence[Sampled], describe: Callable[[float, Mapping[str, Any]], str]
) -> Records:
  """Hindsight instruction relabelling (Zhang et al. 2023, arXiv:2302.05206): each answer under the instruction that it
  did follow. describe: (reward, record) -> that instruction, such as 'Give a wrong answer. '; put before the prompt.
  """
  made = []
  for one in found:
    for i, score in enumerate(one.scores):
      told = describe(float(score), one.told)
      made.append(_example(one, i) | dict(instruction=told + one.prompt))
  return made


def refine(
  write: Generate,
  reward: Reward,
  prompts: Sequence[str],
  answers: Sequence[str],
  comments: Sequence[str],
  told: Told,
  key: jax.Array,
  *,
  n: int = 5,
  template: str = 'Task: {prompt}\nAnswer: {answer}\nFeedback: {comment}\nThe answer, improved by the feedback: ',
) -> Records:
  """ILF, imitation learning from language feedback (Scheurer et al. 2023, arXiv:2303.16755): of `n` refinements of each
  answer by a comment on it the one with the highest reward, as an example for the prompt alone."""
  rows = zip(prompts, answers, comments, strict=True)
  asked = [template.format(prompt=p, answer=a, comment=c) for p, a, c in rows]
  plain = dict(zip(asked, prompts, strict=True))
  judged = lambda questions, made, records: reward([plain[q] for q in questions], made, records)
  found = sample(write, judged, asked, told, key, n=n)
  return [r | dict(instruction=plain[r['instruction']]) for r in best_of_each(found)]
