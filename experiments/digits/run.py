r"""How numbers are cut into tokens decides how fast a model learns to add them.

  .venv/bin/python -m experiments.digits.run --out=runs/digits           # about 4 minutes of one core
  .venv/bin/python -m experiments.digits.run --quick --out=runs/try

OUT/runs.jsonl has a line per finished model and is gone on with. Writes results.json and digits.png.
"""

import functools
import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.digits import data, report
from llm_jax.core.config import build, use
from llm_jax.model import attention, block, count, ffn, heads, norms, positions, transformer
from llm_jax.objectives import language
from llm_jax.optim import chain, rules, schedules
from llm_jax.train import loop, state, step

OUT = flags.DEFINE_string('out', 'runs/digits', 'where the results go')
SEEDS = flags.DEFINE_integer('seeds', 3, 'runs of every way')
STEPS = flags.DEFINE_integer('steps', 1000, 'updates of every model')
QUICK = flags.DEFINE_bool('quick', False, 'a few updates of one seed, to see it work')
TRAIN, HELD, ROWS, WIDTH, LAYERS, RATE = 20_000, 2_000, 64, 48, 2, 4e-3


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  steps, seeds = (20, 1) if QUICK.value else (STEPS.value, SEEDS.value)
  os.makedirs(OUT.value, exist_ok=True)
  path = os.path.join(OUT.value, 'runs.jsonl')
  for seed in range(seeds):
    for name in data.WAYS:
      if not any((r['way'], r['seed'], r['steps']) == (name, seed, steps) for r in read(path)):
        told = trained(name, seed, steps)
        with open(path, 'a', encoding='utf-8') as f:
          f.write(json.dumps(told) + '\n')
        print(name, seed, told['cpu'], told['marks'][-1], flush=True)
  report.write(report.summarise(read(path)), OUT.value)
  print(f'results.json and digits.png are in {OUT.value}')


def read(path: str) -> list[dict[str, Any]]:
  """The finished models."""
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as f:
    return [json.loads(line) for line in f]


def decoder(way: data.Way) -> Any:
  """Two layers; all but the table of tokens is the same for every way."""
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=4),
    ffn=use(ffn.Gated, hidden=2 * WIDTH),
    norm=use(norms.RMSNorm),
  )
  sizes = dict(vocab=way.vocab, embed=WIDTH, layers=LAYERS, length=way.length)
  made = use(
    transformer.causal,
    block=layer,
    positions=use(positions.Learned),
    head=use(heads.Tied),
    **sizes,
  )
  return build(made)()


@functools.cache
def parts(name: str, steps: int) -> tuple:
  """(model, start: key -> state, update, measure) of a way, compiled once for all seeds."""
  way = data.WAYS[name]
  model = decoder(way)
  schedule = use(schedules.cosine, peak=RATE, steps=steps, warmup=max(1, steps // 20), floor=0.0)
  tx = build(use(chain.make, rule=use(rules.adamw, b2=0.98), schedule=schedule))(model.axes)
  update = step.make(functools.partial(language.next_token, model, chunk=None), tx)

  @jax.jit
  def start(key: jax.Array) -> state.State:
    params = model.init(key)
    return state.State(jax.numpy.zeros((), jax.numpy.int32), params, tx.init(params))

  return model, start, update, measurer(model, way)


def trained(name: str, seed: int, steps: int) -> dict[str, Any]:
  """One model, and what it got right of sums it had not seen at ten times on the way."""
  began, way = time.process_time(), data.WAYS[name]
  model, start, update, measure = parts(name, steps)
  learnt, asked = data.problems(seed, TRAIN, HELD)
  source, now = data.Source(way, learnt, ROWS, seed), start(jax.random.key(seed))
  marks = []
  for until in np.unique(np.linspace(steps / 10, steps, 10).astype(int)).tolist():
    now = loop.train(now, source, update, steps=until, key=jax.random.key(seed))
    marks.append(dict(step=until, **measure(now.params, asked)))
  marks[-1]['learnt'] = measure(now.params, learnt[:HELD])['exact']
  parameters = count.total(model.card)
  return dict(
    way=name,
    seed=seed,
    steps=steps,
    tokens_per_sum=way.length,
    vocab=way.vocab,
    parameters=parameters,
    cpu=round(time.process_time() - began, 1),
    marks=marks,
  )


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
