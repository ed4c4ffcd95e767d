r"""Sharp metrics and smooth ones of the same models: seven sizes, the same tokens, four tasks with known answers.

  .venv/bin/python -m experiments.emergence.run --out=runs/emergence          # 8 minutes of one core
  .venv/bin/python -m experiments.emergence.run --quick --out=runs/try

Three tasks are learned together, strings by models of their own; each is measured a few times while it learns.
OUT/cells.jsonl has a line per finished model and is gone on with. Writes results.json and emergence.png.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments import small
from experiments.emergence import data, report
from llm_jax.model import init, positions
from llm_jax.optim import rules, schedules
from llm_jax.scaling import emergence

OUT = flags.DEFINE_string('out', 'runs/emergence', 'where the results go')
QUICK = flags.DEFINE_bool('quick', False, 'a few updates of three sizes, to see it work')
LAYERS, HELD = 2, 512
# of the initial weights and the peak of the learning rate, times the root of 1 / width
STD, RATE = 0.6, 0.04


class Ladder(NamedTuple):
  """Sizes that learn the same. draw: (seed, rows) -> (rng -> examples); measured: seed -> task -> examples."""

  widths: tuple[int, ...]
  seeds: int
  steps: int
  rows: int
  length: int
  draw: Callable
  measured: Callable


def by_heart(seed: int, rows: int) -> Callable[[np.random.Generator], data.Examples]:
  """Rows of the strings of this seed."""
  known = data.strings(seed)

  def draw(rng: np.random.Generator) -> data.Examples:
    chosen = rng.integers(0, len(known.tokens), rows)
    return data.Examples(*(x[chosen] for x in known))

  return draw


LADDERS = dict(
  circuits=Ladder(
    widths=(4, 8, 12, 16, 24, 32, 64),
    seeds=1,
    steps=2500,
    rows=64,
    length=data.LENGTH,
    draw=lambda seed, rows: functools.partial(data.circuits, rows=rows),
    measured=lambda seed: data.heldout(HELD),
  ),
  memory=Ladder(
    widths=(4, 8, 16, 24, 32, 48, 64),
    seeds=1,
    steps=800,
    rows=128,
    length=2 + data.DIGITS_OF_STRING,
    draw=by_heart,
    measured=lambda seed: dict(strings=data.strings(seed)),
  ),
)


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  cells, runs = small.Cells(OUT.value), []
  for name, ladder in LADDERS.items():
    if QUICK.value:
      ladder = ladder._replace(widths=(4, 8, 16), seeds=1, steps=20)
    for seed in range(ladder.seeds):
      for width in ladder.widths:
        called = f'{name} width {width} seed {seed} steps {ladder.steps}'
        runs.append(cells.once(called, functools.partial(trained, ladder, width, seed)))
  report.write(report.summarise(runs), OUT.value)
  print(f'results.json and emergence.png are in {OUT.value}')


def trained(ladder: Ladder, width: int, seed: int) -> dict[str, Any]:
  """One model, and what was measured at an eighth, a quarter, half, three quarters and the whole of its steps."""
  model = small.decoder(
    vocab=data.VOCAB,
    embed=width,
    layers=LAYERS,
    heads=2,
    length=ladder.length,
    positions=positions.Learned,
    init=functools.partial(init.gpt2, std=STD * width**-0.5),
  )
  peak, steps, marks = RATE * width**-0.5, ladder.steps, []
  measure = measurer(model, ladder.measured(seed))
  told = dict(peak=peak, steps=steps, warmup=max(1, steps // 20), floor=0.0)
  schedule = functools.partial(schedules.cosine, **told)
  train = small.trainer(
    model, steps=steps, schedule=schedule, rule=functools.partial(rules.adamw, b2=0.98)
  )
  at = {max(1, int(steps * share)) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)}

  def mark(step: int, now: Any, metrics: Any) -> None:
    if step in at:
      tokens = step * ladder.rows * ladder.length
      marks.append(dict(step=step, tokens=tokens, **measure(now.params)))

  params = train(data.Source(ladder.draw(seed, ladder.rows), seed), seed, hooks=[mark])
  parameters = sum(x.size for x in jax.tree.leaves(params))
  told = dict(width=width, parameters=parameters, seed=seed, steps=steps, learning_rate=peak)
  return dict(told, marks=marks)


def measurer(
  model: Any, measured: dict[str, data.Examples]
) -> Callable[[Any], dict[str, dict[str, float]]]:
  """params -> task -> metrics of its examples, greedy answers for those that need one."""

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
    for name, some in measured.items():
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
