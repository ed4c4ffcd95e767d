"""Files that a kill cannot leave half written, and how to read those that it can."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def whole(path: str, mode: str = 'w') -> Iterator[IO]:
  """A file that takes the place of `path` once all of it is on disk; after an error `path` is as it was."""
  temporary = f'{path}.{os.getpid()}'  # two processes may write the same
  try:
    with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def write(path: str, text: str) -> str:
  """Writes a text whole or not at all; returns its path."""
  with whole(path) as f:
    f.write(text)
  return path


def lines(path: str) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines that grows, but for a last line that is not yet whole; none without a file."""
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as f:
    return [json.loads(line) for line in f if line.endswith('\n')]
