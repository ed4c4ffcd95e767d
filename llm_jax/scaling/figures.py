"""`fit.png`: what a sweep measured, the three approaches through it, and what they predict.

Readable without colours: budgets differ in their marker and their shade, approaches in their line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core import files
from llm_jax.scaling import fits, ladder, laws

MARKERS = 'os^Dv<>p*h'
LINES = dict(
  envelope=('1: envelope', ':'), isoflop=('2: IsoFLOP', '--'), parametric=('3: parametric', '-')
)


def draw(
  table: ladder.Table,
  found: ladder.Ladder,
  path: str,
  *,
  heldout: ladder.Table | None = None,
  optimum: Mapping[str, Any] | None = None,
) -> str:
  """Writes the figure with four panels; returns its path.

  heldout: runs that the fit has not seen, drawn apart. optimum: a predicted run {budget, parameters, tokens, loss}.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 8.4), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(2, 2).ravel()
  _isoflops(panels[0], table, found)
  _curves(panels[1], table, found)
  far = [table.compute.max(), *([] if heldout is None else heldout.compute)]
  far += [] if optimum is None else [optimum['budget']]
  compute = np.geomspace(table.compute.min() / 1.5, 1.5 * max(far), 100)
  _optima(panels[2], found, compute, heldout, optimum)
  _frontier(panels[3], found, compute, heldout, optimum)
  for panel, letter in zip(panels, 'abcd', strict=True):
    panel.set_title(f'({letter}) {panel.get_title()}', fontsize=10, loc='left')
    panel.set_title('')
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(fontsize=7, frameon=False)
  with files.whole(path, 'wb') as f:
    figure.savefig(f, format='png')
  return path


def _styles(table: ladder.Table) -> list[tuple[float, str, str]]:
  """(budget, marker, grey) from the smallest budget, light, to the largest, black."""
  budgets = np.unique(table.budget)
  greys = np.linspace(0.68, 0.0, len(budgets))
  return [
    (b, MARKERS[i % len(MARKERS)], f'{g:.2f}')
    for i, (b, g) in enumerate(zip(budgets, greys, strict=True))
  ]


def _isoflops(panel: Any, table: ladder.Table, found: ladder.Ladder) -> None:
  """Loss against size, a curve for every budget, and the lowest point of its parabola."""
  lowest = {p.budget: p for p in found.parabolas}
  for budget, marker, grey in _styles(table):
    some = table.budget == budget
    n, loss = table.parameters[some], table.loss[some]
    panel.plot(n, loss, marker, color=grey, markersize=5, label=f'{budget:.2g} FLOP')
    if budget in lowest:
      p = lowest[budget]
      x = np.geomspace(n.min(), n.max(), 60)
      panel.plot(x, p.loss + p.curvature * np.log(x / p.parameters) ** 2, '-', color=grey, lw=1)
      panel.plot(p.parameters, p.loss, 'x', color='#c44e52', markersize=8, mew=2)
  panel.plot([], [], 'x', color='#c44e52', mew=2, label='lowest of its parabola')
  panel.set(xscale='log', xlabel='parameters', ylabel='held-out loss (nats per token)')
  panel.set_title('IsoFLOP curves')


def _curves(panel: Any, table: ladder.Table, found: ladder.Ladder) -> None:
  """Training curves against compute; thick where the envelope is."""
  sizes = np.unique(table.parameters)
  for n, curve in zip(table.parameters, table.curves, strict=True):
    shade = 0.75 * (1 - np.searchsorted(sizes, n) / max(1, len(sizes) - 1))
    panel.plot(6 * n * curve[:, 0], curve[:, 1], '-', color=f'{shade:.2f}', lw=0.8)
    panel.plot(6 * n * curve[-1, 0], curve[-1, 1], 'o', color=f'{shade:.2f}', markersize=3)
  compute = np.geomspace(table.compute.min(), table.compute.max(), 60)
  n = laws.power(found.estimates['envelope'].frontier.parameters, compute)
  best = laws.chinchilla(found.law, n, compute / (6 * n))
  panel.plot(compute, best, ':', color='#c44e52', lw=2, label='sizes of the envelope, by the law')
  panel.plot([], [], '-', color='0.75', label=f'{sizes.min():,.0f} parameters')
  panel.plot([], [], '-', color='0.0', label=f'{sizes.max():,.0f} parameters')
  ends = table.loss.min(), np.quantile(np.concatenate([c[:, 1] for c in table.curves]), 0.9)
  panel.set_ylim(ends[0] - 0.05 * (ends[1] - ends[0]), ends[1])
  panel.set(xscale='log', xlabel='compute 6ND (FLOP)', ylabel='held-out loss (nats per token)')
  panel.set_title('training curves')


