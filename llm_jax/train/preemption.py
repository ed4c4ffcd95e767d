"""Ctrl-C and SIGTERM: save at the next step, say how to go on, stop.

The exit code is the shell's for the signal: 130 after Ctrl-C, 143 after SIGTERM. Under `jax.distributed` one process
is told and all stop at the same step; jax's own preemption service is what they agree through.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from llm_jax.train.hooks import Hook, Run


class Stopped(SystemExit):
  """The run was told to stop and its state is saved. `code`: 128 + signal; `step`: where it goes on."""

  def __init__(self, signum: int, step: int):
    super().__init__(128 + signum)
    self.step = step


def preemption(run: Run) -> Hook:
  """Raises `Stopped` at the end of the step in which a signal came, with the state saved. Ctrl-C again aborts at once.

  It has to be the last hook, so that the others are done with the step that is saved. Signal handlers are put back when
  the run ends.
  """
  received: list[int] = []
  distributed = jax.distributed.is_initialized()

  def note(signum: int, frame: Any) -> None:
    if received and signum == signal.SIGINT:
      restore()
      raise KeyboardInterrupt
    received.append(signum)
    os.write(
      2, b'\nStopping after this step; the state will be saved. Ctrl-C again aborts at once.\n'
    )
    if distributed:
      os.kill(
        os.getpid(), signal.SIGTERM
      )  # which jax listens for, and passes on to the other processes

  caught = [signal.SIGINT] if distributed else [signal.SIGINT, signal.SIGTERM]
  before = {signum: signal.signal(signum, note) for signum in caught}

  def restore() -> None:
    for signum, handler in before.items():
      signal.signal(signum, handler)

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    told = multihost_utils.reached_preemption_sync_point(step) if distributed else bool(received)
    if step == run.steps:
      restore()
    elif told:
      run.saver.save(step, state, metrics)
      run.saver.wait()
      run.writer.say(_farewell(run, step))
      run.writer.close()
      restore()
      raise Stopped(received[0] if received else signal.SIGTERM, step)

  return hook


def _farewell(run: Run, step: int) -> str:
  saved = run.saver.steps()
  if not saved:
    return f'Stopped at step {step} of {run.steps}; nothing was worth saving yet. The same command starts anew.'
  command = (
    ' '.join(['llm-jax', *sys.argv[1:]])
    if os.path.basename(sys.argv[0]) == 'llm-jax'
    else 'the same command'
  )
  where = f'saved in {run.saver.folder}'
  return (
    f'Stopped at step {step} of {run.steps}, {where}. To go on from step {saved[-1]}: {command}'
  )
