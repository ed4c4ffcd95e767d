"""Dropout (Srivastava et al. 2014), on while there is a key."""

import jax
import jax.numpy as jnp

from llm_jax.core import mesh


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
  """Zeroes entries of `x` with probability `rate` and scales the others by 1 / (1 - rate); no key, no dropout."""
  if rng is None or not rate:
    return x
  like = jax.typeof(x).sharding if mesh.is_explicit() else None
  keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape, out_sharding=like)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
