"""Dropout (Srivastava et al. 2014), on while there is a key."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core import mesh


def ramp(height: Any, *, bottom: float = 0.0, top: float = 0.3) -> Any:
  """The rate of a layer: `bottom` in the first, `top` in the last, in a line between (LIMA, arXiv:2305.11206, section
  3; top=0.2 for its smaller models). height: of the layer, from 0 to 1. As a block's `dropout` in place of a number."""
  return bottom + (top - bottom) * height


def dropout(x: jax.Array, rate: float | jax.Array, rng: jax.Array | None) -> jax.Array:
  """Zeroes entries of `x` with probability `rate` and scales the others by 1 / (1 - rate); no key, no dropout."""
  if rng is None or (isinstance(rate, float | int) and not rate):
    return x
  like = jax.typeof(x).sharding if mesh.is_explicit() else None
  keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape, out_sharding=like)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
