"""Losses by text and domain with intervals over seeds, differences seed by seed, tables and a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.digits.report import interval

FILTERS = ('unfiltered', 'deduplicated', 'filtered', 'clean')
MARKS = ('o', 's', '^')


def losses(runs: Sequence[Mapping[str, Any]], arm: str) -> dict[str, np.ndarray]:
  """Of every domain, and of their mean: one held-out loss per seed."""
  own = sorted((one for one in runs if one['arm'] == arm), key=lambda one: one['seed'])
  found = {name: np.array([one['loss'][name] for one in own]) for name in own[0]['loss']}
  return dict(found, mean=np.mean(list(found.values()), axis=0))


def summarise(runs: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> dict[str, Any]:
  """JSON: the losses; what each filter changes against the unfiltered text, each missing domain against the clean
  one; what cleaning did."""
  arms = list(dict.fromkeys(one['arm'] for one in runs))
  rows = {arm: {k: interval(v) for k, v in losses(runs, arm).items()} for arm in arms}

  def minus(arm: str, base: str) -> dict[str, Any]:
    other = losses(runs, base)
    return {k: interval(v - other[k]) for k, v in losses(runs, arm).items()}

  return dict(
    rows=rows,
    filters={arm: minus(arm, FILTERS[0]) for arm in FILTERS[1:]},
    missing={arm: minus(arm, 'clean') for arm in arms if arm.startswith('no ')},
    bytes={one['arm']: one['bytes'] for one in runs},
    parameters=runs[0]['parameters'],
    cpu=round(sum(one['cpu'] for one in runs), 1),
    **told,
    runs=list(runs),
  )


def tables(summary: Mapping[str, Any]) -> str:
  """Markdown: what cleaning left, the losses of the four texts, those without a domain."""
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  value = lambda one, sign='': f'{one["mean"]:{sign}.4f} ± {one["half"]:.4f}'
  lines = ['| step | documents | kilobytes |', '| --- | --: | --: |']
  for name, documents, size in summary['steps']['filtered']:
    lines.append(line([name, f'{documents:,}', f'{size / 1000:,.0f}']))
  names = list(summary['rows']['clean'])
  head = ['kilobytes', 'clean', 'repeated', 'other', *names, 'minus unfiltered, mean']
  lines += ['', line(['text', *head]), '| --- |' + ' --: |' * len(head)]
  for arm in FILTERS:
    shares = [f'{100 * summary["against"][arm][k]:.0f} %' for k in ('clean', 'repeated', 'other')]
    loss = [value(summary['rows'][arm][k]) for k in names]
    change = value(summary['filters'][arm]['mean'], '+') if arm in summary['filters'] else ''
    size = f'{summary["bytes"][arm] / 1000:,.0f}'
    lines.append(line([arm, size, *shares, *loss, change]))
  lines += ['', line(['trained', *names]), '| --- |' + ' --: |' * len(names)]
  lines.append(line(['on all three', *(value(summary['rows']['clean'][k]) for k in names)]))
  for arm, row in summary['missing'].items():
    lines.append(line([f'without {arm[3:]}', *(value(row[k], '+') for k in names)]))
  return '\n'.join(lines)


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json and filtering.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  figure(summary).savefig(os.path.join(folder, 'filtering.png'), format='png')


def figure(summary: Mapping[str, Any]) -> Any:
  """The loss of every domain by text; what leaving out a domain adds to each."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(10, 4), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  left, right = made.subplots(1, 2)
  domains = [name for name in summary['rows']['clean'] if name != 'mean']
  _points(left, {arm: summary['rows'][arm] for arm in FILTERS}, domains)
  left.set_xlabel('trained on')
  left.set_ylabel('held-out loss on clean text, nats per byte')
  _points(right, {f'no {k}': summary['missing'][f'no {k}'] for k in domains}, domains)
  right.axhline(0, color='0.5', linewidth=0.8)
  right.set_xlabel('trained on two domains, without the third')
  right.set_ylabel('held-out loss minus that of a model\ntrained on all three, nats per byte')
  left.legend(fontsize=8, title='measured on', title_fontsize=8)
  for panel in (left, right):
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  return made


def _points(panel: Any, rows: Mapping[str, Any], domains: Sequence[str]) -> None:
  faces = ('black', 'white', '0.6')
  for i, (name, mark, face) in enumerate(zip(domains, MARKS, faces, strict=True)):
    at = np.arange(len(rows)) + 0.12 * (i - 1)
    mean, half = (np.array([row[name][k] for row in rows.values()]) for k in ('mean', 'half'))
    told = dict(color='black', markerfacecolor=face, markersize=6, capsize=3, linewidth=1)
    panel.errorbar(at, mean, half, fmt=mark, label=name, **told)
  panel.set_xticks(np.arange(len(rows)), list(rows))
