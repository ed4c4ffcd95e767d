"""Rescaled rotary frequencies against the papers' formulas and against transformers, whose values are in `rope.json`
(`make_rope_reference.py`); ReRoPE against a loop over distances."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, extension, ffn, memory, positions, transformer
from llm_jax.model.masks import Mask
from tests.model.make_rope_reference import CASES, STORED

P = functools.partial
RNG = np.random.default_rng(0)
EXPECTED = json.loads(STORED.read_text())


def scaling(told, longest):
  """Their settings as one of our functions."""
  kind, original = told['rope_type'], told.get('original_max_position_embeddings')
  rest = dict(factor=told['factor'], original_length=original)
  if kind == 'linear':
    return P(extension.interpolation, factor=told['factor'])
  if kind == 'dynamic':
    return P(extension.dynamic_ntk, factor=told['factor'], original_length=longest)
  if kind == 'llama3':
    low, high = told['low_freq_factor'], told['high_freq_factor']
    return P(extension.llama3, low=low, high=high, **rest)
  if kind == 'longrope':
    return P(extension.longrope, short=told['short_factor'], long=told['long_factor'], **rest)
  turns = dict(fast=told.get('beta_fast', 32.0), slow=told.get('beta_slow', 1.0))
  return P(extension.yarn, attention=told.get('attention_factor'), **turns, **rest)


@pytest.mark.parametrize('name', CASES)
def test_frequencies_are_those_of_transformers(name):
  told, head_dim, length, longest = CASES[name]
  size = int(head_dim * told.get('partial_rotary_factor', 1.0))
  theta = positions.frequencies(size, told.get('rope_theta', 10000.0))
  found, factor = scaling(told, longest)(theta, jnp.full((1, 1, 1), length))
  np.testing.assert_allclose(np.ravel(found), EXPECTED[name]['inv_freq'], rtol=2e-6)
  assert math.isclose(factor, EXPECTED[name]['attention_scaling'], rel_tol=1e-6)
  if name not in ('dynamic_within', 'longrope_short'):
    assert np.abs(np.ravel(found) / theta - 1).max() > 0.1


ONE = jnp.ones((1, 1, 1), jnp.int32)
THETA = positions.frequencies(64, 10000.0)


def test_interpolation_moves_the_positions():
  """Chen et al., eq. 4: f(x, m L / L'); not at all for L' = L."""
  x = jnp.float32(RNG.normal(size=(1, 9, 2, 16)))
  for fn in (positions.rope, positions.rope_interleaved, P(positions.rope, fraction=0.5)):
    got = fn(x, x, 4 * jnp.arange(9)[None], scaling=P(extension.interpolation, factor=4.0))
    want = fn(x, x, jnp.arange(9)[None])
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_array_equal(extension.interpolation(THETA, ONE, factor=1.0)[0], THETA)


def test_ntk_is_a_larger_base():
  """b' = b s^(n/(n-2)): the fastest pair stays, the slowest is that of interpolation."""
  found, factor = extension.ntk(THETA, ONE, factor=8.0)
  np.testing.assert_allclose(found, positions.frequencies(64, 1e4 * 8 ** (64 / 62)), rtol=1e-12)
  assert found[0] == 1 and math.isclose(found[-1], THETA[-1] / 8) and factor == 1


def test_dynamic_ntk_looks_at_each_row():
  """A row within the trained length is not changed by a longer one beside it."""
  x, where = (
    jnp.float32(RNG.normal(size=(2, 9, 1, 8))),
    jnp.stack([jnp.arange(9), jnp.arange(9) * 2]),
  )
  grown = P(extension.dynamic_ntk, factor=2.0, original_length=9)
  y, _ = positions.rope(x, x, where, scaling=grown)
  np.testing.assert_array_equal(y[0], positions.rope(x, x, where)[0][0])
  base = 1e4 * (2 * 17 / 9 - 1) ** (8 / 6)
  want = positions.rope(x, x, where, base=base)[0][1]
  np.testing.assert_allclose(y[1], want, atol=1e-5)


def test_truncation_is_piecewise():
  found, _ = extension.truncation(THETA, ONE, high=0.1, low=0.01, constant=0.002)
  for theta, got in zip(THETA, found, strict=True):
    assert got == (theta if theta >= 0.1 else 0.0 if theta <= 0.01 else 0.002)
  assert {0.0, 0.002, 1.0} <= set(found)
  with pytest.raises(UserError, match='must be below'):
    extension.truncation(THETA, ONE, high=0.1, low=0.2, constant=0.0)


def test_by_parts_is_the_formula_of_the_paper():
  """Peng et al., section 3.2: (1 - gamma(r)) theta / s + gamma(r) theta, r = L / wavelength, alpha = 1, beta = 4."""
  found, _ = extension.llama3(THETA, ONE, factor=8.0, original_length=512)
  for theta, got in zip(THETA, found, strict=True):
    r = 512 / (2 * math.pi / theta)
    gamma = 0 if r < 1 else 1 if r > 4 else (r - 1) / (4 - 1)
    assert math.isclose(got, (1 - gamma) * theta / 8 + gamma * theta, rel_tol=1e-9)


def test_yarn_keeps_the_fast_interpolates_the_slow_and_sharpens():
  found, factor = extension.yarn(THETA, ONE, factor=8.0, original_length=2048)
  turns = 2048 * THETA / (2 * math.pi)
  np.testing.assert_allclose(found[turns > 40], THETA[turns > 40])
  np.testing.assert_allclose(found[turns < 0.7], THETA[turns < 0.7] / 8)
  assert (np.diff(found / THETA) <= 1e-12).all() and factor == 0.1 * math.log(8) + 1
  x, where = jnp.float32(RNG.normal(size=(1, 1, 1, 64))), jnp.array([[0]])
  y, z = positions.rope(x, x, where, scaling=P(extension.yarn, factor=8.0, original_length=2048))
  np.testing.assert_allclose((y * z).sum(), factor**2 * (x * x).sum(), rtol=1e-5)
  with pytest.raises(UserError, match='two pairs'):
    extension.yarn(THETA[:1], ONE, factor=8.0, original_length=2048)


def test_longrope_wants_a_number_for_each_pair():
  with pytest.raises(UserError, match='32 pairs rotate.*3 short and 32 long'):
    extension.longrope(
      THETA, ONE, short=(1.0,) * 3, long=(2.0,) * 32, factor=4.0, original_length=64
    )


def by_distance(x, w, clip):
  """Causal attention where key j is seen from query i at the distance clip(i - j): one rotation per pair of them."""
  t = x.shape[0]
  q, k, v = (np.einsum('td,dhk->thk', x, w[n]) for n in ('query', 'key', 'value'))
  (heads, n), out = q.shape[1:], np.zeros_like(x)
  theta = 10000.0 ** (-np.arange(n // 2) / (n // 2))
  for h in range(heads):
    g = h // (heads // k.shape[1])
    for i in range(t):
      logits = np.zeros(i + 1)
      for j in range(i + 1):
        a, b = (y[: n // 2] + 1j * y[n // 2 :] for y in (q[i, h], k[j, g]))
        logits[j] = (a * np.exp(1j * clip(i - j) * theta) * b.conj()).real.sum() / math.sqrt(n)
      p = np.exp(logits - logits.max())
      out[i] += p / p.sum() @ v[: i + 1, g] @ w['out'][h]
  return out


def attend(relative, x, w):
  module = attention.SelfAttention(heads=4, groups=2, rotate=None, relative=relative)
  ctx = attention.Context(Mask(True), jnp.arange(x.shape[1])[None])
  return module.apply({'params': w}, x, ctx)[0]


def weights():
  shapes = dict(query=(16, 4, 8), key=(16, 2, 8), value=(16, 2, 8), out=(4, 8, 16))
  return {n: jnp.float32(RNG.normal(size=s) / 2) for n, s in shapes.items()}


@pytest.mark.parametrize('slope', [0.0, 0.25, 1.0])
@pytest.mark.parametrize('window', [3, 40])
def test_rerope_bounds_the_distance(window, slope):
  w, x = weights(), RNG.normal(size=(1, 12, 16))
  got = attend(P(extension.ReRoPE, window=window, slope=slope), jnp.float32(x), w)[0]
  far = lambda d: d if d <= window else window + slope * (d - window)
  double = {n: np.asarray(v, np.float64) for n, v in w.items()}
  np.testing.assert_allclose(got, by_distance(x[0], double, far), atol=2e-5)
  plain = by_distance(x[0], double, lambda d: d)
  assert (np.abs(got - plain).max() > 1e-3) == (window == 3 and slope < 1)


MIXERS = dict(
  rerope=P(
    attention.SelfAttention,
    heads=4,
    groups=2,
    rotate=None,
    relative=P(extension.ReRoPE, window=3),
  ),
  transformer_xl=P(attention.SelfAttention, heads=4, rotate=None, relative=positions.TransformerXL),
  memory=P(memory.MemoryAttention, heads=4, groups=2, window=3, capacity=4, top=2),
  dynamic=P(
    attention.SelfAttention,
    heads=4,
    rotate=P(positions.xpos, scaling=P(extension.dynamic_ntk, factor=2.0, original_length=4)),
  ),
)


@pytest.mark.parametrize('name', MIXERS)
def test_on_a_mesh_that_types_its_shardings(tiny, name):
  """Packed rows on data=2 x fsdp=2 x tensor=2 with Explicit axes are those of one device."""
  layer = P(block.decoder, mixer=MIXERS[name], ffn=P(ffn.Gated, hidden=24))
  model = transformer.causal(vocab=64, embed=16, layers=2, block=layer)
  params = tiny.large(model)
  ids = RNG.integers(0, 64, (8, 8)).astype(np.int32)
  where, segments = ([[*range(5), *range(3)]] * 8, [[1] * 5 + [2] * 3] * 8)
  batch = dict(inputs=ids, positions=np.int32(where), segments=np.int32(segments))
  want = tiny.forward(model)(params, batch)
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2, explicit=True)), mesh.rules(**mesh.ZERO3):
    placed = jax.device_put(params, mesh.shardings(model.axes, params))
    got = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))(placed, mesh.place(batch))
  np.testing.assert_allclose(got, want, atol=1e-5)
