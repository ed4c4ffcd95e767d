"""Attention kernels with one signature: how softmax(scale * q k^T + bias) v is computed.

    kernel(q [b, t, h, k], k [b, s, g, k], v [b, s, g, k], mask, bias, scale, cap, dropout, rng) -> [b, t, h, k]

`mask` is a `masks.Mask`; `bias` f32, broadcastable to [b, h, t, s], or None; `scale` None is 1/sqrt(head_dim); `cap`
bounds the logits to (-cap, cap) by cap * tanh(logits / cap) before bias and mask (Gemma 2); `dropout` falls on the
probabilities when there is a key `rng`. Query head i reads key head i // (h / g): g = h is multi-head attention, g = 1 multi-query
(Shazeer 2019, arXiv:1911.02150), between them grouped-query (Ainslie et al. 2023, arXiv:2305.13245).
A query that may see nothing attends to everything evenly: finite, and nobody reads it.
"""

import jax
import jax.numpy as jnp

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.model.dropout import dropout as drop
from llm_jax.model.masks import Mask

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit that softmax turns into 0 without making a NaN


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
  """The formula in einsums, softmax in f32; holds the [b, h, t, s] probabilities."""
  (b, t, h, n), (s, g) = q.shape, k.shape[1:3]
  scale = n**-0.5 if scale is None else scale
  q = _reshape(q, (b, t, g, h // g, n)) * jnp.asarray(scale, q.dtype)
  logits = jnp.einsum('btgmk,bsgk->bgmts', q, k, preferred_element_type=jnp.float32)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  if bias is not None:
    logits = logits + _split_heads(bias, g)
  seen = mask.dense(t, s)
  if seen is not None:
    logits = jnp.where(seen[:, :, None], logits, HIDDEN)
  weights = drop(jax.nn.softmax(logits, axis=-1), dropout, rng).astype(v.dtype)
  out = jnp.einsum('bgmts,bsgk->btgmk', weights, v)
  return _reshape(out, (b, t, h, n))


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


def _reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`reshape` between [b, t, h, k] and [b, t, g, h/g, k], telling Explicit meshes where the split lands."""
  if not mesh.is_explicit():
    return x.reshape(shape)
  if len(shape) == 4:
    return jnp.reshape(x, shape, out_sharding=mesh.spec('batch', 'length', 'heads', 'head_dim'))
  groups = mesh.spec('groups')[0]
  if groups is None and mesh.spec('heads')[0] is not None:  # whole keys for every device: split inside the group
    return jnp.reshape(x, shape, out_sharding=mesh.spec('batch', 'length', None, 'heads', 'head_dim'))
  return jnp.reshape(x, shape, out_sharding=mesh.spec('batch', 'length', 'groups', None, 'head_dim'))


def _split_heads(bias: jax.Array, groups: int) -> jax.Array:
  """[b or 1, h or 1, t, s] -> [b or 1, g or 1, h/g, t, s]."""
  b, h, t, s = bias.shape
  return bias[:, :, None] if h == 1 or h == groups else bias.reshape(b, groups, h // groups, t, s)
