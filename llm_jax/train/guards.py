"""Hooks for when training goes wrong: NaN is named and stops the run, a spike of the loss sends it back.

They look at a step when the next one is on its way, as the writer does, so that the device never waits for them.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.train.hooks import Hook, Run


class Diverged(UserError):
  """Training went wrong for good. `step`: where; `tensor`: the path of the first bad array, if it is one."""

  def __init__(self, message: str, *, step: int, tensor: str | None = None):
    super().__init__(message)
    self.step, self.tensor = step, tensor


def stop_on_nan(run: Run) -> Hook:
  """Raises `Diverged` after a step whose loss, norms, parameters or optimizer state are not finite, naming the first.

  The order is that of the computation: the loss, the other metrics, then the arrays of the state by path. The checks
  of the arrays are made on the device (one pass over memory). Checkpoints of bad states are never written (`Saver`).
  """

  def check(step: int, metrics: Mapping[str, Any], paths: list[str], finite: jax.Array) -> None:
    metrics, finite = jax.device_get((dict(metrics), finite))
    bad = [
      name
      for name in ('loss', *sorted(metrics))
      if name in metrics and not math.isfinite(metrics[name])
    ]
    tensor = next((path for path, fine in zip(paths, finite, strict=True) if not fine), None)
    if tensor is None and not {'loss', 'grad_norm', 'param_norm'} & set(bad):
      return
    what = ', '.join(f'{name} is {float(metrics[name])}' for name in list(dict.fromkeys(bad))[:2])
    where = f'first bad tensor: {tensor}' if tensor else 'all parameters are still finite'
    run.saver.wait()
    safe = run.saver.steps()
    kept = f'the checkpoint of step {safe[-1]} is good' if safe else 'no checkpoint was written yet'
    raise Diverged(
      f'step {step} went wrong: {what or "the state is not finite"}; {where}. Lower the learning rate, clip gradients, '
      f'or add the hook guards.rewind_on_spike; {kept}',
      step=step,
      tensor=tensor,
    )

  late = _Late()

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    arrays = {p: x for p, x in tree.flatten(state).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    before = late.exchange(step, metrics, (metrics, list(arrays), _finite(list(arrays.values()))))
    if before is not None:
      check(step - 1, *before)
    if step == run.steps and late.waiting is not None:
      check(step, *late.waiting[1])

  return hook


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
  """bool [arrays]: whether all elements are finite."""
  return jnp.stack([jnp.isfinite(x).all() for x in arrays])


class _Late:
  """Holds what is known of a step until the next one."""

  def __init__(self):
    self.waiting: tuple[int, Any] | None = None

  def exchange(self, step: int, metrics: Mapping[str, Any], item: Any) -> Any:
    """The item of the step before, or None when the run was sent elsewhere in between."""
    before, self.waiting = self.waiting, (step, item) if metrics else None
    return before[1] if before is not None and before[0] == step - 1 else None


def rewind_on_spike(
  run: Run,
  *,
  factor: float = 2.0,
  window: int = 100,
  back: int = 100,
  skip: int = 300,
  limit: int = 5,
) -> Hook:
  """Goes back and leaves data out when the loss exceeds `factor` times its median over the last `window` steps.

  PaLM (arXiv:2204.02311, section 5.1) restarted from a checkpoint about 100 steps before a spike and skipped 200 to 500
  batches; the data around the spike were not bad by themselves, only together with that state. Here: the newest
  checkpoint at least `back` steps before the spike, then `skip` batches of data are left out (more if that does not
  reach the spike). A loss that is not finite is a spike too: list this hook before `stop_on_nan`. Raises `Diverged`
  after `limit` rewinds; a spike for which no checkpoint is old enough is only told.
  """
  if factor <= 1 or window < 2 or back < 0 or skip < 1 or limit < 1:
    raise UserError(
      f'rewind_on_spike: factor={factor} must exceed 1, window={window} 1, skip={skip} and limit={limit} 0'
    )
  losses = _Losses(window, factor)
  run.saver.track('rewind_on_spike', losses)

  def rewind(step: int, loss: float, state: Any) -> Any:
    what = f'the loss of step {step} is {loss:.4g}, usual is {losses.median():.4g}'
    if losses.rewinds == limit:
      raise Diverged(
        f'{what}; {limit} rewinds did not help: lower the learning rate or look at the data',
        step=step,
      )
    restored = run.saver.rewind(state, step - back)
    if restored is None:
      run.writer.say(f'warning: {what}; no checkpoint is {back} steps older, so training goes on')
      return None
    losses.rewinds += 1
    at = int(restored.step)
    left_out = max(skip, step - at)
    run.source.skip(left_out)
    run.writer.say(
      f'{what}: going back to step {at}, leaving out {left_out} batches (rewind {losses.rewinds} of {limit})'
    )
    run.writer.write(at, dict(rewinds=losses.rewinds, skipped_batches=left_out))
    return restored

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> Any:
    loss = losses.late.exchange(step, metrics, metrics.get('loss'))
    if loss is None:
      return None
    loss = float(loss)
    return rewind(step - 1, loss, state) if losses.is_spike(loss) else losses.seen.append(loss)

  return hook


class _Losses:
  """The last losses and the number of rewinds; part of checkpoints."""

  def __init__(self, window: int, factor: float):
    self.seen: deque[float] = deque(maxlen=window)
    self.factor, self.rewinds, self.late = factor, 0, _Late()

  def median(self) -> float:
    return statistics.median(self.seen) if self.seen else math.nan

  def is_spike(self, loss: float) -> bool:
    """With few losses known (a tenth of the window) only one that is not finite is a spike."""
    known = len(self.seen) * 10 >= self.seen.maxlen
    return not math.isfinite(loss) or (known and loss > self.factor * self.median())

  def state(self) -> dict[str, Any]:
    last = [float(self.late.waiting[1])] if self.late.waiting else []
    return dict(seen=[*self.seen, *(x for x in last if not self.is_spike(x))], rewinds=self.rewinds)

  def restore(self, saved: Mapping[str, Any]) -> None:
    """The count of rewinds never goes back, or a run could be sent back for ever."""
    self.late.waiting = None
    self.seen.clear()
    self.seen.extend(saved['seen'])
    self.rewinds = max(self.rewinds, saved['rewinds'])
