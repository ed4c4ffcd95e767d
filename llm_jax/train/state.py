"""Everything a training step changes, and where its arrays live on the mesh.

The random key is not part of it: the key of step `n` is `fold_in(key(seed), n)`, so a resumed run draws what
an uninterrupted one would.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llm_jax.core import mesh, tree


@struct.dataclass
class State:
  """step: int32 []; params: the model's tree; opt_state: of the trained part of it."""

  step: jax.Array
  params: Any
  opt_state: Any

  @property
  def averaged(self) -> Any:
    """The moving average of the parameters where the optimizer keeps one, else the parameters."""
    ema = optax.tree.get(self.opt_state, 'ema')
    return self.params if ema is None else tree.merge(ema, self.params)


class Layout(NamedTuple):
  """`NamedSharding`s: a `State` of them, and those of the gradients (of the trained part)."""

  state: State
  gradients: Any


def trained(params: Any, trainable: str | None) -> Any:
  """The part of `params` whose paths the regex `trainable` finds (None: all); holes are None."""
  return params if trainable is None else tree.split(params, tree.select(params, trainable))[0]


def layout(model: Any, tx: Any, trainable: str | None = None, on: Any = None) -> Layout | None:
  """Where state and gradients live under the current axis rules on the current mesh; None on a single device.

  on: another mesh, which may be `mesh.abstract`. Raises `UserError` before anything is allocated when an axis does not
  divide by the mesh.
  """
  if on is None and mesh.current() is None:
    return None
  with mesh.outside():
    params = jax.eval_shape(model.init, jax.random.key(0))
  part = trained(params, trainable)
  part_axes = tree.align(model.axes, part)
  opt_state = jax.eval_shape(tx.init, part)
  scalar = mesh.shardings((), jax.ShapeDtypeStruct((), jnp.int32), on=on)
  return Layout(
    State(
      scalar,
      mesh.shardings(model.axes, params, 'weights', on),
      mesh.shardings(tx.axes(part), opt_state, 'optimizer', on),
    ),
    mesh.shardings(part_axes, part, 'gradients', on),
  )


def create(
  model: Any, tx: Any, seed: int, *, trainable: str | None = None, layout: Layout | None = None
) -> State:
  """The state at step 0, each array made where it will live."""

  def make(key: jax.Array) -> State:
    params = model.init(key)
    return State(jnp.zeros((), jnp.int32), params, tx.init(trained(params, trainable)))

  with mesh.outside():  # a dummy batch of one passes through `init`: nothing there can be split
    return jax.jit(make, out_shardings=None if layout is None else layout.state)(
      jax.random.key(seed)
    )
