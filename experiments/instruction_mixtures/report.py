"""What came out: means over seeds with 95 % intervals (t), differences of rows seed by seed, a table and a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NATS = dict(chat='chat', task='task', synthetic='synthetic', people='written by people')
METRICS = (*NATS, 'exact')
STRATEGIES = ('complexity', 'diversity', 'difficulty', 'scaling', 'progressive')


def interval(values: Sequence[float]) -> tuple[float, float | None]:
  """(mean, half the width of its 95 % interval by Student's t); of a single value None."""
  from scipy import stats

  n, x = len(values), np.asarray(values, float)
  if n < 2:
    return float(x.mean()), None
  return float(x.mean()), float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / np.sqrt(n))


def summarise(found: Mapping[str, Sequence[Mapping[str, float]]], settings: Mapping) -> dict:
  """JSON of everything. found: row -> what each seed measured."""
  rows = {
    name: {
      key: dict(values=[one[key] for one in runs], mean=m, half=h)
      for key in runs[0]
      for m, h in [interval([one[key] for one in runs])]
    }
    for name, runs in found.items()
  }
  return dict(settings=dict(settings), rows=rows, differences=differences(found))


def differences(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
  """The survey's findings as differences between two rows, seed by seed: {finding, metric, mean, half, sure}. sure:
  whether the interval is on one side of 0."""
  asked = [
    (f'task data against synthetic, on {key}', 'task', 'synthetic', key)
    for key in ('task', 'chat', 'people')
  ]
  for alone in ('chat', 'task', 'synthetic'):
    asked.append((f'all three against {alone} alone, on {alone}', 'all three', alone, alone))
    asked.append((f'all three against {alone} alone, on people', 'all three', alone, 'people'))
  for name in STRATEGIES:
    asked += [(f'{name}, on {key}', name, 'synthetic', key) for key in ('synthetic', 'people')]
  for few in ('2 task kinds', '4 task kinds'):
    asked.append((f'8 kinds of tasks against {few[0]}', 'task', few, 'task'))
  told = []
  for finding, a, b, key in asked:
    if a in found and b in found:
      pairs = zip(found[a], found[b], strict=False)  # the seeds that both have by now
      mean, half = interval([x[key] - y[key] for x, y in pairs])
      told.append(
        dict(
          finding=finding,
          metric=key,
          mean=mean,
          half=half,
          sure=half is not None and abs(mean) > half,
        )
      )
  return told


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json, results.md and results.png."""
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  with open(os.path.join(folder, 'results.md'), 'w', encoding='utf-8') as f:
    f.write(table(summary))
  draw(summary, os.path.join(folder, 'results.png'))


def line(told: Mapping[str, float]) -> str:
  """What one run measured, in a line."""
  return ' '.join(f'{key} {told[key]:.3f}' for key in METRICS)


def table(summary: Mapping[str, Any]) -> str:
  """Markdown: the rows, then the differences."""
  heads = ('data', 'records', 'MTLD', *(f'{v}, nats' for v in NATS.values()), 'exact, %')
  lines = ['| ' + ' | '.join(heads) + ' |', '| --- |' + ' --: |' * (len(heads) - 1)]
  for name, row in summary['rows'].items():
    cells = [name]
    for key in ('records', 'mtld'):
      cells.append(f'{row[key]["mean"]:.0f}' if key in row else '')
    for key in METRICS:
      scale, digits = (1, 3) if key in NATS else (100, 1)
      cells.append(_cell(row[key], scale, digits))
    lines.append('| ' + ' | '.join(cells) + ' |')
  lines += [
    '',
    '| difference of two rows | nats | the interval leaves out 0 |',
    '| --- | --: | --- |',
  ]
  for one in summary['differences']:
    cell = _cell(one, 1, 3, sign='+')
    lines.append(f'| {one["finding"]} | {cell} | {"yes" if one["sure"] else "no"} |')
  return '\n'.join(lines) + '\n'


def _cell(one: Mapping[str, Any], scale: float, digits: int, sign: str = '') -> str:
  told = f'{one["mean"] * scale:{sign}.{digits}f}'
  return told if one['half'] is None else f'{told} ± {one["half"] * scale:.{digits}f}'


def draw(summary: Mapping[str, Any], path: str) -> None:
  """A panel for each measure, a line for each row: mean, interval, and the seeds as small points."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = {name: row for name, row in summary['rows'].items() if name != 'base'}
  shown = (*NATS, 'exact')
  figure = Figure(figsize=(11, 0.9 + 0.32 * len(rows)), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(shown), sharey=True)
  y = -np.arange(len(rows))
  for panel, key in zip(panels, shown, strict=True):
    scale = 1 if key in NATS else 100
    means = np.array([row[key]['mean'] for row in rows.values()]) * scale
    halves = np.array([row[key]['half'] or 0 for row in rows.values()]) * scale
    panel.errorbar(
      means, y, xerr=halves, fmt='s', color='black', markersize=5, capsize=3, linewidth=1
    )
    for at, row in zip(y, rows.values(), strict=True):
      values = np.array(row[key]['values']) * scale
      panel.plot(values, np.full(len(values), at - 0.28), '|', color='0.4', markersize=5)
    before = summary['rows']['base'][key]['mean'] * scale
    unit = 'nats per token' if key in NATS else '% exactly right'
    panel.set_title(f'{NATS.get(key, "task")}', fontsize=10)
    panel.set_xlabel(f'{unit}\n(before: {before:.3g})', fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(axis='both', color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  panels[0].set_yticks(y, list(rows))
  figure.savefig(path, format='png')
