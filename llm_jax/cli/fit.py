r"""Scaling laws of a sweep: Chinchilla's three approaches with intervals, their figure, the best model for a budget.

  llm-jax fit --workdir=runs/isoflop
  llm-jax fit --workdir=runs/isoflop --budget=1e14 --devices=8

Reads DIR/results.jsonl; writes DIR/fit.json, DIR/fit.png and, for a budget (6 N D, in FLOPs), DIR/optimal.json: the
config of the compute-optimal model, which `llm-jax train` runs. --heldout: the folder of runs that the fit does not
see, to compare what it says of them with what they became.
"""

import json
import os
import sys

from absl import flags

from llm_jax.cli.flags import parse, read_sweep
from llm_jax.cli.main import main as command
from llm_jax.core import files
from llm_jax.core.config import to_json
from llm_jax.core.errors import UserError
from llm_jax.scaling import figures, ladder, sweep

OPTIMAL = 'optimal.json'  # the config of the best model


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  if argv and not argv[0].startswith('-'):
    argv = [f'--workdir={argv[0]}', *argv[1:]]
  given = _flags()
  ours = parse(argv, given, __doc__)
  if not given.workdir:
    raise UserError('name the folder of a sweep: --workdir=runs/NAME')
  folder = os.path.expanduser(given.workdir)
  rows = sweep.results(folder)
  table = ladder.read(rows)
  found = ladder.fit(table, trials=given.trials)
  told = ladder.told(found) | dict(runs=len(rows))
  print('\n'.join(figures.lines(told, rows)))
  best = None
  if given.budget is not None:
    best = _optimum(found, given.budget, given.devices)
    told['optimum'] = best
    sized = _config(folder, ours)
    if sized is not None:
      _write_optimal(folder, sized, best)
  heldout = None
  if given.heldout is not None:
    held = sweep.results(given.heldout)
    heldout, told['heldout'] = ladder.read(held), ladder.compare(found, held)
    for one in told['heldout']:
      value = one['predicted']['loss']
      said = f'{one["loss"]:.4f} where {value:.4f} was predicted, {one["error"]:+.2%}'
      print(f'held out {one["cell"]}: {said}')
  files.write(os.path.join(folder, 'fit.json'), json.dumps(told, indent=1))
  path = figures.draw(table, found, os.path.join(folder, 'fit.png'), heldout=heldout, optimum=best)
  print(f'\n{os.path.join(folder, "fit.json")} has the numbers, {path} shows them')
  return 0


def _optimum(found: ladder.Ladder, budget: float, devices: int) -> dict:
  """The size for a budget by the approach that extrapolates best, beside it those of the others; said too."""
  if budget <= 0 or devices < 1:
    raise UserError(f'--budget={budget:g} and --devices={devices} have to be above zero')
  print(f'\nthe best for {budget:.3g} FLOPs:')
  sizes = {name: ladder.optimum(one, budget) for name, one in found.estimates.items()}
  for name, one in sizes.items():
    n, d = one['parameters'], one['tokens'][0]
    text = f'{n[0]:.3g} parameters ({n[1]:.3g} to {n[2]:.3g}), {d:.3g} tokens'
    print(f'{figures.LINES[name][0]:14}{text}')
  n = sizes[found.trusted]['parameters'][0]
  said = ladder.predict(found, n, budget / (6 * n))
  print(f'with a loss of {said["loss"]:.4f} nats per token by {figures.LINES[said["by"]][0]}')
  told = dict(budget=budget, devices=devices, parameters=n, tokens=budget / (6 * n))
  return told | said | dict(approaches=sizes)


def _config(folder: str, ours: list[str]):
  """What makes a config of a size, by the config of the sweep: the one given, else the one that the folder is of."""
  path = os.path.join(folder, sweep.CONFIG)
  if not ours and os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      ours = json.load(f)
  return read_sweep(ours).optimal if ours else None


def _write_optimal(folder: str, sized, best: dict) -> None:
  """The config of the optimum, and how to run it."""
  recipe = sized(parameters=best['parameters'], tokens=best['tokens'], devices=best['devices'])
  path = files.write(os.path.join(folder, OPTIMAL), to_json(recipe))
  print(f'llm-jax train --config={path} --workdir={os.path.join(folder, "optimal")}')


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  at = dict(flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder of a sweep', **at)
  flags.DEFINE_float('budget', None, 'FLOPs to spend on one training, counted as 6 N D', **at)
  flags.DEFINE_integer('devices', 1, 'that train it: the batch is divided among them', **at)
  flags.DEFINE_string('heldout', None, 'folder of runs that the fit does not see', **at)
  flags.DEFINE_integer('trials', 300, 'of the bootstrap, for the intervals', lower_bound=20, **at)
  return values


if __name__ == '__main__':  # python -m llm_jax.cli.fit
  sys.exit(command(['fit', *sys.argv[1:]]))
