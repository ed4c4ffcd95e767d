"""`loss.png`: training loss and held-out bits per byte, or accuracy on pairs, from a run's `metrics.jsonl`."""

import os
from typing import Any

import numpy as np

from llm_jax.core import files, metrics

TRAIN, HELD_OUT = '#4878a8', '#c44e52'


def draw(workdir: str, *, name: str = 'heldout') -> str | None:
  """Writes `loss.png`; returns its path, or None when there are fewer than two points to draw.

  Above the training loss in nats per token, each line's average and a smoothed curve; below, where it was evaluated,
  bits per byte of the text `name`, the share of the pairs `name` in the right order beside that by chance, or the share
  of its texts in the right class. Both against the tokens or pairs trained on.
  """
  lines = files.lines(os.path.join(workdir, metrics.FILE))
  steps, loss = column(lines, 'loss')
  if len(steps) < 2:
    return None
  at, held = column(lines, f'{name}/bits_per_byte')
  of_loss, of_held, unit = 'nats per token', 'held-out text\n(bits per byte)', 'tokens'
  classes = len(column(lines, f'{name}/label_nll')[0])
  pairs = not len(at) and not classes
  if not len(at):
    at, held = column(lines, f'{name}/accuracy')
  if classes:
    of_loss, of_held = 'per text', 'held-out texts\n(accuracy)'
  elif pairs and len(at):
    of_loss, of_held, unit = 'per pair', 'held-out pairs\n(accuracy)', 'pairs'
  tokens = column(lines, 'tokens')
  panels = _panels(2 if len(at) else 1)
  x = np.interp(steps, *tokens)
  panels[0].plot(x, loss, color=TRAIN, alpha=0.3, linewidth=1)
  panels[0].plot(x, smooth(loss), color=TRAIN, linewidth=1.8)
  _label(panels[0], f'training loss\n({of_loss})', loss, x[-1], smooth(loss)[-1], TRAIN)
  if len(at):
    x = np.interp(at, *tokens)
    panels[1].plot(x, held, color=HELD_OUT, marker='o', markersize=4, linewidth=1.8)
    chance = [0.5] * pairs
    for y in chance:
      panels[1].axhline(y, color='0.6', linewidth=1, linestyle='--')
    _label(panels[1], of_held, np.append(held, chance), x[-1], held[-1], HELD_OUT)
  panels[-1].set_xlabel(unit)
  path = os.path.join(workdir, 'loss.png')
  with files.whole(path, 'wb') as f:
    panels[0].figure.savefig(f, format='png')
  return path


def column(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of a metric where it was written and finite."""
  found = [(line['step'], line[name]) for line in lines if line.get(name) is not None]
  return tuple(np.array(found, float).reshape(-1, 2).T)


def smooth(values: np.ndarray) -> np.ndarray:
  """A running mean over about a twentieth of the points around each, fewer at the ends."""
  half, i = max(1, len(values) // 40), np.arange(len(values))
  first, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
  total = np.concatenate([[0.0], np.cumsum(values)])
  return (total[end] - total[first]) / (end - first)


def _panels(count: int) -> list[Any]:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 2.6 * count), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  return list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _label(panel: Any, title: str, values: np.ndarray, x: float, last: float, color: str) -> None:
  """Units, a light grid, the last value; the axis is cut off above where a spike would flatten the rest."""
  from matplotlib.ticker import EngFormatter

  panel.set_ylabel(title)
  panel.xaxis.set_major_formatter(EngFormatter(sep=''))
  panel.grid(alpha=0.25)
  panel.spines[['top', 'right']].set_visible(False)
  low, high = values.min(), min(values.max(), 2 * np.quantile(values, 0.95))
  margin = 0.06 * (high - low) or 0.1
  panel.set_ylim(low - margin, high + margin)
  panel.annotate(
    f'{last:.3f}',
    (x, last),
    (6, 0),
    textcoords='offset points',
    color=color,
    va='center',
    annotation_clip=False,
  )
