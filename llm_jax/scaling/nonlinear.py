"""Fits of laws that are no sums of powers, by least squares: loss to accuracy, experts, repeated data.

Like `fits`: arrays f64 [n], one entry per run.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, laws


class TwoStep(NamedTuple):
  """What predicts a task: loss on the task's answers from N and D, then accuracy from that loss."""

  loss: laws.Chinchilla
  accuracy: laws.Sigmoid


def sigmoid(
  loss: ArrayLike, accuracy: ArrayLike, *, low: float | None = None, high: float | None = None
) -> laws.Sigmoid:
  """accuracy = low + (high - low) / (1 + exp(slope (loss - middle))) by least squares, both within [0, 1].

  low, high: held where known, such as one over the number of choices. The loss may be bits per byte; the slope is
  positive where a lower loss is better.
  """
  x, y = np.asarray(loss, np.float64), np.asarray(accuracy, np.float64)
  free = 4 - (low is not None) - (high is not None)
  if len(x) < free or len(np.unique(x)) < 2:
    raise UserError(
      f'{len(x)} runs cannot tell the {free} constants of a sigmoid: add runs or fix low and high'
    )
  spread, held = max(x.std(), 1e-9), [low, high]

  def unpack(p: np.ndarray) -> laws.Sigmoid:
    ends = iter(p[2:])
    found = [next(ends) if v is None else v for v in held]
    return laws.Sigmoid(found[0], found[1], p[0] / spread, x.mean() + spread * p[1])

  starts = [
    [sign * steep, middle, *(v for v, h in zip((y.min(), y.max()), held, strict=True) if h is None)]
    for sign in (1, -1)
    for steep in (0.5, 2, 6)
    for middle in (-1, 0, 1)
  ]
  bounds = ([-60, -20] + [0] * (free - 2), [60, 20] + [1] * (free - 2))
  runs = [
    optimize.least_squares(
      lambda p: laws.accuracy(unpack(p), x) - y, np.clip(s, *bounds), bounds=bounds
    )
    for s in starts
  ]
  best = min(runs, key=lambda r: r.cost)
  return laws.Sigmoid(*(float(v) for v in unpack(best.x)))


def decay(loss: ArrayLike, error: ArrayLike) -> laws.Decay:
  """error = top - scale exp(-rate loss): Gadre et al.'s step from loss to the average error over tasks."""
  x, y = np.asarray(loss, np.float64), np.asarray(error, np.float64)
  if len(x) < 3:
    raise UserError(f'{len(x)} runs cannot tell the 3 constants of an exponential: take 3 or more')

  def solve(rate: float) -> tuple[float, np.ndarray]:
    design = np.stack([np.ones_like(x), -np.exp(-rate * (x - x.min()))], 1)
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    return float(((design @ found - y) ** 2).sum()), found

  rates = np.geomspace(0.01, 20, 400) / max(np.ptp(x), 1e-9)
  i = int(np.argmin([solve(r)[0] for r in rates]))
  near = rates[max(i - 1, 0)], rates[min(i + 1, 399)]
  rate = float(optimize.minimize_scalar(lambda r: solve(r)[0], bounds=near, method='bounded').x)
  top, scale = solve(rate)[1]
  return laws.Decay(float(top), float(scale * np.exp(rate * x.min())), rate)


def two_step(
  parameters: ArrayLike,
  tokens: ArrayLike,
  loss: ArrayLike,
  accuracy: ArrayLike,
  *,
  low: float | None = None,
  high: float | None = None,
  delta: float = 1e-3,
) -> TwoStep:
  """Both steps of task prediction (Bhagia et al. 2024, arXiv:2412.04403): `fits.parametric`, then `sigmoid`."""
  first = fits.parametric(parameters, tokens, loss, delta=delta).law
  return TwoStep(first, sigmoid(loss, accuracy, low=low, high=high))


def predict_task(law: TwoStep, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
  """Accuracy of N parameters after D tokens."""
  return laws.accuracy(law.accuracy, laws.chinchilla(law.loss, parameters, tokens))


def routed(parameters: ArrayLike, experts: ArrayLike, loss: ArrayLike) -> laws.Routed:
  """Clark et al.'s law of experts (arXiv:2202.01169, eq. 1) by least squares on log10 L; needs several N and E."""
  n, e, y = (np.log10(np.asarray(v, np.float64)) for v in (parameters, experts, loss))
  if len(np.unique(n)) < 2 or len(np.unique(e)) < 4 or len(y) < 7:
    raise UserError(
      'the law of experts has 6 constants: take two sizes, four numbers of experts and 7 runs, or more'
    )

  def linear(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, laws.Routed]:
    start, limit = 1 + np.exp(ends[0]), (1 + np.exp(ends[0])) * (1 + np.exp(ends[1]))
    shape = laws.Routed(0, 0, 0, 0, float(start), float(limit))
    s = np.log10(laws.saturated(shape, 10**e))
    design = np.stack([n, s, n * s, np.ones_like(n)], 1)
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    return design @ found - y, found, shape

  runs = [
    optimize.least_squares(lambda p: linear(p)[0], (a, b), bounds=(-10, 15), xtol=1e-15, ftol=1e-15)
    for a in (-2, 0, 2)
    for b in (3, 5, 7)
  ]
  best = min(runs, key=lambda r: r.cost)
  _, found, shape = linear(best.x)
  return laws.Routed(*(float(v) for v in found), shape.start, shape.limit)


def repetition(
  fresh: laws.Chinchilla,
  parameters: ArrayLike,
  tokens: ArrayLike,
  unique: ArrayLike,
  loss: ArrayLike,
) -> laws.DataConstrained:
  """R*_D and R*_N of runs that repeat data, by least squares on log L; `fresh`: the law of runs that do not."""
  n, d, u, y = (np.asarray(v, np.float64) for v in (parameters, tokens, unique, loss))
  if not np.any(d > u):
    raise UserError('no run repeats its data: nothing tells how much a repetition is worth')

  def error(p: np.ndarray) -> np.ndarray:
    law = laws.DataConstrained(fresh, *np.exp(p))
    return np.log(laws.data_constrained(law, n, d, u)) - np.log(y)

  runs = [
    optimize.least_squares(error, np.log(s), bounds=np.log((1e-2, 1e4)), xtol=1e-15, ftol=1e-15)
    for s in ((2, 2), (15, 5), (60, 60))
  ]
  best = min(runs, key=lambda r: r.cost)
  return laws.DataConstrained(fresh, *(float(v) for v in np.exp(best.x)))
