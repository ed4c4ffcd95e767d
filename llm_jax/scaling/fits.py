"""From finished runs to laws: power laws, Chinchilla's three approaches, intervals, the error of extrapolation.

Arrays are f64 [n], one entry per run: `parameters`, `tokens`, `loss` in nats per token. The three approaches are those
of Hoffmann et al. 2022 (arXiv:2203.15556, section 3): `envelope`, `isoflop` and `parametric`; all give a `Frontier`.
Fits of a loss are of its logarithm, so that residuals are relative errors.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.scaling import laws, sums

EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8)  # where the fits of sums start


class Fit(NamedTuple):
  """A law and how it was found. objective: the minimised sum; agreeing: of 8 starts, those that ended there."""

  law: Any
  objective: float
  agreeing: int = 1


class PowerFit(NamedTuple):
  """A `PowerLaw` or `Offset`, the standard deviation of its relative errors, Akaike's criterion (lower is better)."""

  law: Any
  spread: float
  aic: float


class Parabola(NamedTuple):
  """One budget of an IsoFLOP fit: its lowest point; loss = lowest + curvature log(N / parameters)^2."""

  budget: float
  parameters: float
  tokens: float
  loss: float
  curvature: float


def _f64(*arrays: ArrayLike) -> list[np.ndarray]:
  """The arrays as f64 [n]; UserError unless they are of one length, finite and above zero."""
  found = [np.asarray(a, np.float64) for a in arrays]
  sizes = {a.shape for a in found}
  if len(sizes) > 1 or found[0].ndim != 1:
    raise UserError(f'a fit takes arrays with one number per run, got the shapes {sorted(sizes)}')
  if not all(np.all(np.isfinite(a) & (a > 0)) for a in found):
    raise UserError('a fit takes finite numbers above zero: drop the runs that failed')
  return found


def _enough(points: int, needed: int, law: str) -> None:
  if points < needed:
    raise UserError(
      f'{law} has {needed - 1} constants: {points} runs cannot tell them, take {needed} or more'
    )


# One variable


def power(x: ArrayLike, y: ArrayLike, *, irreducible: float = 0.0) -> PowerFit:
  """y - irreducible = coefficient x^exponent, a straight line through the logarithms (least squares)."""
  x, y = _f64(x, np.asarray(y, np.float64) - irreducible)
  _enough(len(x), 2, 'a power law through its exponent')
  exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
  law = laws.PowerLaw(float(np.exp(constant)), float(exponent))
  error = np.log(irreducible + laws.power(law, x)) - np.log(irreducible + y)
  return PowerFit(law, *_criterion(error, 2))


def offset(x: ArrayLike, y: ArrayLike) -> PowerFit:
  """y = irreducible + (scale / x)^exponent by least squares on log y; needs 4 points, more to be believed."""
  x, y = _f64(x, y)
  _enough(len(x), 4, 'a power law above an irreducible loss')
  columns = _columns(len(x), 3, [(0, None, None), (1, 2, np.log(x))])
  starts = _starts(y, [np.ones(len(x))], [np.log(x)], lambda c, e: [c[0], c[1], e[0]])
  found = sums.minimise(columns, np.log(y), starts, delta=np.inf)
  e, a, alpha = found.theta
  law = laws.Offset(float(np.exp(e)), float(np.exp(a / alpha)), float(alpha))
  return PowerFit(law, *_criterion(sums.predict(columns, found.theta) - np.log(y), 3))


def _criterion(error: np.ndarray, constants: int) -> tuple[float, float]:
  """(standard deviation of the residuals, AIC with the correction for few points)."""
  n, k = len(error), constants + 1  # and the noise
  squares = max(float((error**2).sum()), 1e-300)
  correction = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf
  spread = np.sqrt(squares / max(n - constants, 1))
  return float(spread), float(n * np.log(squares / n) + 2 * k + correction)


# Sums of power laws


def _columns(points: int, size: int, terms: Sequence[tuple]) -> np.ndarray:
  """Columns of `sums`: each term is (index of its constant, index of its exponent, logarithm of its variable)."""
  columns = np.zeros((len(terms), points, size))
  for j, (constant, exponent, x) in enumerate(terms):
    columns[j, :, constant] = 1
    if exponent is not None:
      columns[j, :, exponent] = -x
  return columns


def _starts(
  y: np.ndarray, plain: list, variables: list, order: Callable[[np.ndarray, tuple], list]
) -> np.ndarray:
  """A grid over the exponents of `variables` (logarithms); the constants of each point by non-negative least squares.

  For given exponents the law is linear, so no grid over constants is needed, whatever the units of N and D are. A
  term that comes out as zero starts at a thousandth of the loss.
  """
  found = []
  for exponents in itertools.product(EXPONENTS, repeat=len(variables)):
    terms = [*plain, *(np.exp(-e * x) for e, x in zip(exponents, variables, strict=True))]
    design = np.stack(terms, 1) / y[:, None]
    scale = np.linalg.norm(design, axis=0)
    constants = optimize.nnls(design / scale, np.ones(len(y)))[0] / scale
    constants = np.maximum(constants, 1e-3 / design.max(0))
    found.append(order(np.log(constants), exponents))
  return np.array(found)


