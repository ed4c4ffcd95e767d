"""Products of sorted rows with a matrix for each group of them: what dropless experts multiply with.

    y[i] = x[i] @ w[g]   for the rows i of group g

The rows of group 0 come first, then those of group 1, and so on; rows behind the last group belong to none and come out
as zeros. Groups have any sizes, unknown when compiling.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # rows that one product of `blocks` takes


def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """x [m, d], w [groups, d, f], sizes int [groups] -> [m, f]: `blocks` on a CPU, `ragged` elsewhere.

  XLA on CPU computes `ragged_dot` as the product of every row with every group's matrix.
  """
  return _product(x, w, sizes)


def ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """`jax.lax.ragged_dot`, which XLA has kernels for on GPU and TPU."""
  y = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)
  return _without_rest(y, sizes)


def blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """A loop over blocks of rows of one group (the idea of MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

  Every group begins a block of its own; one that reaches into the next group is overwritten there by the next block.
  """
  step, padded = _padded(x)
  starts, groups, count = _blocks_of(sizes, step)

  def body(i: jax.Array, y: jax.Array) -> jax.Array:
    rows = jax.lax.dynamic_slice_in_dim(padded, starts(i), step)
    return jax.lax.dynamic_update_slice_in_dim(y, _dot(rows, _of(w, groups(i)), 1, 0), starts(i), 0)

  y = _like(jnp.zeros((padded.shape[0], w.shape[2]), x.dtype), x, w)
  return _without_rest(jax.lax.fori_loop(0, count, body, y)[: x.shape[0]], sizes)


def _backward(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple:
  """The gradients of `blocks`: both in one loop, that of `w` added up in place."""
  step, padded = _padded(x)
  starts, groups, count = _blocks_of(sizes, step)
  ends, dy = jnp.cumsum(sizes), _padded(dy)[1]

  def body(i: jax.Array, carry: tuple) -> tuple:
    dx, dw = carry
    at, group = starts(i), groups(i)
    mine = jnp.arange(step) < ends[group] - at
    y = jnp.where(mine[:, None], jax.lax.dynamic_slice_in_dim(dy, at, step), 0)
    rows = jax.lax.dynamic_slice_in_dim(padded, at, step)
    dx = jax.lax.dynamic_update_slice_in_dim(dx, _dot(y, _of(w, group), 1, 1), at, 0)
    return dx, dw.at[group].add(_dot(rows, y, 0, 0))

  zeros = (_like(jnp.zeros_like(padded), x, w), _like(jnp.zeros_like(w), x, w))
  dx, dw = jax.lax.fori_loop(0, count, body, zeros)
  return _without_rest(dx[: x.shape[0]], sizes), dw


def _ragged_backward(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple:
  return jax.vjp(lambda x, w: ragged(x, w, sizes), x, w)[1](dy)


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(x, w, sizes, cpu=blocks, default=ragged)


def _product_backward(saved: tuple, dy: jax.Array) -> tuple:
  dx, dw = jax.lax.platform_dependent(*saved, dy, cpu=_backward, default=_ragged_backward)
  return dx, dw, None


_product.defvjp(lambda x, w, sizes: (_product(x, w, sizes), (x, w, sizes)), _product_backward)


def _blocks_of(sizes: jax.Array, step: int) -> tuple:
  """(block -> its first row, block -> its group, the number of blocks)."""
  each = -(-sizes // step)
  last, first = jnp.cumsum(each), jnp.cumsum(sizes) - sizes
  groups = lambda i: jnp.searchsorted(last, i, side='right')
  starts = lambda i: first[groups(i)] + (i - (last - each)[groups(i)]) * step
  return starts, groups, last[-1]


def _padded(x: jax.Array) -> tuple[int, jax.Array]:
  """(rows of a block, x with so many more)."""
  step = min(BLOCK, x.shape[0])
  return step, jnp.pad(x, ((0, step), (0, 0)))


def _without_rest(y: jax.Array, sizes: jax.Array) -> jax.Array:
  """Zeros for the rows of no group."""
  return jnp.where(jnp.arange(y.shape[0])[:, None] < sizes.sum(), y, 0)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
  """The product that sums axis i of `a` with axis j of `b`."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=a.dtype)


def _like(zeros: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
  """Zeros that differ from device to device where x or w do: what a loop inside a `shard_map` has to begin with."""
  return zeros + jnp.where(False, x[0, 0] * w[0, 0, 0], 0).astype(zeros.dtype)


def _of(w: jax.Array, group: jax.Array) -> jax.Array:
  """The matrix of a group."""
  return jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
