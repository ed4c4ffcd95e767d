"""The ladder of sizes as figures: the same answers under sharp and smooth metrics, and what was predictable."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.scaling import emergence, laws, nonlinear

TITLES = dict(
  addition='adding (3 tokens)',
  recall='recall in context (4 tokens)',
  misconceptions='facts that texts get wrong (1 token)',
  strings='strings by heart (8 tokens)',
)
STYLES = dict(
  addition=('-', 'o'), recall=('--', 's'), misconceptions=(':', '^'), strings=('-.', 'D')
)
CIRCUITS, MEMORY = ('addition', 'recall', 'misconceptions'), ('strings',)
CHANCE = 0.1  # of a digit of a string


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """JSON: the runs by size, how sharp each metric of each task is, and what the smaller sizes say of the largest."""
  runs = sorted(runs, key=lambda one: (one['parameters'], one['seed']))
  sharp = {}
  for task in TITLES:
    told = {
      m: metric(runs, task, m)
      for m in ('exact_match', 'token_edit_distance', 'log_likelihood', 'brier')
    }
    n = sizes(runs, task)
    sharp[task] = {m: emergence.sharpness(n, y) if np.ptp(y) else None for m, y in told.items()}
  return dict(runs=runs, sharpness=sharp, predictions=predictions(runs), memory=memory(runs))


def of(runs: Sequence[Mapping[str, Any]], task: str) -> list[Mapping[str, Any]]:
  """The runs that learned this task."""
  return [one for one in runs if task in one['marks'][-1]]


def metric(runs: Sequence[Mapping[str, Any]], task: str, name: str) -> np.ndarray:
  """One metric of a task at the end, the mean over the seeds of each size: [sizes]."""
  at = lambda n: [r['marks'][-1][task][name] for r in of(runs, task) if r['parameters'] == n]
  return np.array([np.mean(at(n)) for n in sizes(runs, task)])


def sizes(runs: Sequence[Mapping[str, Any]], task: str) -> np.ndarray:
  """The numbers of parameters, ascending."""
  return np.unique([one['parameters'] for one in of(runs, task)])


def predictions(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The largest size's loss and probability of a right answer, from a power law of -log p through the smaller ones."""
  told = {}
  for task in ('addition', 'recall', 'strings'):
    size = sizes(runs, task).astype(float)
    nats = -metric(runs, task, 'log_likelihood')  # per token
    length = of(runs, task)[0]['marks'][-1][task]['length']
    law = emergence.predict(size[:-1], np.exp(-nats[:-1] * length))
    guess = float(law(size[-1:])[0])
    told[task] = dict(
      exponent=law.law.exponent,
      coefficient=law.law.coefficient,
      nats=dict(predicted=-np.log(guess) / length, measured=float(nats[-1])),
      probability=dict(predicted=guess, measured=float(np.exp(-nats[-1] * length))),
    )
  return told


def memory(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The largest size that knows strings, predicted from the 4, 5 and 6 smallest.

  A sigmoid in the logarithm of the size through the accuracy of a token, between guessing and 1; through the share of
  tokens that need no edit, from a floor that is fitted; and through exact match itself, from 0. `power`: exact match as
  the accuracy's power instead.
  """
  size, length = (
    np.log10(sizes(runs, 'strings')),
    of(runs, 'strings')[0]['marks'][-1]['strings']['length'],
  )
  measured = dict(
    token_accuracy=metric(runs, 'strings', 'token_accuracy'),
    token_edit_distance=1 - metric(runs, 'strings', 'token_edit_distance') / length,
    exact_match=metric(runs, 'strings', 'exact_match'),
  )
  floors = dict(token_accuracy=CHANCE, token_edit_distance=None, exact_match=0.0)
  found = []
  for used in (4, 5, 6):
    told = {}
    for name, y in measured.items():
      law = nonlinear.sigmoid(-size[:used], y[:used], low=floors[name], high=1.0)
      told[name] = float(laws.accuracy(law, -size[-1]))
    power = float(emergence.whole(told['token_accuracy'], length))
    told['token_edit_distance'] = length * (1 - told['token_edit_distance'])
    found.append(dict(used=used, power=power, **told))
  last = {name: float(metric(runs, 'strings', name)[-1]) for name in measured}
  return [dict(used='measured', power=last['exact_match'], **last), *found]


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json and emergence.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  figure(summary).savefig(os.path.join(folder, 'emergence.png'), format='png')


def figure(summary: Mapping[str, Any]) -> Any:
  """Sharp and smooth metrics against size, what is learned at once above and what is learned by heart below; on the
  right exact match against the accuracy of a token."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(12.5, 6.6), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  panels = made.subplots(2, 4)
  for row, tasks in zip(panels, (CIRCUITS, MEMORY), strict=True):
    by_size(row[0], summary, 'exact_match', 'share of answers', tasks)
    by_size(row[1], summary, 'token_edit_distance', 'tokens', tasks)
    by_size(row[2], summary, 'log_likelihood', 'nats per token', tasks)
    by_token(row[3], summary, [t for t in tasks if t != 'misconceptions'])
    place = dict(loc='center right', bbox_to_anchor=(1, 0.7)) if len(tasks) > 1 else {}
    row[0].legend(fontsize=7, frameon=False, **place)
  for panel in panels.flat:
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  return made


def by_size(
  panel: Any, summary: Mapping[str, Any], name: str, label: str, tasks: Sequence[str]
) -> None:
  """One metric of some tasks against the parameters; a mark for every seed, a line through the means."""
  for task in tasks:
    line, mark = STYLES[task]
    runs = of(summary['runs'], task)
    panel.plot(sizes(runs, task), metric(runs, task, name), line, color='black', linewidth=1)
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


def by_token(panel: Any, summary: Mapping[str, Any], tasks: Sequence[str]) -> None:
  """Every checkpoint of every size: exact match against the accuracy of a token, beside p^L."""
  p = np.linspace(0, 1, 101)
  for task in tasks:
    line, mark = STYLES[task]
    marks = [m[task] for one in of(summary['runs'], task) for m in one['marks']]
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
