"""Attention as mixers: `(x [batch, t, embed], ctx, state) -> (y [batch, t, embed], state)`.

Without a state the call sees the whole sequence. With one it writes the new keys and values into their slots
(`mask.queries`, which equal the positions unless a batch says otherwise) and looks at all slots up to its own, so
prefill and decoding are one call with different t. A slot at or beyond the state's length is not written. Attention
with a window keeps a ring of the last keys and values instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh, weights
from llm_jax.core.errors import UserError
from llm_jax.model import kernels, paged, param, positions
from llm_jax.model.masks import Mask

State = dict[str, jax.Array]


class Context(NamedTuple):
  """What every layer of a stack is told besides its input.

  mask: who sees whom. positions: int [batch or 1, t]. bias: f32, broadcastable to [batch, heads, t, s], added to the
  logits.
  rng: the layer's dropout key, None for none. encoded: [batch, s, embed], what cross-attention reads. encoded_mask: who
  sees whom there. ids: int [batch, t], the tokens themselves. real: bool [batch, t], with a state: which tokens are no
  padding, None for all; those of a row come first. Attention needs none of it (what padding leaves in a slot is
  overwritten), a recurrent state stays where it is. pages: int32 [batch, n], where the slots of a paged state lie
  (model/paged.py), None for a state with slots of its own. encoded_pages: int32 ([batch, n], [batch]), the same for the
  state of cross-attention, and how many of its slots are the row's. height: of the layer, where there is a key: 0 for
  the first of its stack, 1 for the last.
  """

  mask: Mask
  positions: jax.Array
  bias: jax.Array | None = None
  rng: jax.Array | None = None
  encoded: jax.Array | None = None
  encoded_mask: Mask = Mask()
  ids: jax.Array | None = None
  real: jax.Array | None = None
  pages: jax.Array | None = None
  encoded_pages: tuple[jax.Array, jax.Array] | None = None
  height: Any = None


def _sizes(module: nn.Module, embed: int) -> tuple[int, int, int]:
  """(heads, groups, head_dim) with the defaults filled in."""
  heads, groups = module.heads, module.groups or module.heads
  if heads % groups:
    raise UserError(
      f'{heads} heads do not divide over {groups} groups of keys; choose groups that divide heads'
    )
  if module.head_dim is None and embed % heads:
    raise UserError(f'embed={embed} does not divide by heads={heads}; set head_dim or change heads')
  return heads, groups, module.head_dim or embed // heads


def _project(
  module: nn.Module, name: str, x: jax.Array, letter: str, shape: tuple[int, int]
) -> jax.Array:
  """[b, t, embed] -> [b, t, heads or groups, head_dim]."""
  axes = weights.axes_of(f'd{letter}k')
  w = param.weight(module, name, (x.shape[-1], *shape), axes, name)
  y = weights.einsum(f'btd,d{letter}k->bt{letter}k', x, w)
  if module.bias:
    y = weights.add(
      y, param.weight(module, f'{name}_bias', shape, axes[1:], param.zeros), f'{letter}k'
    )
  return y


def _output(module: nn.Module, y: jax.Array, embed: int) -> jax.Array:
  """[b, t, heads, head_dim] -> [b, t, embed]."""
  shape, axes = (*y.shape[2:], embed), ('heads', 'head_dim', 'embed')
  y = weights.einsum('bthk,hkd->btd', y, param.weight(module, 'out', shape, axes, 'attention_out'))
  if module.bias if module.out_bias is None else module.out_bias:
    y = weights.add(y, param.weight(module, 'out_bias', (embed,), ('embed',), param.zeros), 'd')
  return y


def _attend(
  module: nn.Module, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, ctx: Context, bias: Any
) -> jax.Array:
  return module.kernel(
    q, k, v, mask, bias, scale=module.scale, cap=module.cap, dropout=module.dropout, rng=ctx.rng
  )


def write(state: State, new: State, slots: jax.Array) -> State:
  """The state with `new` [batch, t, ...] written at `slots` [batch, t]; a slot beyond the end is left out."""
  return {name: _at_slots(state[name], slots, new[name], (slice(None),)) for name in state}


def keep(state: State, new: State, slots: jax.Array) -> State:
  """`write` for keys and values: the state's are [batch, groups, length, head_dim], as products read them."""
  return {name: _at_slots(state[name], slots, new[name], (slice(None),) * 2) for name in state}


