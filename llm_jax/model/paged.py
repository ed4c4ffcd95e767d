"""Keys and values in pages, so that requests of any length share one memory (PagedAttention; Kwon et al. 2023,
arXiv:2309.06180, section 4).

A pool holds `pages` of `size` slots, [groups, pages, size, head_dim], plain or `weights.Quantized` to int8 with one
scale per slot and group. A row's table names the page of its slots 0..size-1, size..2*size-1 and so on, -1 for none.

    state = write(state, dict(k=k, v=v), table, slots)
    y = attend(q, state['k'], state['v'], table, slots)

`attend` walks over blocks of slots and keeps a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867), as far
as the longest row goes. What a block adds that a row may not see is exactly nothing, so that a row's bits do not depend
on how far the others go.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core import mesh, weights
from llm_jax.model.kernels import HIDDEN

AXES = 'groups', None, None, 'head_dim'  # of a pool
SUMMED = (
  4096  # XLA on CPUs adds up arrays of so many numbers, or more, in another order than smaller ones
)


def pool(groups: int, pages: int, size: int, head_dim: int, dtype: Any) -> Any:
  """An empty pool; dtype int8 makes a `Quantized` one."""
  shape = groups, pages, size, head_dim
  if jnp.dtype(dtype) != jnp.int8:
    return jnp.zeros(shape, dtype)
  return weights.Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:3], 1), jnp.float32))


def write(state: dict, new: dict, table: jax.Array, slots: jax.Array, real: Any = None) -> dict:
  """The state with `new` [batch, t, groups, head_dim] at `slots` [batch, t]; where `real` is False nothing is written.

  table: int32 [batch, n]. A slot without a page is left out.
  """

  def one(old: jax.Array, x: jax.Array) -> jax.Array:
    groups, pages, size = old.shape[:3]
    place = slots // size
    page = jnp.take_along_axis(table, jnp.clip(place, 0, table.shape[1] - 1), axis=1)
    there = (page >= 0) & (place < table.shape[1]) & (True if real is None else real)
    flat = jnp.where(there, page * size + slots % size, pages * size).reshape(-1)
    x = jnp.moveaxis(x, 2, 0).reshape(groups, flat.shape[0], x.shape[-1])
    lines = old.reshape(groups, pages * size, old.shape[-1])
    return lines.at[:, flat].set(x.astype(old.dtype), mode='drop').reshape(old.shape)

  def both(old: Any, x: jax.Array) -> Any:
    if not isinstance(old, weights.Quantized):
      return one(old, x)
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30).astype(jnp.float32) / 127
    values = jnp.round(x / scale).astype(jnp.int8)
    return weights.Quantized(one(old.values, values), one(old.scale, scale))

  return {name: both(state[name], new[name]) for name in state}


def gather(pool: Any, pages: jax.Array, dtype: Any) -> jax.Array:
  """[groups, batch, n * size, head_dim] of the pages [batch, n]; a missing page reads as some other."""

  def one(x: jax.Array) -> jax.Array:
    x = x[:, jnp.maximum(pages, 0)]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])

  if isinstance(pool, weights.Quantized):
    return (one(pool.values).astype(jnp.float32) * one(pool.scale)).astype(dtype)
  return one(pool).astype(dtype)


def attend(
  q: jax.Array,
  k: Any,
  v: Any,
  table: jax.Array,
  slots: jax.Array,
  scale: float | None = None,
  cap: float | None = None,
  block: int | None = None,
  bias: jax.Array | None = None,
) -> jax.Array:
  """[batch, t, heads, head_dim]: each query over the slots up to its own.

  q: [batch, t, heads, head_dim]; k, v: pools; slots: int32 [batch, t], the last that each may see. cap: see
  model/kernels.py. block: slots at a time, rounded up to pages, None for 128, or for as many as sums over 8 rows need
  to be over `SUMMED` numbers. bias: f32 [batch or 1, heads, t, n * size] on the logits. On a TPU one query per row,
  with heads as wide as its registers (a multiple of 128), plain pools and no bias, goes through the kernel of
  jax.experimental.pallas.ops.tpu. On a mesh each device takes its own groups.
  """
  if block is None:
    block = max(128, -(-SUMMED * mesh.ways('groups') // (8 * q.shape[2])))
  per = -(-block // k.shape[2])
  table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per)), constant_values=-1)
  q = q * jnp.asarray(q.shape[3] ** -0.5 if scale is None else scale, q.dtype)
  walk = functools.partial(_walk, cap=cap, per=per)
  run = walk
  plain = bias is None and not isinstance(k, weights.Quantized)
  if q.shape[1] == 1 and q.shape[3] % 128 == 0 and plain:
    kernel = functools.partial(_tpu, cap=cap, per=per)
    run = lambda *told: jax.lax.platform_dependent(*told, tpu=kernel, default=walk)
  more = () if bias is None else (bias,)
  if mesh.current() is None:
    return run(q, k, v, table, slots, *more)
  split = mesh.spec(*AXES)
  whole, own = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, None, split[0])
  heads = (jax.sharding.PartitionSpec(None, split[0]),) * len(more)
  told = dict(in_specs=(own, split, split, whole, whole, *heads), out_specs=own, check_vma=False)
  return jax.shard_map(run, **told)(q, k, v, table, slots, *more)


def _tpu(q, k, v, table, slots, *, cap: float | None, per: int) -> jax.Array:
  """One scaled query per row. The import takes half a second, and only models with wide heads need it."""
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

  told = dict(pages_per_compute_block=per, attn_logits_soft_cap=cap)
  return paged_attention(q[:, 0], k, v, slots[:, 0] + 1, jnp.maximum(table, 0), **told)[:, None]


def _walk(q, k, v, table, slots, bias=None, *, cap: float | None, per: int) -> jax.Array:
  """Scaled queries; a block of `per` pages at a time."""
  (b, t, h, n), (groups, _, size, _) = q.shape, k.shape
  block = per * size
  q = q.reshape(b, t, groups, h // groups, n).transpose(2, 0, 3, 1, 4).reshape(groups, b, -1, n)
  seen_by = jnp.tile(slots, (1, h // groups))[None, :, :, None]  # [1, b, m * t, 1]
  if bias is not None:
    bias = jnp.broadcast_to(bias, (b, *bias.shape[1:]))
    bias = jnp.moveaxis(bias.reshape(b, groups, q.shape[2], -1), 1, 0)
    bias = jnp.pad(bias, ((0, 0),) * 3 + ((0, table.shape[1] * size - bias.shape[3]),))

  def body(j: jax.Array, carry: tuple) -> tuple:
    top, total, out = carry
    pages = jax.lax.dynamic_slice(table, (0, j * per), (b, per))
    keys, values = gather(k, pages, q.dtype), gather(v, pages, q.dtype)
    logits = jnp.einsum('gbqk,gbsk->gbqs', q, keys, preferred_element_type=jnp.float32)
    if cap is not None:
      logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
      logits += jax.lax.dynamic_slice_in_dim(bias, j * block, block, axis=3)
    index = j * block + jnp.arange(block)
    logits = jnp.where(index <= seen_by, logits, HIDDEN)
    higher = jnp.maximum(top, logits.max(-1, keepdims=True))
    e, kept = jnp.exp(logits - higher), jnp.exp(top - higher)
    more = jnp.einsum(
      'gbqs,gbsk->gbqk', e.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return higher, total * kept + e.sum(-1, keepdims=True), out * kept + more

  shape = groups, b, q.shape[2], 1
  empty = jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros((*shape[:3], n), jnp.float32)
  reach = jnp.clip(slots.max() // block + 1, 1, table.shape[1] // per)
  _, total, out = jax.lax.fori_loop(0, reach, body, empty)
  out = (out / total).astype(q.dtype).reshape(groups, b, h // groups, t, n)
  return out.transpose(1, 3, 0, 2, 4).reshape(b, t, h, n)
