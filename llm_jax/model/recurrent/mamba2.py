"""Mamba-2: Mamba with one decay per head, so that a chunk of it is a product of matrices (Dao & Gu 2024,
arXiv:2405.21060).

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T x_t,    y_t = C_t S_t + D x_t

for every head of `head_dim` channels x, with one number A < 0 per head (eq. 1 with A a scalar times the identity;
section 6 is the chunked form). Section 7 gives the block: all projections from its input, a norm after the gate.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import scan, sequence
from llm_jax.model.recurrent.sequence import State


class Mamba2(nn.Module):
  """The block of figure 6 with a gated RMSNorm.

  hidden: inner width, None = 2 embed. head_dim: channels of a head. groups: of heads that share B and C, and over which
  the norm is taken. state: numbers per channel. taps: of the convolutions. bias: of the projections in and out.
  conv_bias: of the convolutions. limit: (least, most) of the steps dt. eps: of the norm. chunk: tokens
  of a chunk, 16 was the fastest of 16 to 256 on a CPU; accelerators want products of 128 and more.
  """

  hidden: int | None = None
  head_dim: int = 64
  groups: int = 1
  state: int = 128
  taps: int = 4
  bias: bool = False
  conv_bias: bool = True
  limit: tuple[float, float] = (0.0, float('inf'))
  eps: float = 1e-5
  chunk: int = 16

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    f, heads = self._sizes(d)
    gate = sequence.project(self, 'gate', x, (f,), 'df', 'ffn_in', bias=self.bias)
    dt = sequence.project(self, 'dt', x, (heads,), 'dh', 'ffn_in', bias=self.bias)
    kept, after, parts = {} if state is None else state, {}, []
    shared = self.groups * self.state
    for name, size, axis, letters in (
      ('x', f, 'ffn', 'df'),
      ('b', shared, 'state', 'dn'),
      ('c', shared, 'state', 'dn'),
    ):
      y = sequence.project(self, name, x, (size,), letters, 'ffn_in', bias=self.bias)
      conv = f'{name}_conv'
      y, after[conv] = sequence.short(
        self, conv, y, axis, ctx, kept.get(conv), taps=self.taps, bias=self.conv_bias
      )
      parts.append(jax.nn.silu(y))
    y, after['s'] = self._scan(*parts, dt, ctx, kept.get('s'))
    y = self._norm(y.reshape(*x.shape[:2], f) * jax.nn.silu(gate.astype(jnp.float32)))
    y = sequence.project(self, 'out', y.astype(x.dtype), (d,), 'fd', 'ffn_out', bias=self.bias)
    return y, None if state is None else after

  @nn.nowrap
  def _scan(
    self, u: jax.Array, b: jax.Array, c: jax.Array, dt: jax.Array, ctx: Context, s: Any
  ) -> tuple[jax.Array, jax.Array]:
    """f32 (y [batch, t, heads, head_dim], the state)."""
    rows, t, heads = dt.shape
    inner = (self.groups, heads // self.groups)
    rate = -jnp.exp(sequence.vector(self, 'log_rate', (heads,), ('heads',), log_uniform))
    bias = sequence.vector(self, 'step_bias', (heads,), ('heads',), sequence.steps(1e-3, 1e-1))
    skip = sequence.vector(self, 'skip', (heads,), ('heads',), param.ones)
    dt = jnp.clip(jax.nn.softplus(dt.astype(jnp.float32) + bias), *self.limit)
    if ctx.real is not None:
      dt = dt * ctx.real[:, :, None]  # without a step the state stays
    u = u.astype(jnp.float32).reshape(rows, t, heads, self.head_dim)
    b, c = (y.reshape(rows, t, self.groups, self.state) for y in (b, c))
    shape = (rows, *inner, self.state, self.head_dim)
    s = jnp.zeros(shape) if s is None else s.reshape(shape)
    moved = (u * dt[..., None]).reshape(rows, t, *inner, self.head_dim)
    decay = (dt * rate).reshape(rows, t, *inner)
    y, s = scan.chunked(c, b, moved, decay, sequence.starts(ctx), s, size=self.chunk)
    y = y.reshape(u.shape) + skip[:, None] * u
    return y, s.reshape(rows, heads, self.state, self.head_dim)

  @nn.nowrap
  def _norm(self, y: jax.Array) -> jax.Array:
    """RMSNorm over each group of heads."""
    f = y.shape[-1]
    scale = sequence.vector(self, 'norm_scale', (f,), ('ffn',), param.ones)
    grouped = y.reshape(*y.shape[:2], self.groups, -1)
    mean = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
    return (grouped * jax.lax.rsqrt(mean + self.eps)).reshape(y.shape) * scale

  @nn.nowrap
  def _sizes(self, embed: int) -> tuple[int, int]:
    """(inner width, heads)."""
    f = self.hidden or 2 * embed
    if f % self.head_dim or f // self.head_dim % self.groups:
      raise UserError(
        f'{f} inner channels do not make heads of head_dim={self.head_dim} in {self.groups} groups: '
        'change hidden, head_dim or groups'
      )
    return f, f // self.head_dim

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{x_conv, b_conv, c_conv: zeros [batch, taps - 1, channels], s: f32 zeros [batch, heads, state, head_dim]}."""
    del length
    f, heads = self._sizes(embed)
    sizes = dict(x_conv=f, b_conv=self.groups * self.state, c_conv=self.groups * self.state)
    convs = {name: jnp.zeros((batch, self.taps - 1, n), dtype) for name, n in sizes.items()}
    return dict(convs, s=jnp.zeros((batch, heads, self.state, self.head_dim)))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    sizes = dict(x_conv='ffn', b_conv='state', c_conv='state')
    convs = {name: ('batch', 'taps', axis) for name, axis in sizes.items()}
    return dict(convs, s=('batch', 'heads', 'state', 'head_dim'))


def log_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log A with A uniform between 1 and 16, as in the authors' code."""
  return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))