def read(state: State, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """(keys, values) of a state, [batch, length, groups, head_dim]."""
  k, v = (jnp.swapaxes(state[name], 1, 2).astype(dtype) for name in ('k', 'v'))
  return k, v


def _at_slots(old: jax.Array, slots: jax.Array, x: jax.Array, axes: tuple) -> jax.Array:
  """`old` with `x` [batch, t, ...] at the slots of the axis behind `axes`."""
  rows = jnp.arange(slots.shape[0])[:, None]
  out = jax.typeof(old).sharding if mesh.is_explicit() else None
  place = old.at[(rows, *axes[1:], slots)]
  return place.set(x.astype(old.dtype), mode='drop', out_sharding=out)


def _ring(module: nn.Module, state: State, k: jax.Array, v: jax.Array, ctx: Context) -> tuple:
  """(keys, values, mask, state) of a call of windowed attention with a state: what the ring held before, then its own.

  The first `sinks` positions have slots of their own, the others take turns in the rest.
  """
  if ctx.bias is not None or ctx.mask.prefix is not None or ctx.mask.windows is not None:
    raise UserError(
      'attention with a window keeps no more than the window: it decodes without position bias, prefix and parallel '
      'windows; use sees= in the place of window='
    )
  at = jnp.broadcast_to(ctx.positions, k.shape[:2])
  real = jnp.ones(at.shape, bool) if ctx.real is None else ctx.real
  before = jnp.where(state['at'] < at[:, :1], state['at'], -1)
  places = jnp.concatenate([before, jnp.where(real, at, -1)], axis=1)
  keys = jnp.concatenate([state['ring_k'].astype(k.dtype), k], axis=1)
  values = jnp.concatenate([state['ring_v'].astype(v.dtype), v], axis=1)

  def sees(p: jax.Array, r: jax.Array) -> jax.Array:
    seen = (r >= 0) & (r <= p)
    return seen if module.sees is None else seen & module.sees(p, r)

  pattern = dict(window=module.window, sinks=module.sinks, sees=sees)
  mask = Mask(queries=at, places=(at, places), **pattern)
  size = state['at'].shape[1]
  turns = max(size - module.sinks, 1)
  last = jnp.max(jnp.where(real, at, -1), axis=1, keepdims=True)
  slots = jnp.where(at < module.sinks, at, module.sinks + (at - module.sinks) % turns)
  kept = real & ((at < module.sinks) | (at > last - turns))
  new = dict(ring_k=k, ring_v=v, at=at)
  return keys, values, mask, write(state, new, jnp.where(kept, slots, size))


class SelfAttention(nn.Module):
  """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

  heads: of the queries. groups: of keys and values, None = heads. head_dim: None = embed / heads. bias: on all four
  projections; out_bias: where the last one differs. qk_norm: of each head's queries and keys, before they are rotated
  (QK-norm; Dehghani et al. 2023, arXiv:2302.05442, section 2.1). rotate: a rotation of queries and keys by their
  positions, or None. relative: a module that makes the logits depend on distances, instead of `rotate` (see
  model/positions.py): (q, k, positions, mask, embed, scale) -> (q, k, bias of the logits), with `k` as the state keeps
  it. window, sinks, sees: a sparse pattern, see model/masks.py. scale: of the logits, None = 1/sqrt(head_dim). cap:
  soft cap of the logits. dropout: on the probabilities.
  """

  heads: int
  groups: int | None = None
  head_dim: int | None = None
  bias: bool = False
  out_bias: bool | None = None
  qk_norm: Callable | None = None
  rotate: Callable | None = positions.rope
  relative: Callable | None = None
  window: int | None = None
  sinks: int = 0
  sees: Callable | None = None
  kernel: Callable = kernels.reference
  scale: float | None = None
  cap: float | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    heads, groups, head_dim = _sizes(self, x.shape[-1])
    q = _project(self, 'query', x, 'h', (heads, head_dim))
    k = _project(self, 'key', x, 'g', (groups, head_dim))
    v = _project(self, 'value', x, 'g', (groups, head_dim))
    if self.qk_norm is not None:
      q, k = self.qk_norm(name='query_norm')(q), self.qk_norm(name='key_norm')(k)
    if self.rotate is not None:
      q, k = self.rotate(q, k, ctx.positions)
    if state is not None and ctx.pages is not None and not self._turns():
      y, state = self._paged(q, k, v, ctx, state)
      return _output(self, y, x.shape[-1]), state
    if state is not None and self._turns():
      k, v, mask, state = _ring(self, state, k, v, ctx)
    else:
      places, mask = ctx.positions, ctx.mask
      if state is not None:
        state = keep(state, dict(k=k, v=v), ctx.mask.queries)
        k, v = read(state, q.dtype)
        places = jnp.arange(k.shape[1])[None]
      if self.window is not None or self.sees is not None:
        pattern = dict(window=self.window, sinks=self.sinks, sees=self.sees)
        mask = mask._replace(**pattern, places=(ctx.positions, places))
    ctx = ctx._replace(mask=mask)
    q, k, bias = self._distances(q, k, ctx, x.shape[-1])
    return _output(self, _attend(self, q, k, v, ctx.mask, ctx, bias), x.shape[-1]), state

  @nn.nowrap
  def _paged(self, q: jax.Array, k: jax.Array, v: jax.Array, ctx: Context, state: State) -> tuple:
    """(output, state) of a call whose state is in pages."""
    if ctx.mask.windows is not None or self.relative is not None or self.sees is not None:
      raise UserError(
        'attention in pages has no relative positions, sparse pattern or parallel windows: decode this model with '
        'llm-jax generate'
      )
    slots = ctx.mask.queries
    state = paged.write(state, dict(k=k, v=v), ctx.pages, slots, ctx.real)
    if ctx.mask.prefix is not None:  # in pages it is always the first slots
      slots = jnp.maximum(slots, ctx.mask.prefix.sum(1, keepdims=True) - 1)
    told = dict(scale=self.scale, cap=self.cap, bias=ctx.bias)
    return paged.attend(q, state['k'], state['v'], ctx.pages, slots, **told), state

  @nn.nowrap
  def _turns(self) -> bool:
    """Whether the state is a ring: `relative` takes slots for positions."""
    return self.window is not None and self.relative is None

  @nn.nowrap
  def _distances(self, q: jax.Array, k: jax.Array, ctx: Context, embed: int) -> tuple:
    """(q, k, bias of the logits) after `relative`."""
    if self.relative is None:
      return q, k, ctx.bias
    if self.rotate is not None or self.cap is not None:
      raise UserError(
        'SelfAttention(relative=...) has neither a rotation nor a cap: set rotate=None, cap=None'
      )
    scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
    q, k, bias = self.relative(name='relative')(q, k, ctx.positions, ctx.mask, embed, scale)
    return q, k, bias if ctx.bias is None else bias + ctx.bias

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{k, v: zeros [batch, groups, length, head_dim]}; with a window a ring of no more than window + sinks slots and
    the positions in it, -1 for none: {ring_k, ring_v, at}.
    """
    _, groups, head_dim = _sizes(self, embed)
    if not self._turns():
      return {name: jnp.zeros((batch, groups, length, head_dim), dtype) for name in ('k', 'v')}
    size = min(length, self.window + self.sinks)
    ring = jnp.zeros((batch, size, groups, head_dim), dtype)
    return dict(ring_k=ring, ring_v=ring, at=jnp.full((batch, size), -1, jnp.int32))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    if not self._turns():
      return dict.fromkeys(('k', 'v'), ('batch', 'groups', 'length', 'head_dim'))
    ring = 'batch', 'length', 'groups', 'head_dim'
    return dict(ring_k=ring, ring_v=ring, at=ring[:2])


class CrossAttention(nn.Module):
  """Attention of a decoder to `ctx.encoded`; fields as in `SelfAttention`.

  Its state is the projected encoder output and who may see it: `{}` asks for it to be made, and once made `ctx.encoded`
  is not read. With `ctx.encoded_pages` it is {k, v} of pools (model/paged.py).
  """

  heads: int
  groups: int | None = None
  head_dim: int | None = None
  bias: bool = False
  out_bias: bool | None = None
  kernel: Callable = kernels.reference
  scale: float | None = None
  cap: float | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    heads, groups, head_dim = _sizes(self, x.shape[-1])
    q = _project(self, 'query', x, 'h', (heads, head_dim))
    if state and ctx.encoded_pages is not None:
      table, count = ctx.encoded_pages
      last = jnp.broadcast_to(jnp.maximum(count - 1, 0)[:, None], x.shape[:2])
      y = paged.attend(q, state['k'], state['v'], table, last, self.scale, self.cap)
      return _output(self, y, x.shape[-1]), state
    mask = ctx.encoded_mask
    if state:
      k, v = read(state, q.dtype)
      mask = Mask(segments=(jnp.ones(x.shape[:2], jnp.int32), state['segments']))
    else:
      k = _project(self, 'key', ctx.encoded, 'g', (groups, head_dim))
      v = _project(self, 'value', ctx.encoded, 'g', (groups, head_dim))
    if state is not None and not state:
      seen = jnp.ones(k.shape[:2], jnp.int32) if mask.segments is None else mask.segments[1]
      kept = (jnp.swapaxes(x, 1, 2) for x in (k, v))
      state = dict(zip('kv', kept, strict=True), segments=(seen > 0).astype(jnp.int32))
    return _output(self, _attend(self, q, k, v, mask, ctx, None), x.shape[-1]), state

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{}: made from the encoder's output on the first call."""
    del batch, length, embed, dtype
    return {}

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return {}
