"""Where the optima lie, and the figures and tables of the README."""

from collections.abc import Mapping
from typing import Any

import numpy as np

LINES = (('-', 'o', 'white'), ('--', 's', 'white'), ('-.', '^', 'black'), (':', 'D', 'black'))
NAMES = {'standard': 'standard parametrisation', 'muP': 'muP'}


def key(name: str, width: int, rate: int, seed: int) -> str:
  """What a run is called in results.json."""
  return f'{name} width {width} rate {rate} seed {seed}'


def losses(told: Mapping[str, Any], name: str, width: int) -> np.ndarray:
  """Held-out nats per byte [seeds, rates], nan where nothing was run."""
  s, runs = told['settings'], told['runs']
  one = lambda rate, seed: runs.get(key(name, width, rate, seed), {}).get('heldout', np.nan)
  return np.array([[one(r, seed) for r in s['rates']] for seed in range(s['seeds'])])


def optimum(rates: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
  """(best rate on the grid, vertex of the parabola through it and its neighbours), both log2.

  At the end of the grid there is no parabola, and both are its end.
  """
  i = int(np.nanargmin(loss))
  if not 0 < i < len(rates) - 1:
    return float(rates[i]), float(rates[i])
  below, at, above = loss[i - 1 : i + 2]
  return float(rates[i]), float(rates[i] + 0.5 * (below - above) / (below - 2 * at + above))


def optima(told: Mapping[str, Any]) -> dict[str, Any]:
  """parametrisation -> width -> {rate, vertex, loss, vertices of the seeds}, from the mean over seeds; and how far the
  optimum moves from the narrowest to the widest, in factors of 2."""
  s = told['settings']
  rates, found = np.array(s['rates'], float), {}
  for name in NAMES:
    rows = {}
    for width in s['widths']:
      each = losses(told, name, width)
      rate, vertex = optimum(rates, each.mean(0))
      rows[str(width)] = dict(
        rate=rate,
        vertex=round(vertex, 2),
        loss=round(float(np.nanmin(each.mean(0))), 4),
        seeds=[round(optimum(rates, one)[1], 2) for one in each],
      )
    first, last = (rows[str(w)] for w in (s['widths'][0], s['widths'][-1]))
    moves = {key: round(last[key] - first[key], 2) for key in ('rate', 'vertex')}
    found[name] = dict(widths=rows, moves=moves)
  return found


def tables(told: Mapping[str, Any]) -> str:
  """Markdown: the optima, and the exponents of the coordinate checks."""
  s = told['settings']
  lines = [
    '| parametrisation | ' + ' | '.join(f'{w} wide' for w in s['widths']) + ' | moves |',
    '| --- |' + ' --: |' * (len(s['widths']) + 1),
  ]
  for name, found in told['optima'].items():
    cells = [f'{r["rate"]:.0f} ({r["vertex"]:.2f})' for r in found['widths'].values()]
    moves = found['moves']
    lines.append(
      f'| {NAMES[name]} | {" | ".join(cells)} | {moves["rate"]:+.0f} ({moves["vertex"]:+.2f}) |'
    )
  lines += [
    '',
    '| best held-out loss, nats per byte | ' + ' | '.join(f'{w} wide' for w in s['widths']) + ' |',
  ]
  lines.append('| --- |' + ' --: |' * len(s['widths']))
  for name, found in told['optima'].items():
    cells = [f'{r["loss"]:.3f}' for r in found['widths'].values()]
    lines.append(f'| {NAMES[name]} | {" | ".join(cells)} |')
  lines += ['', '| exponent of what moves | last layer | logits |', '| --- | --: | --: |']
  for name, found in told['coordinates'].items():
    last = found['slopes'].get('last', found['slopes'].get(f'layer {s["layers"]}'))
    lines.append(f'| {name} | {last:+.2f} | {found["slopes"]["logits"]:+.2f} |')
  return '\n'.join(lines)


def _figure(panels: int, width: float) -> tuple:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, 3.8), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, panels, sharey=True)
  for panel in axes:
    panel.spines[['top', 'right']].set_visible(False)
  return figure, axes


def transfer(told: Mapping[str, Any], path: str) -> None:
  """Held-out loss against the learning rate, a line for every width, a panel for every parametrisation."""
  s = told['settings']
  figure, panels = _figure(2, 8.6)
  best = min(r['loss'] for one in told['optima'].values() for r in one['widths'].values())
  for panel, (name, title) in zip(panels, NAMES.items(), strict=True):
    for width, (line, marker, fill) in zip(s['widths'], LINES, strict=False):
      each = losses(told, name, width)
      looks = dict(marker=marker, mfc=fill, color='black', ms=5, lw=1.2)
      there = np.isfinite(each.mean(0))
      x, y = np.array(s['rates'])[there], each.mean(0)[there]
      panel.plot(x, y, line, label=f'{width} wide', **looks)
      panel.vlines(s['rates'], each.min(0), each.max(0), color='0.6', lw=0.8, zorder=0)
      found = told['optima'][name]['widths'][str(width)]
      panel.plot(
        found['rate'],
        found['loss'],
        marker='*',
        ms=13,
        mfc='0.75',
        mec='black',
        ls='none',
        zorder=5,
      )
    ends = [
      told['optima'][name]['widths'][str(w)]['rate'] for w in (s['widths'][0], s['widths'][-1])
    ]
    panel.set_title(
      f'{title}\nbest rate {" to ".join(f"$2^{{{e:.0f}}}$" for e in ends)}', fontsize=11
    )
    panel.set_xlabel('peak learning rate, log2')
    panel.set_xticks(s['rates'])
  panels[0].set_ylabel('held-out loss, nats per byte')
  panels[0].set_ylim(best - 0.05, best + 0.7)
  panels[1].legend(frameon=False, fontsize=9, handlelength=3, loc='upper center')
  figure.savefig(path, dpi=110)


def coordinates(told: Mapping[str, Any], path: str) -> None:
  """How far the last layer and the logits move, against width and depth."""
  s = told['settings']
  figure, panels = _figure(2, 8.6)
  for panel, axis, sizes in zip(
    panels, ('width', 'depth'), (s['widths'], s['depths']), strict=True
  ):
    kinds = [k for k in told['coordinates'] if k.startswith(axis)]
    for kind, (line, marker, fill) in zip(kinds, LINES, strict=False):
      found = told['coordinates'][kind]
      for key in found['rows'][0]:
        if key not in (f'layer {s["layers"]}', 'last', 'logits'):
          continue
        shade = '0.55' if key == 'logits' else 'black'
        name = f'{kind.partition(", ")[2]}, {"logits" if key == "logits" else "last layer"}'
        looks = dict(marker=marker, mfc=fill, color=shade, ms=5, lw=1.2, label=name)
        panel.plot(sizes, [row[key] for row in found['rows']], line, **looks)
    panel.set(xscale='log', yscale='log', xlabel={'width': 'width', 'depth': 'layers'}[axis])
    panel.set_xticks(sizes, sizes)
    panel.set_yticks((1, 2, 5, 10, 20, 50), (1, 2, 5, 10, 20, 50))
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=8, handlelength=3)
  rows = [row for found in told['coordinates'].values() for row in found['rows']]
  top = max(max(row.values()) for row in rows)
  panels[0].set_ylim(1, 1.2 * top)
  panels[0].set_ylabel(f'mean |change| of a coordinate after {s["moved"]} updates')
  figure.savefig(path, dpi=110)