def _chinchilla_columns(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  n, d = np.log(parameters), np.log(tokens)
  return _columns(len(n), 5, [(0, None, None), (1, 3, n), (2, 4, d)])


def _chinchilla(theta: np.ndarray) -> np.ndarray:
  """theta [..., 5] -> (E, A, B, alpha, beta)."""
  return np.concatenate([np.exp(theta[..., :3]), theta[..., 3:]], -1)


def parametric(
  parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, delta: float = 1e-3
) -> Fit:
  """Approach 3: E + A / N^alpha + B / D^beta by the Huber loss of log L, summed, with L-BFGS from a grid of starts.

  delta: the relative error from which on a run counts as an outlier. The paper's 1e-3 is far below the scatter of
  most runs, which makes this a fit of the median; with clean Gaussian scatter a delta of that size is more precise.
  """
  n, d, y = _f64(parameters, tokens, loss)
  _enough(len(y), 6, "Chinchilla's law")
  starts = _starts(
    y, [np.ones(len(y))], [np.log(n), np.log(d)], lambda c, e: [c[0], c[1], c[2], e[0], e[1]]
  )
  found = sums.minimise(_chinchilla_columns(n, d), np.log(y), starts, delta=delta)
  law = laws.Chinchilla(*(float(x) for x in _chinchilla(found.theta)))
  return Fit(law, found.objective, found.agreeing)


def tied(parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, delta: float = 1e-3) -> Fit:
  """`parametric` with alpha = beta, so that N and D grow alike at the optimum: one constant less to go wrong.

  With M = D / N and C = 6 N D this is the law of over-training, L = E + (a M^eta + b M^-eta) C^-eta with
  eta = alpha / 2, a = A 6^eta, b = B 6^eta (Gadre et al. 2024, arXiv:2403.08540, eq. 4).
  """
  n, d, y = _f64(parameters, tokens, loss)
  _enough(len(y), 5, "Chinchilla's law with one exponent")
  x = [np.log(n), np.log(d)]
  columns = _columns(len(y), 4, [(0, None, None), (1, 3, x[0]), (2, 3, x[1])])
  starts = _starts(y, [np.ones(len(y))], x, lambda c, e: [c[0], c[1], c[2], sum(e) / 2])
  found = sums.minimise(columns, np.log(y), starts, delta=delta)
  e, a, b, alpha = (float(v) for v in found.theta)
  law = laws.Chinchilla(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, alpha)
  return Fit(law, found.objective, found.agreeing)


# Approaches 1 and 2


def isoflop(
  budget: ArrayLike,
  parameters: ArrayLike,
  tokens: ArrayLike,
  loss: ArrayLike,
  *,
  nearest: int | None = None,
) -> tuple[list[Parabola], laws.Frontier]:
  """Approach 2: a parabola in log N through the runs of each budget, and power laws through their lowest points.

  budget: f64 [n] FLOP, equal for the runs of one curve. nearest: of each budget only so many runs, those nearest in
  log N to the lowest one; a parabola describes the bottom of the curve, not its far sides. A budget whose runs have no
  lowest point between them is left out; UserError with the reason where fewer than two remain.
  """
  c, n, d, y = _f64(budget, parameters, tokens, loss)
  found, reason = [], 'there is one budget'
  for b in np.unique(c):
    try:
      found.append(_parabola(b, n[c == b], d[c == b], y[c == b], nearest))
    except UserError as error:
      reason = str(error)
  if len(found) < 2:
    raise UserError(f'fewer than two budgets have a lowest point, because {reason}')
  columns = ([getattr(p, name) for p in found] for name in ('budget', 'parameters', 'tokens'))
  return found, _frontier(*columns)


def _parabola(
  budget: float,
  parameters: np.ndarray,
  tokens: np.ndarray,
  loss: np.ndarray,
  nearest: int | None,
) -> Parabola:
  """The parabola through the runs of one budget, as `isoflop` fits it to each."""
  x = np.log(parameters)
  keep = np.argsort(np.abs(x - x[np.argmin(loss)]), kind='stable')[:nearest]
  x, d, y = x[keep], np.log(tokens[keep]), loss[keep]
  if len(np.unique(x)) < 3:
    raise UserError(
      f'the budget of {budget:.3g} FLOP has {len(x)} sizes: a parabola takes 3 or more'
    )
  centre = x.mean()
  two, one, zero = np.polyfit(x - centre, y, 2)
  middle = -one / (2 * two) if two > 0 else np.inf
  if not x.min() <= centre + middle <= x.max():
    raise UserError(
      f'the budget of {budget:.3g} FLOP has no lowest loss between its sizes: add smaller or larger models'
    )
  line = np.polyfit(x - centre, d, 1)
  at = float(np.exp(centre + middle)), float(np.exp(np.polyval(line, middle)))
  return Parabola(float(budget), *at, float(zero - two * middle**2), float(two))


def envelope(curves: Sequence[tuple], *, budgets: int = 1500) -> laws.Frontier:
  """Approach 1: for each of `budgets` computes the training curve that is lowest there, and power laws through these.

  curves: (parameters, tokens [k], loss [k]) of each run, loss smoothed; its compute at a point is 6 N D. Computes where
  the smallest or the largest model is the lowest do not count: there a model that was not trained may be better.
  """
  sizes = np.array([float(n) for n, _, _ in curves])
  logs = [np.log(6 * n * np.asarray(d, np.float64)) for n, d, _ in curves]
  grid = np.linspace(min(x[0] for x in logs), max(x[-1] for x in logs), budgets)
  values = np.stack(
    [
      np.interp(grid, x, np.asarray(y, np.float64), left=np.inf, right=np.inf)
      for x, (_, _, y) in zip(logs, curves, strict=True)
    ]
  )
  best = sizes[np.argmin(values, 0)]
  inside = (best > sizes.min()) & (best < sizes.max()) & np.isfinite(values.min(0))
  if len(np.unique(best[inside])) < 2:
    raise UserError(
      'fewer than two sizes between the smallest and the largest are ever the best: add sizes or train longer'
    )
  c, n = np.exp(grid[inside]), best[inside]
  return _frontier(c, n, c / (6 * n))


def _frontier(compute: ArrayLike, parameters: ArrayLike, tokens: ArrayLike) -> laws.Frontier:
  """Power laws through the best N and D of several computes, f64 [n] each."""
  return laws.Frontier(power(compute, parameters).law, power(compute, tokens).law)


# Uncertainty


def bootstrap(
  fit: Callable[..., Sequence[float]],
  arrays: Sequence[ArrayLike],
  *,
  trials: int = 200,
  seed: int = 0,
  groups: ArrayLike | None = None,
) -> np.ndarray:
  """f64 [trials, k]: `fit(*arrays)`, k numbers, of runs drawn anew with replacement.

  groups: [n], equal for runs that belong together, such as those of one budget or one seed: whole groups are drawn. A
  draw that cannot be fitted (UserError) is drawn again; UserError when that happens to half of them.
  """
  arrays = [np.asarray(a) for a in arrays]
  members = _members(len(arrays[0]), groups)
  rng, found, failed = np.random.default_rng(seed), [], 0
  while len(found) < trials:
    drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
    try:
      found.append(np.asarray(fit(*(a[drawn] for a in arrays)), np.float64))
    except UserError as error:
      failed += 1
      if failed > trials:
        raise UserError(
          f'half of the samples cannot be fitted, the last because: {error}'
        ) from error
  return np.stack(found)


def parametric_draws(
  law: laws.Chinchilla,
  parameters: ArrayLike,
  tokens: ArrayLike,
  loss: ArrayLike,
  *,
  trials: int = 200,
  seed: int = 0,
  groups: ArrayLike | None = None,
  delta: float = 1e-3,
) -> np.ndarray:
  """`bootstrap` of `parametric` from `law`, its fit of all runs: f64 [trials, (E, A, B, alpha, beta)], all at once."""
  n, d, y = _f64(parameters, tokens, loss)
  members = _members(len(n), groups)
  rng = np.random.default_rng(seed)
  drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=trials)
  counts = np.zeros((trials, len(n)))
  for i, indices in enumerate(members):
    counts[:, indices] = drawn[:, i : i + 1]
  start = np.concatenate([np.log(law[:3]), law[3:]])
  theta = sums.resampled(_chinchilla_columns(n, d), np.log(y), start, counts, delta=delta)
  return _chinchilla(theta)


