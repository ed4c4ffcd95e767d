"""How long one waits: for the import, for the complaint about a wrong config, for the first step.

python -m benchmarks.startup                    # about two minutes

import        `import jax, llm_jax` less `import jax`, the fastest of several taken in turn
wrong config  `llm-jax train` with a misspelt key, from the command to the one-line error
first step    quickstart with 12 layers under `scan`: from calling the update to its metrics, compilation included,
              no compilation cache; and the whole command with three steps, as a user sees it
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

QUICKSTART = 'configs/quickstart.py'
FIRST = r"""
import functools, sys, time
import jax
from llm_jax.core import config, mesh
from llm_jax.train import state, step
cfg = config.read(sys.argv[1], 'steps=100')
config.override(cfg, 'model.layers', 12)
build = config.build
with jax.set_mesh(mesh.make(**cfg.mesh)), mesh.rules(**cfg.axes):
  model = build(cfg.model)()
  source = build(cfg.source)(model)
  tx = build(cfg.optimizer)(model.axes)
  layout = state.layout(model, tx, cfg.trainable)
  update = step.make(functools.partial(build(cfg.objective), model), tx, layout, microbatches=cfg.microbatches)
  first = state.create(model, tx, 0, layout=layout)
  batch = mesh.place(source(first))
  start = time.perf_counter()
  jax.block_until_ready(update(first, batch, jax.random.key(0)))
  print('seconds', time.perf_counter() - start)
  source.close()
"""


def timed(*command: str, code: int = 0) -> tuple[float, subprocess.CompletedProcess]:
  """(seconds, what it wrote) of a command that must end with this exit code."""
  start = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True)
  seconds = time.perf_counter() - start
  if done.returncode != code:
    raise SystemExit(f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr}')
  return seconds, done


def imports(rounds: int) -> tuple[float, float]:
  """(seconds of `import jax`, seconds that llm_jax adds)."""
  alone, both = [], []
  for _ in range(rounds):
    alone.append(timed(sys.executable, '-c', 'import jax')[0])
    both.append(timed(sys.executable, '-c', 'import jax, llm_jax')[0])
  return min(alone), min(both) - min(alone)


def wrong_config() -> tuple[float, str]:
  """(seconds, the message)."""
  train = (sys.executable, '-m', 'llm_jax.cli.main', 'train', f'--config={QUICKSTART}')
  with tempfile.TemporaryDirectory() as folder:
    wrong = (*train, '--config.modle.embed=64', f'--workdir={folder}')
    seconds, done = timed(*wrong, code=2)
  return seconds, done.stderr.strip().splitlines()[-1]


def first_step() -> float:
  """Seconds of the first update of 12 layers."""
  return float(timed(sys.executable, '-c', FIRST, QUICKSTART)[1].stdout.split()[-1])


def whole_command() -> float:
  """Seconds of `llm-jax train` for three steps (the fewest its schedule takes), without samples."""
  with tempfile.TemporaryDirectory() as folder:
    quiet = ('--config.hooks.heldout.every=1000', '--config.hooks.samples.at=()')
    command = (sys.executable, '-m', 'llm_jax.cli.main', 'train', '--config.model.layers=12')
    return timed(*command, f'--config={QUICKSTART}:steps=3', *quiet, f'--workdir={folder}')[0]


def main() -> None:
  """Prints one line per figure."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=5, help='pairs of imports')
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
  alone, more = imports(args.rounds)
  print(f'import          {more:6.2f} s beyond jax, which takes {alone:.2f} s', flush=True)
  seconds, message = wrong_config()
  print(f'wrong config    {seconds:6.2f} s to: {message}', flush=True)
  print(f'first step      {first_step():6.2f} s, 12 layers under scan, compiled', flush=True)
  print(f'whole command   {whole_command():6.2f} s with three steps, held-out pass and checkpoint')
  print(f'load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')


if __name__ == '__main__':
  main()
