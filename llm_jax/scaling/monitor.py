"""A scaling law as a watchman: the live loss of a run beside the curve that was predicted for it.

The curve comes from a run before it (`like`), from constants (`falling`) or from a law of N and D (`chinchilla`). Small
deviations are noise; the mean of the last steps that leaves the curve by more than `tolerance` is told at once, long
before a loss curve looks wrong to the eye, and in both directions: a loss that is too good is a leak or a bug.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.core import files, metrics
from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, laws
from llm_jax.train.hooks import Hook, Run

Curve = Callable[[int], float]


def like(step: int, *, workdir: str, skip: int = 50, name: str = 'loss') -> float:
  """The curve of a finished run: the power law that fits its `metrics.jsonl` after `skip` steps, see `fits.offset`."""
  return float(laws.offset(_fitted(workdir, skip, name), step))


@functools.lru_cache(maxsize=8)
def _fitted(workdir: str, skip: int, name: str) -> laws.Offset:
  path = os.path.join(workdir, metrics.FILE)
  if not os.path.isfile(path):
    raise UserError(f'no run to compare with: there is no {path}')
  points = [(x['step'], x[name]) for x in files.lines(path) if x.get(name) and x['step'] > skip]
  if len(points) < 4:
    raise UserError(
      f'{path} has {len(points)} values of {name!r} after step {skip}: a curve takes 4'
    )
  return fits.offset(*zip(*points, strict=True)).law


def falling(step: int, *, irreducible: float, scale: float, exponent: float) -> float:
  """irreducible + (scale / step)^exponent."""
  return float(laws.offset(laws.Offset(irreducible, scale, exponent), step))


def chinchilla(step: int, *, law: tuple, parameters: float, tokens_per_step: float) -> float:
  """What a law (E, A, B, alpha, beta) says of a model trained for just as many tokens as it has seen by now."""
  return float(laws.chinchilla(laws.Chinchilla(*law), parameters, step * tokens_per_step))


def watch(
  run: Run, *, curve: Curve, tolerance: float = 0.05, window: int = 20, start: int = 100
) -> Hook:
  """Tells when the mean over `window` steps of log(loss / predicted) leaves +-`tolerance`, and when it is back.

  curve: step -> loss, one of those above. start: the first step that counts; during warm-up no law holds. An alarm is a
  line for a person and one in `metrics.jsonl`: `watch/deviation`, a relative error. It changes nothing: `guards` do. As
  there, a step is looked at when the next is on its way.
  """
  if tolerance <= 0 or window < 1:
    raise UserError(f'watch: tolerance={tolerance} must exceed 0 and window={window} be at least 1')
  recent: deque[float] = deque(maxlen=window)
  waiting: list[tuple[int, Any]] = []
  outside = False

  def look(step: int, loss: float) -> None:
    nonlocal outside
    if step < start:
      return
    predicted = curve(step)
    recent.append(math.log(loss / predicted) if math.isfinite(loss) and loss > 0 else math.inf)
    if len(recent) < window:
      return
    deviation = float(np.mean(recent))
    if (abs(deviation) > tolerance) == outside:
      return
    outside = not outside
    run.writer.write(step, {'watch/deviation': deviation})
    if outside:
      side = 'above' if deviation > 0 else 'below'
      run.writer.say(
        f'step {step}: the loss is {100 * abs(math.expm1(deviation)):.1f} % {side} what was predicted, {predicted:.4g}'
      )
    else:
      run.writer.say(f'step {step}: the loss is as predicted again, {predicted:.4g}')

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if waiting:
      before, loss = waiting.pop()
      if before == step - 1:
        look(before, float(loss))
      else:  # the run was sent back
        recent.clear()
    if 'loss' in metrics:
      if step == run.steps:
        look(step, float(metrics['loss']))
      else:
        waiting.append((step, metrics['loss']))

  return hook
