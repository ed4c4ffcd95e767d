r"""Does the best learning rate of a narrow model hold for a wide one? Two parametrisations, four widths, real text.

  .venv/bin/python -m experiments.mup.run
  .venv/bin/python -m experiments.mup.run --seeds=2
  .venv/bin/python -m experiments.mup.run --quick --out=runs/mup

Writes results.json (one entry for every run; what is there already is not run again: a run that was stopped goes on),
transfer.png and coordinates.png into its own folder or `--out`, and prints the tables of the README.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import small
from experiments.mup import models, report
from llm_jax.core import files, mesh
from llm_jax.objectives import language

VOCAB = 259  # bytes, padding, end, unknown


class Size(NamedTuple):
  """How much is done. rates: log2 of the peaks; bracketed: widths that cost too much to try them all; moved: updates
  before the coordinates are looked at; at: the rate there, and the first of a bracket."""

  widths: tuple = (64, 128, 256, 512)
  rates: tuple = (-10, -9, -8, -7, -6, -5, -4)
  bracketed: tuple = (512,)
  seeds: int = 1
  steps: int = 150
  batch: int = 8
  length: int = 64
  heldout: int = 32
  layers: int = 2
  depths: tuple = (2, 4, 8, 16)
  moved: int = 10
  at: int = -7


QUICK = Size(widths=(64, 128), rates=(-8, -6), seeds=1, steps=4, heldout=2, depths=(2, 4), moved=2)


def text(size: Size, split: str, number: int, seed: int) -> dict[str, jax.Array]:
  """`number` batches of bytes of tiny Shakespeare, stacked: [number, batch, length]."""
  model = models.model(models.HEAD_DIM, 1, VOCAB)
  return small.text(model, split, number, batch=size.batch, length=size.length, seed=seed)


def learning_rates(size: Size, base: models.Base, done: dict[str, Any]) -> Iterator[None]:
  """Every width at every rate, the widest at those that show where its optimum is; what is measured is the loss at the
  end on text that nobody was trained on."""
  heldout = text(size, 'validation', size.heldout, 0)
  heldout = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), heldout)
  for seed in range(size.seeds):
    batches = text(size, 'train', size.steps, seed)
    for width in reversed(size.widths):  # a run that is cut short has what says most
      for name, make in models.PARAMETRISATIONS.items():
        made = models.build(make(base, size.layers), width, size.layers, VOCAB, size.steps)
        params = score = None
        key = lambda rate, name=name, width=width, seed=seed: report.key(name, width, rate, seed)
        while (rate := wanted(size, width, done, key)) is not None:
          twin = report.key('standard', width, rate, seed)
          if width == base.width and twin in done:
            done[key(rate)] = done[twin]  # the base model is the same in both
            continue
          if params is None:
            params, score = made.model.init(jax.random.key(seed)), jax.jit(scorer(made.model))
          after, losses = made.train(2.0**rate, params, batches)
          done[key(rate)] = dict(
            heldout=round(float(score(after, heldout)), 4),
            train=round(float(losses[-max(1, size.steps // 10) :].mean()), 4),
          )
          print(f'{key(rate)}: {done[key(rate)]}', flush=True)
          yield


def wanted(size: Size, width: int, done: Mapping[str, Any], key: Callable) -> int | None:
  """The rate to try next: of a bracketed width the missing neighbour of the best so far, None once both are there."""
  found = {r: done[key(r)]['heldout'] for r in size.rates if key(r) in done}
  if width not in size.bracketed:
    return next((r for r in size.rates if r not in found), None)
  if not found:
    return size.at
  best = min(found, key=found.get)
  return next((r for r in (best - 1, best + 1) if r in size.rates and r not in found), None)


def scorer(model: Any) -> Any:
  """(params, batch) -> nats per token."""

  def score(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    total = language.next_token(model, params, batch, None, chunk=None)
    return total.sum / total.weight

  return score


def coordinates(size: Size, base: models.Base) -> dict[str, Any]:
  """What `models.moved` finds at every width, and at every depth, and the exponents."""
  batches = text(size, 'train', size.moved, 0)

  def look(make: Any, width: int, layers: int) -> dict[str, float]:
    made = models.build(make, width, layers, VOCAB, size.moved)
    params = made.model.init(jax.random.key(0))
    return models.moved(made, 2.0**size.at, params, batches, layers)

  found: dict[str, Any] = {}
  for name, make in models.PARAMETRISATIONS.items():
    rows = [look(make(base, size.layers), width, size.layers) for width in size.widths]
    found[f'width, {name}'] = dict(rows=rows, slopes=models.slopes(size.widths, rows))
  kinds = {
    'standard': models.standard,
    'alpha 1/2': models.transferred,
    'alpha 1': models.transferred,
  }
  for name, make in kinds.items():
    of = base._replace(alpha=1.0 if name == 'alpha 1' else 0.5)
    rows = [look(make(of, n), base.width, n) for n in size.depths]
    ends = [
      dict(last=r[f'layer {n}'], logits=r['logits']) for r, n in zip(rows, size.depths, strict=True)
    ]
    found[f'depth, {name}'] = dict(rows=ends, slopes=models.slopes(size.depths, ends))
  return found


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--quick', action='store_true', help='two widths, four updates')
  parser.add_argument('--out', default=os.path.dirname(os.path.abspath(__file__)))
  parser.add_argument('--seeds', type=int, default=1)
  given = parser.parse_args(argv)
  size, base = (QUICK if given.quick else Size())._replace(seeds=given.seeds), models.Base()
  os.makedirs(given.out, exist_ok=True)
  path = os.path.join(given.out, 'results.json')
  told: dict[str, Any] = dict(settings=json.loads(json.dumps(size._asdict())), runs={})
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      stored = json.load(f)
    if stored['settings'] | dict(seeds=size.seeds) != told['settings']:
      parser.error(f'{path} is of other settings: choose another folder with --out')
    told = stored | dict(settings=told['settings'])
  with jax.set_mesh(mesh.make(data=1)):
    for _ in learning_rates(size, base, told['runs']):
      files.write(path, json.dumps(told, indent=1) + '\n')
    told.setdefault('coordinates', None)
    if told['coordinates'] is None:
      told['coordinates'] = coordinates(size, base)
  told['optima'] = report.optima(told)
  files.write(path, json.dumps(told, indent=1) + '\n')
  report.transfer(told, os.path.join(given.out, 'transfer.png'))
  report.coordinates(told, os.path.join(given.out, 'coordinates.png'))
  print(report.tables(told))


if __name__ == '__main__':
  main()
