"""Attention with an external memory: all that left the local window is searched, a few keys are read.

Wu et al. 2022 (Memorizing Transformers, arXiv:2203.08913), Tworkowski et al. 2023 (LongLLaMA, arXiv:2307.03170). One or
two layers of a stack have it (`block=` takes a pattern). What is read:

    local:   softmax over the keys at distances 0 .. window - 1, rotated
    memory:  softmax over the `top` best of the keys at distances window .. window + capacity - 1, found by q k without
             positions, through which no gradient flows into keys and values
    output:  g * memory + (1 - g) * local

with g per head from `gated` or `joint`. A query with an empty memory reads only what is local.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import attention, kernels, param, positions
from llm_jax.model.attention import Context, State
from llm_jax.model.masks import Mask


class Gate(nn.Module):
  """g = sigmoid(b), a trained b per head, 0 at first (arXiv:2203.08913, section 3)."""

  @nn.compact
  def __call__(self, local: jax.Array, memory: jax.Array) -> jax.Array:
    """local, memory: log sum exp of the logits, [batch, heads, t]. Returns g, broadcastable to it."""
    b = param.weight(self, 'bias', local.shape[1:2], ('heads',), param.zeros)
    return jax.nn.sigmoid(b)[:, None]


class Joint(nn.Module):
  """One softmax over local and retrieved keys together (arXiv:2307.03170, section 3): no parameters."""

  def __call__(self, local: jax.Array, memory: jax.Array) -> jax.Array:
    """local, memory: log sum exp of the logits, [batch, heads, t]. Returns g of that shape."""
    return jax.nn.sigmoid(memory - local)


class MemoryAttention(nn.Module):
  """Causal attention to a local window and, by nearest-neighbour search, to a memory of what came before it.

  heads, groups, head_dim, bias, out_bias, rotate, scale: as in `SelfAttention`; rotate is for the local keys. window:
  keys seen locally. capacity: keys in the memory, the oldest are dropped. top: keys read from it per query and head.
  mix: `Gate` or `Joint`.

  The state is a ring of the last `window + capacity` keys and values with their positions, so its size does not depend
  on the length. A call may bring any number of tokens: a document fed in segments, each with the state that the one
  before left, gives what the document gives at once; only the gradient stays inside a segment. A call that begins
  at position 0 begins a new document, whose memory is empty; with a state, a row of a call is of one document.
  """

  heads: int
  groups: int | None = None
  head_dim: int | None = None
  bias: bool = False
  out_bias: bool | None = None
  rotate: Callable | None = positions.rope
  scale: float | None = None
  window: int = 512
  capacity: int = 8192
  top: int = 32
  mix: Callable = Gate

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    if ctx.bias is not None or (state is not None and ctx.mask.prefix is not None):
      what = 'bias on the logits' if ctx.bias is not None else 'prefix in its state'
      raise UserError(
        f'MemoryAttention has no {what}: its positions are a rotation, its decoders causal'
      )
    heads, groups, head_dim = attention._sizes(self, x.shape[-1])
    q = attention._project(self, 'query', x, 'h', (heads, head_dim))
    k = attention._project(self, 'key', x, 'g', (groups, head_dim))
    v = attention._project(self, 'value', x, 'g', (groups, head_dim))
    where = ctx.positions
    if state is None:
      y = self._read(q, k, v, ctx.mask.dense(*x.shape[1:2] * 2), where, where)
    else:
      seen, at, keys, values = _behind(state, where, k, v)
      y = self._read(q, keys, values, seen, where, at)
      state = _append(state, where, k, v)
    return attention._output(self, y.astype(x.dtype), x.shape[-1]), state

  @nn.nowrap
  def _read(
    self, q: jax.Array, k: jax.Array, v: jax.Array, seen: Any, where: jax.Array, at: jax.Array
  ) -> jax.Array:
    """q: [b, t, h, k]; k, v: [b, s, g, k]; seen: bool [b or 1, 1, t, s] or None; where, at: the positions of queries
    and keys. Returns f32 [b, t, h, k]."""
    scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
    k, v = (kernels.repeat(y, q.shape[2]) for y in (k, v))
    distance = (where[:, :, None] - at[:, None, :])[:, None]
    near = jnp.abs(distance) < self.window
    far = (distance >= self.window) & (distance < self.window + self.capacity)
    near, far = (m if seen is None else m & seen for m in (near, far))
    rotated = (q, k) if self.rotate is None else self.rotate(q, k, where, at)
    logits = jnp.where(near, scale * kernels.products(*rotated), kernels.HIDDEN)
    local = jnp.einsum('bhts,bshk->bthk', jax.nn.softmax(logits), v.astype(jnp.float32))
    k, v = jax.lax.stop_gradient((k, v))
    scores = jnp.where(far, scale * kernels.products(q, k), kernels.HIDDEN)
    best, index = jax.lax.top_k(scores, min(self.top, scores.shape[-1]))
    found = jnp.moveaxis(v, 2, 1)[:, :, None]  # [b, h, 1, s, k]
    found = jnp.take_along_axis(found, index[..., None], axis=3).astype(jnp.float32)
    memory = jnp.einsum('bhtn,bhtnk->bthk', jax.nn.softmax(best), found)
    g = self.mix(name='mix')(jax.nn.logsumexp(logits, -1), jax.nn.logsumexp(best, -1))
    g = jnp.moveaxis(jnp.where(far.any(-1), g, 0.0), 1, 2)[..., None]
    return g * memory + (1 - g) * local

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{memory_k, memory_v: zeros [batch, window + capacity, groups, head_dim], at: their positions, -1 for none}."""
    del length
    _, groups, head_dim = attention._sizes(self, embed)
    shape = (batch, self.window + self.capacity)
    made = {n: jnp.zeros((*shape, groups, head_dim), dtype) for n in ('memory_k', 'memory_v')}
    return dict(made, at=jnp.full(shape, -1, jnp.int32))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    kept = 'batch', 'length', 'groups', 'head_dim'
    return dict(memory_k=kept, memory_v=kept, at=kept[:2])


def _behind(state: State, where: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
  """(seen, positions, keys, values) of the ring followed by the call's own. Of the ring, what lies before the call is
  seen: what padding or another document left in it has a later position."""
  ring = jax.lax.stop_gradient(state)
  before = (ring['at'] >= 0) & (ring['at'] < where[:, :1])
  own = Mask(True).dense(where.shape[1], where.shape[1])[:, 0]
  shape = (where.shape[0], where.shape[1])
  seen = [jnp.broadcast_to(m, (*shape, m.shape[-1])) for m in (before[:, None], own)]
  keys = jnp.concatenate([ring['memory_k'].astype(k.dtype), k], axis=1)
  values = jnp.concatenate([ring['memory_v'].astype(v.dtype), v], axis=1)
  at = jnp.concatenate([ring['at'], where], axis=1)
  return jnp.concatenate(seen, axis=-1)[:, None], at, keys, values


def _append(state: State, where: jax.Array, k: jax.Array, v: jax.Array) -> State:
  """The ring with the newest keys and values in the place of the oldest."""
  size = state['at'].shape[1]
  new = dict(memory_k=k, memory_v=v, at=where)
  new = {name: y[:, -size:] for name, y in new.items()}
  return attention.write(state, new, new['at'] % size)
