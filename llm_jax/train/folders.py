"""Where checkpoints lie: `WORKDIR/checkpoints/STEP`."""

import os

from llm_jax.core.errors import UserError, nearest

NAME = 'checkpoints'


def steps(folder: str) -> list[int]:
  """The numbered folders in it, in order; Orbax gives a checkpoint its number when all of it is written."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(n) for n in names if n.isdigit() and os.path.isdir(os.path.join(folder, n)))


def newest_first(path: str) -> list[str]:
  """The checkpoints that `path` names: those of a workdir, of its folder `checkpoints`, or one step. Never empty."""
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isdir(os.path.join(path, 'meta')):
    return [path]
  folder = os.path.join(path, NAME) if os.path.isdir(os.path.join(path, NAME)) else path
  found = [os.path.join(folder, str(step)) for step in reversed(steps(folder))]
  if not found:
    above = os.path.dirname(path)
    near = [os.path.join(above, n) for n in os.listdir(above)] if os.path.isdir(above) else []
    runs = [n for n in near if os.path.isdir(os.path.join(n, NAME))]
    raise UserError(
      f'there is no checkpoint in {path}: name the --workdir of a run; {nearest(path, runs)}'
    )
  return found
