r"""A ladder of small models, its three laws, and the largest run predicted before it is trained.

  .venv/bin/python -m experiments.scaling_ladder.run --out=runs/ladder

Every part of it goes on where it was when it is run again. Writes what this folder ships: results.jsonl, fit.json,
fit.png, prediction.json (before the last run) and heldout.jsonl (after it).
"""

import argparse
import json
import os
import shutil
import time

from llm_jax.cli import fit as fit_command
from llm_jax.cli import main as commands
from llm_jax.cli import train
from llm_jax.core import config, files
from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.scaling import ladder, sweep, workers

CONFIG = 'configs/scaling/isoflop.py'
LARGEST = 6e12  # FLOPs of the run that is predicted, 6 N D


def main() -> None:
  """Runs it."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', default='runs/ladder', help='where everything goes')
  parser.add_argument('--workers', type=int, default=2, help='processes')
  told = parser.parse_args()
  begin, out = time.perf_counter(), told.out
  _done(['sweep', f'--config={CONFIG}', f'--workdir={out}', f'--workers={told.workers}'])
  fit = ['fit', f'--workdir={out}', f'--budget={LARGEST:g}']
  _done(fit)
  cell = announce(out)
  sweep.work(f'{out}/heldout', [cell], workers.logged(train.run))
  _done([*fit, f'--heldout={out}/heldout'])
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
    said = ladder.predict(ladder.fit(ladder.read(sweep.results(out))), n, d)
    when = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    files.write(path, json.dumps(dict(written=when, parameters=n, tokens=d, **said), indent=1))
  return cell


def _done(words: list[str]) -> None:
  """Runs a command; an error ends all of it."""
  if commands.main(words):
    raise UserError(f'llm-jax {words[0]} stopped here: the same command goes on')


if __name__ == '__main__':
  main()
