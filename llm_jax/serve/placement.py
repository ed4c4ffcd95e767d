"""Where an engine's weights and memory are: on one device, or split over the mesh axis `tensor` of several.

Every device holds its part of each layer, of the pool of keys and values and of the recurrent states, as the names of
their axes and the rules in force say (core/mesh.py), and all of them work at the same rows (Megatron-LM; Shoeybi et al.
2019, arXiv:1909.08053). The rows themselves are not split: who computes them would depend on how many there are, and so
would their bits. More requests at once is another engine.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.model import stack

# What may stay whole: fewer heads of keys than devices (MQA), a vocabulary of an odd size.
WHOLE = ('groups', 'vocab')


class Placement(NamedTuple):
  """A mesh, which may be empty, and the rules for it."""

  mesh: jax.sharding.Mesh
  rules: Mapping[str, Mapping]

  @contextlib.contextmanager
  def entered(self) -> Iterator[None]:
    """In force inside: a thread does not inherit them."""
    with jax.set_mesh(self.mesh), mesh.rules(**self.rules):
      yield

  def put(self, model: Any, params: Any) -> Any:
    """The parameters, stacked or apart, where they belong. Inside `entered`."""
    if mesh.current() is None:
      return params
    axes = stack.axes_apart(model.axes, params)
    return jax.device_put(params, mesh.shardings(axes, params))

  def laid(self, model: Any, shapes: Any) -> Any:
    """The shapes of the stacked parameters with their shardings, to load them by."""
    with self.entered():
      if mesh.current() is None:
        return shapes
      one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
      return jax.tree.map(one, shapes, mesh.shardings(model.axes, shapes))

  def whole(self, x: Any) -> jax.Array:
    """A host array on every device."""
    if self.mesh.empty:
      return jax.numpy.asarray(x)
    return jax.device_put(x, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()))


def find(model: Any) -> Placement:
  """That of the mesh and the rules in force, less the axes of `WHOLE` that do not divide.

  Raises `UserError` for a mesh that splits something else than layers, or that these do not divide over.
  """
  on = jax.sharding.get_mesh()
  sizes = {} if on.empty else {name: n for name, n in on.shape.items() if n > 1}
  shown = ', '.join(f'{name}={n}' for name, n in sizes.items())
  if sizes.keys() - {'tensor'}:
    raise UserError(
      f'an engine splits its layers over the mesh axis tensor and nothing else, got {shown}: use tensor='
      f'{math.prod(sizes.values())}, or an engine for each part of the requests'
    )
  if mesh.is_explicit():
    raise UserError('an engine needs a mesh of Auto axes: leave out explicit=True')
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rules, why = mesh.divisible(model.axes, shapes, sizes)
  wrong = [f'{name} ({reason})' for name, reason in why.items() if name not in WHOLE]
  if wrong:
    raise UserError(f'the model does not split over {shown}: {", ".join(wrong)}; choose a divisor')
  return Placement(on, rules)


def spread(x: Any) -> Mapping[str, Any]:
  """How each leaf of a tree of arrays is split, by its path; {} on one device."""
  if mesh.current() is None:
    return {}
  return {path: leaf.sharding.spec for path, leaf in tree.flatten(x).items()}
