r"""How numbers are cut into tokens decides how fast a model learns to add them.

  .venv/bin/python -m experiments.digits.run --out=runs/digits           # about 4 minutes of one core
  .venv/bin/python -m experiments.digits.run --quick --out=runs/try

OUT/cells.jsonl has a line per finished model and is gone on with. Writes results.json and digits.png.
"""

import functools
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import small
from experiments.digits import data, report
from llm_jax.model import count, heads, positions
from llm_jax.model.functions import Model
from llm_jax.optim import rules, schedules

OUT = flags.DEFINE_string('out', 'runs/digits', 'where the results go')
SEEDS = flags.DEFINE_integer('seeds', 3, 'runs of every way')
STEPS = flags.DEFINE_integer('steps', 1000, 'updates of every model')
QUICK = flags.DEFINE_bool('quick', False, 'a few updates of one seed, to see it work')
TRAIN, HELD, ROWS, WIDTH, LAYERS, RATE = 20_000, 2_000, 64, 48, 2, 4e-3


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  steps, seeds = (20, 1) if QUICK.value else (STEPS.value, SEEDS.value)
  store = small.Cells(OUT.value)
  for seed in range(seeds):
    for name in data.WAYS:
      store.once(f'{name}-{seed}-{steps}', functools.partial(trained, name, seed, steps))
  report.write(report.summarise(list(store.all().values())), OUT.value)
  print(f'results.json and digits.png are in {OUT.value}')


def decoder(way: data.Way) -> Model:
  """Two layers; all but the table of tokens is the same for every way."""
  sizes = dict(vocab=way.vocab, embed=WIDTH, heads=4, layers=LAYERS, length=way.length)
  return small.decoder(positions=positions.Learned, head=heads.Tied, **sizes)


@functools.cache
def parts(name: str, steps: int) -> tuple:
  """(model, train, measure) of a way, compiled once for all seeds."""
  way = data.WAYS[name]
  model = decoder(way)
  told = dict(peak=RATE, steps=steps, warmup=max(1, steps // 20), floor=0.0)
  schedule = functools.partial(schedules.cosine, **told)
  rule = functools.partial(rules.adamw, b2=0.98)
  train = small.trainer(model, steps=steps, schedule=schedule, rule=rule)
  return model, train, measurer(model, way)


def trained(name: str, seed: int, steps: int) -> dict[str, Any]:
  """One model, and what it got right of sums it had not seen at ten times on the way."""
  way = data.WAYS[name]
  model, train, measure = parts(name, steps)
  learnt, asked = data.problems(seed, TRAIN, HELD)
  looks, marks = np.linspace(steps / 10, steps, 10).astype(int).tolist(), []

  def look(at: int, now: Any, metrics: Any) -> None:
    if at in looks:
      marks.append(dict(step=at, **measure(now.params, asked)))

  params = train(data.Source(way, learnt, ROWS, seed), seed, hooks=[look])
  marks[-1]['learnt'] = measure(params, learnt[:HELD])['exact']
  size = dict(tokens_per_sum=way.length, vocab=way.vocab, parameters=count.total(model.card))
  return dict(way=name, seed=seed, steps=steps, **size, marks=marks)


def measurer(model: Any, way: data.Way) -> Any:
  """(params, sums) -> the share of answers that are right throughout, and nats per answer.

  An answer is right when each of its tokens is the likeliest after the right ones before it, which is when greedy
  decoding writes it.
  """

  @jax.jit
  def score(params: Any, batch: Any) -> Any:
    logits = model.logits(params, model.hidden(params, batch).x)[:, -way.answer :, : way.vocab]
    targets = batch['targets'][:, -way.answer :]
    logp = jax.nn.log_softmax(logits)
    own = jax.numpy.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return (logits.argmax(-1) == targets).all(-1), -own.sum(-1)

  def measure(params: Any, pairs: np.ndarray) -> dict[str, float]:
    right, nats = score(params, data.batch_of(way, data.tokens(way, pairs)))
    return dict(exact=float(right.mean()), nats=float(nats.mean()))

  return measure


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
