"""Mamba: a state space whose step, input and output depend on the token (Gu & Dao 2023, arXiv:2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t h_t + D x_t

for every channel x of the inner width, with A < 0 diagonal of `state` numbers (eq. 2 and algorithm 2; the input by
Euler's rule, as in the authors' code).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import scan, sequence
from llm_jax.model.recurrent.sequence import State


class Mamba(nn.Module):
  """The block of figure 3: projection to two branches of `hidden` channels, convolution, selective state space, gate.

  hidden: inner width, None = 2 embed. state: numbers per channel. taps: of the convolution. rank: of the projection to
  the steps dt, None = embed / 16 rounded up. bias: of the projections in and out. conv_bias: of the convolution. chunk:
  tokens whose states exist at one time.
  """

  hidden: int | None = None
  state: int = 16
  taps: int = 4
  rank: int | None = None
  bias: bool = False
  conv_bias: bool = True
  chunk: int = 16

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    f = self._width(d)
    u = sequence.project(self, 'x', x, (f,), 'df', 'ffn_in', bias=self.bias)
    gate = sequence.project(self, 'gate', x, (f,), 'df', 'ffn_in', bias=self.bias)
    kept = {} if state is None else state
    u, conv = sequence.short(
      self, 'conv', u, 'ffn', ctx, kept.get('conv'), taps=self.taps, bias=self.conv_bias
    )
    y, h = self._select(jax.nn.silu(u), ctx, kept.get('h'), self.rank or -(-d // 16))
    y = (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
    y = sequence.project(self, 'out', y, (d,), 'fd', 'ffn_out', bias=self.bias)
    return y, None if state is None else dict(conv=conv, h=h)

  @nn.nowrap
  def _select(
    self, u: jax.Array, ctx: Context, h: jax.Array | None, rank: int
  ) -> tuple[jax.Array, jax.Array]:
    """The selective state space: u [batch, t, hidden], h [batch, hidden, state] -> f32 y and h of these shapes."""
    f = u.shape[-1]
    low = sequence.project(self, 'rank', u, (rank,), 'fr', 'ffn_in')
    b = sequence.project(self, 'b', u, (self.state,), 'fn', 'ffn_in').astype(jnp.float32)
    c = sequence.project(self, 'c', u, (self.state,), 'fn', 'ffn_in').astype(jnp.float32)
    dt = sequence.project(self, 'step', low, (f,), 'rf', sequence.uniform(rank**-0.5))
    bias = sequence.vector(self, 'step_bias', (f,), ('ffn',), sequence.steps(1e-3, 1e-1))
    rate = -jnp.exp(
      sequence.vector(self, 'log_rate', (f, self.state), ('ffn', 'state'), log_counts)
    )
    skip = sequence.vector(self, 'skip', (f,), ('ffn',), param.ones)
    u = u.astype(jnp.float32)
    dt = jax.nn.softplus(dt.astype(jnp.float32) + bias)
    if ctx.real is not None:
      dt = dt * ctx.real[:, :, None]  # without a step the state stays
    first = sequence.starts(ctx)

    def chunk(h: jax.Array, part: tuple) -> tuple[jax.Array, jax.Array]:
      dt, moved, b, c, first = part
      decay = jnp.exp(dt[..., None] * rate)
      if first is not None:
        decay = jnp.where(first[:, :, None, None], 0, decay)
      new = moved[..., None] * b[:, :, None]
      new = new.at[:, 0].add(decay[:, 0] * h)
      all_h = scan.linear(decay, new)
      return all_h[:, -1], jnp.einsum('btfn,btn->btf', all_h, c)

    h = jnp.zeros((u.shape[0], f, self.state)) if h is None else h
    h, y = scan.over_chunks(chunk, h, (dt, dt * u, b, c, first), self.chunk)
    return y + skip * u, h

  @nn.nowrap
  def _width(self, embed: int) -> int:
    return self.hidden or 2 * embed

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{conv: zeros [batch, taps - 1, hidden], h: f32 zeros [batch, hidden, state]}."""
    del length
    f = self._width(embed)
    return dict(
      conv=jnp.zeros((batch, self.taps - 1, f), dtype), h=jnp.zeros((batch, f, self.state))
    )

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(conv=('batch', 'taps', 'ffn'), h=('batch', 'ffn', 'state'))


def log_counts(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log 1, log 2, ... along the last axis: A = -1, -2, ..., the real form of S4D (Gu et al. 2022, arXiv:2206.11893)."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)
