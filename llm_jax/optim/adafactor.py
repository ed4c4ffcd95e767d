"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), factored by axis names as in T5X.

The second moment of a matrix is kept as the means of its rows and columns, O(n + m) numbers instead of O(n m)
(algorithm 4). Which axes are rows and which columns follows from their names, so the moments are split over devices
like the parameter, less a name:

  'layers', 'expert' in front   stacked parameters: statistics of their own for each
  'embed'                       rows
  all others                    columns

Parameters without rows or without columns (norms, biases) and small ones keep a whole second moment. Because parameters
are stacked over layers, every root mean square (update clipping, parameter scale) is taken per layer: a stacked tree
and its unstacked layers get the same updates.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.optim.rules import Rule


class AdafactorState(NamedTuple):
  """count: updates made, int32 []. The others are trees like the parameters, None where a parameter keeps none.

  row [stacked..., rows], column [stacked..., columns...]: of a factored second moment; full: of a whole one; momentum.
  """

  count: Any
  row: Any
  column: Any
  full: Any
  momentum: Any


class Split(NamedTuple):
  """The positions of a parameter's axes by role."""

  stacked: tuple[int, ...]
  rows: tuple[int, ...]
  columns: tuple[int, ...]


def adafactor(
  axes: Any,
  *,
  beta1: float | None = None,
  decay: float = 0.8,
  min_factored: int | None = 128,
  clip: float | None = 1.0,
  epsilon: float = 1e-30,
  min_scale: float | None = 1e-3,
  stacked: tuple = ('layers', 'expert'),
  rows: tuple = ('embed',),
  momentum_dtype: str = 'float32',
) -> Rule:
  """T5's Adafactor as it stands; PaLM's with `beta1=0.9, min_factored=None` and `chain.squared` weight decay.

  beta1: of the momentum over whole steps, None keeps none. decay: beta2 of update t = 1, 2, ... is 1 - t^-decay
  (section 7.2). min_factored: parameters with fewer rows or columns are not factored; None factors none. clip: d, the
  largest root mean square of an update (section 6), None for no limit. epsilon: added to squared gradients. min_scale:
  steps are multiplied by the parameter's root mean square, at least this (section 8); None does not multiply.
  """
  if beta1 is not None and not 0 <= beta1 < 1:
    raise UserError(f'adafactor beta1={beta1}: choose 0 <= beta1 < 1, or None for no momentum')
  if decay <= 0:
    raise UserError(f'adafactor decay={decay} must be positive; the paper has 0.8')

  def roles(names: tuple, shape: tuple) -> tuple[Split, bool]:
    split = split_axes(names, stacked, rows)
    return split, min_factored is not None and is_factored(split, shape, min_factored)

  def init(params: Any) -> AdafactorState:
    names, leaves, treedef = _flat(axes, params)
    kept = [_zeros(p, *roles(n, p.shape)) for n, p in zip(names, leaves, strict=True)]
    row, column, full = (treedef.unflatten(part) for part in _transposed(kept, 3))
    momentum = [None if beta1 is None else jnp.zeros_like(p, dtype=momentum_dtype) for p in leaves]
    return AdafactorState(jnp.zeros((), jnp.int32), row, column, full, treedef.unflatten(momentum))

  def update(grads: Any, state: AdafactorState, params: Any, rates: Any):
    names, leaves, treedef = _flat(axes, params)
    t = (state.count + 1).astype(jnp.float32)
    beta2 = 1 - t**-decay
    parts = [treedef.flatten_up_to(x) for x in (grads, state.row, state.column, state.full)]
    results = []
    for n, p, g, row, column, full in zip(names, leaves, *parts, strict=True):
      split, factored = roles(n, p.shape)
      g = g.astype(jnp.float32)
      moment = _factored if factored else _whole
      direction, kept = moment(g, g * g + epsilon, row, column, full, beta2, split)
      if clip is not None:
        direction = direction / jnp.maximum(1.0, _rms(direction, split) / clip)
      if min_scale is not None:
        direction = direction * jnp.maximum(_rms(p.astype(jnp.float32), split), min_scale)
      results.append((direction, *kept))
    direction, row, column, full = (treedef.unflatten(x) for x in _transposed(results, 4))
    steps = jax.tree.map(lambda r, d: r * d, rates, direction)
    momentum = state.momentum
    if beta1 is not None:
      steps = jax.tree.map(lambda m, s: beta1 * m + (1 - beta1) * s, momentum, steps)
      momentum = jax.tree.map(lambda s: s.astype(momentum_dtype), steps)
    return steps, AdafactorState(state.count + 1, row, column, full, momentum)

  def state_axes(params: Any) -> AdafactorState:
    names, leaves, treedef = _flat(axes, params)
    kept = [_names(n, *roles(n, p.shape)) for n, p in zip(names, leaves, strict=True)]
    row, column, full = (treedef.unflatten(part) for part in _transposed(kept, 3))
    momentum = treedef.unflatten([None if beta1 is None else n for n in names])
    return AdafactorState((), row, column, full, momentum)

  return Rule(init, update, state_axes)


