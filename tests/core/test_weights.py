"""Every leaf type against the same product written densely in numpy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, weights
from llm_jax.core.weights import LowRank, Quantized, Scaled

# the equations of the model, with the number of leading weight axes that LoRA's `a` takes
EQUATIONS = {
  'btd,dhk->bthk': 1,  # queries
  'bsd,dgk->bsgk': 1,  # keys, values
  'bthk,hkd->btd': 2,  # output: two contracted axes
  'btd,df->btf': 1,
  'btf,fd->btd': 1,
  'btd,vd->btv': 1,  # tied head: the contracted axis is the last one
}
SIZE = dict(b=8, t=4, s=4, d=16, h=4, g=2, k=8, f=32, v=24, r=3)


def shape(letters):
  return tuple(SIZE[c] for c in letters)


def draw(seed, *size):
  return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def operands(eq):
  left, right = eq.split('->')[0].split(',')
  return draw(0, *shape(left)), draw(1, *shape(right)), right


def leaf(kind, w, split):
  """(the leaf, the dense weight it stands for)."""
  a, b = draw(2, *w.shape[:split], SIZE['r']), draw(3, SIZE['r'], *w.shape[split:])
  scale = draw(4, w.shape[-1])
  values = np.round(w * 40).clip(-127, 127).astype(np.int8)
  quantized = Quantized(jnp.asarray(values), jnp.full((1,) * (w.ndim - 1) + w.shape[-1:], 1 / 40))
  low = np.tensordot(a, b, axes=1)
  return {
    'plain': (jnp.asarray(w), w),
    'quantized': (quantized, values / np.float32(40)),
    'low_rank': (LowRank(jnp.asarray(w), a, b, scale=0.5), w + 0.5 * low),
    'scaled': (Scaled(jnp.asarray(w), scale), w * scale),
    'qlora': (LowRank(quantized, a, b, scale=2.0), values / np.float32(40) + 2.0 * low),
    'scaled_qlora': (
      Scaled(LowRank(quantized, a, b), scale),
      (values / np.float32(40) + low) * scale,
    ),
  }[kind]


KINDS = ('plain', 'quantized', 'low_rank', 'scaled', 'qlora', 'scaled_qlora')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('eq', EQUATIONS)
def test_einsum_equals_the_dense_product(eq, kind):
  x, w, _ = operands(eq)
  w, oracle = leaf(kind, w, EQUATIONS[eq])
  np.testing.assert_allclose(
    weights.einsum(eq, jnp.asarray(x), w), np.einsum(eq, x, oracle), rtol=2e-5, atol=2e-4
  )
  np.testing.assert_allclose(weights.dense(w), oracle, rtol=1e-5, atol=1e-5)
  assert w.shape == oracle.shape and w.dtype == jnp.float32


def test_low_rank_takes_any_split_of_the_contracted_axes():
  eq = 'bthk,hkd->btd'
  x, w, _ = operands(eq)
  for split in (1, 2):  # with 1, half of the contracted axes are in a and half in b
    w_, oracle = leaf('low_rank', w, split)
    np.testing.assert_allclose(
      weights.einsum(eq, jnp.asarray(x), w_), np.einsum(eq, x, oracle), rtol=2e-5, atol=2e-4
    )


def test_low_rank_never_forms_the_sum():
  x, w, _ = operands('btd,df->btf')
  w, _ = leaf('low_rank', w, 1)
  made = [
    v.aval.shape
    for e in jax.make_jaxpr(weights.einsum, static_argnums=0)('btd,df->btf', x, w).eqns
    for v in e.outvars
  ]
  assert (SIZE['d'], SIZE['f']) not in made


@pytest.mark.parametrize('kind', KINDS)
def test_lookup_is_a_row_of_the_dense_table(kind):
  table, oracle = leaf(kind, draw(1, SIZE['v'], SIZE['d']), 1)
  ids = np.arange(8 * 4).reshape(8, 4) % SIZE['v']
  np.testing.assert_allclose(
    weights.lookup(table, ids, dtype=jnp.float32), oracle[ids], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    weights.lookup(table, ids[0], dtype=jnp.float32), oracle[ids[0]], rtol=1e-5, atol=1e-5
  )


def test_lookup_with_a_scale_per_row():
  values, scale = np.arange(12, dtype=np.int8).reshape(4, 3), draw(0, 4, 1)
  table = Quantized(jnp.asarray(values), jnp.asarray(scale))
  ids = np.array([[3, 0, 1]])
  np.testing.assert_allclose(
    weights.lookup(table, ids, dtype=jnp.float32), (values * scale)[ids], rtol=1e-6
  )


def test_dtype_is_that_of_the_activation_unless_named():
  x, w = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((16, 32), jnp.float32)
  assert weights.einsum('btd,df->btf', x, w).dtype == jnp.bfloat16
  assert weights.einsum('btd,df->btf', x, w, dtype=jnp.float32).dtype == jnp.float32
  assert weights.lookup(w, jnp.zeros((1, 2), int), dtype=jnp.bfloat16).dtype == jnp.bfloat16
  # the accumulator is as wide as the result: 257 ones do not fit the 8 bits of a bf16 mantissa
  long = weights.einsum(
    'btd,df->btf', jnp.ones((1, 1, 257), jnp.bfloat16), jnp.ones((257, 1)), dtype=jnp.float32
  )
  assert long.item() == 257


def test_the_low_rank_part_is_trained_and_the_rest_is_not_touched():
  x, w, _ = operands('btd,df->btf')
  low, _ = leaf('low_rank', w, 1)
  got = jax.grad(lambda w: weights.einsum('btd,df->btf', jnp.asarray(x), w).sum())(low)
  down = np.einsum('btd,dr->btr', x, low.a)
  np.testing.assert_allclose(
    got.b, 0.5 * np.einsum('btr,f->rf', down, np.ones(SIZE['f'])), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('explicit', [False, True], ids=['auto', 'explicit'])
def test_add_is_a_bias_on_the_last_axes(explicit):
  x, b = draw(0, 8, 4, 4, 8), draw(1, 4, 8)
  np.testing.assert_allclose(weights.add(jnp.asarray(x), jnp.asarray(b), 'hk'), x + b)
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2, explicit=explicit)):
    m = jax.sharding.get_mesh()
    put = jax.device_put(x, jax.NamedSharding(m, mesh.spec(*weights.axes_of('bthk'))))
    got = jax.jit(weights.add, static_argnums=2)(put, placed(jnp.asarray(b), 'hk', 1), 'hk')
    np.testing.assert_allclose(np.asarray(got), x + b)


def test_axes_of_an_equation():
  assert weights.axes_of('bthk') == ('batch', 'length', 'heads', 'head_dim')
  with pytest.raises(KeyError):
    weights.axes_of('z')


MESHES = {
  'fsdp': dict(data=2, fsdp=4),
  'tensor': dict(data=4, tensor=2),
  'both': dict(data=2, fsdp=2, tensor=2),
}


def placed(w, letters, split):
  """The leaf laid out as the axis rules say, its parts by the axes they have."""
  names = weights.axes_of(letters)

  def put(x, axes):
    axes = tuple(None if n == 1 else a for n, a in zip(x.shape, axes, strict=True))
    return jax.device_put(
      x, jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.spec(*axes, kind='weights'))
    )

  def go(w):
    if isinstance(w, Quantized):
      return Quantized(put(w.values, names), put(w.scale, names))
    if isinstance(w, LowRank):
      return LowRank(
        go(w.w), put(w.a, (*names[:split], 'rank')), put(w.b, ('rank', *names[split:])), w.scale
      )
    if isinstance(w, Scaled):
      return Scaled(go(w.w), put(w.scale, names[-1:]))
    return put(w, names)

  return go(w)


def products(table, ids, xs, ws):
  """Both ends of a tied table and every equation."""
  x = weights.lookup(table, ids, dtype=jnp.float32)
  out = dict(lookup=x, head=weights.einsum('btd,vd->btv', x, table))
  return out | {eq: weights.einsum(eq, xs[eq], ws[eq]) for eq in EQUATIONS}


@pytest.mark.parametrize('kind', ['plain', 'quantized', 'scaled_qlora'])
@pytest.mark.parametrize('explicit', [False, True], ids=['auto', 'explicit'])
@pytest.mark.parametrize('layout', MESHES)
def test_eight_devices_equal_one(layout, explicit, kind):
  ids = np.arange(8 * 4).reshape(8, 4) % SIZE['v']
  table = leaf(kind, draw(1, SIZE['v'], SIZE['d']), 1)[0]
  xs = {eq: jnp.asarray(operands(eq)[0]) for eq in EQUATIONS}
  ws = {eq: leaf(kind, operands(eq)[1], split)[0] for eq, split in EQUATIONS.items()}
  whole = products(table, ids, xs, ws)
  with jax.set_mesh(mesh.make(**MESHES[layout], explicit=explicit)):

    def sharding(letters):
      return jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec(*weights.axes_of(letters)))

    ids = mesh.place(dict(ids=ids))['ids']
    xs = {eq: jax.device_put(x, sharding(eq.split(',')[0])) for eq, x in xs.items()}
    ws = {eq: placed(w, operands(eq)[2], EQUATIONS[eq]) for eq, w in ws.items()}
    parts = jax.jit(products)(placed(table, 'vd', 1), ids, xs, ws)
    for eq in EQUATIONS:
      letters = eq.split('->')[1]
      assert parts[eq].sharding.is_equivalent_to(sharding(letters), len(letters)), eq
  for name, value in whole.items():
    np.testing.assert_allclose(np.asarray(parts[name]), value, rtol=2e-5, atol=3e-4, err_msg=name)


@pytest.mark.parametrize('explicit', [False, True], ids=['auto', 'explicit'])
def test_gradients_on_eight_devices_equal_one_and_stay_sharded(explicit):
  x, w, _ = operands('btd,df->btf')

  def loss(w, x):
    return (weights.einsum('btd,df->btf', x, w) ** 2).sum()

  want = jax.grad(loss)(jnp.asarray(w), jnp.asarray(x))
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2, explicit=explicit)):
    gradient = jax.jit(jax.grad(loss))
    w, x = placed(jnp.asarray(w), 'df', 1), mesh.place(dict(x=x))['x']
    got = gradient(w, x)
    want_spec = mesh.spec('embed', 'ffn', kind='gradients')
    assert got.sharding.is_equivalent_to(jax.NamedSharding(jax.sharding.get_mesh(), want_spec), 2)
  np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-3)
