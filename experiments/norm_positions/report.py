"""Which trainings were stable, the largest stable rate of every position and depth, a table and a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = dict(pre='pre-norm', sandwich='sandwich', post='post-norm', deepnorm='DeepNorm')
WINDOW, SPIKE = 5, 0.5  # updates that are averaged; nats
FREQUENCIES = 3.313  # nats per byte: the entropy of the text's bytes taken one by one


def spike(losses: np.ndarray) -> float:
  """How far the loss rose, in nats: the largest distance of the mean of `WINDOW` updates above the lowest such mean
  before it; infinite where a loss is no number. losses: [steps]."""
  if not np.all(np.isfinite(losses)):
    return float('inf')
  smooth = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), 'valid')
  return float(np.max(smooth - np.minimum.accumulate(smooth)))


def stable(losses: np.ndarray) -> bool:
  """Finite, at the end below the start, and never `SPIKE` nats above what had been reached."""
  return bool(spike(losses) < SPIKE and np.mean(losses[-WINDOW:]) < losses[0])


def largest(one: Mapping[str, Any]) -> int | None:
  """log2 of the largest rate up to which all were stable with all seeds; None where none was."""
  found = None
  for i, rate in enumerate(one['rates']):
    if not all(stable(np.array(seed[i], float)) for seed in one['losses']):
      break
    found = rate
  return found


def at_end(one: Mapping[str, Any]) -> np.ndarray:
  """The loss of the last 10 updates, the mean over the seeds: [rates]."""
  return np.array(one['losses'], float)[..., -10:].mean((0, 2))


def learning(one: Mapping[str, Any]) -> int | None:
  """log2 of the largest rate that is stable and ends below `FREQUENCIES`; None where none does."""
  stands = [
    all(stable(np.array(x, float)) for x in runs) for runs in zip(*one['losses'], strict=True)
  ]
  told = zip(one['rates'], stands, at_end(one), strict=True)
  return max((rate for rate, held, end in told if held and end < FREQUENCIES), default=None)


def best(one: Mapping[str, Any]) -> tuple[float, int]:
  """(lowest loss at the end, log2 of its rate)."""
  ends = np.nan_to_num(at_end(one), nan=np.inf)
  return float(ends.min()), one['rates'][int(ends.argmin())]


def summarise(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """JSON: every cell with its largest stable rate, its best, and the spike of each of its trainings."""
  number = lambda x: round(float(x), 3) if np.isfinite(x) else None
  told = []
  for one in found:
    spikes = [[number(spike(np.array(x, float))) for x in seed] for seed in one['losses']]
    ends = [number(x) for x in at_end(one)]
    told.append(dict(one, largest=largest(one), best=list(best(one)), spikes=spikes, ends=ends))
  return told


def table(found: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: the largest stable rate and the lowest loss, positions by depths."""
  depths = sorted({one['layers'] for one in found})
  at = {(one['name'], one['layers']): one for one in found}
  power = lambda r: 'none' if r is None else f'2^{r}'
  heads = ' | '.join(f'{n} layers' for n in depths)
  asked = {
    'largest stable rate': lambda one: power(largest(one)),
    f'largest stable rate that ends below {FREQUENCIES}': lambda one: power(learning(one)),
    'lowest loss at the end (its rate)': lambda one: '{:.3f} (2^{})'.format(*best(one)),
  }
  lines = []
  for question, answer in asked.items():
    lines += [f'| {question} | {heads} |', '| --- |' + ' --: |' * len(depths)]
    for name, title in NAMES.items():
      lines.append(f'| {title} | {" | ".join(answer(at[name, n]) for n in depths)} |')
    lines.append('')
  return '\n'.join(lines).rstrip()


def write(summary: Sequence[Mapping[str, Any]], folder: str) -> None:
  """results.json and norm_positions.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f)
  figure(summary).savefig(os.path.join(folder, 'norm_positions.png'), format='png')


def figure(summary: Sequence[Mapping[str, Any]]) -> Any:
  """The loss at the end against the rate, a panel for each depth, without what is above 4.1 nats; open marks are
  trainings that were not stable."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  depths = sorted({one['layers'] for one in summary})
  made = Figure(figsize=(4 * len(depths), 3.8), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  panels = made.subplots(1, len(depths), sharey=True, squeeze=False)[0]
  styles = dict(zip(NAMES, (('-', 'o'), ('--', 's'), (':', '^'), ('-.', 'D')), strict=True))
  for panel, layers in zip(panels, depths, strict=True):
    for one in (x for x in summary if x['layers'] == layers):
      line, mark = styles[one['name']]
      x = 2.0 ** np.array(one['rates'])
      ends = np.array(one['ends'], float)
      panel.plot(x, ends, line, color='black', linewidth=1)
      for rate, end, losses in zip(x, ends, zip(*one['losses'], strict=True), strict=True):
        held = all(stable(np.array(run, float)) for run in losses)
        panel.plot(rate, end, mark, color='black', markerfacecolor='black' if held else 'white')
      panel.plot([], [], line, marker=mark, color='black', label=NAMES[one['name']])
    panel.axhline(FREQUENCIES, color='0.5', linewidth=0.8)
    panel.set_xscale('log', base=2)
    panel.set_ylim(2.7, 4.1)  # what is above has diverged
    panel.set_title(f'{layers} layers', fontsize=10)
    panel.set_xlabel('learning rate', fontsize=9)
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  panels[-1].text(
    2.0**-11, 2.8, "grey: the entropy of the bytes' frequencies", fontsize=8, color='0.3'
  )
  panels[0].set_ylabel('loss of the last 10 updates, nats per byte', fontsize=9)
  made.legend(
    *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8
  )
  return made
