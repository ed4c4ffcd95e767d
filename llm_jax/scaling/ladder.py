"""What the table of a sweep says: Chinchilla's three approaches with intervals, and what they predict.

A table is what `sweep.results` reads. Compute is 6 N D of all N parameters throughout, because that is what the closed
form of approach 3 allocates; the exact FLOPs of every run stand beside it in the table. Intervals are bootstraps over
runs: each approach is fitted again to as many runs drawn with replacement, and 95 % of what comes out is between the
bounds (Hoffmann et al. 2022, arXiv:2203.15556, tables 2 and A3, has 80 % of the same).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, laws

APPROACHES = ('envelope', 'isoflop', 'parametric')
_LEAST = 8  # runs, and 3 of a budget


class Table(NamedTuple):
  """A row per run. parameters, tokens, loss, budget (rounded to 3 digits): f64 [n]; curves: [k, 2] of each."""

  parameters: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray
  budget: np.ndarray
  curves: list[np.ndarray]

  @property
  def compute(self) -> np.ndarray:
    """6 N D."""
    return 6 * self.parameters * self.tokens

  def take(self, index: np.ndarray) -> 'Table':
    """Some of the runs, in any order and any number of times."""
    picked = (field[index] for field in self[:4])
    return Table(*picked, [self.curves[i] for i in index])


class Estimate(NamedTuple):
  """An approach. frontier: its laws; draws: f64 [trials, (k, a, k', b)], of N = k C^a and D = k' C^b."""

  frontier: laws.Frontier
  draws: np.ndarray


class Ladder(NamedTuple):
  """All three approaches, and what two of them found on the way.

  lowest: the loss of the best size against compute, by approach 2; back: what `backtest` says.
  """

  estimates: dict[str, Estimate]
  law: laws.Chinchilla
  objective: float
  law_draws: np.ndarray
  parabolas: list[fits.Parabola]
  lowest: laws.Offset | None
  back: dict[str, float]

  @property
  def trusted(self) -> str:
    """The approach that was closest in `backtest`; parametric where there was none."""
    return min(self.back, key=lambda name: abs(self.back[name]), default='parametric')


def read(rows: Sequence[Mapping[str, Any]]) -> Table:
  """The rows of `sweep.results` as arrays. Runs whose config names a `budget` have that, others their 6 N D."""
  column = lambda name: np.array([row[name] for row in rows], np.float64)
  n, d = column('parameters'), column('tokens')
  budget = [row['config'].get('budget', 6 * x * y) for row, x, y in zip(rows, n, d, strict=True)]
  rounded = [float(f'{b:.3g}') for b in budget]
  curves = [np.array(row['curve'], np.float64).reshape(-1, 2) for row in rows]
  return Table(n, d, column('loss'), np.array(rounded), curves)


def fit(table: Table, *, trials: int = 300, seed: int = 0, delta: float = 1e-2) -> Ladder:
  """Fits all three. delta: of the Huber loss of approach 3, about the scatter of small runs; see `fits.parametric`.

  A budget whose runs have no lowest point between them is left out; two have to remain. Raises `UserError` for a table
  that has too few runs, sizes or budgets.
  """
  _check(table)
  found = fits.parametric(*table[:3], delta=delta)
  drawn = fits.parametric_draws(found.law, *table[:3], trials=trials, seed=seed, delta=delta)
  closed = lambda law: laws.frontier(laws.Chinchilla(*law))
  estimates = dict(
    envelope=_estimate(table, envelope, trials, seed),
    isoflop=_estimate(table, lambda some: isoflop(some)[1], trials, seed),
    parametric=Estimate(closed(found.law), np.array([_flat(closed(law)) for law in drawn])),
  )
  parabolas = isoflop(table)[0]
  back = backtest(table, parabolas, delta=delta)
  return Ladder(estimates, found.law, found.objective, drawn, parabolas, _lowest(parabolas), back)


def _lowest(parabolas: Sequence[fits.Parabola]) -> laws.Offset | None:
  """The loss of the best size against compute, through the lowest points; None where they are too few."""
  if len(parabolas) < 4:
    return None
  return fits.offset([p.budget for p in parabolas], [p.loss for p in parabolas]).law


def backtest(
  table: Table, parabolas: Sequence[fits.Parabola], *, delta: float = 1e-2
) -> dict[str, float]:
  """How far off each approach would have been at the largest budget, knowing only the smaller ones.

  Relative errors of the predicted loss of the best size. What extrapolates best within a ladder is what to trust
  beyond it: the parametric law has an irreducible loss that runs far above it hardly know.
  """
  last = parabolas[-1]
  known = table.take(np.flatnonzero(table.budget < last.budget))
  found = {}
  if len(known.loss) >= _LEAST:
    law = fits.parametric(*known[:3], delta=delta).law
    found['parametric'] = float(laws.optimum(law, last.budget).loss / last.loss - 1)
  line = _lowest([p for p in parabolas if p.budget < last.budget])
  if line is not None:
    found['isoflop'] = float(laws.offset(line, last.budget) / last.loss - 1)
  return found


def _check(table: Table) -> None:
  per_budget = [np.sum(table.budget == b) for b in np.unique(table.budget)]
  if len(table.loss) < _LEAST or sum(n >= 3 for n in per_budget) < 2:
    raise UserError(
      f'{len(table.loss)} finished cells with {len(per_budget)} budgets are too few for a law: take {_LEAST} or more, '
      'with three sizes for each of two budgets'
    )


def _estimate(table: Table, approach: Callable, trials: int, seed: int) -> Estimate:
  every = np.arange(len(table.loss))
  again = lambda index: _flat(approach(table.take(index.astype(int))))
  return Estimate(approach(table), fits.bootstrap(again, [every], trials=trials, seed=seed))


def _flat(frontier: laws.Frontier) -> list[float]:
  return [*frontier.parameters, *frontier.tokens]


def envelope(table: Table) -> laws.Frontier:
  """Approach 1, through the training curves."""
  found = zip(table.parameters, table.curves, strict=True)
  return fits.envelope([(n, curve[:, 0], curve[:, 1]) for n, curve in found if len(curve) > 1])


def isoflop(table: Table) -> tuple[list[fits.Parabola], laws.Frontier]:
  """Approach 2, through the budgets whose runs have a lowest point between them."""
  return fits.isoflop(table.budget, *table[:3])


# --- what they say -------------------------------------------------------------------------------------


def agree(ladder: Ladder) -> bool:
  """Whether the intervals of the exponent a of all three approaches overlap."""
  low, high = np.array([fits.interval(e.draws)[:, 1] for e in ladder.estimates.values()]).T
  return bool(low.max() <= high.min())


def optimum(estimate: Estimate, flops: float) -> dict[str, list[float]]:
  """(value, low, high) of the best parameters and tokens for a budget."""
  at = lambda k, a: k * flops**a
  found = {}
  for i, name in enumerate(('parameters', 'tokens')):
    draws = at(estimate.draws[:, 2 * i], estimate.draws[:, 2 * i + 1])
    value = float(at(*estimate.frontier[i]))
    found[name] = [value, *map(float, fits.interval(draws[:, None])[:, 0])]
  return found


def predict(ladder: Ladder, parameters: float, tokens: float) -> dict[str, Any]:
  """The loss of a run: {loss, by, parametric, interval, isoflop}.

  parametric: by the law, with its interval; isoflop: by the line through the lowest points of the parabolas, which
  knows only compute and is for runs of about the best size. loss: of these two the one of the approach `by`, which
  `backtest` trusts.
  """
  value = float(laws.chinchilla(ladder.law, parameters, tokens))
  draws = [laws.chinchilla(laws.Chinchilla(*law), parameters, tokens) for law in ladder.law_draws]
  low, high = fits.interval(np.array(draws)[:, None])[:, 0]
  said = dict(parametric=value, interval=[float(low), float(high)])
  if ladder.lowest is not None:
    said['isoflop'] = float(laws.offset(ladder.lowest, 6 * parameters * tokens))
  return dict(loss=said[ladder.trusted], by=ladder.trusted, **said)


def compare(ladder: Ladder, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Runs that the fit has not seen beside what it says of them. error: prediction / measured - 1."""
  found = []
  for row in rows:
    said = predict(ladder, row['parameters'], row['tokens'])
    errors = {n: said[n] / row['loss'] - 1 for n in ('parametric', 'isoflop') if n in said}
    one = {name: row[name] for name in ('cell', 'parameters', 'tokens', 'loss')}
    found.append(one | dict(predicted=said, error=errors[said['by']], errors=errors))
  return found


def told(ladder: Ladder) -> dict[str, Any]:
  """Everything as JSON: each number as [value, low, high]."""
  keys = ('k', 'a', 'k_tokens', 'b')
  estimates = ladder.estimates.items()
  return dict(
    approaches={name: _bounded(keys, _flat(e.frontier), e.draws) for name, e in estimates},
    agree=agree(ladder),
    law=_bounded(ladder.law._fields, ladder.law, ladder.law_draws),
    objective=ladder.objective,
    parabolas=[p._asdict() for p in ladder.parabolas],
    lowest=ladder.lowest and ladder.lowest._asdict(),
    backtest=ladder.back,
    trusted=ladder.trusted,
  )


def _bounded(
  keys: Sequence[str], values: Sequence[float], draws: np.ndarray
) -> dict[str, list[float]]:
  """Name -> [value, low, high]."""
  rows = zip(keys, values, *fits.interval(draws), strict=True)
  return {key: list(map(float, row)) for key, *row in rows}
