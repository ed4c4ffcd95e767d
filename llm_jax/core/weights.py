"""The one place where a weight meets an activation.

`einsum` and `lookup` dispatch on the type of the weight, so adapters and quantisation are functions
`params -> params` that replace leaves, and the model never knows. One alphabet for all
equations; a letter means the same axis everywhere:

  b batch   t query position   s key position   d embed   h heads   g groups (key/value heads)   k
  head_dim f ffn     v vocab            e expert         r rank
  n state (of a recurrent channel)   c class (of a classifier)   o filter (of a convolution)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.core import mesh

AXIS = dict(
  b='batch',
  t='length',
  s='length',
  d='embed',
  h='heads',
  g='groups',
  k='head_dim',
  f='ffn',
  v='vocab',
  e='expert',
  r='rank',
  n='state',
  c='classes',
  o='filters',
)


@struct.dataclass
class Quantized:
  """An integer weight: `values * scale`, the scale broadcast against it (absmax quantisation, QNT rows).

  values: int8 [...], scale: float, same rank with 1 on the axes that share a scale.
  """

  values: jax.Array
  scale: jax.Array

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.scale.dtype


@struct.dataclass
class LowRank:
  """`w + scale * a @ b` without forming the sum (LoRA; Hu et al. 2021, arXiv:2106.09685, eq. 3).

  w: the frozen weight (any leaf type), a: [leading axes of w..., rank], b: [rank, the other axes of
  w...]. Which of the two meets the activation first follows from the equation, so a tied table
  works as input and as head.
  """

  w: Any
  a: jax.Array
  b: jax.Array
  scale: float = struct.field(pytree_node=False, default=1.0)

  @property
  def shape(self):
    return self.w.shape

  @property
  def dtype(self):
    return self.w.dtype


@struct.dataclass
class Scaled:
  """`w * scale` with a trained scale on the last axes of w ((IA)^3; Liu et al. 2022, arXiv:2205.05638)."""

  w: Any
  scale: jax.Array

  @property
  def shape(self):
    return self.w.shape

  @property
  def dtype(self):
    return self.w.dtype


def axes_of(letters: str) -> tuple[str, ...]:
  """Axis names for the letters of an equation: `'bthk'` -> `('batch', 'length', 'heads', 'head_dim')`."""
  return tuple(AXIS[letter] for letter in letters)


def einsum(eq: str, x: jax.Array, w: Any, *, dtype: Any = None) -> jax.Array:
  """`jnp.einsum(eq, x, w)` for any leaf type `w`, sharded by the letters of `eq`.

  eq: `'btd,dhk->bthk'`, activation first, weight second. dtype: of the result, also the accumulator
  (default that of `x`; the weight is cast to it before multiplying).
  """
  return _einsum(w, eq, x, x.dtype if dtype is None else dtype)


def add(x: jax.Array, b: Any, letters: str) -> jax.Array:
  """`x + b` for a bias on the last axes of `x`, named by their letters."""
  return x + mesh.gather(_dense(b).astype(x.dtype), axes_of(letters))


def lookup(table: Any, ids: jax.Array, *, dtype: Any) -> jax.Array:
  """Rows of `table` [vocab, embed] at `ids` [batch, length] -> [batch, length, embed]."""
  return _lookup(table, ids, dtype)


def dense(w: Any, dtype: Any = jnp.float32) -> jax.Array:
  """Any leaf type as one plain array."""
  return _dense(w).astype(dtype)


def ready(w: Any, letters: str, dtype: Any) -> jax.Array:
  """Any leaf type as a plain array where it is used (`mesh.used`), for products that no einsum says."""
  return mesh.gather(_dense(w).astype(dtype), axes_of(letters))


def _contract(eq: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
  operands, out = eq.split('->')
  w = mesh.gather(w.astype(x.dtype), axes_of(operands.split(',')[1]))
  if mesh.current() is None:
    return _matmul(eq, x, w, dtype)
  partition = mesh.spec(*axes_of(out))
  if mesh.is_explicit():
    return jnp.einsum(eq, x, w, preferred_element_type=dtype, out_sharding=partition)
  return mesh.constrain(jnp.einsum(eq, x, w, preferred_element_type=dtype), partition)


def _matmul(eq: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
  """The einsum as a product of two matrices, where its letters stand in that order already.

  XLA on CPU computes the weight gradient of a product over three axes from a transposed copy of
  what comes back, and recomputes whatever is fused into that copy: a SwiGLU layer of 384 x 1024
  took 1.6 times as long.
  """
  operands, out = eq.split('->')
  left, right = operands.split(',')
  summed = ''.join(c for c in right if c in left)
  rows, kept = left[: len(left) - len(summed)], ''.join(c for c in right if c not in summed)
  if left != rows + summed or out != rows + kept or right not in (summed + kept, kept + summed):
    return jnp.einsum(eq, x, w, preferred_element_type=dtype)
  n = math.prod(x.shape[len(rows) :])
  first = right.startswith(summed)
  w2 = w.reshape((n, -1) if first else (-1, n))
  shape = (*x.shape[: len(rows)], *(w.shape[len(summed) :] if first else w.shape[: len(kept)]))
  return _product(x.reshape(-1, n), w2, first, jnp.dtype(dtype)).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, w: jax.Array, first: bool, dtype: Any) -> jax.Array:
  """x [n, in] times w, [in, out] if `first`, else [out, in] -> [n, out]."""
  return _dot(x, w, 1, 0 if first else 1, dtype)


def _product_backward(
  first: bool, dtype: Any, saved: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Both gradients as products that give their results in the right order; jax's own rule transposes that of the
  weight.
  """
  del dtype
  x, w = saved
  dy = dy.astype(x.dtype)
  dw = _dot(x, dy, 0, 0, w.dtype) if first else _dot(dy, x, 0, 0, w.dtype)
  return _dot(dy, w, 1, 1 if first else 0, x.dtype), dw


