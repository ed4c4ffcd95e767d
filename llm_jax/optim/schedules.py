"""Learning rates as functions of the update: `schedule(step) -> rate`, an f32 scalar, traceable.

`step` is the number of updates made before this one: 0 for the first. A warm-up of n updates gives update k = 1..n
the fraction k / n of the peak, so that no update is wasted on a rate of zero; after it the curves are those of the
papers and of `optax.schedules` at the same step. Beyond `steps` every schedule stays where it ended (GPT-3: constant
at 10 %). To state lengths in tokens, wrap a schedule in `in_tokens`; to end any schedule at zero, in `cooldown`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError

Step = jax.Array | int


def constant(step: Step, *, peak: float, warmup: int = 0) -> jax.Array:
  """`peak` from the end of the warm-up on."""
  _check(peak=peak, warmup=warmup)
  return peak * _warm(step, warmup)


def rsqrt(step: Step, *, peak: float = 0.01, hold: int = 10_000, warmup: int = 0) -> jax.Array:
  """Inverse square root: `peak * sqrt(hold / max(step, hold))`.

  The defaults are T5's 1 / sqrt(max(n, 10^4)) (Raffel et al. 2020, arXiv:1910.10683, section 3.1.2; PaLM,
  arXiv:2204.02311, has the same): .01 for the first 10,000 updates, .005 at 40,000. hold: updates at the peak, the k
  of the papers. warmup: updates of linear rise within them (T5X's `constant * linear_warmup * rsqrt_decay` has warmup
  = hold).
  """
  _check(peak=peak, warmup=warmup)
  if hold < max(1, warmup):
    raise UserError(
      f'rsqrt warms up for {warmup} updates but holds its peak for {hold}: raise hold to at least max(1, warmup)'
    )
  return peak * jnp.sqrt(hold / jnp.maximum(_float(step), hold)) * _warm(step, warmup)


def cosine(
  step: Step, *, peak: float, steps: int, warmup: int = 0, floor: float = 0.1
) -> jax.Array:
  """Half a cosine from `peak` at the end of the warm-up to `floor * peak` at `steps` (GPT-3, LLaMA, Gopher, BLOOM)."""
  _check(peak=peak, warmup=warmup, steps=steps, floor=floor)
  shape = 0.5 * (1 + jnp.cos(math.pi * _progress(step, warmup, steps)))
  return peak * (floor + (1 - floor) * shape) * _warm(step, warmup)


def linear(
  step: Step, *, peak: float, steps: int, warmup: int = 0, floor: float = 0.1
) -> jax.Array:
  """A straight line from `peak` at the end of the warm-up to `floor * peak` at `steps` (OPT, Galactica)."""
  _check(peak=peak, warmup=warmup, steps=steps, floor=floor)
  return peak * (floor + (1 - floor) * (1 - _progress(step, warmup, steps))) * _warm(step, warmup)


def wsd(
  step: Step, *, peak: float, steps: int, decay: int, warmup: int = 0, floor: float = 0.1
) -> jax.Array:
  """Warm-up, stable, decay: `peak` until `steps - decay`, then a line to `floor * peak` at `steps`.

  Hu et al. 2024 (MiniCPM, arXiv:2404.06395, section 4): the stable part needs no fixed length, the decay may start from
  any of its checkpoints; a decay of 10 % of the updates suffices.
  """
  _check(peak=peak, warmup=warmup, steps=steps, floor=floor)
  if not 0 < decay <= steps - warmup:
    raise UserError(
      f'wsd decays over {decay} of {steps} updates after {warmup} of warm-up: choose 0 < decay <= {steps - warmup}'
    )
  return (
    peak * (floor + (1 - floor) * (1 - _progress(step, steps - decay, steps))) * _warm(step, warmup)
  )


def manual(step: Step, *, points: tuple) -> jax.Array:
  """Straight lines between `points` ((step, rate), ...), as OPT's rate was set by hand; constant before and after
  them."""
  if len(points) < 1 or any(len(p) != 2 for p in points):
    raise UserError(f'manual takes points=((step, rate), ...), got {points!r}')
  at, rates = [float(p[0]) for p in points], [float(p[1]) for p in points]
  if sorted(set(at)) != at:
    raise UserError(
      f'the points of manual must have rising steps, got {at}: sort them and drop the repeated ones'
    )
  return jnp.interp(_float(step), jnp.array(at, jnp.float32), jnp.array(rates, jnp.float32))


def cooldown(
  step: Step, *, schedule: Callable, steps: int, length: int, floor: float = 0.0
) -> jax.Array:
  """`schedule`, multiplied over the last `length` of `steps` updates by a line from 1 to `floor`."""
  _check(steps=steps, floor=floor)
  if not 0 < length <= steps:
    raise UserError(f'cooldown over {length} of {steps} updates: choose 0 < length <= {steps}')
  return schedule(step) * (1 - (1 - floor) * _progress(step, steps - length, steps))


def in_tokens(step: Step, *, schedule: Callable, tokens_per_step: int) -> jax.Array:
  """`schedule` with `warmup`, `steps`, `hold`, ... counted in tokens instead of updates.

  GPT-3: `in_tokens(schedule=cosine(peak=6e-5, warmup=375_000_000, steps=260_000_000_000), tokens_per_step=3_200_000)`.
  An update has the rate that the last of its tokens would have, so warm-ups end exactly where they would in updates.
  """
  if tokens_per_step < 1:
    raise UserError(
      f'tokens_per_step={tokens_per_step}: give the tokens of one update, batch times length'
    )
  return schedule((_float(step) + 1) * float(tokens_per_step) - 1)


def _float(step: Step) -> jax.Array:
  return jnp.asarray(
    step, jnp.float32
  )  # exact to 16.7M updates; in tokens the relative error is 6e-8


def _warm(step: Step, warmup: int) -> jax.Array:
  return jnp.minimum(1.0, (_float(step) + 1) / max(1.0, float(warmup)))


def _progress(step: Step, start: int, end: int) -> jax.Array:
  """0 up to `start`, 1 from `end` on, linear between."""
  return jnp.clip((_float(step) - float(start)) / float(end - start), 0.0, 1.0)


def _check(
  *, peak: float = 1.0, warmup: int = 0, steps: int | None = None, floor: float = 0.0
) -> None:
  if peak <= 0:
    raise UserError(f'the peak learning rate must be positive, got {peak}')
  if warmup < 0:
    raise UserError(f'warmup={warmup} must not be negative: 0 is none')
  if steps is not None and warmup >= steps:
    raise UserError(
      f'the schedule warms up for {warmup} of its {steps} updates: lower warmup or raise steps'
    )
  if not 0 <= floor <= 1:
    raise UserError(
      f'floor={floor} is the fraction of the peak that is left at the end: choose 0 <= floor <= 1'
    )
