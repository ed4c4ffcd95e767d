"""RetNet's multi-scale retention (Sun et al. 2023, arXiv:2307.08621).

    S_n = gamma S_{n-1} + K_n^T V_n,  O_n = Q_n S_n        (eq. 6, recurrent)
    O = (Q K^T * D) V,  D_nm = gamma^(n-m) for n >= m      (eq. 5, parallel)

with queries and keys turned by their positions (the exponential decay of xPos is gamma itself), a gamma per head, a
group norm over each head and a swish gate (eq. 8). `scan.chunked` is all three forms: parallel with chunks of the whole
sequence, recurrent with chunks of one token, chunkwise (eq. 7) between. The score normalisations of section 2.3
change only the scale of a head, which the group norm takes away, so they are left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model.attention import Context
from llm_jax.model.positions import rope_interleaved
from llm_jax.model.recurrent import scan, sequence
from llm_jax.model.recurrent.sequence import State


def gammas(heads: int) -> jax.Array:
  """f32 [heads]: 1 - 2^(-5 - i), the decays of eq. 8."""
  return 1 - 2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))


class Retention(nn.Module):
  """Multi-scale retention.

  heads: each with a decay of its own. head_dim: of queries and keys, None = embed / heads. value_dim: of values and
  gates per head, None = twice head_dim (section 3.1). base: of the angles of positions. chunk: tokens of a chunk. eps:
  of the group norm.
  """

  heads: int
  head_dim: int | None = None
  value_dim: int | None = None
  base: float = 10_000.0
  chunk: int = 64
  eps: float = 1e-5

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    key_dim, value_dim = self._sizes(d)
    of_keys, of_values = (self.heads, key_dim), (self.heads, value_dim)
    q = sequence.project(self, 'query', x, of_keys, 'dhk', 'query')
    k = sequence.project(self, 'key', x, of_keys, 'dhk', 'key')
    v = sequence.project(self, 'value', x, of_values, 'dhk', 'value')
    gate = sequence.project(self, 'gate', x, of_values, 'dhk', 'ffn_in')
    q, k = rope_interleaved(q, k, ctx.positions, base=self.base)  # eq. 3: pairs as complex numbers
    k = k * jnp.asarray(key_dim**-0.5, k.dtype)
    decay = jnp.broadcast_to(jnp.log(gammas(self.heads)), q.shape[:3])
    if ctx.real is not None:
      k, decay = (jnp.where(sequence.wide(ctx.real, y), y, 0) for y in (k, decay))
    s = self._zeros(x.shape[0], d) if state is None else state['s']
    first = sequence.starts(ctx)
    y, s = scan.chunked(
      q, k, v[:, :, :, None], decay[..., None], first, s[:, :, None], size=self.chunk
    )
    y = self._norm(y[:, :, :, 0]).astype(x.dtype) * jax.nn.silu(gate)
    y = sequence.project(self, 'out', y, (d,), 'hkd', 'attention_out')
    return y, None if state is None else dict(s=s[:, :, 0])

  @nn.nowrap
  def _norm(self, y: jax.Array) -> jax.Array:
    """Group norm, a head a group; scale and bias are left to the projection out."""
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)

  @nn.nowrap
  def _sizes(self, embed: int) -> tuple[int, int]:
    if self.head_dim is None and embed % self.heads:
      raise UserError(
        f'embed={embed} does not divide by heads={self.heads}; set head_dim or change heads'
      )
    key_dim = self.head_dim or embed // self.heads
    if key_dim % 2:
      raise UserError(f'head_dim={key_dim} has no pairs to turn: choose an even one')
    return key_dim, self.value_dim or 2 * key_dim

  @nn.nowrap
  def _zeros(self, batch: int, embed: int) -> jax.Array:
    return jnp.zeros((batch, self.heads, *self._sizes(embed)), jnp.float32)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{s: f32 zeros [batch, heads, head_dim, value_dim]}."""
    del length, dtype
    return dict(s=self._zeros(batch, embed))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(s=('batch', 'heads', 'head_dim', None))
