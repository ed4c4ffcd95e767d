"""Flags of the commands: absl's, plus `--config=FILE[:ARGS]` with `--config.KEY=VALUE` overrides.

The overrides are read here and not by `ml_collections.config_flags`, which cannot name the nearest key, reach into a
tuple of blocks, or replace a nested call by another function.
"""

import os
import sys

import jax
from absl import flags

from llm_jax.core import config, mesh
from llm_jax.core.errors import UserError, nearest


def parse(argv: list[str], values: flags.FlagValues, usage: str) -> list[str]:
  """Parses absl flags; returns the `--config...` arguments. Anything else that is left over is a `UserError`."""
  if any(a in ('-h', '--help', '--helpfull') for a in argv):
    print(usage.strip() + '\n\nflags:')
    for name in sorted(values):
      print(f'  --{name}: {values[name].help} (default: {values[name].default!r})')
    sys.exit(0)
  ours, theirs = [], []
  rest = iter(argv)
  for argument in rest:
    if argument.partition('=')[0].lstrip('-').split('.')[0].split(':')[
      0
    ] == 'config' and argument.startswith('-'):
      if '=' not in argument:
        following = next(rest, None)
        if following is None:
          raise UserError(f'{argument} has no value: write {argument}=VALUE')
        argument = f'{argument}={following}'
      ours.append(argument)
    else:
      theirs.append(argument)
  try:
    left = values(['llm-jax', *theirs])[1:]
  except flags.UnrecognizedFlagError as e:
    raise UserError(f'no flag --{e.flagname}; {nearest(e.flagname, [*values, "config"])}') from e
  except flags.Error as e:
    raise UserError(str(e).replace('\n', ' ').removeprefix('flag ')) from e
  if left:
    raise UserError(f'unexpected argument {left[0]!r}: flags read --name=value')
  return ours


def read_config(arguments: list[str]):
  """The config named by `--config=FILE[:ARGS]` with every `--config.KEY=VALUE` applied, checked as a whole."""
  path, text, overrides = _config_flags(arguments)
  cfg = config.read(path, text)
  if isinstance(cfg, tuple):
    raise UserError(f'{path} is a sweep of many configs: run it with llm-jax sweep')
  return _overridden(cfg, overrides)


def read_sweep(arguments: list[str]):
  """The sweep named by `--config=FILE[:ARGS]`; every `--config.KEY=VALUE` is applied to all of its cells."""
  path, text, overrides = _config_flags(arguments)
  found = config.read(path, text)
  if not isinstance(found, tuple):
    raise UserError(f'{path} is the config of one training: run it with llm-jax train')
  cells = [cell._replace(recipe=_overridden(cell.recipe, overrides)) for cell in found.cells]
  return found._replace(cells=tuple(cells))


def _config_flags(arguments: list[str]) -> tuple[str, str | None, list[tuple[str, str]]]:
  """(file, what follows its colon, the overrides as (path, value))."""
  split = [a.lstrip('-').partition('=')[::2] for a in arguments]
  files = [value for name, value in split if name == 'config']
  if len(files) != 1 or not files[0]:
    raise UserError('name one config file: --config=configs/quickstart.py')
  path, _, text = files[0].partition(':')
  overrides = [(n.removeprefix('config.'), value) for n, value in split if n != 'config']
  return path, text or None, overrides


def _overridden(cfg, overrides: list[tuple[str, str]]):
  for name, value in overrides:
    config.override(cfg, name, value)
  config.check(cfg)
  return cfg


def mesh_sizes(text: str) -> dict[str, int]:
  """`--mesh=fsdp=16,tensor=4` as sizes."""
  found = {}
  for one in filter(None, text.split(',')):
    name, _, size = one.partition('=')
    if name not in mesh.AXES:
      raise UserError(f'--mesh={text}: no mesh axis {name!r}; {nearest(name, mesh.AXES)}')
    if not size.isdigit():
      raise UserError(f'--mesh={text}: write sizes as in --mesh=data=8,fsdp=16')
    found[name] = int(size)
  return found


def join_cluster() -> None:
  """Connects the processes of a cluster, where there is one: each runs the same command.

  A cluster is a TPU pod, SLURM or Open MPI with several tasks (found by jax itself), or the variables
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  env = os.environ
  if 'JAX_COORDINATOR_ADDRESS' in env:
    missing = [n for n in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID') if not env.get(n, '').isdigit()]
    if missing:
      raise UserError(
        f'JAX_COORDINATOR_ADDRESS is set, but {missing[0]} is not a number: set it for every process'
      )
    jax.distributed.initialize(
      env['JAX_COORDINATOR_ADDRESS'], int(env['JAX_NUM_PROCESSES']), int(env['JAX_PROCESS_ID'])
    )
  elif (
    (int(env.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in env)
    or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ',' in env.get('TPU_WORKER_HOSTNAMES', '')
  ):
    jax.distributed.initialize()