def _optima(panel: Any, found: ladder.Ladder, compute: Any, heldout: Any, optimum: Any) -> None:
  """The best size against compute: three lines with the range of their draws."""
  for name, estimate in found.estimates.items():
    label, line = LINES[name]
    draws = estimate.draws[:, :1] * compute ** estimate.draws[:, 1:2]
    low, high = fits.interval(draws)
    panel.fill_between(compute, low, high, color='0.5', alpha=0.15, lw=0)
    a, (lo, hi) = estimate.frontier.parameters.exponent, fits.interval(estimate.draws[:, 1:2])[:, 0]
    told = f'{label}: a = {a:.2f} ({lo:.2f} to {hi:.2f})'
    panel.plot(
      compute, laws.power(estimate.frontier.parameters, compute), line, color='k', label=told
    )
  c, n = zip(*((p.budget, p.parameters) for p in found.parabolas), strict=True)
  panel.plot(c, n, 'x', color='#c44e52', mew=2, label='lowest of each parabola')
  _marks(panel, heldout, optimum, 'parameters')
  panel.set(xscale='log', yscale='log', xlabel='compute 6ND (FLOP)', ylabel='parameters')
  panel.set_title('the best size, with 95 % intervals')


def _frontier(panel: Any, found: ladder.Ladder, compute: Any, heldout: Any, optimum: Any) -> None:
  """The loss of the best size against compute, and beyond what was measured."""
  best = laws.frontier(found.law)
  n, d = laws.power(best.parameters, compute), laws.power(best.tokens, compute)
  draws = []
  for row in found.law_draws:
    law = laws.Chinchilla(*row)
    own = laws.frontier(law)
    sizes = (laws.power(own.parameters, compute), laws.power(own.tokens, compute))
    draws.append(laws.chinchilla(law, *sizes))
  low, high = fits.interval(np.array(draws))
  panel.fill_between(compute, low, high, color='0.5', alpha=0.2, lw=0)
  panel.plot(compute, laws.chinchilla(found.law, n, d), 'k-', label='3: parametric')
  if found.lowest is not None:
    panel.plot(compute, laws.offset(found.lowest, compute), 'k--', label='2: IsoFLOP')
  c, loss = zip(*((p.budget, p.loss) for p in found.parabolas), strict=True)
  panel.plot(c, loss, 'x', color='#c44e52', mew=2, label='lowest of each parabola')
  _marks(panel, heldout, optimum, 'loss')
  panel.set(xscale='log', xlabel='compute 6ND (FLOP)', ylabel='held-out loss (nats per token)')
  panel.set_title('predicted frontier')


def _marks(panel: Any, heldout: Any, optimum: Any, name: str) -> None:
  if optimum is not None:
    at = optimum['budget'], optimum[name]
    panel.plot(*at, 's', mfc='none', color='k', markersize=9, label='predicted run')
  if heldout is not None:
    at = heldout.compute, getattr(heldout, name)
    panel.plot(*at, '*', color='#4878a8', mec='k', markersize=12, label='held-out run, measured')


def lines(told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fit as a table for a terminal: `told` is `ladder.told`, rows those of the sweep."""
  pair = lambda x, form: f'{x[0]:{form}} ({x[1]:{form}} to {x[2]:{form}})'
  found = [f"{len(rows)} runs; N = k C^a, D = k' C^b with C = 6 N D; 95 % intervals over runs", '']
  found.append(f'{"approach":14}{"a":26}{"b":26}')
  for name, values in told['approaches'].items():
    found.append(f'{LINES[name][0]:14}{pair(values["a"], ".3f"):26}{pair(values["b"], ".3f"):26}')
  word = 'overlap' if told['agree'] else 'do not overlap'
  found += ['', f'the intervals of a {word}', '', 'L(N, D) = E + A / N^alpha + B / D^beta']
  found += [f'{name:14}{pair(value, ".4g")}' for name, value in told['law'].items()]
  if told['backtest']:
    errors = (f'{LINES[name][0]} {error:+.2%}' for name, error in told['backtest'].items())
    found += ['', f'the largest budget from the smaller ones: {", ".join(errors)}']
  return found
