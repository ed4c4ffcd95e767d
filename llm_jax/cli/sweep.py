r"""Many trainings that differ in a few arguments, in one folder: in N processes here, or by index on a cluster.

  llm-jax sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --workers=2
  llm-jax sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --list
  llm-jax sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --index=$SLURM_ARRAY_TASK_ID

What is done stays done, what was killed goes on from its checkpoint, and any number of these commands may share a
folder. Every cell is trained by what `llm-jax train` calls; --config.KEY=VALUE is set in all of them. DIR/results.jsonl
has a line for each cell that is done. The exit code is 1 where one failed.
"""

import json
import os
import sys

import jax
from absl import flags

from llm_jax.cli import train
from llm_jax.cli.flags import parse, read_sweep
from llm_jax.cli.main import main as command
from llm_jax.core import files
from llm_jax.core.errors import UserError
from llm_jax.scaling import sweep, workers
from llm_jax.train import report


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = _flags()
  ours = parse(argv, given, __doc__)
  cells = read_sweep(ours).cells
  folder = report.open_workdir(given.workdir)
  sweep.publish(folder)
  files.write(os.path.join(folder, sweep.CONFIG), json.dumps(ours))
  if given.list:
    return _list(folder, cells)
  if given.worker:  # one of --workers
    workers.stop_with_parent()
    sweep.work(folder, cells, workers.logged(_train))
    return 0
  if given.index is not None and given.index >= len(cells):
    raise UserError(f'--index={given.index}, but the sweep has the cells 0 to {len(cells) - 1}')
  chosen = cells if given.index is None else (cells[given.index],)
  for cell in chosen:
    sweep.same_config(sweep.place(folder, cell), cell)
  if given.retry:
    print(f'{sweep.forgive(folder, chosen)} failed cells are tried again')
  if given.index is not None:
    sweep.work(folder, chosen, _train, wait=False)
    failed = sweep.failures(folder, chosen)
  else:
    again = [sys.executable, '-m', 'llm_jax.cli.sweep', f'--workdir={folder}', '--worker', *ours]
    try:
      failed = workers.run(folder, chosen, again, count=given.workers)
    except KeyboardInterrupt:
      print('stopped, with its state saved: the same command goes on', file=sys.stderr)
      return 130
  return _report(folder, chosen, failed)


def _train(recipe, where: str) -> None:
  train.run(recipe, where)
  jax.clear_caches()  # of programs that no other cell runs


def _report(folder: str, cells: tuple, failed: dict[str, str]) -> int:
  """Says what came of the cells; returns the exit code."""
  # a worker is stopped when all cells have ended, be its last one in the table or not
  sweep.publish(folder)
  states = [sweep.state(folder, cell) for cell in cells]
  print(f'{states.count("done")} of {len(cells)} cells are done: {folder}/{sweep.TABLE}')
  for name, error in failed.items():
    print(f'{name} failed: {error}', file=sys.stderr)
  if failed:
    print('look into its log.txt; the same command with --retry tries again', file=sys.stderr)
  elif states.count('running'):
    print('another process is at it: this one leaves the cell to it', file=sys.stderr)
  return int(states.count('done') < len(cells))


def _list(folder: str, cells: tuple) -> int:
  width = max(len(cell.name) for cell in cells)
  for i, cell in enumerate(cells):
    state = sweep.state(folder, cell)
    told = f', loss {sweep.result(folder, cell)["loss"]:.4f}' if state == 'done' else ''
    print(f'{i:4}  {cell.name:{width}}  {sweep.flops(cell):8.2e} FLOPs  {state}{told}')
  for name, error in sweep.failures(folder, cells).items():
    print(f'{name} failed: {error}')
  return 0


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  at = dict(flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder of the sweep; its cells are in DIR/cells', **at)
  flags.DEFINE_integer('workers', 1, 'processes; they share the cores', lower_bound=1, **at)
  flags.DEFINE_integer('index', None, 'train this cell alone, in this process', lower_bound=0, **at)
  flags.DEFINE_bool('list', False, 'say which cells there are and how far they are', **at)
  flags.DEFINE_bool('retry', False, 'try failed cells again', **at)
  flags.DEFINE_bool('worker', False, 'be one of the processes of another llm-jax sweep', **at)
  return values


if __name__ == '__main__':  # python -m llm_jax.cli.sweep
  sys.exit(command(['sweep', *sys.argv[1:]]))
