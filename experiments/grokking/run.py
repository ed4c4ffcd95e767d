r"""Grokking: sums modulo a prime are known by heart long before they are understood, and with weight decay only.

  .venv/bin/python -m experiments.grokking.run --out=runs/grokking          # 7 minutes of one core
  .venv/bin/python -m experiments.grokking.run --quick --out=runs/try

a + b mod p for all a and b, a share of them to learn from, the others to be measured on; one layer, all examples in
every batch (Power et al. 2022, arXiv:2201.02177). OUT/cells.jsonl has a line per finished run and is gone on with.
Writes results.json and grokking.png.
"""

import argparse
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import small
from llm_jax.model import init, positions
from llm_jax.objectives import language
from llm_jax.optim import chain, rules, schedules

ENOUGH = 0.99  # the accuracy that counts as knowing


class Plan(NamedTuple):
  """prime; share: of the pairs that is learned; decay: of the weights; every: steps to a measurement."""

  prime: int
  share: float
  decay: float
  steps: int
  width: int = 48
  rate: float = 1e-3
  every: int = 20


PLANS = tuple(Plan(97, 0.3, decay, 2400) for decay in (1.0, 0.0))
TRY = (Plan(11, 0.5, 1.0, 40, width=16),)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', default='runs/grokking', help='where the results go')
  parser.add_argument('--quick', action='store_true', help='a few updates, to see it work')
  given = parser.parse_args(argv)
  cells = small.Cells(given.out)
  runs = []
  for plan in TRY if given.quick else PLANS:
    name = ' '.join(f'{k} {v}' for k, v in plan._asdict().items())
    runs.append(cells.once(name, functools.partial(trained, plan)))
  with open(os.path.join(given.out, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(runs, f)
  figure(runs).savefig(os.path.join(given.out, 'grokking.png'), format='png')
  print(table(runs))


def sums(prime: int, share: float, seed: int = 0) -> tuple[dict, dict]:
  """(what is learned, what is held out): rows `a b =` and the sum modulo `prime` after them; only the sum counts."""
  a, b = np.divmod(np.random.default_rng(seed).permutation(prime**2), prime)
  inputs = np.stack([a, b, np.full_like(a, prime)], 1).astype(np.int32)
  targets = np.zeros_like(inputs)
  targets[:, -1] = (a + b) % prime
  weights = np.broadcast_to(np.float32([0, 0, 1]), inputs.shape)
  both = dict(inputs=inputs, targets=targets, weights=weights)
  cut = int(share * len(a))
  return {k: v[:cut] for k, v in both.items()}, {k: v[cut:] for k, v in both.items()}


def trained(plan: Plan) -> dict[str, Any]:
  """The curves of a run, and the first measured steps with an accuracy of `ENOUGH`."""
  seen, unseen = (jax.device_put(x) for x in sums(plan.prime, plan.share))
  model = small.decoder(
    vocab=plan.prime + 1,
    embed=plan.width,
    layers=1,
    heads=4,
    length=3,
    positions=positions.Learned,
    init=functools.partial(init.gpt2, std=plan.width**-0.5),
  )
  train = small.trainer(
    model,
    steps=plan.steps,
    schedule=functools.partial(schedules.constant, peak=plan.rate, warmup=10),
    rule=functools.partial(rules.adamw, b2=0.98),
    weight_decay=plan.decay,
    decayed=chain.everything,
  )
  curve = dict(step=[], train=[], validation=[], train_loss=[], validation_loss=[], norm=[])

  @jax.jit
  def score(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    loss = language.next_token(model, params, batch, None, chunk=None)
    return loss.metrics['accuracy'] / loss.weight, loss.metrics['nats'] / loss.weight

  def mark(step: int, now: Any, metrics: Any) -> None:
    if step % plan.every == 0 and metrics:
      found = [float(x) for batch in (seen, unseen) for x in score(now.params, batch)]
      names = ('train', 'train_loss', 'validation', 'validation_loss')
      for name, value in zip(names, found, strict=True):
        curve[name].append(round(value, 5))
      curve['norm'].append(round(float(metrics['param_norm']), 2))
      curve['step'].append(step)

  train(lambda state: seen, 0, hooks=[mark])
  first = {k: reached(curve['step'], curve[k]) for k in ('train', 'validation')}
  return dict(plan._asdict(), reached=first, curve=curve)


def reached(steps: Sequence[int], accuracy: Sequence[float]) -> int | None:
  """The first step with an accuracy of `ENOUGH`; None where there is none."""
  return next((s for s, a in zip(steps, accuracy, strict=True) if a >= ENOUGH), None)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: when each run knew what it had learned, and what it had not."""
  lines = [
    '| p | learned | weight decay | train reaches 0.99 | validation reaches 0.99 | validation at the end |',
    '| --: | --: | --: | --: | --: | --: |',
  ]
  for one in runs:
    steps = [f'step {n:,}' if n else 'never' for n in one['reached'].values()]
    end = f'{one["curve"]["validation"][-1]:.3f} at step {one["steps"]:,}'
    lines.append(
      f'| {one["prime"]} | {one["share"]:.0%} | {one["decay"]:g} | {" | ".join(steps)} | {end} |'
    )
  return '\n'.join(lines)


def figure(runs: Sequence[Mapping[str, Any]]) -> Any:
  """Accuracy against steps, a panel for each run."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=(4.2 * len(runs), 3.4), dpi=120, layout='constrained')
  FigureCanvasAgg(made)
  panels = made.subplots(1, len(runs), sharey=True, squeeze=False)[0]
  for panel, one in zip(panels, runs, strict=True):
    curve = one['curve']
    panel.semilogx(curve['step'], curve['train'], '--', color='0.4', label='train')
    panel.semilogx(curve['step'], curve['validation'], '-', color='black', label='validation')
    title = f'p = {one["prime"]}, {one["share"]:.0%} learned, weight decay {one["decay"]:g}'
    panel.set_title(title, fontsize=10)
    panel.set_xlabel('updates', fontsize=9)
    panel.set_ylim(-0.03, 1.05)
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  panels[0].set_ylabel('accuracy, share of sums', fontsize=9)
  panels[0].legend(frameon=False, fontsize=9)
  return made


if __name__ == '__main__':
  main()
