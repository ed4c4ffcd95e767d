"""Where trained vocabularies and token maps are kept, and how a folder appears there whole or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

from llm_jax.core.errors import UserError

_UNWRITABLE = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOSPC,
  errno.EDQUOT,
  errno.ENOTDIR,
  errno.EEXIST,
)


def root() -> str:
  """$LLM_JAX_CACHE, else ~/.cache/llm_jax."""
  return os.environ.get('LLM_JAX_CACHE') or os.path.join(
    os.path.expanduser('~'), '.cache', 'llm_jax'
  )


def once(kind: str, name: str, make: Callable[[str], None]) -> str:
  """The folder `<root>/<kind>/<name>`; if it is not there, `make(tmp)` fills one that is then renamed to it.

  One process of a machine makes it while the others wait for the lock, so a half-written folder is never seen.
  Raises `UserError` when the cache cannot be written.
  """
  parent = os.path.join(root(), kind)
  final = os.path.join(parent, name)
  if os.path.isdir(final):
    return final
  try:
    os.makedirs(parent, exist_ok=True)
    with _lock(os.path.join(parent, f'.{name}.lock')):
      if os.path.isdir(final):
        return final
      tmp = tempfile.mkdtemp(prefix=f'.{name}.', dir=parent)
      os.chmod(tmp, 0o755)
      try:
        make(tmp)
        os.rename(tmp, final)
      finally:
        shutil.rmtree(tmp, ignore_errors=True)
  except OSError as e:
    if e.errno not in _UNWRITABLE:
      raise
    raise UserError(
      f'cannot write to {parent} ({e.strerror or e}): free space there or set LLM_JAX_CACHE to a writable folder'
    ) from e
  return final


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
  with open(path, 'w', encoding='utf-8') as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    yield
