"""Files and folders that appear once all of them is written."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from llm_jax.core.errors import UserError


@contextlib.contextmanager
def new(path: str) -> Iterator[str]:
  """A place beside `path` to write to, that takes its name when the block ends well and disappears otherwise.

  The block makes the file or folder. Raises `UserError` when `path` exists, before anything is done.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.lexists(path):
    raise UserError(f'{path} exists: name a new one, or remove it')
  os.makedirs(os.path.dirname(path), exist_ok=True)
  temporary = f'{path}.new'
  _remove(temporary)
  try:
    yield temporary
    os.rename(temporary, path)
  finally:
    _remove(temporary)


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.lexists(path):
    os.remove(path)
