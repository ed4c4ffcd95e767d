"""What the processes of a run have to agree on before one of them acts. With one process there is nothing to do."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agree(error: Exception | None, otherwise: Exception) -> None:
  """Raises on all processes when one of them has an error: its own there, `otherwise` on the others."""
  bad = error is not None
  if jax.process_count() > 1:
    bad = bool(multihost_utils.process_allgather(np.asarray(bad)).any())
  if bad:
    raise error or otherwise


def from_first(numbers: list[int]) -> list[int]:
  """The list of process 0, for all: file systems differ in when they show a folder."""
  if jax.process_count() == 1:
    return numbers
  count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(numbers))))
  padded = np.asarray((numbers + [0] * count)[:count], np.int64)
  return [int(n) for n in multihost_utils.broadcast_one_to_all(padded)]


def barrier(name: str) -> None:
  """Returns when all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
