"""The processes of a sweep on one machine, and what a person sees of them."""

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llm_jax.core.errors import UserError
from llm_jax.scaling import sweep

_LOOK, _SAY = 0.2, 30.0  # seconds between looks at the workers, and between lines


def run(
  folder: str, cells: Sequence[sweep.Cell], command: Sequence[str], *, count: int
) -> dict[str, str]:
  """Runs `command`, which calls `sweep.work` on these cells, in `count` processes until all cells have ended.

  A process that dies is replaced, so its cell goes on from its last checkpoint. The cores are shared out among the
  processes. SIGTERM and Ctrl-C stop all of them with their state saved. Returns the errors of the failed cells.
  """
  progress, left = Progress(folder, cells), sweep.DEATHS * len(cells)
  with _processes(folder, command, count) as (running, start):
    while any(sweep.ended(folder, cell) is None for cell in cells):
      time.sleep(_LOOK)
      for i, process in enumerate(running):
        if process.poll():  # one that ends with 0 has seen all cells end
          left -= 1
          if 0 < process.returncode < 128 or not left:  # not by a signal, or far too often
            raise UserError(
              f'a process of the sweep ended with {process.returncode}: see {folder}/workers.log'
            )
          running[i] = start(i)
      progress.look()
  progress.look(last=True)
  return sweep.failures(folder, cells)


@contextlib.contextmanager
def _processes(folder: str, command: Sequence[str], count: int) -> Iterator[tuple]:
  """The processes and what starts the one of a number anew; on the way out all are told to save and stop."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []

  def start(i: int) -> subprocess.Popen:
    own = cores[i * len(cores) // count : (i + 1) * len(cores) // count]
    with open(os.path.join(folder, 'workers.log'), 'ab') as log:
      process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    if own and count > 1:
      with contextlib.suppress(ProcessLookupError):  # XLA counts its cores later than this
        os.sched_setaffinity(process.pid, own)
    return process

  def stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)

  before = signal.signal(signal.SIGTERM, stop)
  running = [start(i) for i in range(count)]
  try:
    yield running, start
  finally:
    for process in running:
      process.stdin.close()  # see `stop_with_parent`
    for process in running:
      process.wait()
    signal.signal(signal.SIGTERM, before)


def stop_with_parent() -> None:
  """Sends this process SIGTERM, on which a training saves and stops, as soon as the one that started it is gone."""

  def listen() -> None:
    os.read(0, 1)  # nothing is ever written there: it returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=listen, daemon=True).start()


def logged(train: Callable[[Any, str], Any]) -> Callable[[Any, str], None]:
  """`train`, with what it prints added to `log.txt` in the folder of the cell."""

  @functools.wraps(train)
  def quiet(recipe: Any, where: str) -> None:
    with open(os.path.join(where, 'log.txt'), 'a', encoding='utf-8') as log:
      print(f'=== {time.strftime("%F %T")}, process {os.getpid()}', file=log, flush=True)
      with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train(recipe, where)

  return quiet


class Progress:
  """Prints a line for every cell that ends, and now and then one with the time that is left.

  Time is told in FLOPs and not in cells, because the last cells of a ladder take most of it.
  """

  def __init__(self, folder: str, cells: Sequence[sweep.Cell], say: Callable = print):
    self._folder, self._say = folder, say
    self._flops = {cell.name: sweep.flops(cell) for cell in cells}
    self._open = [cell for cell in cells if sweep.ended(folder, cell) is None]
    self._begin, self._first = time.monotonic(), self.spent()
    self._next = self._begin + _SAY

  def spent(self) -> float:
    """FLOPs of the cells that ended, and of what the others have done."""
    left = (
      self._flops[cell.name] * (1 - sweep.fraction(self._folder, cell)) for cell in self._open
    )
    return sum(self._flops.values()) - sum(left)

  def look(self, *, last: bool = False) -> None:
    """Says what is new."""
    new = [cell for cell in self._open if sweep.ended(self._folder, cell)]
    self._open = [cell for cell in self._open if cell not in new]
    errors = sweep.failures(self._folder, new)
    for cell in new:
      self._say(f'{cell.name}: {_outcome(self._folder, cell, errors.get(cell.name))}')
    if new or last or time.monotonic() >= self._next:
      self._next = time.monotonic() + _SAY
      self._say(self.line())

  def line(self) -> str:
    """`12 of 30 cells, 41 % of 2.1e+15 FLOPs, ETA 0:12:30`."""
    spent, total, count = self.spent(), sum(self._flops.values()), len(self._flops)
    text = f'{count - len(self._open)} of {count} cells, {100 * spent / total:.0f} % of {total:.2g} FLOPs'
    gained, seconds = spent - self._first, time.monotonic() - self._begin
    if not self._open or gained <= 0:
      return text
    left = round((total - spent) / gained * seconds)
    return f'{text}, ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}'


def _outcome(folder: str, cell: sweep.Cell, error: str | None) -> str:
  return f'failed: {error}' if error else f'loss {sweep.result(folder, cell)["loss"]:.4f}'
