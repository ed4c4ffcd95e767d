"""Layers as patterns, and the runners that execute them.

A stack is a sequence of segments; a segment repeats a pattern of blocks. Its parameters are
`{'block_0': ..., 'block_1': ...}` with every leaf stacked over the repeats on axis 0 (named `layers`), whoever
runs it: a checkpoint never depends on how it was executed. A runner is

    runner(apply, params, x, states, repeats, *, remat) -> (x, states, aux)
    apply(params of one repeat, x, states of one repeat, index) -> (x, states, aux)

with `aux` a dict of losses [batch], summed over the layers.

To decode fast, the repeats can lie apart (`apart`): then a segment's parameters and states are tuples with a tree per
repeat, leaves [1, ...], and no runner is asked. A stacked weight would be copied out of its stack for every token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import tree as tree_lib
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.block import OUTPUT, Block
from llm_jax.model.masks import Mask

# What the backward pass finds saved: everything, nothing but the inputs of the layers, the outputs of the weight
# products, or the outputs of the sublayers.
REMAT = dict(
  none=None,
  full=jax.checkpoint_policies.nothing_saveable,
  dots=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  names=jax.checkpoint_policies.save_only_these_names(OUTPUT),
)


class Segment(NamedTuple):
  """A pattern of blocks, repeated."""

  blocks: tuple[Block, ...]
  repeats: int


def segments(layers: int | tuple, block: Callable | tuple) -> tuple[Segment, ...]:
  """The segments of a stack.

  layers: the number of blocks, or one number per segment. block: a block factory, or a tuple of them as the repeating
  pattern; with several segments one of these per segment. Raises `UserError` when a pattern does not divide its layers.
  """
  if not isinstance(layers, tuple):
    layers, block = (layers,), (block,)
  if not isinstance(block, tuple) or len(block) != len(layers):
    raise UserError(f'layers={layers} names {len(layers)} segments: give `block` as many patterns')
  found = []
  for n, pattern in zip(layers, block, strict=True):
    blocks = tuple(make() for make in (pattern if isinstance(pattern, tuple) else (pattern,)))
    if n < 1 or n % len(blocks):
      raise UserError(f'layers={n} is no multiple of the pattern of {len(blocks)} blocks')
    found.append(Segment(blocks, n // len(blocks)))
  return tuple(found)


def keys(stack: tuple[Segment, ...]) -> list[str]:
  """Where the segments' parameters and states lie: `layers`, `layers_1`, ..."""
  return ['layers' if not i else f'layers_{i}' for i in range(len(stack))]


def declare(stack: tuple[Segment, ...], embed: int) -> dict:
  """The declared weights of all segments, stacked."""
  x = jnp.zeros((1, 1, embed))
  ids = jnp.zeros((1, 1), jnp.int32)
  ctx = Context(Mask(), ids, encoded=x, ids=ids)
  return {
    key: {
      f'block_{i}': param.stack(param.declare(block, x, ctx), segment.repeats)
      for i, block in enumerate(segment.blocks)
    }
    for key, segment in zip(keys(stack), stack, strict=True)
  }


def initial(stack: tuple[Segment, ...], batch: int, length: int, embed: int, dtype: Any) -> dict:
  """States of an empty context: like the parameters, leaves [repeats, batch, ...]."""

  def one(block: Block, repeats: int) -> dict:
    state = block.initial(batch, length, embed, dtype)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), state)

  return {
    key: {f'block_{i}': one(block, segment.repeats) for i, block in enumerate(segment.blocks)}
    for key, segment in zip(keys(stack), stack, strict=True)
  }


def state_axes(stack: tuple[Segment, ...]) -> dict:
  """Names of the axes of `initial`."""

  def one(block: Block) -> dict:
    own = block.state_axes()
    return jax.tree.map(lambda names: ('layers', *names), own, is_leaf=tree_lib.is_names)

  return {
    key: {f'block_{i}': one(block) for i, block in enumerate(segment.blocks)}
    for key, segment in zip(keys(stack), stack, strict=True)
  }


