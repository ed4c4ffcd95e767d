"""Devices as a mesh, and the one table from axis names to mesh axes.

Weights and activations name their axes (`'embed'`, `'heads'`, `'batch'`); the rules say on which
mesh axes each is split. Data parallelism, FSDP, tensor parallelism and their products are the same
rules on another mesh; ZeRO 1, 2, 3 are three choices of what is split over `fsdp` (Rajbhandari et
al. 2020, arXiv:1910.02054): the optimizer state, also the gradients, also the weights.

`jax.make_mesh` types its axes; they are named here and only here. Auto lets XLA propagate shardings
between our constraints; Explicit makes every sharding part of the type, so that a forgotten
annotation is an error while tracing. Training uses Auto, the tests use both.
"""

import contextlib
import contextvars
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.core import tree as tree_lib
from llm_jax.core.errors import UserError, nearest

AXES = ('data', 'fsdp', 'expert', 'sequence', 'stage', 'tensor')

# What is split where. Every name a weight or activation may use has an entry; () is not split.
_WHOLE = dict(
  batch=(), length=(), embed=(), heads=(), groups=(), head_dim=(), ffn=(), vocab=(), expert=(),
  layers=(), norm=(), positions=(), buckets=(), rank=(), state=(), taps=(),
  types=(), classes=(), characters=(), filters=(),
)  # fmt: skip
NAMES = tuple(_WHOLE)
_TENSOR = dict(
  _WHOLE, heads=('tensor',), groups=('tensor',), ffn=('tensor',), vocab=('tensor',), expert=('expert',)
)  # fmt: skip
_SHARDED = dict(_TENSOR, embed=('fsdp',))
# all but the experts are data-parallel over their axis (GShard): there tokens are what moves
_ACTIVATIONS = dict(_TENSOR, batch=('data', 'fsdp', 'expert'))

ZERO1 = dict(weights=_TENSOR, gradients=_TENSOR, optimizer=_SHARDED, activations=_ACTIVATIONS)
ZERO2 = dict(weights=_TENSOR, gradients=_SHARDED, optimizer=_SHARDED, activations=_ACTIVATIONS)
ZERO3 = dict(weights=_SHARDED, gradients=_SHARDED, optimizer=_SHARDED, activations=_ACTIVATIONS)
DATA = dict(weights=_TENSOR, gradients=_TENSOR, optimizer=_TENSOR, activations=_ACTIVATIONS)

_outside: contextvars.ContextVar[bool] = contextvars.ContextVar('outside', default=False)
_rules: contextvars.ContextVar[Mapping[str, Mapping[str, tuple]]] = contextvars.ContextVar(
  'rules', default=ZERO3
)


def make(
  *,
  data: int = -1,
  fsdp: int = 1,
  expert: int = 1,
  sequence: int = 1,
  stage: int = 1,
  tensor: int = 1,
  explicit: bool = False,
) -> jax.sharding.Mesh:
  """A mesh over the devices, or the first ones of them; one size may be -1: what is left over.

  Raises `UserError` when the sizes need more devices than there are, do not divide them, or leave a
  process without any.
  """
  sizes = dict(data=data, fsdp=fsdp, expert=expert, sequence=sequence, stage=stage, tensor=tensor)
  bad = {n: s for n, s in sizes.items() if s < 1 and s != -1}
  free = [n for n, s in sizes.items() if s == -1]
  if bad or len(free) > 1:
    raise UserError(
      f'mesh {bad or sizes}: sizes are positive, and one of them may be -1 (what is left over)'
    )
  devices = jax.device_count()
  fixed = math.prod(s for s in sizes.values() if s != -1)
  if free:
    if devices % fixed:
      raise UserError(
        f'{devices} devices do not divide by {fixed} ({_show(sizes)}): choose sizes whose product divides {devices}'
      )
    sizes[free[0]] = devices // fixed
  elif fixed > devices:
    virtual = f', or let the CPU act as {fixed}: JAX_NUM_CPU_DEVICES={fixed} llm-jax ...'
    raise UserError(
      f'mesh {_show(sizes)} needs {fixed} devices, this machine has {devices}: lower a size, '
      f'set data=-1{virtual if jax.default_backend() == "cpu" else ""}'
    )
  elif fixed < devices and jax.process_count() > 1:
    raise UserError(
      f'mesh {_show(sizes)} uses {fixed} of the {devices} devices '
      f'of {jax.process_count()} processes: use all of them'
    )
  kind = AxisType.Explicit if explicit else AxisType.Auto
  shape = tuple(sizes[a] for a in AXES)
  return jax.make_mesh(
    shape, AXES, axis_types=(kind,) * len(AXES), devices=jax.devices()[: math.prod(shape)]
  )


