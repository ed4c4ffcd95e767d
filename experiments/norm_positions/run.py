r"""Where the norm sits and how large a learning rate a model then stands: four positions, three depths, real text.

  .venv/bin/python -m experiments.norm_positions.run --out=runs/norm_positions          # 4 minutes of one core
  .venv/bin/python -m experiments.norm_positions.run --quick --out=runs/try

One LLaMA, 32 wide, on bytes of tiny Shakespeare with Adam, no clipping and a rate that is never warmed up; the rates of
the grid are a factor of 2 apart. OUT/cells.jsonl has a line for every position and depth and is gone on with. Writes
results.json and norm_positions.png and prints the table of the README.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import small
from experiments.norm_positions import report
from llm_jax.model import init, norms
from llm_jax.optim import rules, schedules

EMBED, HEADS, VOCAB, BATCH, LENGTH = 32, 2, 259, 8, 32


class Position(NamedTuple):
  """layers -> what a model has: its residual topology, its last norm, the factor on the weights that write to the
  residual stream (Xavier's otherwise)."""

  residual: Callable[[int], Callable]
  last: Any
  beta: Callable[[int], float]


POSITIONS = dict(
  pre=Position(lambda n: norms.pre, norms.RMSNorm, lambda n: 1.0),
  sandwich=Position(lambda n: norms.sandwich, norms.RMSNorm, lambda n: 1.0),
  post=Position(lambda n: norms.post, None, lambda n: 1.0),
  deepnorm=Position(
    lambda n: functools.partial(norms.deepnorm, alpha=(2 * n) ** 0.25),
    None,
    lambda n: (8 * n) ** -0.25,
  ),
)


class Size(NamedTuple):
  """rates: their log2."""

  depths: tuple[int, ...] = (2, 8, 24)
  rates: tuple[int, ...] = (-11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0)
  seeds: int = 1
  steps: int = 100


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', default='runs/norm_positions', help='where the results go')
  parser.add_argument('--quick', action='store_true', help='a few updates, to see it work')
  given = parser.parse_args(argv)
  size = Size(depths=(2,), rates=(-8, -2), steps=12) if given.quick else Size()
  cells, found = small.Cells(given.out), []
  for layers in size.depths:
    for name in POSITIONS:
      called = f'{name} layers {layers} steps {size.steps}'
      found.append(cells.once(called, functools.partial(trained, name, layers, size)))
  report.write(report.summarise(found), given.out)
  print(report.table(found))


def trained(name: str, layers: int, size: Size) -> dict[str, Any]:
  """The training losses of every rate and seed, [seeds][rates][steps], None for what is no number; compiled once."""
  chosen = POSITIONS[name]
  model = small.decoder(
    vocab=VOCAB,
    embed=EMBED,
    heads=HEADS,
    layers=layers,
    length=LENGTH,
    residual=chosen.residual(layers),
    norm=chosen.last,
    init=functools.partial(init.deepnorm, beta=chosen.beta(layers)),
  )
  constant = functools.partial(schedules.constant, peak=1.0)
  rule = functools.partial(rules.adamw, b2=0.99)
  run = small.scanned(model, schedule=constant, rule=rule, clip=None)
  losses = []
  for seed in range(size.seeds):
    batches = small.text(model, 'train', size.steps, batch=BATCH, length=LENGTH, seed=seed)
    params = model.init(jax.random.key(seed))
    told = [jax.device_get(run(jnp.float32(2.0**r), None, params, batches)[1]) for r in size.rates]
    losses.append([[round(float(x), 4) if np.isfinite(x) else None for x in y] for y in told])
  return dict(name=name, layers=layers, rates=list(size.rates), losses=losses)


if __name__ == '__main__':
  main()
