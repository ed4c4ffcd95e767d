"""The ladder of sizes as figures: the same answers under sharp and smooth metrics, and what was predictable."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.scaling import emergence

TITLES = dict(
  addition='adding (3 tokens)',
  recall='recall in context (4 tokens)',
  misconceptions='facts that texts get wrong (1 token)',
)
STYLES = dict(addition=('-', 'o'), recall=('--', 's'), misconceptions=(':', '^'))


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """JSON: the runs by size, how sharp each metric of each task is, and what the smaller sizes say of the largest."""
  runs = sorted(runs, key=lambda one: (one['parameters'], one['seed']))
  sharp = {}
  for task in TITLES:
    told = {
      m: metric(runs, task, m)
      for m in ('exact_match', 'token_edit_distance', 'log_likelihood', 'brier')
    }
    sharp[task] = {
      m: emergence.sharpness(sizes(runs), y) if np.ptp(y) else None for m, y in told.items()
    }
  return dict(runs=runs, sharpness=sharp, predictions=predictions(runs))


def metric(runs: Sequence[Mapping[str, Any]], task: str, name: str) -> np.ndarray:
  """One metric of a task at the end, the mean over the seeds of each size: [sizes]."""
  at = lambda n: [r['marks'][-1][task][name] for r in runs if r['parameters'] == n]
  return np.array([np.mean(at(n)) for n in sizes(runs)])


def sizes(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """The numbers of parameters, ascending."""
  return np.unique([one['parameters'] for one in runs])


def predictions(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The largest size's loss and probability of a right answer, from a power law of -log p through the smaller ones."""
  size = sizes(runs).astype(float)
  told = {}
  for task in ('addition', 'recall'):
    nats = -metric(runs, task, 'log_likelihood')  # per token
    length = runs[0]['marks'][-1][task]['length']
    law = emergence.predict(size[:-1], np.exp(-nats[:-1] * length))
    guess = float(law(size[-1:])[0])
    told[task] = dict(
      exponent=law.law.exponent,
      coefficient=law.law.coefficient,
      nats=dict(predicted=-np.log(guess) / length, measured=float(nats[-1])),
      probability=dict(predicted=guess, measured=float(np.exp(-nats[-1] * length))),
    )
  return told


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json and emergence.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  figure(summary).savefig(os.path.join(folder, 'emergence.png'), format='png')


def figure(summary: Mapping[str, Any]) -> Any:
  """Exact match and smooth metrics against size; exact match against the probability of a token."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(12, 3.9), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  panels = made.subplots(1, 4)
  by_size(panels[0], summary, 'exact_match', 'exact match, share of answers')
  by_size(panels[1], summary, 'token_edit_distance', 'token edit distance, tokens')
  by_size(panels[2], summary, 'log_likelihood', 'log-likelihood, nats per token')
  by_token(panels[3], summary)
  made.legend(
    *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8
  )
  for panel in panels:
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  return made


def by_size(panel: Any, summary: Mapping[str, Any], name: str, label: str) -> None:
  """One metric of all tasks against the parameters."""
  runs = summary['runs']
  for task, (line, mark) in STYLES.items():
    panel.plot(sizes(runs), metric(runs, task, name), line, color='black', linewidth=1)
    x, y = zip(*((r['parameters'], r['marks'][-1][task][name]) for r in runs), strict=True)
    panel.plot(x, y, mark, color='black', markerfacecolor='0.8', markersize=5)
    panel.plot([], [], line, marker=mark, color='black', markerfacecolor='0.8', label=TITLES[task])
  panel.set_xscale('log')
  panel.set_xlabel('parameters', fontsize=9)
  panel.set_ylabel(label, fontsize=9)
  panel.set_title(name.replace('_', ' '), fontsize=10)


def token(marks: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """The accuracy of a token: the geometric mean over the positions of an answer, whose power is the product."""
  p = np.array([one['position_accuracy'] for one in marks])
  return p.prod(1) ** (1 / p.shape[1])


def by_token(panel: Any, summary: Mapping[str, Any]) -> None:
  """Every checkpoint of every size: exact match against the accuracy of a token, beside p^L."""
  p = np.linspace(0, 1, 101)
  for task in ('addition', 'recall'):
    line, mark = STYLES[task]
    marks = [m[task] for one in summary['runs'] for m in one['marks']]
    length = marks[0]['length']
    panel.plot(p, emergence.whole(p, length), line, color='black', linewidth=1, label=f'p^{length}')
    panel.plot(
      token(marks),
      [m['exact_match'] for m in marks],
      mark,
      color='black',
      markerfacecolor='0.8',
      label=task,
    )
  panel.set_xlabel('accuracy of a token p (geometric mean)', fontsize=9)
  panel.set_ylabel('exact match, share of answers', fontsize=9)
  panel.set_title('all checkpoints', fontsize=10)
  panel.legend(fontsize=7, frameon=False)
