r"""A ladder of small models, its three laws, and the largest run predicted before it is trained.

  .venv/bin/python -m experiments.scaling_ladder.run --out=runs/ladder
  .venv/bin/python -m experiments.scaling_ladder.run --quick

Every part of it goes on where it was when it is run again. Writes what this folder ships: results.jsonl, fit.json,
fit.png, prediction.json (before the last run) and heldout.jsonl (after it).
"""

import json
import os
import shutil
import sys
import time

from absl import app, flags

from llm_jax.cli import fit as fit_command
from llm_jax.cli import main as commands
from llm_jax.cli import train
from llm_jax.core import config
from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.scaling import ladder, sweep, workers

OUT = flags.DEFINE_string('out', 'runs/ladder', 'where everything goes')
QUICK = flags.DEFINE_bool('quick', False, 'a fiftieth of the budgets, to see it work')
WORKERS = flags.DEFINE_integer('workers', 2, 'processes')
BUDGET = flags.DEFINE_float('budget', 6e12, 'FLOPs of the run that is predicted')
CONFIG = 'configs/scaling/isoflop.py'


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  begin, out = time.perf_counter(), OUT.value
  scale = 0.02 if QUICK.value else 1.0
  told = f'--config={CONFIG}:budget={1e11 * scale:g}'
  _done(commands.main(['sweep', told, f'--workdir={out}', f'--workers={WORKERS.value}']))
  said = [f'--workdir={out}', f'--budget={BUDGET.value * scale:g}']
  _done(commands.main(['fit', *said]))
  cell = announce(out)
  sweep.work(f'{out}/heldout', [cell], workers.logged(train.run))
  _done(commands.main(['fit', *said, f'--heldout={out}/heldout']))
  shutil.copy(f'{out}/heldout/{sweep.TABLE}', f'{out}/heldout.jsonl')
  print(f'{time.perf_counter() - begin:.0f} s; {out} holds results.jsonl, fit.json, fit.png')


def announce(out: str) -> sweep.Cell:
  """The largest run as a cell, with what the fit says of it written to prediction.json before there is any of it."""
  recipe = config.read(os.path.join(out, fit_command.OPTIMAL))
  n = count.total(config.build(recipe.model)().card)
  d = recipe.steps * recipe.source.batch * recipe.source.length
  cell = sweep.Cell('largest', dict(parameters=n, tokens=d), recipe)
  path = os.path.join(out, 'prediction.json')
  if not os.path.exists(path):
    os.makedirs(out, exist_ok=True)
    said = ladder.predict(ladder.fit(ladder.read(sweep.results(out))), n, d)
    when = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    sweep.write(path, json.dumps(dict(written=when, parameters=n, tokens=d, **said), indent=1))
  return cell


def _done(code: int) -> None:
  if code:
    raise UserError('stopped here: the same command goes on')


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
