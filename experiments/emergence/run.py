r"""Sharp metrics and smooth ones of the same models: seven sizes, the same tokens, three tasks with known answers.

  .venv/bin/python -m experiments.emergence.run --out=runs/emergence          # 5 minutes of one core
  .venv/bin/python -m experiments.emergence.run --quick --out=runs/try

Every model is measured a few times while it learns. OUT/runs.jsonl has a line per finished model and is gone on with.
Writes results.json and emergence.png.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.emergence import data, report
from llm_jax.core.config import build, use
from llm_jax.model import attention, block, ffn, heads, init, norms, positions, stack, transformer
from llm_jax.objectives import language
from llm_jax.optim import chain, rules, schedules
from llm_jax.scaling import emergence
from llm_jax.train import loop, state, step

OUT = flags.DEFINE_string('out', 'runs/emergence', 'where the results go')
SEEDS = flags.DEFINE_integer('seeds', 1, 'runs of every size')
STEPS = flags.DEFINE_integer('steps', 2500, 'updates of every model')
WIDTHS = flags.DEFINE_list(
  'widths', ['4', '8', '12', '16', '24', '32', '64'], 'embed of the models'
)
QUICK = flags.DEFINE_bool('quick', False, 'a few updates of two sizes, to see it work')
ROWS, LAYERS, HELD = 64, 2, 512
STD, RATE = (
  0.6,
  0.04,
)  # of the initial weights and the peak of the learning rate, times the root of 1 / width


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  steps, widths = (20, (8, 16)) if QUICK.value else (STEPS.value, tuple(map(int, WIDTHS.value)))
  os.makedirs(OUT.value, exist_ok=True)
  path = os.path.join(OUT.value, 'runs.jsonl')
  for seed in range(SEEDS.value):
    for width in widths:
      if not any((r['width'], r['seed'], r['steps']) == (width, seed, steps) for r in read(path)):
        told = trained(width, seed, steps)
        with open(path, 'a', encoding='utf-8') as f:
          f.write(json.dumps(told) + '\n')
        print(width, told['parameters'], told['cpu'], json.dumps(told['marks'][-1]), flush=True)
  report.write(report.summarise(read(path)), OUT.value)
  print(f'results.json and emergence.png are in {OUT.value}')


def read(path: str) -> list[dict[str, Any]]:
  """The finished models."""
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as f:
    return [json.loads(line) for line in f]


def decoder(width: int) -> Any:
  """Two layers; initial weights shrink with the width."""
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=2),
    ffn=use(ffn.Gated, hidden=2 * width),
    norm=use(norms.RMSNorm),
    residual=use(norms.pre),
  )
  made = use(
    transformer.causal,
    vocab=data.VOCAB,
    embed=width,
    layers=LAYERS,
    block=layer,
    length=data.LENGTH,
    runner=use(stack.scan),
    head=use(heads.Tied),
    positions=use(positions.Learned),
    init=use(init.gpt2, std=STD * width**-0.5),
  )
  return build(made)()


def trained(width: int, seed: int, steps: int) -> dict[str, Any]:
  """One model, and what was measured at an eighth, a quarter, half, three quarters and the whole of its steps."""
  began, model = time.process_time(), decoder(width)
  peak = RATE * width**-0.5
  schedule = use(schedules.cosine, peak=peak, steps=steps, warmup=max(1, steps // 20), floor=0.0)
  tx = build(use(chain.make, rule=use(rules.adamw, b2=0.98), schedule=schedule, clip=1.0))(
    model.axes
  )
  update = step.make(functools.partial(language.next_token, model, chunk=None), tx)
  source, measure = data.Source(ROWS, seed), measurer(model)
  now, marks = state.create(model, tx, seed), []
  for until in sorted({max(1, int(steps * share)) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)}):
    now = loop.train(now, source, update, steps=until, key=jax.random.key(seed))
    marks.append(dict(step=until, tokens=until * ROWS * data.LENGTH, **measure(now.params)))
  parameters = sum(x.size for x in jax.tree.leaves(now.params))
  cpu = round(time.process_time() - began, 1)
  return dict(
    width=width,
    parameters=parameters,
    seed=seed,
    steps=steps,
    learning_rate=peak,
    cpu=cpu,
    marks=marks,
  )


def measurer(model: Any) -> Callable[[Any], dict[str, dict[str, float]]]:
  """params -> task -> metrics of the held-out examples, greedy answers for those that need one."""
  held = data.heldout(HELD)

  @jax.jit
  def score(params: Any, inputs: jax.Array) -> jax.Array:
    x = model.hidden(params, dict(inputs=inputs)).x
    return jax.nn.log_softmax(model.logits(model.head(params), x)[..., : data.VOCAB])

  def answers(params: Any, some: data.Examples, where: np.ndarray) -> np.ndarray:
    """Greedy, one token after the other; what is between the answers stays as it is."""
    tokens = np.array(some.tokens)
    for at in where:
      inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
      tokens[:, at] = np.asarray(score(params, inputs))[:, at].argmax(-1)
    return tokens[:, where]

  def measure(params: Any) -> dict[str, dict[str, float]]:
    told = {}
    for name, some in held.items():
      batch, where = data.batch_of(some), np.flatnonzero(some.answer[0])
      logp = np.asarray(score(params, batch['inputs']))[:, where]
      targets, said = some.tokens[:, where], answers(params, some, where)
      mean = emergence.log_likelihood(logp, targets)
      right = logp.argmax(-1) == targets
      told[name] = dict(
        length=len(where),
        exact_match=float(emergence.exact_match(said, targets).mean()),
        token_edit_distance=float(emergence.token_edit_distance(said, targets).mean()),
        log_likelihood=float(mean.mean()),
        brier=float(emergence.brier(logp, targets).mean()),
        token_accuracy=float(right.mean()),
        position_accuracy=right.mean(0).tolist(),
        probability=float(np.exp(mean * len(where)).mean()),
        token_probability=float(np.exp(mean).mean()),
      )
    return told

  return measure


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
