"""Positions, by where they enter the model: the input, the queries and keys, or the attention logits.

| enters | argument | here |
|---|---|---|
| the embedding | `transformer.causal(positions=...)` | `Sinusoidal`, `Learned` |
| queries and keys | `SelfAttention(rotate=...)` | `rope`, `rope_interleaved`, `xpos`, `xpos_interleaved` |
| the logits, from the positions alone | `transformer.causal(bias=...)` | `Alibi`, `Buckets` |
| the logits, with queries and keys | `SelfAttention(relative=...)` | `TransformerXL`, `extension.ReRoPE` |

Use none of them for a causal decoder without positions (NoPE). A rotation is a function

    rotate(q [b, t, h, k], k [b, s, g, k], positions [b or 1, t], keys=None) -> (q, k)

with `keys` [b or 1, s] the positions of the keys where they are not those of the queries. Its frequencies can be
rescaled for longer contexts: `rope(..., scaling=...)` takes the functions of model/extension.py.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh, weights
from llm_jax.core.errors import UserError
from llm_jax.model import param
from llm_jax.model.masks import Mask


class Sinusoidal(nn.Module):
  """PE[p, 2i] = sin(p / base^(2i/d)), PE[p, 2i+1] = cos(p / base^(2i/d)) (Vaswani et al. 2017, arXiv:1706.03762,
  section 3.5).
  """

  base: float = 10000.0

  def __call__(self, positions: jax.Array, embed: int, length: int | None) -> jax.Array:
    """positions: int [batch or 1, t]. Returns f32 [batch or 1, t, embed]."""
    del length
    return sinusoids(positions, embed, self.base)


def sinusoids(positions: jax.Array, embed: int, base: float = 10000.0) -> jax.Array:
  """f32 [..., embed] for int [...]: what `Sinusoidal` adds."""
  angle = positions[..., None] * frequencies(embed, base).astype(np.float32)
  waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return waves.reshape(*positions.shape, -1)[..., :embed]


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
  """f64 [ceil(size / 2)]: base^(-2i / size), in radians per position."""
  return base ** (-np.arange(0, size, 2, dtype=np.float64) / size)


def _angles(
  q: jax.Array,
  positions: jax.Array,
  keys: jax.Array | None,
  base: float,
  fraction: float,
  scaling: Callable | None,
) -> tuple[int, float, list[jax.Array]]:
  """How many entries of a head rotate, what multiplies them, and the angles f32 [batch or 1, t, 1, rotated / 2] of
  queries and keys (one array where their positions are the same)."""
  rotated = 2 * round(q.shape[-1] * fraction / 2)
  if not 0 < rotated <= q.shape[-1]:
    raise UserError(
      f'rope: fraction={fraction} of a head of {q.shape[-1]} rotates {rotated} entries; choose one in (0, 1]'
    )
  theta, factor = frequencies(rotated, base), 1.0
  if scaling is not None:
    theta, factor = scaling(theta, jnp.max(positions, axis=1)[:, None, None] + 1)
  where = [positions] if keys is None else [positions, keys]
  return rotated, factor, [(p[..., None] * jnp.float32(theta))[:, :, None, :] for p in where]


def _halves(x: jax.Array, cos: jax.Array, sin: jax.Array, n: int) -> jax.Array:
  """Rotates the pairs (i, i + n/2) of the first n entries."""
  cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  turned, rest = x[..., :n], x[..., n:]
  # rolled rather than put together from two halves: on CPU the gradient of that costs as much as a projection
  turned = (turned * cos + jnp.roll(turned, n // 2, axis=-1) * sin).astype(x.dtype)
  return turned if n == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def _neighbours(x: jax.Array, cos: jax.Array, sin: jax.Array, n: int) -> jax.Array:
  """Rotates the pairs (2i, 2i + 1) of the first n entries."""
  even, odd, rest = x[..., 0:n:2], x[..., 1:n:2], x[..., n:]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return jnp.concatenate([turned.reshape(*x.shape[:-1], n).astype(x.dtype), rest], axis=-1)


def _rope(turn, q, k, positions, keys, base, fraction, scaling) -> tuple[jax.Array, jax.Array]:
  n, factor, angles = _angles(q, positions, keys, base, fraction, scaling)
  waves = [(jnp.cos(a), jnp.sin(a)) for a in angles]
  if factor != 1:
    waves = [(factor * cos, factor * sin) for cos, sin in waves]
  return turn(q, *waves[0], n), turn(k, *waves[-1], n)


def rope(
  q: jax.Array,
  k: jax.Array,
  positions: jax.Array,
  keys: jax.Array | None = None,
  *,
  base: float = 10000.0,
  fraction: float = 1.0,
  scaling: Callable | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Rotary positions on the pairs (i, i + n/2) of the first n = fraction * head_dim entries (NeoX and LLaMA layout).

  q: [batch, t, heads, head_dim], k: [batch, s, groups, head_dim], positions: [batch or 1, t], keys: the positions of
  `k`, None when they are those of `q`. Pair i turns by p * base^(-2i/n) (Su et al. 2021, arXiv:2104.09864, eq. 34).
  base: a larger one stretches all wavelengths 2 pi base^(2i/n) but the first: 5e5 for LLaMA-2 Long (Xiong et al. 2023,
  arXiv:2309.16039), 1e6 for Code LLaMA (Roziere et al. 2023, arXiv:2308.12950); 500 makes all of them shorter than 4k
  (Liu et al. 2023, arXiv:2310.05209). scaling: of the frequencies, see model/extension.py.
  """
  return _rope(_halves, q, k, positions, keys, base, fraction, scaling)


