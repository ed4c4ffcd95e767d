"""How a Linen module declares a weight, and how the declarations become a tree of parameters and one of axis names.

A declaration is a shape, a name for every axis (`core.mesh` and `core.weights` know the names) and a role
or an initialiser. Modules are only ever initialised abstractly, so no forward pass runs to make
parameters; `model.init` turns the roles into numbers.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from llm_jax.core import tree as tree_lib

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> f32 array
Recipe = Callable[
  [str, tuple[int, ...], tuple[str, ...], int, int], Initializer
]  # see model/init.py


class Box(struct.PyTreeNode, meta.AxisMetadata):
  """A declared weight: its abstract value, the names of its axes, and its role or initialiser."""

  value: Any
  axes: tuple[str, ...] = struct.field(pytree_node=False)
  init: Any = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value  # plain: Linen's own boxes add a sharding constraint here

  def replace_boxed(self, val: Any) -> 'Box':
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict) -> 'Box':
    raise NotImplementedError('layers are stacked by model/stack.py, not by a lifted transform')

  def remove_axis(self, index: int, params: dict) -> 'Box':
    raise NotImplementedError('layers are stacked by model/stack.py, not by a lifted transform')


def weight(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  init: str | Initializer,
) -> Any:
  """The weight `name` of `module`, declared on the way: an f32 array, or whatever leaf the parameters hold there.

  init: a role that the recipes of `model/init.py` know (`'query'`, `'ffn_out'`, ...), or an initialiser for a
  weight that is the same in all recipes.
  """
  if len(shape) != len(axes):
    raise ValueError(f'{name}: {len(axes)} axis names {axes} for the shape {shape}')
  if module.is_initializing():
    return module.param(name, lambda _: Box(jnp.zeros(shape, jnp.float32), axes, init))
  # not `param`: it compares the shape of the leaf type, and adapters and quantised weights have another
  found = module.get_variable('params', name)
  if found is None:
    raise KeyError(f'the parameters have no {"/".join((*module.path, name))!r}')
  return found


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The initialiser of scales."""
  del key
  return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The initialiser of biases."""
  del key
  return jnp.zeros(shape, jnp.float32)


def constant(value: float) -> Initializer:
  """The same number everywhere."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def declare(module: nn.Module, *args: Any) -> dict:
  """The tree of `Box`es with abstract values that `module(*args)` declares; nothing is computed.

  args: what `module` is called with; a `jax.ShapeDtypeStruct` stands for an array too large to make.
  """
  abstract = [a for a in args if isinstance(a, jax.ShapeDtypeStruct)]

  def init(key: jax.Array, arrays: list) -> dict:
    found = iter(arrays)
    return module.init(
      key, *(next(found) if isinstance(a, jax.ShapeDtypeStruct) else a for a in args)
    )

  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((), ())
  ):  # batch 1 splits over no mesh
    variables = jax.eval_shape(init, jax.random.key(0), abstract)
  return variables.get('params', {})


def stack(boxes: Any, layers: int) -> Any:
  """The declarations of `layers` equal blocks: a leading axis named `'layers'`."""

  def one(box: Box) -> Box:
    value = jax.ShapeDtypeStruct((layers, *box.value.shape), box.value.dtype)
    return box.replace(value=value, axes=('layers', *box.axes))

  return jax.tree.map(one, boxes, is_leaf=is_box)


def is_box(x: Any) -> bool:
  """Whether `x` is a declared weight, for `is_leaf`."""
  return isinstance(x, Box)


def unbox(boxes: Any) -> tuple[Any, Any]:
  """(abstract parameters, axis names): two trees of one structure."""
  return tuple(
    jax.tree.map(get, boxes, is_leaf=is_box) for get in (lambda b: b.value, lambda b: b.axes)
  )


def sample(boxes: Any, key: jax.Array, recipe: Recipe, embed: int, residuals: int) -> Any:
  """Parameters for the declarations, each leaf from `key` and its own path, so that adding one changes no other.

  embed, residuals: width and number of residual additions of the stack, which some recipes scale by.
  """

  def one(path: str, box: Box) -> jax.Array:
    shape, axes = box.value.shape, box.axes
    init = box.init
    if isinstance(init, str):
      init = recipe(init, shape, axes, embed, residuals)
    return init(jax.random.fold_in(key, zlib.crc32(path.encode())), shape)

  return tree_lib.map_paths(one, boxes, is_leaf=is_box)


def fan_in(shape: tuple[int, ...], axes: tuple[str, ...]) -> int:
  """The size of what a projection sums over: `embed` on the way in, everything before `embed` on the way out."""
  sizes = [(n, a) for n, a in zip(shape, axes, strict=True) if a not in ('layers', 'expert')]
  if sizes[0][1] == 'embed':
    return sizes[0][0]
  total = 1
  for n, _ in sizes[:-1]:
    total *= n
  return total