def _members(points: int, groups: ArrayLike | None) -> list[np.ndarray]:
  if groups is None:
    return list(np.arange(points)[:, None])
  return [np.flatnonzero(np.asarray(groups) == g) for g in np.unique(groups)]


def interval(draws: ArrayLike, level: float = 0.95) -> np.ndarray:
  """f64 [2, k]: between which bounds this share of the draws [trials, k] lies, as much outside below as above."""
  tail = 100 * (1 - level) / 2
  return np.percentile(np.asarray(draws, np.float64), [tail, 100 - tail], axis=0)


def extrapolation(
  fit: Callable[..., Any],
  predict: Callable[..., ArrayLike],
  x: Sequence[ArrayLike],
  y: ArrayLike,
  known: ArrayLike,
) -> np.ndarray:
  """Relative errors, prediction / truth - 1, on the runs not `known` (bool [n]) of `fit(*x, y)` on those that are.

  predict: (what fit returns, *x) -> y. The honest measure of a law is the error at runs larger than all it has seen.
  """
  x, y, known = (
    [np.asarray(a, np.float64) for a in x],
    np.asarray(y, np.float64),
    np.asarray(known, bool),
  )
  if known.all() or not known.any():
    raise UserError(
      'extrapolation needs runs to fit and others to predict: known is all or nothing'
    )
  found = fit(*(a[known] for a in x), y[known])
  return np.asarray(predict(found, *(a[~known] for a in x)), np.float64) / y[~known] - 1