def abstract(**sizes: int) -> jax.sharding.AbstractMesh:
  """A mesh of these sizes (1 where not named) without devices: to plan for more of them than there are."""
  for name, size in sizes.items():
    if name not in AXES:
      raise UserError(f'no mesh axis {name!r}; {nearest(name, AXES)}')
    if size < 1:
      raise UserError(f'mesh {name}={size}: without devices every size is a positive number')
  return jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES)


def _show(sizes: Mapping[str, int]) -> str:
  return ' x '.join(f'{n}={s}' for n, s in sizes.items() if s != 1) or 'data=1'


@contextlib.contextmanager
def rules(
  *, weights: Mapping, gradients: Mapping, optimizer: Mapping, activations: Mapping
) -> Iterator[None]:
  """Use these axis rules inside the `with`; see `ZERO1`, `ZERO2`, `ZERO3`, `DATA` above."""
  table = dict(weights=weights, gradients=gradients, optimizer=optimizer, activations=activations)
  for kind, names in table.items():
    for name, axes in names.items():
      if name not in _WHOLE:
        raise UserError(f'axes.{kind} names the axis {name!r}; {nearest(name, _WHOLE)}')
      if isinstance(axes, str):
        raise UserError(f'axes.{kind}.{name} is the text {axes!r}: write a tuple, ({axes!r},)')
      for axis in axes:
        if axis not in AXES:
          raise UserError(f'axes.{kind}.{name} names the mesh axis {axis!r}; {nearest(axis, AXES)}')
  token = _rules.set({kind: dict(_WHOLE, **dict(names)) for kind, names in table.items()})
  try:
    yield
  finally:
    _rules.reset(token)


def spec(*axes: str | None, kind: str = 'activations') -> PartitionSpec:
  """The mesh axes of an array whose axes have these names. A mesh axis is used once: the first name gets it.

  Inside a `shard_map` the axes it has taken over are left out: there an array is one device's part along them.
  Raises `KeyError` on a name that is not in the rules (Flax would silently replicate a typo).
  """
  table, entries = _rules.get()[kind], []
  used = set(jax.sharding.get_abstract_mesh().manual_axes)
  for name in axes:
    if name is not None and name not in table:
      raise KeyError(f'axis {name!r} is not in the rules; {nearest(name, table)}')
    free = tuple(a for a in table.get(name, ()) if a not in used) if name else ()
    used.update(free)
    entries.append(free if len(free) > 1 else (free[0] if free else None))
  return PartitionSpec(*entries)


def current() -> Any:
  """The abstract mesh of `jax.set_mesh`, or None outside one.

  Also None on a single device, where nothing is split, and inside a `shard_map` over all axes of the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if (
    _outside.get() or mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
  ):
    return None
  return mesh


@contextlib.contextmanager
def outside() -> Iterator[None]:
  """No sharding constraints inside: for what runs on arrays too small to split, such as `init`'s dummy batch."""
  token = _outside.set(True)
  try:
    yield
  finally:
    _outside.reset(token)


def is_explicit() -> bool:
  """Whether the current mesh has shardings in the types of arrays, so that every gather and reshape must name one."""
  mesh = current()
  return mesh is not None and AxisType.Explicit in mesh.axis_types


def constrain(x: jax.Array, partition: PartitionSpec) -> jax.Array:
  """Puts `x` on the current mesh as `partition` says; without a mesh it is returned as it is."""
  if current() is None:
    return x
  return (
    jax.sharding.reshard(x, partition)
    if is_explicit()
    else jax.lax.with_sharding_constraint(x, partition)
  )


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """An activation whose axes have these names, constrained to where the rules put it."""
  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axis names {axes} for an array of shape {x.shape}')
  return constrain(x, spec(*axes))


