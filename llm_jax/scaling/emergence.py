r"""What emerges with size, and how much of it is the metric (Wei et al. 2022, arXiv:2206.07682; Schaeffer et al. 2023,
arXiv:2304.15004).

The same answers are scored by metrics that ask for all tokens at once (`exact_match`) and by those that give credit for
each (`token_edit_distance`, `log_likelihood`, `brier`). If a token is right with probability p, an answer of L tokens
is with p^L (`whole`): a sharp curve from a smooth one. `pass_until` (Hu et al. 2023, arXiv:2310.03262) measures pass
probabilities that a test set of fixed size calls 0, and `predict` extrapolates them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, laws

# --- metrics ------------------------------------------------------------------------------------------


def exact_match(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """bool [n]: whether all tokens of an answer [n, length] are those of its target."""
  return (np.asarray(answers) == np.asarray(targets)).all(-1)


def token_edit_distance(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """int64 [n]: the fewest tokens to insert, delete or replace in an answer [n, s] to get its target [n, t]
  (Levenshtein 1966)."""
  answers, targets = np.asarray(answers), np.asarray(targets)
  column = np.arange(targets.shape[1] + 1)
  row = np.repeat(column[None], len(answers), 0)
  for i in range(answers.shape[1]):
    replaced = row[:, :-1] + (answers[:, i : i + 1] != targets)
    best = np.concatenate([row[:, :1] + 1, np.minimum(row[:, 1:] + 1, replaced)], 1)
    row = np.minimum.accumulate(best - column, 1) + column  # insertions, from the left
  return row[:, -1]


def log_likelihood(logp: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """f64 [n]: nats of the target's tokens, the mean over its length. logp: [n, length, vocab]."""
  picked = np.take_along_axis(np.asarray(logp, np.float64), np.asarray(targets)[..., None], -1)
  return picked[..., 0].mean(-1)


def brier(logp: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """f64 [n]: sum over the vocabulary of (p - [it is the target])^2, mean over the length (Brier 1950): 0 is sure and
  right, 2 sure and wrong. logp: [n, length, vocab]."""
  p = np.exp(np.asarray(logp, np.float64))
  right = np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0]
  return ((p**2).sum(-1) - 2 * right + 1).mean(-1)


def whole(p: np.ndarray, length: int) -> np.ndarray:
  """p^length: the probability that all tokens are right where each is, independently, with probability p."""
  return np.asarray(p, np.float64) ** length


def sharpness(size: np.ndarray, score: np.ndarray) -> float:
  """The largest share of a score's whole rise that falls between two neighbouring sizes, divided by the share of the
  logarithm of the size that lies between them: 1 for a straight line over log size, much more for a jump.

  size, score: [n], ascending sizes. Raises `UserError` for a score that does not change.
  """
  x, y = np.log(np.asarray(size, np.float64)), np.asarray(score, np.float64)
  if not np.ptp(y):
    raise UserError('a score that does not change has no sharpness')
  return float(np.max(np.abs(np.diff(y)) / np.ptp(y) / (np.diff(x) / np.ptp(x))))


# --- PassUntil ----------------------------------------------------------------------------------------


def pass_until(
  attempt: Callable[[np.random.Generator], bool],
  *,
  passes: int = 1,
  most: int = 100_000,
  seed: int = 0,
) -> int | None:
  """How many samples there were when the `passes`-th passed, None where `most` did not do.

  attempt: takes one sample of an answer and says whether it passes.
  """
  if not 1 <= passes <= most:
    raise UserError(f'passes={passes} must be at least 1 and at most most={most}')
  rng, found = np.random.default_rng(seed), 0
  for k in range(1, most + 1):
    found += bool(attempt(rng))
    if found == passes:
      return k
  return None


def pass_rate(samples: np.ndarray, *, passes: int) -> np.ndarray:
  """The pass probability from the number of samples until the `passes`-th pass: (passes - 1) / (samples - 1).

  Unbiased (Haldane 1945). It needs two passes: for one, PassUntil's maximum likelihood estimate 1 / samples has the
  mean -p log(p) / (1 - p), far above a small p; see `first_pass_mean`.
  """
  if passes < 2:
    raise UserError(
      f'passes={passes}: no estimate from one pass has any resolution without bias; take 2 or more'
    )
  return (passes - 1) / (np.asarray(samples, np.float64) - 1)


def first_pass_mean(p: np.ndarray) -> np.ndarray:
  """E[1 / K], K the number of samples until the first pass: -p log(p) / (1 - p)."""
  p = np.asarray(p, np.float64)
  return -p * np.log(p) / (1 - p)


# --- predictions --------------------------------------------------------------------------------------


class TaskLaw(NamedTuple):
  """-log(pass probability) = law(size), a power law that falls."""

  law: laws.PowerLaw

  def __call__(self, size: np.ndarray) -> np.ndarray:
    """The pass probability of a model of this size."""
    return np.exp(-laws.power(self.law, np.asarray(size, np.float64)))


def predict(size: np.ndarray, probability: np.ndarray) -> TaskLaw:
  """The task scaling law of PassUntil, p = exp(-c N^-alpha), by least squares on log(-log p) (Hu et al. 2023, eq. 4).

  size, probability: [n]; probabilities strictly between 0 and 1, however small.
  """
  p = np.asarray(probability, np.float64)
  if not np.all((p > 0) & (p < 1)):
    raise UserError('pass probabilities must lie between 0 and 1: estimate small ones by pass_rate')
  return TaskLaw(fits.power(size, -np.log(p)).law)
