"""The optimizer as one chain: clip, rule, decay, average; each part a function, all told the parameters' axes."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.optim import rules, schedules


class Optimizer(NamedTuple):
  """An optax transformation that also says how its state is split.

  init, update: as optax has them. axes: params or their shapes -> the tree of `init(params)` whose leaves are tuples of
  axis names, for `mesh.shardings`.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  axes: Callable[[Any], Any]


class ChainState(NamedTuple):
  """count: updates made, int32 []; learning_rate: of the last one, f32 []; rule: its state; ema: average or None."""

  count: Any
  learning_rate: Any
  rule: Any
  ema: Any


def decoupled(rate: jax.Array, weight_decay: float) -> jax.Array:
  """A step takes away the fraction `rate * weight_decay` (AdamW; Loshchilov & Hutter, arXiv:1711.05101)."""
  return rate * weight_decay


def squared(rate: jax.Array, weight_decay: float) -> jax.Array:
  """A step takes away the fraction `rate^2 * weight_decay` (PaLM, arXiv:2204.02311, section 5; weight_decay=1)."""
  return rate * rate * weight_decay


def unscaled(names: tuple, shape: tuple) -> float:
  """One learning rate for every width."""
  return 1.0


def everything(names: tuple) -> bool:
  """Decay every parameter."""
  return True


def matrices(names: tuple) -> bool:
  """Decay all but vectors: no norms and no biases. The two axes of attention heads count as one."""
  return len({'heads' if n in ('groups', 'head_dim') else n for n in _inner(names)}) > 1


def hidden_matrices(names: tuple) -> bool:
  """Decay matrices but no looked-up tables: embeddings of tokens, positions and types, position biases."""
  return matrices(names) and _inner(names)[0] not in ('vocab', 'positions', 'buckets', 'types')


def make(
  axes: Any,
  *,
  rule: Callable = rules.adamw,
  schedule: Callable = schedules.rsqrt,
  clip: float | None = 1.0,
  weight_decay: float = 0.0,
  decay: Callable = decoupled,
  decayed: Callable = hidden_matrices,
  multipliers: tuple = (),
  scaling: Callable = unscaled,
  ema: float | None = None,
) -> Optimizer:
  """The optimizer of parameters with these axis names.

  axes: tree like the parameters with tuples of names. rule: axes -> `rules.Rule`. schedule: step -> rate, step 0 for
  the first update. clip: the largest global norm of the gradients (over all shards). decay: (rate, weight_decay) -> the
  fraction of a parameter that a step takes away, if `decayed(its axis names)`. multipliers: ((regex on the path,
  factor), ...) on the learning rate; the first that matches counts. scaling: (axis names, shape) -> one more factor on
  it, but not on the decay: what a step takes away depends on no width (see optim/mup.py). ema: decay of an average of
  the parameters, kept in the state.

  The last rate is `optax.tree_utils.tree_get(state, 'learning_rate')`, the average `tree_get(state, 'ema')`.
  """
  _check(clip, weight_decay, ema)
  factors = _factors(axes, multipliers)
  jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))  # raises now, not in the first step
  rule = rule(axes)

  def init(params: Any) -> ChainState:
    first = jnp.asarray(schedule(jnp.zeros((), jnp.int32)), jnp.float32)
    copy = None if ema is None else jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return ChainState(jnp.zeros((), jnp.int32), first, rule.init(params), copy)

  def update(grads: Any, state: ChainState, params: Any) -> tuple[Any, ChainState]:
    names = tree.align(axes, params)
    grads, params = _lay_out(grads, names, 'optimizer'), _lay_out(params, names, 'optimizer')
    if clip is not None:
      grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
    rate = jnp.asarray(schedule(state.count), jnp.float32)
    rates = tree.map_paths(lambda path, _: rate * factors[path], params)
    steps, rule_state = rule.update(
      grads, state.rule, params, _scaled(rates, names, params, scaling)
    )

    def change(p: jax.Array, step: jax.Array, rate: jax.Array, names: tuple) -> jax.Array:
      if weight_decay and decayed(names):
        step = step + decay(rate, weight_decay) * p
      return -step.astype(p.dtype)

    updates = jax.tree.map(change, params, steps, rates, names)
    mean = None
    if ema is not None:
      mean = average(state.ema, optax.apply_updates(params, updates), decay=ema)
    return _lay_out(updates, names, 'weights'), ChainState(state.count + 1, rate, rule_state, mean)

  def state_axes(params: Any) -> ChainState:
    return ChainState((), (), rule.axes(params), None if ema is None else tree.align(axes, params))

  return Optimizer(init, update, state_axes)


def average(mean: Any, params: Any, *, decay: float) -> Any:
  """Exponential moving average, `decay * mean + (1 - decay) * params` (InstructGPT, arXiv:2203.02155: decay .992)."""
  return jax.tree.map(lambda m, p: m + (1 - decay) * (p - m), mean, params)


def _inner(names: tuple) -> tuple:
  """The names less the axes in front that only stack parameters."""
  while names and names[0] in ('layers', 'expert'):
    names = names[1:]
  return names


def _lay_out(values: Any, names: Any, kind: str) -> Any:
  """`values` where the `kind` rules put them: ZeRO's update happens on the shards that hold the optimizer state."""
  if mesh.current() is None:
    return values
  return jax.tree.map(lambda x, n: mesh.constrain(x, mesh.spec(*n, kind=kind)), values, names)


def _factors(axes: Any, multipliers: tuple) -> dict[str, float]:
  """The learning-rate multiplier of every parameter by path."""
  paths = list(tree.flatten(axes, is_leaf=tree.is_names))
  for entry in multipliers:
    if len(entry) != 2 or not isinstance(entry[0], str):
      raise UserError(f'multipliers read ((regex, factor), ...), got {entry!r}')
    tree.select(dict.fromkeys(paths, 0), entry[0])  # raises when it matches nothing
  table = [
    *((re.compile(pattern), float(factor)) for pattern, factor in multipliers),
    (re.compile(''), 1.0),
  ]
  return {path: next(factor for pattern, factor in table if pattern.search(path)) for path in paths}


def _scaled(rates: Any, names: Any, params: Any, scaling: Callable) -> Any:
  """The rates times what follows from each parameter's axes and sizes."""
  return jax.tree.map(lambda rate, n, p: rate * scaling(n, p.shape), rates, names, params)


def _check(clip: float | None, weight_decay: float, ema: float | None) -> None:
  if clip is not None and clip <= 0:
    raise UserError(
      f'clip={clip} is the largest gradient norm: choose a positive one, or None for no limit'
    )
  if weight_decay < 0:
    raise UserError(f'weight_decay={weight_decay} must not be negative: 0 is none')
  if ema is not None and not 0 <= ema < 1:
    raise UserError(
      f'ema={ema} is the decay of the average: choose 0 <= ema < 1 (such as 0.999), or None for no average'
    )
