r"""Bits per parameter: a small model in 16 bits or one twice as large in 8, when both take the same memory?

  .venv/bin/python -m experiments.bits.run --out=runs/bits          # 6 minutes of one core
  .venv/bin/python -m experiments.bits.run --quick --out=runs/try

Five sizes of a LLaMA on bytes of tiny Shakespeare, each trained once per seed and then rounded to 16, 8, 6, 5, 4, 3 and
2 bits; nothing is trained after rounding (Dettmers and Zettlemoyer 2022, arXiv:2212.09720). OUT/cells.jsonl has a line
for every model and is gone on with. Writes results.json and bits.png and prints the tables of the README.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import small
from experiments.bits import quantise, report
from llm_jax.model import count, heads, init
from llm_jax.optim import rules, schedules

VOCAB, LENGTH, ROWS = 259, 128, 16
BITS = (16, 8, 6, 5, 4, 3, 2)
RATE = 0.75  # times 1 / width: the peak of the learning rate


class Plan(NamedTuple):
  """sizes: (width, layers). held: batches of 48 rows that are measured."""

  sizes: tuple[tuple[int, int], ...] = ((16, 1), (24, 2), (40, 2), (64, 3), (96, 4))
  seeds: int = 3
  steps: int = 250
  held: int = 16


TRY = Plan(sizes=((16, 1), (24, 1)), seeds=2, steps=10, held=1)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', default='runs/bits', help='where the results go')
  parser.add_argument('--quick', action='store_true', help='a few updates, to see it work')
  given = parser.parse_args(argv)
  plan = TRY if given.quick else Plan()
  cells, found = small.Cells(given.out), []
  for width, layers in plan.sizes:
    tools = functools.cache(functools.partial(compiled, width, layers, plan))
    for seed in range(plan.seeds):
      name = f'width {width} layers {layers} seed {seed} steps {plan.steps}'
      found.append(cells.once(name, functools.partial(measured, tools, seed)))
  summary = report.summarise(found)
  report.write(summary, given.out)
  print(report.tables(summary))


def compiled(width: int, layers: int, plan: Plan) -> tuple:
  """(model, seed -> its trained parameters, parameters -> held-out nats per byte)."""
  model = small.decoder(
    vocab=VOCAB,
    embed=width,
    heads=max(1, width // 16),
    layers=layers,
    length=LENGTH,
    init=init.palm,
    head=functools.partial(heads.Tied, scaled=True),
  )
  warmup = max(1, plan.steps // 10)
  schedule = functools.partial(
    schedules.linear, peak=1.0, steps=plan.steps, warmup=warmup, floor=0.0
  )
  rule = functools.partial(rules.adamw, b2=0.99)
  run = small.scanned(model, schedule=schedule, rule=rule, clip=1.0)
  held = small.text(model, 'validation', plan.held, batch=48, length=LENGTH, seed=0)
  batches = [{k: v[i] for k, v in held.items()} for i in range(plan.held)]
  nats = small.evaluator(model)

  def train(seed: int) -> Any:
    seen = small.text(model, 'train', plan.steps, batch=ROWS, length=LENGTH, seed=seed)
    params = model.init(jax.random.key(seed))
    return jax.device_get(run(jnp.float32(RATE / width), None, params, seen)[0])

  return model, train, lambda params: nats(params, batches)


def measured(tools: Any, seed: int) -> dict[str, Any]:
  """A model: [bits per number, bits of all, held-out nats per byte] at every precision."""
  model, train, nats = tools()
  params, points = train(seed), []
  for bits in BITS:
    made, size = quantise.quantised(params, model.axes, bits)
    points.append([bits, size, round(nats(made), 5)])
  told = dict(width=model.card.embed, seed=seed, parameters=count.total(model.card))
  return dict(told, whole=round(nats(params), 5), points=points)


if __name__ == '__main__':
  main()
