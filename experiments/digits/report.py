"""The ways to write a number side by side: shares of right answers over training, with intervals over the seeds."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STYLES = dict(digits=('-', 'o'), reversed=('--', 's'), pairs=('-.', '^'), numbers=(':', 'D'))
T95 = {
  2: 12.706,
  3: 4.303,
  4: 3.182,
  5: 2.776,
}  # Student's t of n - 1 degrees of freedom, both sides
SOLVED = 0.9


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """JSON: the runs, and of each way what was right at the end and how soon `SOLVED` of the answers were."""
  ways = {}
  for name in dict.fromkeys(one['way'] for one in runs):
    own = [one for one in runs if one['way'] == name]
    last = [one['marks'][-1] for one in own]
    soon = [next((m['step'] for m in one['marks'] if m['exact'] >= SOLVED), None) for one in own]
    ways[name] = dict(
      exact=interval([m['exact'] for m in last]),
      learnt=interval([m['learnt'] for m in last]),
      nats=interval([m['nats'] for m in last]),
      solved_at=soon,
      **{k: own[0][k] for k in ('tokens_per_sum', 'vocab', 'parameters')},
    )
  return dict(ways=ways, cpu=round(sum(one['cpu'] for one in runs), 1), runs=list(runs))


def interval(values: Sequence[float]) -> dict[str, float]:
  """Mean and half of the 95 % interval of Student's t over seeds (0 for one seed)."""
  n = len(values)
  half = T95[n] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
  return dict(mean=float(np.mean(values)), half=half)


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json and digits.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  figure(summary).savefig(os.path.join(folder, 'digits.png'), format='png')


def figure(summary: Mapping[str, Any]) -> Any:
  """Right answers against updates, a line for every seed."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(6.4, 3.8), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  panel = made.subplots()
  for name in summary['ways']:
    own = [one['marks'] for one in summary['runs'] if one['way'] == name]
    at = [m['step'] for m in own[0]]
    y = np.array([[m['exact'] for m in marks] for marks in own])
    line, mark = STYLES[name]
    for seed, values in enumerate(y):
      told = dict(marker=mark, markersize=4, linewidth=1, label=None if seed else name)
      panel.plot(at, values, line, color='black', **told)
  panel.set_xlabel('updates of 64 sums')
  panel.set_ylabel('right answers, share of unseen sums')
  panel.set_ylim(-0.03, 1.03)
  panel.legend(fontsize=8, title='a number is written as', title_fontsize=8)
  for side in ('top', 'right'):
    panel.spines[side].set_visible(False)
  return made