def gather(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A weight in the layout it is used in, that of `used`.

  The forward pass gathers the FSDP shards, the backward pass leaves the gradient where the
  `gradients` rules want it.
  """
  if current() is None:
    return w
  stored, left = spec(*axes, kind='gradients'), used(*axes)
  if is_explicit():
    return jax.sharding.reshard(w, left)

  @jax.custom_vjp
  def move(w):
    return constrain(w, left)

  move.defvjp(lambda w: (constrain(w, left), None), lambda _, g: (constrain(g, stored),))
  return move(w)


def settle(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """What `gather` returned, constrained to stay there: its gradient is gathered too before it is split."""
  return constrain(w, used(*axes))


def used(*axes: str | None) -> PartitionSpec:
  """Where a weight is when it is multiplied with: whole along the mesh axes that split the batch.

  Not so the experts, a leading axis 'expert': these stay where they are, and tokens are sent to them.
  """
  batch = set(_rules.get()['activations']['batch'])
  entries = []
  for i, entry in enumerate(spec(*axes, kind='weights')):
    stay = i == 0 and axes[0] == 'expert'
    left = tuple(a for a in named(entry) if stay or a not in batch)
    entries.append(left if len(left) > 1 else (left[0] if left else None))
  return PartitionSpec(*entries)


def named(entry: Any) -> tuple[str, ...]:
  """The mesh axes of one entry of a `PartitionSpec`."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def shardings(axes: Any, shapes: Any, kind: str = 'weights', on: Any = None) -> Any:
  """A tree of `NamedSharding`s for a tree of axis-name tuples.

  axes: tree of tuples of names. shapes: the same tree of arrays or `ShapeDtypeStruct`s. on: the mesh, which may be
  `abstract`; default that of `jax.set_mesh`. Raises `UserError` when an axis does not divide by the mesh axes it is
  split over.
  """
  mesh = jax.sharding.get_mesh() if on is None else on
  if mesh.empty:
    raise UserError('no mesh: wrap the call in `with jax.set_mesh(mesh.make(...))`')
  flat = tree_lib.flatten(axes, is_leaf=tree_lib.is_names)

  def one(path: str, shape: Any) -> NamedSharding:
    names = flat[path]
    partition = spec(*names, kind=kind)
    for name, size, entry in zip(names, shape.shape, partition, strict=True):
      ways = math.prod(
        mesh.shape[a] for a in (entry if isinstance(entry, tuple) else (entry,)) if a
      )
      if size % ways:
        raise UserError(
          f'{path}: axis {name!r} of size {size} does not divide by {entry}={ways}; '
          f"change the mesh or keep it whole with --config.axes.{kind}.{name}='()'"
        )
    return NamedSharding(mesh, partition)

  return tree_lib.map_paths(one, shapes)


def divisible(
  axes: Any, shapes: Any, sizes: Mapping[str, int], table: Mapping[str, Mapping] | None = None
) -> tuple[dict[str, dict], dict[str, str]]:
  """(rules, why): the rules less the names of axes that do not divide over a mesh of these sizes, and why, by name.

  axes, shapes: as in `shardings`. table: rules such as `ZERO3`, default those in force.
  """
  names = tree_lib.flatten(axes, is_leaf=tree_lib.is_names)
  found: dict[str, set[int]] = {}
  for path, leaf in tree_lib.flatten(shapes).items():
    for name, size in zip(names[path], leaf.shape, strict=True):
      found.setdefault(name, set()).add(size)
  left, why = {}, {}
  for kind, entries in (_rules.get() if table is None else table).items():
    left[kind] = dict(entries)
    for name, over in entries.items():
      ways = math.prod(sizes.get(axis, 1) for axis in over)
      bad = sorted(n for n in found.get(name, ()) if n % ways)
      if bad:
        left[kind][name] = ()
        why[name] = f'{bad[0]:,} does not divide by {"x".join(over)}={ways}'
  return left, why


def place(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Host arrays of this process as global arrays, split over the batch axes.

  batch: name -> [local batch, ...]. Each process passes its own rows; together they are the global
  batch.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty or mesh.size == 1:
    return {k: jax.numpy.asarray(v) for k, v in batch.items()}
  entry = spec('batch')
  return {
    k: jax.make_array_from_process_local_data(NamedSharding(mesh, entry), np.asarray(v))
    for k, v in batch.items()
  }


def batch_ways() -> int:
  """Over how many devices the rules split the rows of a batch."""
  mesh = jax.sharding.get_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[a] for a in _rules.get()['activations']['batch'])


def ways(*axes: str | None) -> int:
  """Over how many devices the rules split an activation whose axes have these names; 1 outside a mesh."""
  on = current()
  entries = [axis for entry in spec(*axes) for axis in named(entry)]
  return 1 if on is None else math.prod(on.shape[axis] for axis in entries)


def context() -> Hashable:
  """What a trace depends on here besides the mesh, which jax watches itself: a static argument for functions whose
  compiled code outlives a `with rules(...)`."""
  table = _rules.get()
  return _outside.get(), tuple((kind, *sorted(table[kind].items())) for kind in sorted(table))


def check_batch(size: int, microbatches: int = 1) -> None:
  """Raises `UserError` when `size` examples do not divide into microbatches and over the batch axes of the mesh."""
  ways = batch_ways()
  if microbatches < 1 or size % microbatches:
    raise UserError(
      f'a batch of {size} does not divide into {microbatches} microbatches: choose a divisor of {size}'
    )
  if size // microbatches % ways:
    raise UserError(
      f'{microbatches} microbatch(es) of {size // microbatches} examples do not divide over '
      f'{ways} devices (mesh axes data x fsdp x expert): '
      f'choose a batch that is a multiple of {ways * microbatches}'
    )
