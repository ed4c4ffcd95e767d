"""Convolutions as long as the sequence by the FFT, of packed documents too.

The FFT does not know where documents end, but a pair of tokens of one document on both sides of a cut belongs to the
one document that lies across the cut. So a row is cut in halves, quarters, ...; at every cut the tokens of that
document on the left act on those on the right by one FFT, and all cuts of a level are one batch: O(t log^2 t) instead
of O(t log t), and no leak.
"""

import jax
import jax.numpy as jnp

from llm_jax.model.recurrent import sequence

NEAR = 8  # distances that are multiplied out


def causal(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """y_t = sum_{s <= t} kernel_{t-s} x_s for every channel. x: f32 [batch, t, f], kernel: f32 [t, f]."""
  return _fft(x, kernel, 2 * x.shape[1])[:, : x.shape[1]]


def long(x: jax.Array, kernel: jax.Array, segments: jax.Array | None) -> jax.Array:
  """`causal` within each of the segments, int [batch, t]; a segment is one run of tokens."""
  if segments is None:
    return causal(x, kernel)
  t = x.shape[1]
  y = sum(_back(x, segments, i) * kernel[i] for i in range(min(NEAR, t)))
  whole = NEAR
  while whole < t:
    whole *= 2
  x = jnp.pad(x, ((0, 0), (0, whole - t), (0, 0)))
  segments = jnp.pad(segments, ((0, 0), (0, whole - t)), constant_values=-1)
  far = jnp.pad(kernel, ((0, whole - t), (0, 0))).at[:NEAR].set(0)
  half = NEAR
  while half < whole:
    y = y + _across(x, far[: 2 * half], segments, half)[:, :t]
    half *= 2
  return y


def _across(x: jax.Array, kernel: jax.Array, segments: jax.Array, half: int) -> jax.Array:
  """What tokens left of the cuts in the middle of stretches of 2 * half do to those right of them."""
  parts = x.reshape(-1, 2 * half, x.shape[-1])
  of = segments.reshape(-1, 2 * half)
  same = (of == of[:, half - 1 : half])[:, :, None]
  left = jnp.where(same[:, :half], parts[:, :half], 0)
  right = jnp.where(same[:, half:], _fft(left, kernel, 2 * half)[:, half:], 0)
  return jnp.pad(right, ((0, 0), (half, 0), (0, 0))).reshape(x.shape)


def _fft(x: jax.Array, kernel: jax.Array, size: int) -> jax.Array:
  """The circular convolution along axis 1 of `size`, zeros behind x and the kernel."""
  z = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(kernel, size, axis=0)
  return jnp.fft.irfft(z, size, axis=1)


def _back(x: jax.Array, segments: jax.Array, steps: int) -> jax.Array:
  """The token `steps` before, zero where that is of another segment."""
  if not steps:
    return x
  t = x.shape[1]
  same = jnp.pad(segments, ((0, 0), (steps, 0)), constant_values=-1)[:, :t] == segments
  return jnp.where(sequence.wide(same, x), jnp.pad(x, ((0, 0), (steps, 0), (0, 0)))[:, :t], 0)
