"""The best precision for every budget of bits, a law for what rounding adds, tables and a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.digits.report import interval
from llm_jax.scaling import laws

BUDGETS = (16, 24, 32, 48, 64, 96)  # kilobytes, of 8,000 bits
FITTED = (3, 4, 5, 6)  # the precisions that the law is fitted to: 8 add less than can be measured
STYLES = {16: ('-', 'o'), 8: ('--', 's'), 6: ('-.', '^'), 5: (':', 'D'), 4: ('-', 'v')}
STYLES |= {3: ('--', 'P'), 2: (':', 'X')}


def grid(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """parameters [sizes], bits [precisions], total [sizes, precisions] in bits, nats [seeds, sizes, precisions]."""
  sizes = sorted({one['parameters'] for one in runs})
  own = [[one for one in runs if one['parameters'] == n] for n in sizes]
  points = np.array([[one['points'] for one in some] for some in own]).swapaxes(0, 1)
  return dict(
    parameters=np.array(sizes),
    bits=points[0, 0, :, 0].astype(int),
    total=points[0, :, :, 1],
    nats=points[..., 2],
  )


def at_budget(total: np.ndarray, nats: np.ndarray, budget: float) -> float:
  """The loss of one precision at `budget` bits, between its sizes on a line in the logarithm of the bits; nan outside.

  total, nats: [sizes], ascending in total.
  """
  return float(np.interp(np.log(budget), np.log(total), nats, left=np.nan, right=np.nan))


def choices(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """Of each budget: the mean loss of every precision that has it, the best one, and how much worse the others are
  (seed by seed, with an interval)."""
  told = []
  for budget in BUDGETS:
    loss = np.array(
      [
        [at_budget(found['total'][:, k], one[:, k], 8000 * budget) for one in found['nats']]
        for k in range(len(found['bits']))
      ]
    )
    if np.isnan(loss).all():
      continue
    best = int(np.nanargmin(loss.mean(1)))
    there = [k for k in range(len(loss)) if not np.isnan(loss[k]).any()]
    bits = {k: str(found['bits'][k]) for k in there}
    told.append(
      dict(
        kilobytes=budget,
        nats={bits[k]: float(loss[k].mean()) for k in there},
        best=int(found['bits'][best]),
        worse={bits[k]: interval(loss[k] - loss[best]) for k in there if k != best},
      )
    )
  return told


def law(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """`laws.Rounded` by least squares on the logarithm of what `FITTED` bits add to the loss of 16, mean over the seeds.

  All were trained on the same number of tokens, so the law's exponent of tokens is left at 0.
  """
  added = (found['nats'] - found['nats'][..., :1]).mean(0)
  use = np.isin(found['bits'], FITTED) & (added > 0)
  n = np.broadcast_to(found['parameters'][:, None], added.shape)[use].astype(float)
  bits = np.broadcast_to(found['bits'], added.shape)[use].astype(float)
  y = np.log(added[use])
  x = np.stack([np.ones_like(bits), -np.log(n), -bits], 1)
  theta = np.linalg.lstsq(x, y, rcond=None)[0]
  made = laws.Rounded(float(np.exp(theta[0])), 0.0, float(theta[1]), float(1 / theta[2]))
  error = np.abs(laws.rounding(made, n, 1.0, bits) / added[use] - 1)
  return dict(made._asdict(), points=int(use.sum()), error=float(error.mean()))


def by_law(found: Mapping[str, np.ndarray], law: Mapping[str, Any]) -> dict[str, int]:
  """The best precision at each budget by the law: the loss in 16 bits between the sizes that were trained, and what
  the law says rounding adds. Only precisions whose model is within the ladder are asked."""
  made = laws.Rounded(*(law[k] for k in laws.Rounded._fields))
  n, whole = found['parameters'], found['nats'][..., 0].mean(0)

  def loss(parameters: float, bits: float) -> float:
    return at_budget(n, whole, parameters) + float(laws.rounding(made, parameters, 1.0, bits))

  told = {}
  for budget in BUDGETS:
    stored = {int(k): k + 0.25 * (k < 16) for k in found['bits'] if k > 2}
    there = {k: s for k, s in stored.items() if n[0] <= 8000 * budget / s <= n[-1]}
    if there:
      best = min(there, key=lambda k: loss(8000 * budget / there[k], k))
      told[str(budget)] = best
  return told


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """JSON of all of it."""
  found = grid(runs)
  added = found['nats'] - found['nats'][..., :1]
  sizes = [
    dict(
      parameters=int(n),
      nats={str(b): interval(found['nats'][:, i, k]) for k, b in enumerate(found['bits'])},
      added={str(b): interval(added[:, i, k]) for k, b in enumerate(found['bits']) if k},
    )
    for i, n in enumerate(found['parameters'])
  ]
  fitted = law(found)
  return dict(
    sizes=sizes,
    budgets=choices(found),
    law=fitted,
    by_law=by_law(found, fitted),
    cpu=round(sum(one['cpu'] for one in runs), 1),
    runs=list(runs),
  )


def tables(summary: Mapping[str, Any]) -> str:
  """Markdown: what rounding adds to every size; what each budget buys."""
  bits = list(summary['sizes'][0]['nats'])
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  told = lambda one, sign='': f'{one["mean"]:{sign}.4f} ± {one["half"]:.4f}'
  lines = [
    line(['parameters', 'nats per byte in 16 bits', *(f'{b} bits' for b in bits[1:])]),
    '| --: |' + ' --: |' * len(bits),
  ]
  for one in summary['sizes']:
    added = [told(one['added'][b], '+') for b in bits[1:]]
    lines.append(line([f'{one["parameters"]:,}', told(one['nats']['16']), *added]))
  lines += [
    '',
    line(['kilobytes', *(f'{b} bits' for b in bits), 'best', 'best by the law']),
    '| --: |' + ' --: |' * (len(bits) + 2),
  ]
  for one in summary['budgets']:
    cells = []
    for b in bits:
      value = f'{one["nats"][b]:.3f}' if b in one['nats'] else ''
      cells.append(f'**{value}**' if b == str(one['best']) else value)
    best = summary['by_law'].get(str(one['kilobytes']), '')
    lines.append(line([str(one['kilobytes']), *cells, str(one['best']), str(best)]))
  return '\n'.join(lines)


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json and bits.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f)
  figure(summary).savefig(os.path.join(folder, 'bits.png'), format='png')


def figure(summary: Mapping[str, Any]) -> Any:
  """Loss against the bits of the model, a line for each precision; what rounding adds, with the law."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(10.5, 4.2), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  left, right = made.subplots(1, 2)
  found = grid(summary['runs'])
  for k, bits in enumerate(found['bits'][:-1]):  # 2 bits are above all others
    line, mark = STYLES[int(bits)]
    x, y = found['total'][:, k], found['nats'][..., k]
    face = 'white' if bits in (16, 6, 3) else 'black'
    told = dict(color='0.45' if bits < 5 else 'black', markerfacecolor=face, markersize=5)
    error = [interval(y[:, i])['half'] for i in range(len(x))]
    left.errorbar(x, y.mean(0), error, fmt=line, marker=mark, linewidth=1, label=str(bits), **told)
  left.set_xscale('log')
  whole = found['nats'][..., 0]
  left.set_ylim(whole.min() - 0.05, whole.max() + 0.5)
  left.set_xlabel('bits of the whole model, scales counted')
  left.set_ylabel('held-out loss, nats per byte')
  left.legend(title='bits per number', fontsize=8, title_fontsize=8, frameon=False)
  _added(right, found, summary['law'])
  for panel in (left, right):
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  return made


def _added(panel: Any, found: Mapping[str, np.ndarray], fitted: Mapping[str, Any]) -> None:
  made = laws.Rounded(*(fitted[k] for k in laws.Rounded._fields))
  added = (found['nats'] - found['nats'][..., :1]).mean(0)
  marks = [*(mark for _, mark in STYLES.values())]
  for i, n in enumerate(found['parameters']):
    shown = (added[i] > 0) & (found['bits'] < 16)
    gray = str(0.15 * i)
    told = dict(color=gray, markersize=5, label=f'{n:,}')
    panel.plot(found['bits'][shown], added[i][shown], marks[i], **told)
    x = np.linspace(min(FITTED), max(FITTED))
    panel.plot(x, laws.rounding(made, n, 1.0, x), '-', color=gray, linewidth=0.8)
  panel.set_yscale('log')
  panel.set_xlabel('bits per number')
  panel.set_ylabel('added by rounding, nats per byte\n(lines: the law)')
  panel.legend(title='parameters', fontsize=8, title_fontsize=8, frameon=False)
