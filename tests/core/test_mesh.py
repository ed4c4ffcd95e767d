"""Meshes and axis rules on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llm_jax.core import mesh
from llm_jax.core.errors import UserError

BOTH = pytest.mark.parametrize('explicit', [False, True], ids=['auto', 'explicit'])


def sizes(m):
  return {name: size for name, size in m.shape.items() if size > 1}


def test_make_fills_in_what_is_left_over():
  assert sizes(mesh.make()) == dict(data=8)
  assert sizes(mesh.make(fsdp=2, tensor=2)) == dict(data=2, fsdp=2, tensor=2)
  assert sizes(mesh.make(data=1, fsdp=-1)) == dict(fsdp=8)
  assert mesh.make().axis_names == mesh.AXES


def test_make_names_the_axis_types():
  assert set(mesh.make().axis_types) == {AxisType.Auto}
  assert set(mesh.make(explicit=True).axis_types) == {AxisType.Explicit}


def test_make_may_use_the_first_devices_only():
  assert [d.id for d in mesh.make(data=1).devices.flat] == [0]
  assert [d.id for d in mesh.make(data=2, tensor=2).devices.flat] == [0, 1, 2, 3]


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (
      dict(data=16),
      'data=16 needs 16 devices, this machine has 8: lower a size, set data=-1',
    ),
    (dict(data=4, tensor=4), 'data=4 x tensor=4 needs 16 devices'),
    (dict(data=-1, tensor=3), '8 devices do not divide by 3.*product divides 8'),
    (dict(data=-1, tensor=16), '8 devices do not divide by 16'),
    (dict(data=-1, fsdp=-1), 'one of them may be -1'),
    (dict(data=0), "'data': 0.*positive"),
    (dict(tensor=-2), "'tensor': -2.*positive"),
  ],
)
def test_make_refuses(wrong, message):
  with pytest.raises(UserError, match=message):
    mesh.make(**wrong)


def test_spec_by_kind_of_array():
  assert mesh.spec('embed', 'heads', 'head_dim', kind='weights') == P('fsdp', 'tensor', None)
  assert mesh.spec('batch', 'length', 'embed') == P(('data', 'fsdp', 'expert'), None, None)
  assert mesh.spec(None, 'ffn') == P(None, 'tensor')
  assert mesh.spec() == P()


def test_spec_raises_on_an_unknown_axis():
  with pytest.raises(KeyError, match=r"axis 'bacth' is not in the rules; did you mean 'batch'\?"):
    mesh.spec('bacth')


def test_a_mesh_axis_splits_one_array_axis_only():
  assert mesh.spec('heads', 'ffn', kind='weights') == P('tensor', None)
  assert mesh.spec('embed', 'embed', kind='weights') == P('fsdp', None)
  with mesh.rules(
    **dict(mesh.ZERO3, activations=dict(batch=('data', 'fsdp'), embed=('fsdp', 'tensor')))
  ):
    assert mesh.spec('batch', 'embed') == P(('data', 'fsdp'), 'tensor')


def test_the_zero_stages_differ_in_what_is_split():
  kinds = ('weights', 'gradients', 'optimizer')
  split = {
    name: [
      mesh_axes != P(None, None)
      for kind in kinds
      for mesh_axes in [in_rules(rules, 'embed', 'norm', kind=kind)]
    ]
    for name, rules in dict(
      data=mesh.DATA, zero1=mesh.ZERO1, zero2=mesh.ZERO2, zero3=mesh.ZERO3
    ).items()
  }
  assert split == dict(
    data=[False] * 3, zero1=[False, False, True], zero2=[False, True, True], zero3=[True] * 3
  )


def in_rules(rules, *axes, kind):
  with mesh.rules(**rules):
    return mesh.spec(*axes, kind=kind)


def test_rules_hold_inside_the_with_only():
  before = mesh.spec('embed', kind='weights')
  with mesh.rules(**mesh.DATA):
    assert mesh.spec('embed', kind='weights') == P(None)
    with mesh.rules(**mesh.ZERO3):
      assert mesh.spec('embed', kind='weights') == P('fsdp')
    assert mesh.spec('embed', kind='weights') == P(None)
  with pytest.raises(RuntimeError), mesh.rules(**mesh.DATA):
    raise RuntimeError
  assert mesh.spec('embed', kind='weights') == before == P('fsdp')


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (dict(embedd=('fsdp',)), r"axes.weights names the axis 'embedd'; did you mean 'embed'\?"),
    (
      dict(embed=('fdsp',)),
      r"axes.weights.embed names the mesh axis 'fdsp'; did you mean 'fsdp'\?",
    ),
    (dict(embed='fsdp'), r"axes.weights.embed is the text 'fsdp': write a tuple, \('fsdp',\)"),
  ],
)
def test_rules_refuse(weights, message):
  with pytest.raises(UserError, match=message), mesh.rules(**dict(mesh.ZERO3, weights=weights)):
    pass


def test_current_is_none_without_a_mesh_and_on_one_device():
  assert mesh.current() is None
  with jax.set_mesh(mesh.make(data=1)):
    assert mesh.current() is None and not mesh.is_explicit()
  with jax.set_mesh(mesh.make()):
    assert mesh.current() is not None and not mesh.is_explicit()
    with mesh.outside():
      assert mesh.current() is None
    assert mesh.current() is not None
  with jax.set_mesh(mesh.make(explicit=True)):
    assert mesh.is_explicit()


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((2, 3))
  assert mesh.shard(x, 'batch', 'embed') is x
  assert mesh.gather(x, ('embed', 'ffn')) is x
  with pytest.raises(ValueError, match='1 axis names'):
    mesh.shard(x, 'batch')


@BOTH
def test_shard_and_place(explicit):
  rows = np.arange(32, dtype=np.float32).reshape(8, 4)
  with jax.set_mesh(mesh.make(data=4, tensor=2, explicit=explicit)):
    x = mesh.place(dict(x=rows))['x']
    assert x.sharding.is_equivalent_to(jax.NamedSharding(jax.sharding.get_mesh(), P('data')), 2)
    y = jax.jit(lambda x: mesh.shard(x * 2, 'batch', 'ffn'))(x)
    assert y.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(y), rows * 2)


@BOTH
def test_gather_makes_weights_whole_over_the_batch_axes_and_leaves_gradients_split(explicit):
  with jax.set_mesh(mesh.make(fsdp=4, tensor=2, data=1, explicit=explicit)):
    m = jax.sharding.get_mesh()
    w = jax.device_put(
      jnp.arange(32.0).reshape(8, 4),
      mesh.shardings({'w': ('embed', 'ffn')}, {'w': jnp.ones((8, 4))})['w'],
    )
    assert w.addressable_shards[0].data.shape == (2, 2)
    whole = jax.jit(lambda w: mesh.gather(w, ('embed', 'ffn')))(w)
    assert whole.sharding.is_equivalent_to(jax.NamedSharding(m, P(None, 'tensor')), 2)
    grad = jax.jit(jax.grad(lambda w: (mesh.gather(w, ('embed', 'ffn')) ** 2).sum()))(w)
    assert grad.sharding.is_equivalent_to(w.sharding, 2)
    np.testing.assert_array_equal(np.asarray(grad), 2 * np.arange(32.0).reshape(8, 4))


def test_shardings_follow_the_axes():
  axes = {
    'a': {'table': ('vocab', 'embed')},
    'b': ('layers', 'embed', 'heads', 'head_dim'),
    'c': (),
  }
  shapes = {'a': {'table': (32, 8)}, 'b': (3, 8, 4, 5), 'c': ()}
  shapes = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
  )
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2)):
    got = jax.tree.map(lambda s: s.spec, mesh.shardings(axes, shapes))
  assert got == {
    'a': {'table': P('tensor', 'fsdp')},
    'b': P(None, 'fsdp', 'tensor', None),
    'c': P(),
  }


def test_shardings_refuse():
  shapes = {'q': jax.ShapeDtypeStruct((6, 4), jnp.float32)}
  with pytest.raises(UserError, match='no mesh: wrap the call'):
    mesh.shardings({'q': ('embed', 'ffn')}, shapes)
  with jax.set_mesh(mesh.make(data=1, fsdp=4)):
    with pytest.raises(
      UserError,
      match=r"q: axis 'embed' of size 6 does not divide by fsdp=4; .*--config.axes.weights.embed='\(\)'",
    ):
      mesh.shardings({'q': ('embed', 'ffn')}, shapes)


def test_parameters_per_device_are_the_zero_formulas():
  """2 + 2 + 12 bytes per parameter (weights, gradients, Adam), split as ZeRO says (checklist PAR-008)."""
  n, psi = 8, 64 * 16
  full = dict(weights=2, gradients=2, optimizer=12)  # bytes per parameter
  want = dict(
    DATA=16 * psi, ZERO1=4 * psi + 12 * psi // n, ZERO2=2 * psi + 14 * psi // n, ZERO3=16 * psi // n
  )
  with jax.set_mesh(mesh.make(data=1, fsdp=n)):
    for name, want_bytes in want.items():
      with mesh.rules(**getattr(mesh, name)):
        shape = jax.ShapeDtypeStruct((64, 16), jnp.float32)
        of = {k: mesh.shardings({'w': ('embed', 'ffn')}, {'w': shape}, k)['w'] for k in full}
      got = sum(full[k] * np.prod(s.shard_shape((64, 16))) for k, s in of.items())
      assert got == want_bytes, name


def test_check_batch():
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2)):
    mesh.check_batch(8, 2)
    with pytest.raises(UserError, match='batch of 8 does not divide into 3 microbatches'):
      mesh.check_batch(8, 3)
    with pytest.raises(UserError, match='batch of 8 does not divide into 0 microbatches'):
      mesh.check_batch(8, 0)
    with pytest.raises(
      UserError,
      match=r'4 microbatch\(es\) of 2 examples do not divide over 4 devices.*multiple of 16',
    ):
      mesh.check_batch(8, 4)
  mesh.check_batch(7)
