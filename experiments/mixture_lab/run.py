r"""Which mixture of books, Wikipedia and stories: DoReMi's and RegMix's against the uniform one, at equal tokens.

  .venv/bin/python -m experiments.mixture_lab.run --out=runs/mixture_lab          # 8 minutes of one core
  .venv/bin/python -m experiments.mixture_lab.run --quick --out=runs/try

Small models find the mixtures, a model more than three times as large is trained on each. Every model that was trained
is a line of OUT/cells.jsonl; what is there already is not trained again, so a run that was stopped goes on, and two
processes may share the work (`--only=uniform,regmix`, `--only=doremi`). Writes results.json, results.md and
results.png.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import small
from experiments.mixture_lab import report
from llm_jax.data import batch, domains, pipeline, tasks, vocab
from llm_jax.model import init
from llm_jax.optim import rules, schedules
from llm_jax.scaling import mixture

DOMAINS = ('books', 'wikipedia', 'stories')
ARMS = ('uniform', 'doremi', 'regmix')
OUT = flags.DEFINE_string('out', 'runs/mixture_lab', 'where the results go')
SEEDS = flags.DEFINE_integer('seeds', 5, 'runs of every mixture')
ONLY = flags.DEFINE_list('only', list(ARMS), 'which mixtures to work on now')
QUICK = flags.DEFINE_bool('quick', False, 'hardly trained, to see it work')
LENGTH = 128


class Size(NamedTuple):
  """A model and how long it is trained. std: of the initial weights; small models need more than GPT-2's 0.02. rows:
  in a batch."""

  embed: int
  layers: int
  heads: int
  std: float
  peak: float
  steps: int
  rows: int = 12


class Plan(NamedTuple):
  """tiny: RegMix's proxies. small: DoReMi's. large: the check. tried: mixtures fitted; held: predicted. rounds: of
  DoReMi. batches: of 32 rows of each domain that are measured."""

  tiny: Size
  small: Size
  large: Size
  tried: int
  held: int
  rounds: int
  batches: int


FULL = Plan(
  tiny=Size(32, 2, 2, 0.1, 1e-2, 150),
  small=Size(32, 2, 2, 0.1, 5e-3, 1500, rows=3),
  large=Size(64, 2, 2, 0.08, 5e-3, 300),
  tried=18,
  held=6,
  rounds=3,
  batches=8,
)
TRY = Plan(
  tiny=Size(16, 1, 1, 0.1, 1e-2, 4),
  small=Size(16, 1, 1, 0.1, 1e-2, 4),
  large=Size(16, 1, 1, 0.1, 1e-2, 4),
  tried=8,
  held=3,
  rounds=1,
  batches=1,
)


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  plan, seeds = (TRY, 2) if QUICK.value else (FULL, SEEDS.value)
  cells = small.Cells(OUT.value)
  lab = Lab(plan, cells)
  found = {}
  if 'doremi' in ONLY.value:
    found['doremi'] = [lab.doremi(plan.rounds)] * seeds
  if 'regmix' in ONLY.value:
    found['regmix'] = [lab.regmix()] * seeds
  if 'uniform' in ONLY.value:
    found['uniform'] = [(1 / 3,) * 3] * seeds
    for i, name in enumerate(DOMAINS):
      lab.large(f'only {name}', tuple(float(i == j) for j in range(3)), 0)
  for seed in range(seeds):
    for arm in found:
      lab.large(arm, found[arm][seed], seed)
  if set(found) == set(ARMS):
    report.write(report.summarise(cells.all(), DOMAINS, ARMS, seeds, plan.held), OUT.value)
    print(f'results.json, results.md and results.png are in {OUT.value}')


class Lab:
  """Trains and measures. Models are compiled once for all their runs."""

  def __init__(self, plan: Plan, cells: small.Cells):
    self._plan, self._cells, self._compiled = plan, cells, {}

  def large(self, arm: str, rates: Sequence[float], seed: int) -> None:
    """The check: a large model on a mixture."""
    self._mixed(f'large {arm} {seed}', self._plan.large, rates, seed)

  def doremi(self, rounds: int) -> tuple[float, ...]:
    """The mixture of DoReMi's last round; each has a reference on the mixture of the round before, the first on the
    uniform one."""
    rates = (1 / 3,) * 3
    for k in range(rounds):
      rates = self._cells.once(f'doremi round {k}', functools.partial(self._doremi, rates, k))[
        'rates'
      ]
    return tuple(rates)

  def _doremi(self, rates: Sequence[float], seed: int) -> dict[str, Any]:
    size = self._plan.small
    model, train, measure = self._tools(size)
    params = train(mixed(model, rates, size.rows, seed), seed)
    inner = sides(model, size.rows, seed + 1000)
    made = mixture.DoReMi(model, inner, lambda state: params, burn_in=size.steps // 3)
    recorder = Recorder(made)
    proxy = train(recorder, seed)
    found = dict(rates=made.average.tolist(), trace=recorder.trace)
    return dict(reference=measure(params), loss=measure(proxy), **found)

  def regmix(self) -> tuple[float, ...]:
    """The mixture with the lowest predicted loss of its worst domain."""
    plan = self._plan
    tried = mixture.dirichlet(plan.tried + plan.held, (1 / 3,) * 3, least=0.02, seed=0)
    runs = [self._mixed(f'tiny {i}', plan.tiny, rates, 0) for i, rates in enumerate(tried)]
    mixtures, loss = (np.array([one[k] for one in runs[: plan.tried]]) for k in ('rates', 'loss'))
    predict = report.worst(report.fitted(mixtures, loss, mixture.exponential))
    candidates = mixture.dirichlet(20_000, (1 / 3,) * 3, least=0.02, seed=1)
    return tuple(mixture.best(predict, candidates).tolist())

  def _mixed(self, name: str, size: Size, rates: Sequence[float], seed: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
      model, train, measure = self._tools(size)
      return dict(
        rates=list(map(float, rates)),
        loss=measure(train(mixed(model, rates, size.rows, seed), seed)),
      )

    return self._cells.once(name, make)

  def _tools(self, size: Size) -> tuple:
    """(model, (source, seed) -> params, params -> loss by domain)."""
    if size not in self._compiled:
      model = decoder(size)
      self._compiled[size] = model, trainer(model, size), measurer(model, self._plan.batches)
    return self._compiled[size]


class Recorder:
  """A DoReMi source that notes its weights."""

  def __init__(self, source: mixture.DoReMi):
    self._source, self.trace = source, []

  def __call__(self, training: Any) -> pipeline.Batch:
    made = self._source(training)
    self.trace.append([round(x, 4) for x in self._source.weights.tolist()])
    return made

  def close(self) -> None:
    """Stops the threads."""
    self._source.close()


# --- models and data ----------------------------------------------------------------------------------


def words(text: Any = None) -> vocab.Bytes:
  """Bytes: a nat per token is a nat per byte."""
  return vocab.bytes_(text, extra_ids=0, modes=())


def decoder(size: Size) -> Any:
  """A small LLaMA on bytes."""
  return small.decoder(
    vocab=words().size,
    embed=size.embed,
    layers=size.layers,
    heads=size.heads,
    length=LENGTH,
    init=functools.partial(init.gpt2, std=size.std),
  )


def domain(name: str) -> Callable:
  """One domain in bytes."""
  return functools.partial(tasks.domain, name=name, vocab=words)


def mixed(model: Any, rates: Sequence[float], rows: int, seed: int) -> pipeline.Source:
  """Rows drawn from the domains at these rates."""
  there = [(domain(name), float(rate)) for name, rate in zip(DOMAINS, rates, strict=True) if rate]
  parts, shares = zip(*there, strict=True)
  task = functools.partial(tasks.mixture, tasks=parts, rates=shares, vocab=words)
  return pipeline.make(
    model, task=task, batch=rows, length=LENGTH, rows=batch.concatenate, seed=seed
  )


def sides(model: Any, rows: int, seed: int) -> domains.Domains:
  """As many rows of each domain."""
  made = [
    functools.partial(pipeline.make, task=domain(name), rows=batch.concatenate, seed=seed)
    for name in DOMAINS
  ]
  return domains.make(model, sources=tuple(made), batch=rows, length=LENGTH)


def trainer(model: Any, size: Size) -> Callable[[Any, int], Any]:
  """(source, seed) -> the parameters after `size.steps` updates; the source is closed."""
  warmup = max(1, min(size.steps // 10, 20))
  schedule = functools.partial(
    schedules.cosine, peak=size.peak, steps=size.steps, warmup=warmup, floor=0.0
  )
  rule = functools.partial(rules.adamw, b2=0.99)
  train = small.trainer(model, steps=size.steps, schedule=schedule, rule=rule)

  def trained(source: Any, seed: int) -> Any:
    with contextlib.closing(source):
      return train(source, seed)

  return trained


def measurer(model: Any, batches: int) -> Callable[[Any], list[float]]:
  """params -> held-out nats per byte of each domain."""
  told = dict(batch=32, length=LENGTH, rows=batch.concatenate, split='validation', jitter=False)
  held, nats = [], small.evaluator(model)
  for name in DOMAINS:
    with contextlib.closing(pipeline.make(model, task=domain(name), **told)) as source:
      held.append([source() for _ in range(batches)])
  return lambda params: [nats(params, some) for some in held]


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