def _dot(a: jax.Array, b: jax.Array, i: int, j: int, dtype: Any) -> jax.Array:
  """The product that sums axis i of `a` with axis j of `b`."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype)


_product.defvjp(
  lambda x, w, first, dtype: (_product(x, w, first, dtype), (x, w)), _product_backward
)


@functools.singledispatch
def _einsum(w: Any, eq: str, x: jax.Array, dtype: Any) -> jax.Array:
  return _contract(eq, x, w, dtype)


@_einsum.register
def _(w: Quantized, eq: str, x: jax.Array, dtype: Any) -> jax.Array:
  return _contract(eq, x, _dense(w), dtype)


@_einsum.register
def _(w: LowRank, eq: str, x: jax.Array, dtype: Any) -> jax.Array:
  (left, right), out = eq.split('->')[0].split(','), eq.split('->')[1]
  lead, rest = right[: w.a.ndim - 1], right[w.a.ndim - 1 :]
  factors = [(f'{lead}r', w.a), (f'r{rest}', w.b)]
  if set(lead) <= set(out):  # the contracted axes are in b: multiply by it first
    factors.reverse()
  (first, p), (second, q) = factors
  middle = ''.join(c for c in left + first if c != 'r' and (c in out or c in second)) + 'r'
  middle = ''.join(dict.fromkeys(middle))  # each letter once
  low = _contract(f'{left},{first}->{middle}', x, p, dtype).astype(x.dtype)
  y = _contract(f'{middle},{second}->{out}', low, q, dtype)
  return _einsum(w.w, eq, x, dtype) + jnp.asarray(w.scale, y.dtype) * y


@_einsum.register
def _(w: Scaled, eq: str, x: jax.Array, dtype: Any) -> jax.Array:
  left, right = eq.split('->')[0].split(',')
  letters = right[-w.scale.ndim :]
  scale = mesh.gather(w.scale, axes_of(letters))
  if left.endswith(letters):  # axes that are summed over: scale the activation
    return _einsum(w.w, eq, x * scale.astype(x.dtype), dtype)
  y = _einsum(w.w, eq, x, dtype)
  return y * scale.astype(y.dtype)


@functools.singledispatch
def _dense(w: Any) -> jax.Array:
  return w


@_dense.register
def _(w: Quantized) -> jax.Array:
  return w.values.astype(w.scale.dtype) * w.scale


@_dense.register
def _(w: LowRank) -> jax.Array:
  return _dense(w.w) + w.scale * jnp.tensordot(w.a, w.b, axes=1).astype(w.dtype)


@_dense.register
def _(w: Scaled) -> jax.Array:
  return _dense(w.w) * w.scale


@functools.singledispatch
def _lookup(table: Any, ids: jax.Array, dtype: Any) -> jax.Array:
  axes = (*(('batch', 'length')[: ids.ndim]), 'embed')
  if mesh.current() is None:
    return table[ids].astype(dtype)
  whole = mesh.gather(table, (None, 'embed'))
  if mesh.is_explicit():
    return whole.at[ids].get(out_sharding=mesh.spec(*axes)).astype(dtype)
  # a second constraint for its transpose: the rows' gradients are summed whole, then split as stored
  return mesh.shard(mesh.settle(whole, (None, 'embed'))[ids].astype(dtype), *axes)


@_lookup.register
def _(table: Quantized, ids: jax.Array, dtype: Any) -> jax.Array:
  values = _lookup(table.values, ids, dtype)
  if table.scale.shape[0] == table.values.shape[0]:  # a scale per row
    return values * _lookup(table.scale, ids, dtype)
  return values * mesh.gather(table.scale, (None, None))[0].astype(dtype)


@_lookup.register
def _(table: LowRank, ids: jax.Array, dtype: Any) -> jax.Array:
  rows = _lookup(table.a, ids, dtype)
  letters = 'bt'[: ids.ndim]
  return _lookup(table.w, ids, dtype) + table.scale * _contract(
    f'{letters}r,rd->{letters}d', rows, table.b, dtype
  )


@_lookup.register
def _(table: Scaled, ids: jax.Array, dtype: Any) -> jax.Array:
  return _lookup(table.w, ids, dtype) * mesh.gather(table.scale, ('embed',)).astype(dtype)
