"""What is wrong with a checkpoint, in one line: unreadable, not as it was written, or of another model."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax

from llm_jax.core.errors import UserError


class Damaged(Exception):
  """A checkpoint that cannot be read, or not as it was written."""


def compare(folder: str, leaves: dict[str, list], targets: dict[str, Any]) -> None:
  """Raises `UserError` naming the first array that is not as the model and optimizer here want it."""
  remedy = 'use the config it was trained with (config.json beside it) or another --workdir'
  targets = {p: x for p, x in targets.items() if x.size}
  for path, x in targets.items():
    if path not in leaves:
      raise UserError(
        f'the checkpoint {folder} is of another model: it has no {path!r} {tuple(x.shape)}; {remedy}'
      )
    there, here = (tuple(leaves[path][0]), leaves[path][1]), (tuple(x.shape), x.dtype.name)
    if there[0] != here[0]:
      raise UserError(
        f'the checkpoint {folder} is of another model: {path!r} has shape {there[0]} there, {here[0]} here; {remedy}'
      )
    if there[1] != here[1]:
      raise UserError(
        f'the checkpoint {folder} is of another model: {path!r} is {there[1]} there, {here[1]} here; {remedy}'
      )
  for path in leaves:
    if path not in targets:
      raise UserError(
        f'the checkpoint {folder} is of another model: {path!r} {tuple(leaves[path][0])} is not in this one; {remedy}'
      )


@contextlib.contextmanager
def guard() -> Iterator[None]:
  """Whatever goes wrong while reading, as `Damaged`. Running out of memory is not damage and passes."""
  hush()
  try:
    yield
  except (Damaged, UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:
    raise Damaged(reason(e)) from None


def hush() -> None:
  """From now on the abandoned readers and writers of a failed Orbax call, which report much later, print no traces."""
  if getattr(sys.excepthook, 'hushed', False):
    return
  of_threads, of_coroutines = sys.excepthook, sys.unraisablehook

  def excepthook(kind: type, error: BaseException, trace: Any) -> None:
    if not _is_noise(error):
      of_threads(kind, error, trace)

  excepthook.hushed = True
  sys.excepthook = excepthook
  sys.unraisablehook = lambda info: None if _is_noise(info.exc_value) else of_coroutines(info)
  # what asyncio says of the arrays that were read beside the one that failed
  abandoned = 'exception was never retrieved'
  logging.getLogger('asyncio').addFilter(lambda record: abandoned not in record.getMessage())


def _is_noise(error: BaseException | None) -> bool:
  return 'Event loop is closed' in str(error) or 'error while reading array index' in str(error)


def reason(error: BaseException) -> str:
  """The line of an error that says most: the operating system's own words where it has some."""
  text = ' '.join(str(error).split()) or type(error).__name__
  for words in (
    'No space left on device',
    'File too large',
    'Read-only file system',
    'Permission denied',
    'Not a directory',
  ):
    if words in text or words in str(error.__cause__):
      return words.lower()
  return 'unreadable data' if 'array index' in text or 'OCDBT' in text else text[:160]