def split_axes(names: Sequence[str | None], stacked: Sequence[str], rows: Sequence[str]) -> Split:
  """The roles of axes with these names. Only leading axes are stacked: the 'expert' axis of a router is a column."""
  front = len(list(itertools.takewhile(lambda name: name in stacked, names)))
  rest = range(front, len(names))
  return Split(
    tuple(range(front)),
    tuple(i for i in rest if names[i] in rows),
    tuple(i for i in rest if names[i] not in rows),
  )


def is_factored(split: Split, shape: Sequence[int], min_factored: int) -> bool:
  """Whether a parameter has rows and columns, at least `min_factored` of each."""
  sizes = [math.prod(shape[i] for i in part) for part in (split.rows, split.columns)]
  return bool(split.rows and split.columns) and min(sizes) >= min_factored


def _factored(g, square, row, column, full, beta2, split: Split):
  """The direction by the rank-one estimate `row * column / mean(row)` of the second moment, and the new moments."""
  row = beta2 * row + (1 - beta2) * square.mean(split.columns)
  column = beta2 * column + (1 - beta2) * square.mean(split.rows)
  by_row, by_column = jnp.expand_dims(row, split.columns), jnp.expand_dims(column, split.rows)
  scale = (
    by_row / by_row.mean(split.rows, keepdims=True)
  ) ** -0.5  # two factors: their product could overflow
  return g * scale * by_column**-0.5, (row, column, None)


def _whole(g, square, row, column, full, beta2, split: Split):
  full = beta2 * full + (1 - beta2) * square
  return g * full**-0.5, (None, None, full)


def _rms(x: jax.Array, split: Split) -> jax.Array:
  """The root mean square of each stacked parameter, with the axes kept."""
  return jnp.sqrt(jnp.mean(x * x, split.rows + split.columns, keepdims=True))


def _zeros(p: jax.Array, split: Split, factored: bool):
  """The moments of one parameter before the first update: (row, column, full)."""
  if not factored:
    return None, None, jnp.zeros_like(p, dtype=jnp.float32)
  zero = jnp.zeros_like(
    p, dtype=jnp.float32
  )  # reduced rather than made anew: keeps the sharding's type
  return zero.mean(split.columns), zero.mean(split.rows), None


def _names(names: tuple, split: Split, factored: bool):
  if not factored:
    return None, None, names
  without = lambda part: tuple(name for i, name in enumerate(names) if i not in part)
  return without(split.columns), without(split.rows), None


def _flat(axes: Any, params: Any) -> tuple[list, list, Any]:
  """(axis names, leaves, tree structure) of the parameters."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.flatten_up_to(tree.align(axes, params)), leaves, treedef


def _transposed(rows: list[tuple], width: int) -> list[list]:
  return [[row[i] for row in rows] for i in range(width)]
