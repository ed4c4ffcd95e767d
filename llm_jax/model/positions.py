"""Positions, by where they enter the model: the input, the queries and keys, or the attention logits.

| enters | argument | here |
|---|---|---|
| the embedding | `transformer.causal(positions=...)` | `Sinusoidal`, `Learned` |
| queries and keys | `SelfAttention(rotate=...)` | `rope`, `rope_interleaved` |
| the logits | `transformer.causal(bias=...)` | `Alibi`, `Buckets` |

Use none of them for a causal decoder without positions (NoPE).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh, weights
from llm_jax.core.errors import UserError
from llm_jax.model import param


class Sinusoidal(nn.Module):
  """PE[p, 2i] = sin(p / base^(2i/d)), PE[p, 2i+1] = cos(p / base^(2i/d)) (Vaswani et al. 2017, arXiv:1706.03762,
  section 3.5).
  """

  base: float = 10000.0

  def __call__(self, positions: jax.Array, embed: int, length: int | None) -> jax.Array:
    """positions: int [batch or 1, t]. Returns f32 [batch or 1, t, embed]."""
    del length
    angle = positions[..., None] * frequencies(embed, self.base)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, -1)[
      ..., :embed
    ]


class Learned(nn.Module):
  """A trained vector for each of `length` positions (Radford et al. 2019); longer contexts are refused."""

  @nn.compact
  def __call__(self, positions: jax.Array, embed: int, length: int | None) -> jax.Array:
    """positions: int [batch or 1, t]. Returns f32 [batch or 1, t, embed]."""
    if length is None:
      raise UserError('learned positions need a table size: set --config.model.length=...')
    table = param.weight(self, 'table', (length, embed), ('positions', 'embed'), 'positions')
    if positions.shape[0] == 1 and mesh.current() is not None:  # one row splits over no mesh
      return mesh.gather(weights.dense(table), ('positions', 'embed'))[positions[0]][None]
    return weights.lookup(table, positions, dtype=jnp.float32)


def frequencies(size: int, base: float) -> np.ndarray:
  """f32 [ceil(size / 2)]: base^(-2i / size)."""
  return (base ** (-np.arange(0, size, 2, dtype=np.float64) / size)).astype(np.float32)


def _rotation(
  x: jax.Array, positions: jax.Array, base: float, fraction: float
) -> tuple[jax.Array, jax.Array, int]:
  """(cos, sin) f32 [batch or 1, t, 1, rotated / 2] and the number of rotated entries of a head."""
  rotated = 2 * round(x.shape[-1] * fraction / 2)
  if not 0 < rotated <= x.shape[-1]:
    raise UserError(
      f'rope: fraction={fraction} of a head of {x.shape[-1]} rotates {rotated} entries; choose one in (0, 1]'
    )
  angle = (positions[..., None] * frequencies(rotated, base))[:, :, None, :]
  return jnp.cos(angle), jnp.sin(angle), rotated


def rope(
  x: jax.Array, positions: jax.Array, *, base: float = 10000.0, fraction: float = 1.0
) -> jax.Array:
  """Rotary positions on the pairs (i, i + n/2) of the first n = fraction * head_dim entries (NeoX and LLaMA layout).

  x: [batch, t, heads, head_dim], positions: int [batch or 1, t]. Pair i turns by p * base^(-2i/n)
  (Su et al. 2021, arXiv:2104.09864, eq. 34).
  """
  cos, sin, n = _rotation(x, positions, base, fraction)
  cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  turned, rest = x[..., :n], x[..., n:]
  # rolled rather than put together from two halves: on CPU the gradient of that costs as much as a projection
  turned = (turned * cos + jnp.roll(turned, n // 2, axis=-1) * sin).astype(x.dtype)
  return turned if n == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def rope_interleaved(
  x: jax.Array, positions: jax.Array, *, base: float = 10000.0, fraction: float = 1.0
) -> jax.Array:
  """`rope` on the neighbouring pairs (2i, 2i + 1): the layout of the paper, GPT-J and GLM."""
  cos, sin, n = _rotation(x, positions, base, fraction)
  even, odd, rest = x[..., 0:n:2], x[..., 1:n:2], x[..., n:]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return jnp.concatenate([turned.reshape(*x.shape[:-1], n).astype(x.dtype), rest], axis=-1)


def alibi_slopes(heads: int) -> np.ndarray:
  """f32 [heads]: 2^(-8h/n) for h = 1..n; for other counts, those of the power of two below, then every other slope of
  the power of two above (Press et al. 2021, arXiv:2108.12409, section 3, and its code)."""

  def geometric(n: int) -> list[float]:
    return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]

  n = 2 ** math.floor(math.log2(heads))
  return np.asarray(geometric(n) + geometric(2 * n)[0::2][: heads - n], np.float32)


class Alibi(nn.Module):
  """-slope * |i - j| on the logits (Press et al. 2021, arXiv:2108.12409)."""

  def __call__(self, queries: jax.Array, keys: int, heads: int, bidirectional: bool) -> jax.Array:
    """queries: int [batch or 1, t], keys: how many. Returns f32 [batch or 1, heads, t, keys]."""
    del bidirectional
    distance = jnp.abs(queries[:, None, :, None] - jnp.arange(keys))
    return -alibi_slopes(heads)[:, None, None] * distance


def bucket(relative: jax.Array, bidirectional: bool, buckets: int, distance: int) -> jax.Array:
  """The T5 bucket in [0, buckets) of a relative position key - query (Raffel et al. 2020, arXiv:1910.10683, section
  2.1).

  Half of the buckets are exact distances, half are logarithmic up to `distance`, beyond which all share the last.
  Bidirectional: half of the buckets for keys after the query; else those all fall into bucket 0.
  """
  start = 0
  if bidirectional:
    buckets //= 2
    start = jnp.where(relative > 0, buckets, 0)
    n = jnp.abs(relative)
  else:
    n = jnp.maximum(-relative, 0)
  exact = buckets // 2
  far = (
    jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact)
    / math.log(distance / exact)
    * (buckets - exact)
  )
  return start + jnp.where(n < exact, n, jnp.minimum(exact + far.astype(jnp.int32), buckets - 1))


class Buckets(nn.Module):
  """A trained scalar per head and bucket of distance on the logits, one table for all layers of a stack (Raffel et al.
  2020).
  """

  buckets: int = 32
  distance: int = 128

  @nn.compact
  def __call__(self, queries: jax.Array, keys: int, heads: int, bidirectional: bool) -> jax.Array:
    """queries: int [batch or 1, t], keys: how many. Returns f32 [batch or 1, heads, t, keys]."""
    table = weights.dense(
      param.weight(self, 'table', (self.buckets, heads), ('buckets', 'heads'), 'buckets')
    )
    ids = bucket(jnp.arange(keys) - queries[:, :, None], bidirectional, self.buckets, self.distance)
    # One-hot product rather than a gather: its gradient is a matmul, not a scatter of t * s rows into 32.
    one_hot = jax.nn.one_hot(ids, self.buckets, dtype=table.dtype)
    return jnp.einsum('btsn,nh->bhts', one_hot, table)
