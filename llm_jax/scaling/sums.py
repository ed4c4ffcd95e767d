"""Sums of power laws, fitted on the logarithm of the loss: the solver under `fits`.

A law such as E + A / N^alpha + B / D^beta is, in logarithms, a logsumexp of terms that are linear in
theta = (log E, log A, log B, alpha, beta). So a law is an array: `columns` f64 [terms, points, theta], and its log
prediction at a point is logsumexp_j columns[j, point] @ theta. Exponents shared between terms share a column.

Minimised is the sum over the points of the Huber loss of (log prediction - log loss), as in Hoffmann et al. 2022
(arXiv:2203.15556, eq. 3): `delta` is where it turns from a square into a line, infinity makes it least squares.

The matrices are tiny. Where cores are busy set OPENBLAS_NUM_THREADS=1 before numpy is imported: threads that
wait for one another make a fit take seconds instead of a tenth of one.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import optimize


class Solution(NamedTuple):
  """theta f64 [theta]; objective: the sum; agreeing: how many of the starts ended there."""

  theta: np.ndarray
  objective: float
  agreeing: int


class _State(NamedTuple):
  """At `theta` [trials, theta]: residuals [trials, points], shares of the terms [trials, terms, points], the sum."""

  residual: np.ndarray
  share: np.ndarray
  value: np.ndarray


def minimise(
  columns: np.ndarray,
  target: np.ndarray,
  starts: np.ndarray,
  *,
  delta: float = 1e-3,
  tried: int = 8,
) -> Solution:
  """L-BFGS from the best `tried` rows of `starts` [starts, theta], then Newton's method from all their ends.

  target: f64 [points], logarithms. L-BFGS stops where the objective is flat to its eyes, which leaves the third digit
  of A and B open; Newton's method ends where the gradient is rounding noise.
  """
  columns, back = _whitened(columns)
  flat = columns.reshape(-1, columns.shape[-1])
  starts = np.linalg.solve(back, starts.T).T
  order = np.argsort([objective(flat, target, delta, start)[0] for start in starts], kind='stable')
  ends = [
    optimize.minimize(
      functools.partial(objective, flat, target, delta),
      start,
      jac=True,
      method='L-BFGS-B',
      options=dict(maxiter=100, gtol=0),
    ).x
    for start in starts[order[:tried]]
  ]
  theta, value = _newton(
    columns, target, np.stack(ends), np.ones((len(ends), len(target))), delta, 200
  )
  i = int(np.argmin(value))
  agreeing = int(np.sum(value <= value[i] * (1 + 1e-6) + 1e-20))
  return Solution(back @ theta[i], float(value[i]), agreeing)


def resampled(
  columns: np.ndarray,
  target: np.ndarray,
  start: np.ndarray,
  counts: np.ndarray,
  *,
  delta: float = 1e-3,
  iterations: int = 60,
) -> np.ndarray:
  """theta [trials, theta] with the points taken `counts` [trials, points] times, all trials at once from `start`."""
  columns, back = _whitened(columns)
  first = np.tile(np.linalg.solve(back, start), (len(counts), 1))
  return _newton(columns, target, first, counts, delta, iterations, 1e-9)[0] @ back.T


def predict(columns: np.ndarray, theta: np.ndarray) -> np.ndarray:
  """Log predictions [points] of theta [theta]."""
  return np.logaddexp.reduce(columns @ theta, axis=0)


def _whitened(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Columns with the identity as Gram matrix, and the matrix that takes their theta back: coefficients and exponents
  go together, log N is 20 or so everywhere, and no gradient method likes that."""
  gram = np.einsum('jnk,jnl->kl', columns, columns) / columns.shape[1]
  back = np.linalg.inv(np.linalg.cholesky(gram).T)
  return columns @ back, back


def _evaluate(
  columns: np.ndarray, target: np.ndarray, theta: np.ndarray, counts: np.ndarray, delta: float
) -> _State:
  terms = np.einsum('jnk,tk->tjn', columns, theta, optimize=True)
  top = terms.max(1)
  share = np.exp(terms - top[:, None])
  total = share.sum(1)
  residual = top + np.log(total) - target
  size = np.abs(residual)
  bent = np.minimum(size, delta)
  return _State(residual, share / total[:, None], (counts * bent * (size - bent / 2)).sum(1))


def objective(
  flat: np.ndarray, target: np.ndarray, delta: float, theta: np.ndarray
) -> tuple[float, np.ndarray]:
  """The objective at one theta and its gradient; flat: columns as [terms * points, theta]."""
  terms = (flat @ theta).reshape(-1, len(target))
  top = terms.max(0)
  share = np.exp(terms - top)
  total = share.sum(0)
  residual = top + np.log(total) - target
  pull = np.clip(residual, -delta, delta)
  return float(pull @ (residual - pull / 2)), ((share * (pull / total)).ravel()) @ flat


def _newton(
  columns: np.ndarray,
  target: np.ndarray,
  theta: np.ndarray,
  counts: np.ndarray,
  delta: float,
  iterations: int,
  tolerance: float = 1e-13,
) -> tuple[np.ndarray, np.ndarray]:
  """Damped Newton steps from theta [trials, theta], each trial with its own damping; returns theta and the sums.

  A trial ends when a step changes its sum by less than `tolerance` of it.

  Added to the Hessian is `damping` times that of iteratively reweighted least squares, which bounds the Huber loss from
  above: with much of it a step always descends, with little of it the steps are Newton's and converge quadratically.
  """
  theta, damping = theta.copy(), np.ones(len(theta))
  at = _evaluate(columns, target, theta, counts, delta)
  active = np.arange(len(theta))
  for _ in range(iterations):
    now = _State(*(x[active] for x in at))
    gradient, hessian, bound = _derivatives(columns, now, counts[active], delta)
    ridge = 1e-13 * np.trace(bound, axis1=1, axis2=2)[:, None, None] * np.eye(theta.shape[1])
    metric = hessian + damping[active, None, None] * bound + ridge
    step = np.linalg.solve(metric, gradient[..., None])[..., 0]
    new = _evaluate(columns, target, theta[active] - step, counts[active], delta)
    better = new.value < now.value
    moved = active[better]
    theta[moved] -= step[better]
    for old, fresh in zip(at, new, strict=True):
      old[moved] = fresh[better]
    damping[active] = np.clip(damping[active] * np.where(better, 0.2, 8), 1e-10, 1e10)
    gain = now.value - new.value
    done = np.abs(gain) <= tolerance * now.value
    active = active[~(done | (damping[active] >= 1e10))]
    if not len(active):
      break
  return theta, at.value


def _derivatives(
  columns: np.ndarray, at: _State, counts: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Gradient [trials, theta], Hessian and the upper bound of it [trials, theta, theta]."""
  terms, points, k = columns.shape
  slope = np.einsum('tjn,jnk->tnk', at.share, columns, optimize=True)
  size = np.abs(at.residual)
  pull = counts * np.clip(at.residual, -delta, delta)
  gradient = np.einsum('tn,tnk->tk', pull, slope)
  outer = (columns[..., :, None] * columns[..., None, :]).reshape(terms * points, k * k)
  curved = (at.share * pull[:, None]).reshape(-1, terms * points) @ outer
  inner = counts * (size <= delta) - pull
  hessian = curved.reshape(-1, k, k) + np.swapaxes(slope * inner[..., None], 1, 2) @ slope
  with np.errstate(divide='ignore'):
    weight = counts * np.minimum(1, delta / size)
  return gradient, hessian, np.swapaxes(slope * weight[..., None], 1, 2) @ slope