def rope_interleaved(
  q: jax.Array,
  k: jax.Array,
  positions: jax.Array,
  keys: jax.Array | None = None,
  *,
  base: float = 10000.0,
  fraction: float = 1.0,
  scaling: Callable | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`rope` on the neighbouring pairs (2i, 2i + 1): the layout of the paper, GPT-J and GLM."""
  return _rope(_neighbours, q, k, positions, keys, base, fraction, scaling)


def _xpos(turn, q, k, positions, keys, base, fraction, scaling, gamma, unit):
  n, factor, angles = _angles(q, positions, keys, base, fraction, scaling)
  zeta = (np.arange(0, n, 2) / n + gamma) / (1 + gamma)

  def wave(p: jax.Array, angle: jax.Array, sign: int) -> tuple[jax.Array, jax.Array]:
    size = factor * jnp.exp(sign * p[:, :, None, None] / unit * np.log(zeta).astype(np.float32))
    return size * jnp.cos(angle), size * jnp.sin(angle)

  q = turn(q, *wave(positions, angles[0], 1), n)
  return q, turn(k, *wave(positions if keys is None else keys, angles[-1], -1), n)


def xpos(
  q: jax.Array,
  k: jax.Array,
  positions: jax.Array,
  keys: jax.Array | None = None,
  *,
  base: float = 10000.0,
  fraction: float = 1.0,
  scaling: Callable | None = None,
  gamma: float = 0.4,
  unit: float = 512.0,
) -> tuple[jax.Array, jax.Array]:
  """`rope` whose products decay with the distance: pair i of a query at m is multiplied by zeta_i^(m/unit), of a key
  at n by zeta_i^(-n/unit), with zeta_i = (2i/n + gamma) / (1 + gamma) (Sun et al. 2022, arXiv:2212.10554).

  Only m - n matters to the logits, but the factors themselves leave the range of f32 beyond some 60 units.
  """
  return _xpos(_halves, q, k, positions, keys, base, fraction, scaling, gamma, unit)


def xpos_interleaved(
  q: jax.Array,
  k: jax.Array,
  positions: jax.Array,
  keys: jax.Array | None = None,
  *,
  base: float = 10000.0,
  fraction: float = 1.0,
  scaling: Callable | None = None,
  gamma: float = 0.4,
  unit: float = 512.0,
) -> tuple[jax.Array, jax.Array]:
  """`xpos` on the neighbouring pairs (2i, 2i + 1): the layout of the paper and RetNet."""
  return _xpos(_neighbours, q, k, positions, keys, base, fraction, scaling, gamma, unit)


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


class TransformerXL(nn.Module):
  """Logits that also depend on the distance (Dai et al. 2019, arXiv:1901.02860, section 3.3; Gopher, arXiv:2112.11446).

      scale * ((q_i + u) k_j + (q_i + v) W r(i - j)),    r the sinusoids of the distance

  for `SelfAttention(rotate=None, relative=TransformerXL)`. W [embed, heads, head_dim], u and v [heads, head_dim] are
  those of the layer. Distances count slots, which inside a segment are positions.
  """

  base: float = 10000.0

  @nn.compact
  def __call__(
    self, q: jax.Array, k: jax.Array, positions: jax.Array, mask: Mask, embed: int, scale: float
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q: [batch, t, heads, head_dim], k: [batch, s, groups, head_dim]. Returns q + u, k, f32 [batch, heads, t, s]."""
    del positions
    shape, axes, s = q.shape[2:], ('heads', 'head_dim'), k.shape[1]
    w = param.weight(self, 'key', (embed, *shape), ('embed', *axes), 'key')
    u = param.weight(self, 'content_bias', shape, axes, param.zeros)
    v = param.weight(self, 'position_bias', shape, axes, param.zeros)
    # from the farthest key before a query to itself, or to the farthest after it
    distances = jnp.arange(s - 1, -1 if mask.causal and mask.prefix is None else -s, -1)
    r = weights.einsum('td,dhk->thk', sinusoids(distances, embed, self.base).astype(q.dtype), w)
    y = jnp.einsum('bthk,shk->bhts', weights.add(q, v, 'hk'), r, preferred_element_type=jnp.float32)
    if mask.queries is None:
      y = _shift(y)
    else:
      column = s - 1 - mask.queries[:, :, None] + jnp.arange(s)
      y = jnp.take_along_axis(y, jnp.clip(column, 0, y.shape[-1] - 1)[:, None], axis=-1)
    return weights.add(q, u, 'hk'), k, scale * y


def _shift(y: jax.Array) -> jax.Array:
  """[b, h, t, n] by distance t-1, t-2, ... -> [b, h, t, t] by key, without a gather (Dai et al. 2019, appendix B)."""
  b, h, t, n = y.shape
  flat = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, t * (n + 1))
  return flat[:, :, t:].reshape(b, h, t, n)[..., :t]


def of_keys(positions: jax.Array, mask: Mask, count: int) -> jax.Array:
  """The positions [batch or 1, count] of a self-attention's keys: those of the queries, or the slots of its state."""
  return positions if mask.queries is None else jnp.arange(count)[None]
