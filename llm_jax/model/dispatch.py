"""From tokens to their experts and back, on one device or with the experts split over the mesh axis `expert`.

    dispatch(x [b, t, d], routing, crew) -> (y [b, t, d], part of the pairs that were dropped [b])

Both ways of doing it work on one device's rows, inside the `shard_map` of `model/moe.py`, and are the
only places where tokens change devices.

| | an expert takes | moves tokens by |
|---|---|---|
| `dropless` | all that come | all-gather and reduce-scatter over `expert` |
| `limited` | a fixed number from each row; others pass by on the residual stream | two all-to-alls over `expert` |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import grouped
from llm_jax.model.routers import Routing


class Crew(NamedTuple):
  """The experts of this device.

  experts: of all devices. k: that a token goes to. training: whether there is a key. axes: mesh axes that split the
  experts. apply: (rows, product, spread) -> rows of what the experts make of them; product(x, w) multiplies every
  row with its expert's matrix, spread(b) gives every row its expert's vector.
  """

  experts: int
  k: int
  training: bool
  axes: tuple[str, ...]
  apply: Callable


def dropless(
  x: jax.Array, routing: Routing, crew: Crew, *, product: Callable = grouped.product
) -> tuple[jax.Array, jax.Array]:
  """Every pair is computed: rows are sorted by expert and multiplied group by group.

  product: see `model/grouped.py`. Split over devices, each gathers the tokens of its group of `expert` devices and
  computes those of its experts; the sums are scattered back.
  """
  rows = x.shape[0]
  if crew.axes:
    x, routing = jax.tree.map(
      lambda a: jax.lax.all_gather(a, crew.axes, axis=0, tiled=True),
      (x, routing._replace(logits=None, load=None)),
    )
  here = crew.experts // math.prod(jax.lax.axis_size(a) for a in crew.axes)
  first = jax.lax.axis_index(crew.axes) * here if crew.axes else 0
  local = routing.kept & (routing.expert >= first) & (routing.expert < first + here)
  group = jnp.where(local, routing.expert - first, here).reshape(-1)
  order = jnp.argsort(group)
  back, group = jnp.argsort(order), group[order]
  sizes = (group[:, None] == jnp.arange(here)).sum(0, dtype=jnp.int32)
  pairs = _of_tokens(x, routing).reshape(-1, x.shape[-1])
  at = jnp.minimum(group, here - 1)
  y = crew.apply(_move(pairs, order, back), lambda x, w: product(x, w, sizes), lambda b: b[at])
  y = _move(jnp.where((group < here)[:, None], y, 0), back, order)
  y = _to_tokens(y, x, routing)
  if crew.axes:
    y = jax.lax.psum_scatter(y, crew.axes, scatter_dimension=0, tiled=True)
  return y, jnp.zeros((rows,))


def first_choices_first(chosen: jax.Array) -> jax.Array:
  """Places in GShard's order: all tokens' first choices, then their second ones (arXiv:2006.16668, alg. 1).

  With two choices an early token may lose its second to the first of a later one, so the output sees the future; with
  one it does not. chosen: bool [b, rounds, n, experts] -> int, the number of pairs before.
  """
  b, rounds, n, experts = chosen.shape
  flat = chosen.reshape(b, rounds * n, experts).astype(jnp.int32)
  return (jnp.cumsum(flat, 1) - flat).reshape(chosen.shape)


def tokens_in_order(chosen: jax.Array) -> jax.Array:
  """Places in the order of the tokens, all choices of one before the next: causal for any number of choices."""
  return jnp.swapaxes(first_choices_first(jnp.swapaxes(chosen, 1, 2)), 1, 2)


def limited(
  x: jax.Array,
  routing: Routing,
  crew: Crew,
  *,
  factor: float = 1.25,
  evaluation: float | None = None,
  slots: int | None = None,
  order: Callable = first_choices_first,
) -> tuple[jax.Array, jax.Array]:
  """An expert takes at most factor * k * t / experts pairs of a row, rounded up; the others are dropped.

  (Fedus et al. 2021, arXiv:2101.03961, eq. 3; GShard's 2N/E is factor=1 for two choices.) evaluation: the factor while
  there is no key, None = factor. slots: this number instead. order: who gets the places. Rows are the groups of GShard:
  a row's result does not depend on the others, however a batch is cut up. Decoding one token at a time drops nothing.
  """
  (b, t, d), experts = x.shape, crew.experts
  factor = factor if crew.training or evaluation is None else evaluation
  if (slots is not None and slots < 1) or factor <= 0:
    raise UserError(f'capacity factor={factor}, slots={slots}: both must be positive')
  c = min(t, slots or max(1, math.ceil(factor * crew.k * t / experts)))
  chosen = (routing.expert[..., None] == jnp.arange(experts)) & routing.kept[..., None]
  place = jnp.where(chosen, order(chosen), 0).sum(-1)
  fits = routing.kept & (place < c)
  slot = jnp.where(fits, routing.expert * c + place, experts * c).reshape(b, -1)
  m = slot.shape[1]
  pair = jax.vmap(lambda s: jnp.full(experts * c, m).at[s].set(jnp.arange(m), mode='drop'))(slot)
  h = jax.vmap(_move)(_of_tokens(x, routing).reshape(b, m, d), pair, slot)
  h = jnp.swapaxes(h.reshape(b, experts, c, d), 0, 1)  # [experts, rows, slots, embed]
  if crew.axes:  # fewer experts, rows of more devices
    h = jax.lax.all_to_all(h, crew.axes, split_axis=0, concat_axis=1, tiled=True)
  shape = h.shape
  h = crew.apply(
    h.reshape(shape[0], -1, d),
    lambda x, w: jnp.einsum('esd,edf->esf', x, w, preferred_element_type=x.dtype),
    lambda b: b[:, None],
  )
  h = h.reshape(shape)
  if crew.axes:
    h = jax.lax.all_to_all(h, crew.axes, split_axis=1, concat_axis=0, tiled=True)
  y = jax.vmap(_move)(jnp.swapaxes(h, 0, 1).reshape(b, experts * c, d), slot, pair)
  wanted = jnp.maximum(routing.kept.sum((1, 2)), 1)
  return _to_tokens(y, x, routing), 1 - (fits.sum((1, 2)) + (routing.kept.sum((1, 2)) < 1)) / wanted


def _of_tokens(x: jax.Array, routing: Routing) -> jax.Array:
  """[b, t, d] -> [b, rounds, n, d]: the token of every pair."""
  if routing.token is None:
    return jnp.broadcast_to(x[:, None], (*routing.expert.shape, x.shape[-1]))
  return jax.vmap(lambda x, token: x[token])(x, routing.token)


def _to_tokens(y: jax.Array, x: jax.Array, routing: Routing) -> jax.Array:
  """The weighted sum of each token's pairs, like x [b, t, d]; y holds all pairs in order."""
  y = y.reshape(*routing.expert.shape, y.shape[-1])
  y = y * jnp.where(routing.kept, routing.gate, 0)[..., None].astype(y.dtype)
  if routing.token is None:
    return y.sum(1)
  add = lambda y, token: jnp.zeros_like(x[0]).at[token].add(y)
  return jax.vmap(add)(y, routing.token)


@jax.custom_vjp
def _move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
  """Rows of x [n, d] at `there` [m], zeros where that is n; `back` [n] says where each went, m for nowhere.

  With both ways known the gradient is a gather too: a scatter is slow on CPUs, and on TPUs.
  """
  return jnp.take(x, there, axis=0, mode='fill', fill_value=0)


_move.defvjp(
  lambda x, there, back: (_move(x, there, back), (there, back)),
  lambda saved, dy: (_move(dy, saved[1], saved[0]), None, None),
)
