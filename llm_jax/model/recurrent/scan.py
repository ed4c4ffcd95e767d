"""Linear recurrences in parallel: h_t = a_t h_{t-1} + b_t, with numbers a_t or with a decay of a matrix (`chunked`).

The first is an associative scan (Blelloch 1990, "Prefix sums and their applications", section 1.4), the second products
of matrices within chunks and a recurrence between them (Sun et al. 2023, arXiv:2307.08621, eq. 7; Dao & Gu 2024,
arXiv:2405.21060, section 6).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def linear(a: jax.Array, b: jax.Array) -> jax.Array:
  """h_t = a_t h_{t-1} + b_t along axis 1, from h = 0. a, b: [batch, t, ...] of one shape, real or complex."""

  def after(first: tuple, second: tuple) -> tuple:
    return first[0] * second[0], first[1] * second[0] + second[1]

  return jax.lax.associative_scan(after, (a, b), axis=1)[1]


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same recurrence from the other end: what autodiff would make of the tree of the scan needs several times the
  memory."""
  a, h = saved
  reverse = lambda x: jnp.flip(x, 1)
  later = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
  db = reverse(linear(reverse(later), reverse(g)))
  before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
  return db * before, db


def _forward(a: jax.Array, b: jax.Array) -> tuple:
  h = linear(a, b)
  return h, (a, h)


linear.defvjp(_forward, _backward)


def over_chunks(
  body: Callable, carry: jax.Array, arrays: tuple, size: int
) -> tuple[jax.Array, jax.Array]:
  """(carry, y) of `body(carry, arrays of one chunk) -> (carry, y)` over the chunks of axis 1, one after the other.

  arrays: pytree of [batch, t, ...], zeros behind their ends where chunks of `size` do not fit. Only the carries are
  kept for the backward pass, the insides of a chunk are computed again.
  """
  t = jax.tree.leaves(arrays)[0].shape[1]
  size = min(size, t)
  body = jax.checkpoint(body, prevent_cse=False)
  if size == t:
    return body(carry, arrays)
  arrays = jax.tree.map(functools.partial(_cut, size=size), arrays)
  carry, y = jax.lax.scan(body, carry, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
  y = jnp.moveaxis(y, 0, 1)
  return carry, y.reshape(y.shape[0], -1, *y.shape[3:])[:, :t]


def _cut(x: jax.Array, size: int) -> jax.Array:
  """[batch, t, ...] -> [batch, chunks, size, ...], zeros behind the end."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def chunked(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  decay: jax.Array,
  first: jax.Array | None,
  state: jax.Array,
  *,
  size: int,
) -> tuple[jax.Array, jax.Array]:
  """y_t = q_t S_t with S_t = exp(decay_t) S_{t-1} + k_t^T v_t, a matrix per head: (y, the last S), f32.

  q, k: [batch, t, g, n], v: [batch, t, g, r, p] (r heads share a query and a key), decay: [batch, t, g, r], at most 0.
  first: bool [batch, t], where S starts afresh. state: [batch, g, r, n, p], the S before. size: of the chunks: within
  one everything is a product of matrices, between them the recurrence. A chunk of the whole sequence is the parallel
  form, chunks of one token are the recurrent one.
  """

  def body(s: jax.Array, part: tuple) -> tuple[jax.Array, jax.Array]:
    q, k, v, decay, first = part
    total = jnp.cumsum(decay, axis=1)
    gone = jnp.moveaxis(total, 1, -1)
    gone = gone[..., :, None] - gone[..., None, :]  # log of what of token s is left at t
    t = q.shape[1]
    seen = jnp.tri(t, dtype=bool)[None]
    within, since = jnp.exp(total), jnp.exp(total[:, -1:] - total)
    if first is not None:
      of = jnp.cumsum(first, axis=1)
      seen = seen & (of[:, :, None] == of[:, None, :])
      within = jnp.where((of == 0)[:, :, None, None], within, 0)
      since = jnp.where((of == of[:, -1:])[:, :, None, None], since, 0)
    left = jnp.exp(jnp.where(seen[:, None, None], gone, -jnp.inf))
    scores = jnp.einsum('btgn,bsgn->bgts', q, k)[:, :, None] * left
    y = jnp.einsum('bgrts,bsgrp->btgrp', scores, v)
    y = y + jnp.einsum('btgn,bgrnp->btgrp', q, s) * within[..., None]
    s = s * within[:, -1, :, :, None, None]
    return s + jnp.einsum('bsgn,bsgrp->bgrnp', k, v * since[..., None]), y

  f32 = (x.astype(jnp.float32) for x in (q, k, v, decay))
  state, y = over_chunks(body, state.astype(jnp.float32), (*f32, first), size)
  return y, state
