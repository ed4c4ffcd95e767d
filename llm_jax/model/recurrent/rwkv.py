"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048): a weighted mean of the values so far, its weights decaying per channel.

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)     (eq. 16)

Numerator and denominator are linear recurrences, kept divided by e^m with m the largest exponent so far (appendix D),
so they are computed by two associative scans: of m, which is a maximum of sums, then of the two. A block of RWKV is
`block.mixers(mixer=TimeMix, channel=ChannelMix)`: its feed-forward looks at the token before, so it is a mixer too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model.attention import Context
from llm_jax.model.recurrent import scan, sequence
from llm_jax.model.recurrent.sequence import State

LOWEST = -1e30  # an exponent that stands for log 0 and can be added to others


class TimeMix(nn.Module):
  """The part of attention (eq. 11 to 17): out(sigmoid(r) * wkv), with r, k, v from the token and the one before.

  hidden: channels of k, v, r, None = embed. chunk: tokens whose sums exist at one time.
  """

  hidden: int | None = None
  chunk: int = 128

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    f = self.hidden or x.shape[-1]
    kept = {} if state is None else state
    (before, _), shift = sequence.past(x, 1, ctx, kept.get('shift'))
    key, value, gate = (
      sequence.project(self, name, mixed(self, name, x, before), (f,), 'df', 'ffn_in')
      for name in ('key', 'value', 'receptance')
    )
    decay = jnp.exp(sequence.vector(self, 'log_decay', (f,), ('ffn',), decays))
    bonus = sequence.vector(self, 'bonus', (f,), ('ffn',), bonuses)
    sums = None if state is None else {name: state[name] for name in ('num', 'den', 'top')}
    wkv = wkv_chunks(key, value, decay, bonus, sums, ctx, self.chunk)
    y = jax.nn.sigmoid(gate) * wkv[0].astype(x.dtype)
    y = sequence.project(self, 'out', y, (x.shape[-1],), 'fd', 'ffn_out')
    return y, None if state is None else dict(wkv[1], shift=shift)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{shift: zeros [batch, 1, embed], num, den, top: f32 [batch, hidden]}."""
    del length
    shift = jnp.zeros((batch, 1, embed), dtype)
    return dict(nothing(batch, self.hidden or embed), shift=shift)

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    sums = dict.fromkeys(('num', 'den', 'top'), ('batch', 'ffn'))
    return dict(sums, shift=('batch', None, 'embed'))


class ChannelMix(nn.Module):
  """The part of the feed-forward (eq. 18): sigmoid(r) * (max(k, 0)^2 W_v), with r, k from the token and the one before.

  hidden: None = 4 embed.
  """

  hidden: int | None = None

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    (before, _), shift = sequence.past(x, 1, ctx, None if state is None else state['shift'])
    gate = mixed(self, 'receptance', x, before)
    gate = sequence.project(self, 'receptance', gate, (d,), 'df', 'ffn_in')
    hidden = (self.hidden or 4 * d,)
    h = sequence.project(self, 'key', mixed(self, 'key', x, before), hidden, 'df', 'ffn_in')
    y = sequence.project(self, 'value', jnp.square(jax.nn.relu(h)), (d,), 'fd', 'ffn_out')
    return jax.nn.sigmoid(gate) * y, None if state is None else dict(shift=shift)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{shift: zeros [batch, 1, embed]}."""
    del length
    return dict(shift=jnp.zeros((batch, 1, embed), dtype))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(shift=('batch', None, 'embed'))


def mixed(module: nn.Module, name: str, x: jax.Array, before: jax.Array) -> jax.Array:
  """mu x_t + (1 - mu) x_{t-1} (eq. 11 to 13)."""
  mu = sequence.vector(module, f'{name}_mix', x.shape[-1:], ('norm',), shares).astype(x.dtype)
  return before + mu * (x - before)


def nothing(batch: int, f: int) -> State:
  """The sums over no tokens."""
  zeros = jnp.zeros((batch, f), jnp.float32)
  return dict(num=zeros, den=zeros, top=zeros + LOWEST)


