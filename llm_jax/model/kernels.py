"""Attention kernels with one signature: how softmax(scale * q k^T + bias) v is computed.

    kernel(q [b, t, h, k], k [b, s, g, k], v [b, s, g, k], mask, bias, scale, cap, dropout, rng) -> [b, t, h, k]

`mask` is a `masks.Mask`; `bias` f32, broadcastable to [b, h, t, s], or None; `scale` None is 1/sqrt(head_dim); `cap`
bounds the logits to (-cap, cap) by cap * tanh(logits / cap) before bias and mask (Gemma 2); `dropout` falls on the
probabilities when there is a key `rng`. Query head i reads key head i // (h / g): g = h is multi-head attention, g = 1
multi-query (Shazeer 2019, arXiv:1911.02150), between them grouped-query (Ainslie et al. 2023, arXiv:2305.13245).
A query that may see nothing attends to everything evenly: finite, and nobody reads it.
"""

import jax
import jax.numpy as jnp

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.model.dropout import dropout as drop
from llm_jax.model.masks import Mask

HIDDEN = -0.7 * float(
  jnp.finfo(jnp.float32).max
)  # a logit that softmax turns into 0 without making a NaN


def reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask = Mask(),
  bias: jax.Array | None = None,
  scale: float | None = None,
  cap: float | None = None,
  dropout: float = 0.0,
  rng: jax.Array | None = None,
) -> jax.Array:
  """The formula in einsums; holds the [b, h, t, s] logits in f32."""
  return _softmax_average(
    q, k, v, mask.dense(q.shape[1], k.shape[1]), bias, scale, cap, dropout, rng
  )


