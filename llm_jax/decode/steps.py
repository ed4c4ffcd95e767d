"""The two calls that every strategy of decoding is made of, as pure functions: read the prompts, read one more token.

    x, states = prefill(model, params, batch, last)                      # x [rows, embed]: what predicts the next token
    x, states = step(model, params, context, token, position, states)
    logits(model, params, x)                                             # f32 [rows, vocab]

The states are those of `Model.states`, every leaf [layers, rows, ...]; `take` gives rows other places, which is all
that beams and parallel samples need.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import mesh


class Functions(NamedTuple):
  """What of a model is known to the compiler, besides shapes.

  slots: of the state; rules: for the mesh, in force while tracing."""

  hidden: Callable
  logits: Callable
  states: Callable
  slots: int
  rules: Hashable


def functions(model: Any, slots: int) -> Functions:
  """Of a `Model`, for states of `slots`."""
  return Functions(model.hidden, model.logits, model.states, slots, mesh.context())


def prefill(f: Functions, params: Any, batch: dict, last: jax.Array) -> tuple[jax.Array, Any]:
  """Reads the prompts. last: int32 [rows], the position of each row's last token."""
  hidden = f.hidden(params, batch, states=f.states(params, batch, f.slots))
  x = jnp.take_along_axis(hidden.x, last[:, None, None], axis=1)  # only these need logits
  return x[:, 0], hidden.states


def step(
  f: Functions, params: Any, context: dict, token: jax.Array, position: jax.Array, states: Any
) -> tuple[jax.Array, Any]:
  """Reads one token of each row. token, position: int32 [rows]."""
  batch = dict(context, inputs=token[:, None], positions=position[:, None])
  hidden = f.hidden(params, batch, states=states)
  return hidden.x[:, 0], hidden.states


def logits(f: Functions, params: Any, x: jax.Array) -> jax.Array:
  """f32 [rows, vocab]. x: [rows, embed]."""
  return f.logits(params, x[:, None])[:, 0].astype(jnp.float32)


def take(tree: Any, rows: jax.Array, axis: int = 1) -> Any:
  """The tree with its rows (on `axis` of every leaf; 1 in states) chosen by the indices `rows`."""
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), tree)


def repeat(tree: Any, n: int, axis: int = 1) -> Any:
  """Every row n times: rows 0, 0, 1, 1 for n = 2."""
  return tree if n == 1 else jax.tree.map(lambda x: jnp.repeat(x, n, axis=axis), tree)


def whole(x: jax.Array) -> jax.Array:
  """Every device holds all of `x`: small, and the host of each process reads it."""
  return mesh.constrain(x, jax.sharding.PartitionSpec())