def wkv_chunks(
  key: jax.Array,
  value: jax.Array,
  decay: jax.Array,
  bonus: jax.Array,
  sums: State | None,
  ctx: Context,
  size: int,
) -> tuple[jax.Array, State]:
  """(wkv, the sums after) of eq. 16, f32. key, value: [batch, t, f]; decay, bonus: [f]; sums: as `nothing` makes."""
  rows, t, f = key.shape
  real = jnp.ones((rows, t), bool) if ctx.real is None else ctx.real
  first = sequence.starts(ctx)

  def body(sums: State, part: tuple) -> tuple[State, jax.Array]:
    key, value, real, first = part
    fade = jnp.where(real[:, :, None], -decay, 0.0)
    if first is not None:
      fade = jnp.where(first[:, :, None], LOWEST, fade)
    key = jnp.where(real[:, :, None], key, LOWEST)
    top = jax.lax.stop_gradient(_largest(fade, key, sums['top']))
    tops = jnp.concatenate([sums['top'][:, None], top[:, :-1]], axis=1)
    share = jnp.where(real[:, :, None], jnp.exp(key - top), 0.0)
    keep = jnp.exp(fade + tops - top)
    new = jnp.stack([share * value, share], axis=2)
    new = new.at[:, 0].add(keep[:, :1] * jnp.stack([sums['num'], sums['den']], axis=1))
    after = scan.linear(jnp.broadcast_to(keep[:, :, None], new.shape), new)
    at_first = jnp.stack([sums['num'], sums['den']], axis=1)[:, None]
    before = jnp.concatenate([at_first, after[:, :-1]], axis=1)
    if first is not None:
      tops = jnp.where(first[:, :, None], LOWEST, tops)
    most = jax.lax.stop_gradient(jnp.maximum(tops, key + bonus))
    old, own = jnp.exp(tops - most), jnp.exp(key + bonus - most)
    y = (old * before[:, :, 0] + own * value) / (old * before[:, :, 1] + own)
    return dict(num=after[:, -1, 0], den=after[:, -1, 1], top=top[:, -1]), y

  f32 = [x.astype(jnp.float32) for x in (key, value)]
  sums, y = scan.over_chunks(body, sums or nothing(rows, f), (*f32, real, first), size)
  return y, sums


def _largest(fade: jax.Array, key: jax.Array, top: jax.Array) -> jax.Array:
  """m_t = max(m_{t-1} + fade_t, key_t) along axis 1, from m = top [batch, f]."""

  def after(a: tuple, b: tuple) -> tuple:
    return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

  key = jnp.concatenate([jnp.maximum(key[:, :1], top[:, None] + fade[:, :1]), key[:, 1:]], axis=1)
  return jax.lax.associative_scan(after, (fade, key), axis=1)[1]


def _depth(shape: tuple[int, ...]) -> jax.Array:
  """How deep a layer lies, 0 to 1: [layers, 1] for stacked weights."""
  if len(shape) == 1:
    return jnp.zeros(())
  return (jnp.arange(shape[0]) / max(1, shape[0] - 1))[:, None]


def decays(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log w = -5 + 8 (i / (f-1))^(0.7 + 1.3 depth) for channel i (appendix E)."""
  del key
  i = jnp.arange(shape[-1]) / max(1, shape[-1] - 1)
  return jnp.broadcast_to(-5 + 8 * i ** (0.7 + 1.3 * _depth(shape)), shape).astype(jnp.float32)


def bonuses(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log 0.3 plus -1/2, 0, 1/2 in turn (appendix E)."""
  del key
  i = jnp.arange(shape[-1])
  return jnp.broadcast_to(jnp.log(0.3) + 0.5 * ((i + 1) % 3 - 1), shape).astype(jnp.float32)


def shares(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """mu = (i / embed)^(1 - depth) for channel i, with depths up to 1 - 1/layers (appendix E, of k)."""
  del key
  layers = shape[0] if len(shape) > 1 else 1
  i = jnp.arange(shape[-1]) / shape[-1]
  depth = _depth(shape) * (layers - 1) / layers
  return jnp.broadcast_to(i ** (1 - depth), shape).astype(jnp.float32)