def blocked(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask = Mask(),
  bias: jax.Array | None = None,
  scale: float | None = None,
  cap: float | None = None,
  dropout: float = 0.0,
  rng: jax.Array | None = None,
  *,
  blocks: int = 4,
) -> jax.Array:
  """`reference` over blocks of queries, each against only the keys before its end.

  Of the t^2 products of a causal mask 1/2 - 1/(2 blocks) are never formed, and the logits of one block are held at a
  time (t = 256 on CPU: the kernel 1.3 times as fast, forward and backward; more for longer t). Masks that are not
  causal over the whole sequence (prefix, decoding, encoders) are one block.
  """
  t = q.shape[1]
  if blocks == 1 or not mask.causal or mask.prefix is not None or mask.queries is not None:
    return _softmax_average(
      q, k, v, mask.dense(q.shape[1], k.shape[1]), bias, scale, cap, dropout, rng
    )
  size, out = -(-t // blocks), []
  for i in range(0, t, size):
    end = min(i + size, t)
    rows = None if bias is None else bias[:, :, i:end, :end]
    key = None if rng is None else jax.random.fold_in(rng, i)
    seen = mask.rows(i, end).dense(end - i, end)
    args = (q[:, i:end], k[:, :end], v[:, :end], seen, rows, scale, cap, dropout, key)
    out.append(_softmax_average(*args))
  return jnp.concatenate(out, axis=1)


def banded(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask = Mask(),
  bias: jax.Array | None = None,
  scale: float | None = None,
  cap: float | None = None,
  dropout: float = 0.0,
  rng: jax.Array | None = None,
) -> jax.Array:
  """`reference` for a causal window, in time and memory linear in t: blocks of a window's length, each against its own
  keys, those of the block before, and the sinks.

  Decoding, whose queries are few, and a sequence inside one window go to `reference`. Raises `UserError` for anything
  else without a causal window.
  """
  if mask.queries is not None or (mask.window is not None and q.shape[1] <= mask.window):
    return _softmax_average(
      q, k, v, mask.dense(q.shape[1], k.shape[1]), bias, scale, cap, dropout, rng
    )
  other = mask.sees or mask.windows is not None or mask.branches is not None
  if mask.window is None or other or not mask.causal:
    raise UserError(
      'the kernel banded needs causal attention with a window and no other pattern, nor branches'
    )
  if bias is not None or mask.prefix is not None:
    what = 'position bias' if bias is not None else 'prefix'
    raise UserError(f'the kernel banded takes no {what}; use llm_jax.model.kernels:reference')
  t, w = q.shape[1], mask.window
  blocks = -(-t // w)
  seen, sinks = _band(mask, t, w, blocks)
  rng = None if rng is None else jax.random.split(rng, blocks)
  args = (_cut(q, w), _pairs(k, w, sinks), _pairs(v, w, sinks), seen)
  one = lambda q, k, v, seen, rng: _softmax_average(q, k, v, seen, None, scale, cap, dropout, rng)
  out = jax.vmap(one, (1, 1, 1, 1, None if rng is None else 0), 1)(*args, rng)
  return out.reshape(q.shape[0], blocks * w, *q.shape[2:])[:, :t]


def _band(mask: Mask, t: int, w: int, blocks: int) -> tuple[jax.Array, jax.Array]:
  """What `banded` looks at: bool [b or 1, blocks, 1, w, sinks + 2w], and the indices of the sinks [b or 1, blocks,
  sinks].

  A document that began before the block before holds that block's first token, so there is one at most, and its sinks
  are the only ones that are not among the neighbours.
  """
  index = jnp.arange(t)[None]
  place = index if mask.places is None else mask.places[0]
  segment = jnp.ones_like(index) if mask.segments is None else mask.segments[0]
  place, segment = jnp.broadcast_arrays(place, segment)
  first = jnp.maximum(jnp.arange(blocks) * w - w, 0)  # of the block before
  sinks = (first - place[:, first])[..., None] + jnp.arange(mask.sinks)
  shape = (len(segment), blocks, w + w)
  # the index of every neighbour, -1 in front of the sequence and behind it
  near = jnp.broadcast_to(
    (first[:, None] - w * (jnp.arange(blocks) == 0)[:, None] + jnp.arange(2 * w)), shape
  )
  real = (near >= 0) & (near < t)
  of = lambda x: _pick(x, jnp.clip(near, 0, t - 1))
  own = near[:, :, w:, None]
  reach = (own - near[:, :, None] < w) | (of(place) < mask.sinks)[:, :, None]
  seen = real[:, :, None] & (near[:, :, None] <= own) & reach
  seen &= of(segment)[:, :, None] == of(segment)[:, :, w:, None]
  far = sinks < jnp.where(jnp.arange(blocks) == 0, 0, first)[:, None]
  far = far[:, :, None] & (_pick(segment, sinks)[:, :, None] == of(segment)[:, :, w:, None])
  return jnp.concatenate([far, seen], axis=-1)[:, :, None], sinks


def _cut(x: jax.Array, w: int) -> jax.Array:
  """[b, t, ...] -> [b, blocks, w, ...], filled up with zeros."""
  blocks = -(-x.shape[1] // w)
  x = jnp.pad(x, ((0, 0), (0, blocks * w - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
  return x.reshape(x.shape[0], blocks, w, *x.shape[2:])


def _pairs(x: jax.Array, w: int, sinks: jax.Array) -> jax.Array:
  """[b, t, ...] -> [b, blocks, sinks + 2w, ...]: the sinks, the block before, the own."""
  own = _cut(x, w)
  before = jnp.concatenate([jnp.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
  sinks = jnp.broadcast_to(sinks, (x.shape[0], *sinks.shape[1:]))
  return jnp.concatenate([_pick(x, sinks), before, own], axis=2)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [b, t, ...] at index [b, blocks, n] along t: [b, blocks, n, ...]."""
  rows = jnp.arange(x.shape[0])[:, None, None]
  if not mesh.is_explicit():
    return x[rows, index]
  b, _, *rest = jax.typeof(x).sharding.spec
  return x.at[rows, index].get(out_sharding=jax.sharding.PartitionSpec(b, None, None, *rest))


def dot_product(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask = Mask(),
  bias: jax.Array | None = None,
  scale: float | None = None,
  cap: float | None = None,
  dropout: float = 0.0,
  rng: jax.Array | None = None,
) -> jax.Array:
  """`jax.nn.dot_product_attention`, which uses a fused kernel where the platform has one."""
  if cap is not None or (dropout and rng is not None):
    what = 'logit soft cap' if cap is not None else 'dropout on the probabilities'
    raise UserError(f'the kernel dot_product has no {what}; use llm_jax.model.kernels:reference')
  seen = None if mask.static else mask.dense(q.shape[1], k.shape[1])
  causal = mask.static and mask.causal
  return jax.nn.dot_product_attention(q, k, v, bias, seen, scale=scale, is_causal=causal)


def _softmax_average(q, k, v, seen, bias, scale, cap, dropout, rng) -> jax.Array:
  """Arguments as above, `seen` bool, broadcastable to [b, 1, t, s], or None. Divides by the sum of the exponentials
  last: one pass less over [b, h, t, s].
  """
  if q.shape[1] == 1 and rng is None:
    return _one(q, k, v, seen, bias, scale, cap)
  (b, t, h, n), g = q.shape, k.shape[2]
  q = q * jnp.asarray(n**-0.5 if scale is None else scale, q.dtype)
  if g == h:
    logits = jnp.einsum('bthk,bshk->bhts', q, k, preferred_element_type=jnp.float32)
  else:  # m heads share a key
    q = _reshape(q, (b, t, g, h // g, n))
    logits = jnp.einsum('btgmk,bsgk->bgmts', q, k, preferred_element_type=jnp.float32)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  if bias is not None:
    logits = logits + (bias if g == h else _split_heads(bias, g))
  if seen is not None:
    logits = jnp.where(seen if g == h else seen[:, :, None], logits, HIDDEN)
  e = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  total = jnp.sum(e, axis=-1)
  e = drop(e, dropout, rng).astype(v.dtype)
  if g == h:
    out = jnp.einsum('bhts,bshk->bthk', e, v, preferred_element_type=jnp.float32)
    return (out / jnp.swapaxes(total, 1, 2)[..., None]).astype(v.dtype)
  out = jnp.einsum('bgmts,bsgk->btgmk', e, v, preferred_element_type=jnp.float32)
  out = (out / jnp.moveaxis(total, 3, 1)[..., None]).astype(v.dtype)
  return _reshape(out, (b, t, h, n))


def _one(q, k, v, seen, bias, scale, cap) -> jax.Array:
  """The same for one query per row, whose products are made as states keep their keys, [b, g, s, k]: nothing is turned
  around for a token (batch 32, 256 slots on CPU: 2.5 times as fast).
  """
  (b, _, h, n), g = q.shape, k.shape[2]
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  q = q * jnp.asarray(n**-0.5 if scale is None else scale, q.dtype)
  q = _reshape(q, (b, 1, g, h // g, n))[:, 0]
  logits = jnp.einsum('bgmk,bgsk->bgms', q, k, preferred_element_type=jnp.float32)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  if bias is not None:
    logits = logits + _split_heads(bias, g)[:, :, :, 0]
  if seen is not None:
    logits = jnp.where(seen, logits, HIDDEN)
  e = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  total = jnp.sum(e, axis=-1, keepdims=True)
  out = jnp.einsum('bgms,bgsk->bgmk', e.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return _reshape((out / total).astype(v.dtype)[:, None], (b, 1, h, n))


def _reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`reshape` between [b, t, h, k] and [b, t, g, h/g, k], telling Explicit meshes where the split lands."""
  if not mesh.is_explicit():
    return x.reshape(shape)
  if len(shape) == 4:
    return jnp.reshape(x, shape, out_sharding=mesh.spec('batch', 'length', 'heads', 'head_dim'))
  groups = mesh.spec('groups')[0]
  if (
    groups is None and mesh.spec('heads')[0] is not None
  ):  # whole keys for every device: split inside the group
    return jnp.reshape(
      x, shape, out_sharding=mesh.spec('batch', 'length', None, 'heads', 'head_dim')
    )
  return jnp.reshape(
    x, shape, out_sharding=mesh.spec('batch', 'length', 'groups', None, 'head_dim')
  )


def _split_heads(bias: jax.Array, groups: int) -> jax.Array:
  """[b or 1, h or 1, t, s] -> [b or 1, g or 1, h/g, t, s]."""
  b, h, t, s = bias.shape
  return bias[:, :, None] if h == 1 or h == groups else bias.reshape(b, groups, h // groups, t, s)


def products(q: jax.Array, k: jax.Array) -> jax.Array:
  """q k^T, f32 [b, h, t, s], for what needs logits of its own: q [b, t, h, k], k [b, s, g, k]."""
  k = repeat(k, q.shape[2])
  return jnp.einsum('bthk,bshk->bhts', q, k, preferred_element_type=jnp.float32)


def repeat(k: jax.Array, heads: int) -> jax.Array:
  """[b, s, g, k] -> [b, s, h, k]: every key as often as query heads share it."""
  out = mesh.spec('batch', 'length', 'heads', 'head_dim') if mesh.is_explicit() else None
  return k if k.shape[2] == heads else jnp.repeat(k, heads // k.shape[2], axis=2, out_sharding=out)
