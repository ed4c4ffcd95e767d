r"""Is text worth cleaning before it is learnt from, and what does each of three domains give the others?

  .venv/bin/python -m experiments.filtering.run --out=runs/filtering          # 6 minutes of one core
  .venv/bin/python -m experiments.filtering.run --quick --out=runs/try

The same small model, the same number of bytes, seven texts to learn from: documents of three domains as they are, the
same with what happens to text on the web, that once cleaned of copies alone and once of everything; and the clean
documents without each of the domains. All are measured on the same clean held-out text of every domain.
OUT/cells.jsonl has a line for every model and is gone on with. Writes results.json and filtering.png.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import small
from experiments.filtering import clean, data, report
from llm_jax.model import count, init
from llm_jax.optim import rules, schedules

VOCAB, LENGTH, ROWS, PEAK = 256, 128, 12, 5e-3


class Plan(NamedTuple):
  """limit: bytes of each domain. held: batches of 32 rows of each that are measured."""

  limit: int = 300_000
  seeds: int = 5
  steps: int = 300
  width: int = 64
  held: int = 16


TRY = Plan(limit=10_000, seeds=2, steps=4, width=16, held=1)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', default='runs/filtering', help='where the results go')
  parser.add_argument('--quick', action='store_true', help='a few updates, to see it work')
  given = parser.parse_args(argv)
  plan = TRY if given.quick else Plan()
  cells = small.Cells(given.out)
  made, told = texts(plan.limit)
  told['plan'] = plan._asdict()
  tools = functools.cache(functools.partial(compiled, plan))
  runs = []
  for seed in range(plan.seeds):
    for arm, text in made.items():
      trained = functools.partial(measured, tools, arm, text, seed)
      runs.append(cells.once(f'{arm} seed {seed} steps {plan.steps}', trained))
  summary = report.summarise(runs, told)
  report.write(summary, given.out)
  print(report.tables(summary))


def texts(limit: int) -> tuple[dict[str, bytes], dict[str, Any]]:
  """(The text of every arm, what cleaning did)."""
  parts = {name: data.sample(name, limit) for name in data.DOMAINS}
  own = [one for some in parts.values() for one in some]
  found = [*data.dirty(own), *data.pages()]
  alone, few = clean.all_of(found, clean.COPIES)
  filtered, all_ = clean.all_of(found)
  corpora = dict(clean=own, unfiltered=found, deduplicated=alone, filtered=filtered)
  told = dict(
    steps=dict(deduplicated=few, filtered=all_),
    against={name: clean.against(some, own) for name, some in corpora.items()},
  )
  for name in data.DOMAINS:
    corpora[f'no {name}'] = [one for other in data.DOMAINS if other != name for one in parts[other]]
  return {name: data.joined(some) for name, some in corpora.items()}, told


def compiled(plan: Plan) -> tuple[Callable, Callable, int]:
  """((text, seed) -> parameters, parameters -> held-out nats per byte by domain, how many parameters)."""
  std = functools.partial(init.gpt2, std=0.64 / plan.width**0.5)
  model = small.decoder(vocab=VOCAB, embed=plan.width, heads=2, layers=2, length=LENGTH, init=std)
  warmup = max(1, min(plan.steps // 10, 20))
  schedule = functools.partial(
    schedules.cosine, peak=1.0, steps=plan.steps, warmup=warmup, floor=0.0
  )
  run = small.scanned(model, schedule=schedule, rule=functools.partial(rules.adamw, b2=0.99))
  nats = small.evaluator(model)
  heldout = {
    name: data.held(data.joined(data.documents(name, 'validation')), plan.held, 32, LENGTH)
    for name in data.DOMAINS
  }

  def train(text: bytes, seed: int) -> Any:
    batches = data.drawn(text, plan.steps, ROWS, LENGTH, seed)
    return run(jnp.float32(PEAK), None, model.init(jax.random.key(seed)), batches)[0]

  measure = lambda params: {name: nats(params, some) for name, some in heldout.items()}
  return train, measure, count.total(model.card)


def measured(tools: Callable, arm: str, text: bytes, seed: int) -> dict[str, Any]:
  """A model on the text of an arm: its held-out loss of every domain."""
  train, measure, parameters = tools()
  loss = {name: round(x, 5) for name, x in measure(train(text, seed)).items()}
  return dict(arm=arm, seed=seed, bytes=len(text), parameters=parameters, loss=loss)


if __name__ == '__main__':
  main()
