"""One update: gradients of an objective over microbatches, divided once, handed to the optimizer.

Objectives return sums and weights (`Loss`), so the mean is taken here and only here, after microbatches and
devices: 1 and 8 microbatches give the same update however ragged the weights are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.train.state import Layout, State

Update = Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]


def make(
  objective: Callable,
  tx: Any,
  layout: Layout | None = None,
  *,
  microbatches: int = 1,
  trainable: str | None = None,
) -> Update:
  """The jitted `update(state, batch, key) -> (state, metrics)`; the old state's buffers are reused.

  objective: (params, batch, key) -> Loss. microbatches: the batch is cut into this many equal parts whose
  gradients are added in f32. trainable: a regex on parameter paths; only what it finds is differentiated.
  metrics: f32 scalars: loss, weight, grad_norm, param_norm, learning_rate, and the objective's own, each per weight.
  """

  def update(
    state: State, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(key, state.step)
    chosen = True if trainable is None else tree.select(state.params, trainable)
    params, frozen = (state.params, None) if trainable is None else tree.split(state.params, chosen)

    def loss(params: Any, batch: Any, key: jax.Array):
      out = objective(params if trainable is None else tree.merge(params, frozen), batch, key)
      return out.sum, out

    grads, total = _accumulate(
      jax.grad(loss, has_aux=True), params, batch, key, microbatches, layout
    )
    weight = jnp.where(total.weight > 0, total.weight, 1).astype(jnp.float32)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics = {name: value / weight for name, value in total.metrics.items()}
    metrics |= dict(loss=total.sum / weight, weight=total.weight, grad_norm=optax.tree.norm(grads))
    metrics |= dict(param_norm=optax.tree.norm(params))
    rate = optax.tree.get(opt_state, 'learning_rate')
    metrics |= {} if rate is None else dict(learning_rate=rate)
    params = params if trainable is None else tree.merge(params, frozen)
    return State(state.step + 1, params, opt_state), jax.tree.map(
      lambda x: x.astype(jnp.float32), metrics
    )

  shardings = {} if layout is None else dict(out_shardings=(layout.state, None))
  return jax.jit(update, donate_argnums=0, **shardings)


def _accumulate(
  grad: Callable, params: Any, batch: Any, key: jax.Array, microbatches: int, layout: Layout | None
):
  """(sum of the gradients, sum of the losses) over the microbatches, one after the other."""

  def one(batch: Any, key: jax.Array):
    grads, total = grad(params, batch, key)
    if layout is not None:
      grads = jax.tree.map(lambda g, s: mesh.constrain(g, s.spec), grads, layout.gradients)
    return grads, total

  if microbatches == 1:
    return one(batch, key)
  parts = _cut(batch, microbatches)
  keys = jax.random.split(key, microbatches)

  def add(carry: Any, part: Any):
    return jax.tree.map(jnp.add, carry, one(*part)), None

  first = one(jax.tree.map(lambda x: x[0], parts), keys[0])
  return jax.lax.scan(add, first, (jax.tree.map(lambda x: x[1:], parts), keys[1:]))[0]


def _cut(batch: Any, parts: int) -> Any:
  """[batch, ...] -> [parts, batch / parts, ...], every part spread over all devices that hold the batch.

  Where some arrays have a row for several of the others (prompts of their own, rl/layout.py), those stay together.
  """
  units = min(len(x) for x in jax.tree.leaves(batch))
  if units % parts:
    raise UserError(
      f'{units} prompts with all their answers do not divide into {parts} microbatches: choose a divisor of {units}'
    )

  def one(x: jax.Array) -> jax.Array:
    cut = x.reshape(units // parts, parts, len(x) // units, *x.shape[1:])
    return jnp.swapaxes(cut, 0, 1).reshape(parts, len(x) // parts, *x.shape[1:])

  return jax.tree.map(one, batch)