def run(
  stack: tuple[Segment, ...],
  runner: Callable,
  params: dict,
  x: jax.Array,
  ctx: Context,
  states: dict | None,
  wrap: Callable | None = None,
) -> tuple[Any, dict | None, dict[str, jax.Array]]:
  """All segments, one after the other. x: [batch, t, embed], or what the functions `wrap(apply, layer)` take in its
  place (see model/depth.py). params, states: may have more repeats than the stack, whose are then the first.
  """
  after, total, first, size = {}, {}, 0, sum(s.repeats * len(s.blocks) for s in stack)
  for key, segment in zip(keys(stack), stack, strict=True):
    apply, n = _repeat(segment.blocks, ctx, first, size), segment.repeats
    if wrap is not None:
      apply = wrap(apply, functools.partial(_done, first, len(segment.blocks)))
    own, state = (None if tree is None else _first(tree[key], n) for tree in (params, states))
    if isinstance(own, tuple):
      x, after[key], aux = _each(apply, own, x, state)
    else:
      x, after[key], aux = runner(apply, own, x, state, n)
    total = add(total, aux)
    first += n * len(segment.blocks)
  return x, None if states is None else after, total


def upto(stack: tuple[Segment, ...], layers: int) -> tuple[Segment, ...]:
  """The stack's first blocks, as many as `layers`. Raises `UserError` where that is not the end of a repeat."""
  found, left = [], layers
  for segment in stack:
    found.append(segment._replace(repeats=min(segment.repeats, left // len(segment.blocks))))
    left -= found[-1].repeats * len(segment.blocks)
    if not left and layers >= 0:
      return tuple(s for s in found if s.repeats)
  ends = [0]
  for segment in stack:
    ends += [ends[-1] + (i + 1) * len(segment.blocks) for i in range(segment.repeats)]
  raise UserError(f'no repeat of the pattern ends after {layers} layers: choose one of {ends}')


def _done(first: int, size: int, index: Any) -> Any:
  """The number of blocks done after a repeat."""
  return first + (index + 1) * size


def _first(tree: Any, n: int) -> Any:
  """The first n repeats of parameters or states that have at least as many."""
  if isinstance(tree, tuple):  # they lie apart
    return tree[:n]
  return jax.tree.map(lambda x: x if x.shape[0] == n else x[:n], tree)


def _repeat(blocks: tuple[Block, ...], ctx: Context, first: int, size: int) -> Callable:
  """One repeat of a pattern as a function for a runner; `first`: its first block's number in the stack of `size`."""

  def apply(params: dict, x: jax.Array, states: dict | None, index: Any) -> tuple:
    after, total = {}, {}
    for i, block in enumerate(blocks):
      name, told = f'block_{i}', ctx
      if ctx.rng is not None:
        number = first + index * len(blocks) + i
        height = number / max(size - 1, 1)
        told = ctx._replace(rng=jax.random.fold_in(ctx.rng, number), height=height)
      state = None if states is None else states[name]
      x, after[name], aux = block.apply({'params': params[name]}, x, told, state)
      total = add(total, aux)
    return x, None if states is None else after, total

  return apply


def apart(params: dict, free: bool = False) -> dict:
  """A tree like `params` (of a whole model, or states) whose layers are tuples of one tree per repeat.

  Copies the layers leaf by leaf. free: deletes each stacked leaf after that; nobody may use it any more.
  """
  return {key: _apart(key, value, free) for key, value in params.items()}


def axes_apart(axes: Any, params: Any) -> Any:
  """The axis names of a tree that `apart` made, from those of the tree it was made of."""
  if isinstance(params, tuple):
    return tuple(axes for _ in params)
  if isinstance(params, dict):
    return {key: axes_apart(axes[key], value) for key, value in params.items()}
  return axes


def is_apart(params: dict) -> bool:
  """Whether the layers of a stack's parameters are."""
  return isinstance(params.get('layers'), tuple)


def _apart(key: str, value: Any, free: bool) -> Any:
  if isinstance(value, dict) and not key.startswith('layers'):
    return apart(value, free)
  if not isinstance(value, dict):
    return value
  leaves, treedef = jax.tree.flatten(value)
  cut = []
  for leaf in leaves:
    cut.append([_repeat_of(leaf, i) for i in range(leaf.shape[0])])
    if free:
      jax.block_until_ready(cut[-1])
      leaf.delete()
  return tuple(treedef.unflatten(one) for one in zip(*cut, strict=True))


@jax.jit
def _repeat_of(leaf: jax.Array, i: int) -> jax.Array:
  """[1, ...] of [repeats, ...]. Compiled once for all i."""
  return jax.lax.dynamic_slice_in_dim(leaf, i, 1)


def _each(apply: Callable, params: tuple, x: jax.Array, states: tuple | None) -> tuple:
  """What a runner does, for repeats that lie apart."""
  first = lambda tree: jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), tree)
  after, total = [], {}
  for i, one in enumerate(params):
    x, state, aux = apply(first(one), x, None if states is None else first(states[i]), i)
    after.append(jax.tree.map(lambda leaf: leaf[None], state))
    total = add(total, aux)
  return x, None if states is None else tuple(after), total


def add(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The sums by name of two dicts of losses."""
  return {**a, **{name: a[name] + value if name in a else value for name, value in b.items()}}


def _policy(remat: str) -> Callable | None:
  if remat not in REMAT:
    raise UserError(f'no remat policy {remat!r}; {nearest(remat, REMAT)}')
  return REMAT[remat]


def scan(
  apply: Callable,
  params: dict,
  x: jax.Array,
  states: dict | None,
  repeats: int,
  *,
  remat: str = 'none',
) -> tuple[jax.Array, dict | None, dict[str, jax.Array]]:
  """`jax.lax.scan` over the repeats: one layer is compiled, however many there are."""
  policy = _policy(remat)
  if policy is not None:  # the loop itself keeps XLA from undoing the recomputation
    apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)

  def body(x: jax.Array, one: tuple) -> tuple:
    x, states, aux = apply(one[0], x, one[1], one[2])
    return x, (states, aux)

  x, (states, aux) = jax.lax.scan(body, x, (params, states, jnp.arange(repeats)))
  return x, states, jax.tree.map(lambda a: a.sum(0), aux)


def loop(
  apply: Callable,
  params: dict,
  x: jax.Array,
  states: dict | None,
  repeats: int,
  *,
  remat: str = 'none',
) -> tuple[jax.Array, dict | None, dict[str, jax.Array]]:
  """One copy of the program per repeat: slower to compile, no stacking of what the backward pass needs."""
  policy = _policy(remat)
  if policy is not None:
    apply = jax.checkpoint(apply, policy=policy)
  layers, total, after = _unstack(params, repeats), {}, []
  for i in range(repeats):
    state = jax.tree.map(lambda s, i=i: s[i], states)
    x, state, aux = apply(layers[i], x, state, i)
    after.append(state)
    total = add(total, aux)
  return x, None if states is None else jax.tree.map(lambda *s: jnp.stack(s), *after), total


def _unstack(tree: Any, n: int) -> list[Any]:
  """The trees of the n slices along axis 0 of every leaf, with a gradient that is one `stack` per leaf.

  Indexing n times would give n gradients of the full size, each zero but for one slice, to be summed.
  """
  leaves, treedef = jax.tree.flatten(tree)
  slices = [
    _slices(leaf, n) if jnp.issubdtype(leaf.dtype, jnp.inexact) else list(leaf) for leaf in leaves
  ]
  return [treedef.unflatten([s[i] for s in slices]) for i in range(n)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slices(w: jax.Array, n: int) -> tuple[jax.Array, ...]:
  return tuple(w[i] for i in range(n))


_slices.defvjp(lambda w, n: (_slices(w, n), None), lambda n, _, g: (jnp.stack(g),))
