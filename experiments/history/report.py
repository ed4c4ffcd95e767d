"""The table and the figure of experiments/history."""

import json
import os
from collections.abc import Mapping
from typing import Any

STYLES = {
  'NPLM': dict(color='0.35', marker='s', linestyle='--'),
  'LSTM': dict(color='0.2', marker='^', linestyle='-.'),
  'Transformer': dict(color='0', marker='o', linestyle='-'),
}


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
  """A row of Markdown for each model."""
  lines = [
    '| model | numbers | bytes seen before each | held-out bits per byte | perplexity per byte | CPU s |',
    '| --- | --: | --: | --: | --: | --: |',
  ]
  for name, one in cells.items():
    bits = one['bits']
    lines.append(
      f'| {name} | {one["parameters"]:,} | {one["sees"]} | {bits:.3f} | {2**bits:.2f} | {one["cpu"]:.0f} |'
    )
  return '\n'.join(lines) + '\n'


def write(cells: Mapping[str, Mapping[str, Any]], folder: str) -> None:
  """results.json, results.md and results.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(list(cells.values()), f, indent=1)
    f.write('\n')
  with open(os.path.join(folder, 'results.md'), 'w', encoding='utf-8') as f:
    f.write(table(cells))
  draw(cells, os.path.join(folder, 'results.png'))


def draw(cells: Mapping[str, Mapping[str, Any]], path: str) -> None:
  """Held-out bits per byte by bytes of training text."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 5), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  panel = figure.subplots()
  for name, one in cells.items():
    x, y = zip(*one['curve'], strict=True)
    style = STYLES.get(name, dict(color='0.6', marker='', linestyle='-'))
    panel.plot(x, y, linewidth=1.4, markersize=4, label=name if name in STYLES else None, **style)
    if name not in STYLES:
      panel.annotate(
        name,
        (x[-1], y[-1]),
        (6, 0),
        textcoords='offset points',
        va='center',
        fontsize=8,
        color='0.4',
      )
  panel.set_xscale('log')
  low, high = panel.get_xlim()
  panel.set_xlim(low, 1.4 * high)  # room for the names
  panel.set_xlabel('bytes of training text')
  panel.set_ylabel('held-out bits per byte')
  panel.set_title('Four novels: counts with back-off (grey) and neural models', fontsize=10)
  panel.legend(frameon=False)
  panel.grid(alpha=0.3)
  figure.savefig(path)
