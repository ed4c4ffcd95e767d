"""Position encodings against complex numbers, published values and independent derivations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import positions

RNG = np.random.default_rng(0)


def test_sinusoidal_is_the_formula():
  p = np.arange(50)
  y = positions.Sinusoidal().apply({}, jnp.asarray(p)[None], 10, None)[0]
  for i in range(5):
    np.testing.assert_allclose(y[:, 2 * i], np.sin(p / 10000 ** (2 * i / 10)), atol=1e-5)
    np.testing.assert_allclose(y[:, 2 * i + 1], np.cos(p / 10000 ** (2 * i / 10)), atol=1e-5)


def rotate(x, p, base=10000.0):
  """RoPE of the paper by complex numbers: neighbouring pairs are multiplied by e^(i p theta)."""
  n = x.shape[-1]
  theta = base ** (-np.arange(0, n, 2) / n)
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * p[:, :, None, None] * theta)
  return np.stack([z.real, z.imag], -1).reshape(x.shape)


def test_rope_interleaved_multiplies_complex_numbers():
  x, p = RNG.normal(size=(2, 5, 3, 8)), RNG.integers(0, 60, (2, 5))
  y = positions.rope_interleaved(jnp.float32(x), jnp.asarray(p), base=500.0)
  np.testing.assert_allclose(y, rotate(x, p, 500.0), atol=2e-5)


def test_the_two_layouts_are_one_permutation_apart():
  x, p = jnp.float32(RNG.normal(size=(2, 5, 3, 8))), jnp.asarray(RNG.integers(0, 60, (2, 5)))
  order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
  half = positions.rope(x[..., order], p)
  np.testing.assert_allclose(half, positions.rope_interleaved(x, p)[..., order], atol=1e-6)


@pytest.mark.parametrize('fn', [positions.rope, positions.rope_interleaved])
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_rope_products_depend_on_the_distance_only(fn, fraction):
  q, k = (jnp.float32(RNG.normal(size=(1, 1, 2, 16))) for _ in range(2))
  product = lambda m, n: jnp.sum(
    fn(q, jnp.array([[m]]), fraction=fraction) * fn(k, jnp.array([[n]]), fraction=fraction), -1
  )
  np.testing.assert_allclose(product(7, 3), product(104, 100), atol=1e-4)
  np.testing.assert_allclose(product(3, 7), product(100, 104), atol=1e-4)
  assert np.abs(product(7, 3) - product(8, 3)).max() > 1e-2


@pytest.mark.parametrize('fn', [positions.rope, positions.rope_interleaved])
def test_partial_rope_leaves_the_rest_alone(fn):
  x, p = jnp.float32(RNG.normal(size=(2, 5, 3, 16))), jnp.arange(5)[None]
  y = fn(x, p, fraction=0.25)
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  np.testing.assert_allclose(y[..., :4], fn(x[..., :4], p), atol=1e-6)
  with pytest.raises(UserError, match='fraction'):
    fn(x, p, fraction=1.5)


def test_alibi_slopes_are_the_published_ones():
  np.testing.assert_allclose(positions.alibi_slopes(8), [2.0**-h for h in range(1, 9)])
  # 12 heads: the 8 of 2^(-8/8 h), then every other of the 16 of 2^(-8/16 h)
  want = [2.0**-h for h in range(1, 9)] + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)]
  np.testing.assert_allclose(positions.alibi_slopes(12), want, rtol=1e-6)
  # 112 heads (BLOOM): 64 of 2^(-h/8), then 48 of the odd 2^(-h/16)
  want = [2 ** (-h / 8) for h in range(1, 65)] + [2 ** (-h / 16) for h in range(1, 97, 2)]
  np.testing.assert_allclose(positions.alibi_slopes(112), want, rtol=1e-6)


def test_alibi_bias_falls_with_the_distance():
  y = positions.Alibi().apply({}, jnp.array([[2, 3]]), 4, 8, False)
  assert y.shape == (1, 8, 2, 4)
  np.testing.assert_allclose(y[0, 0, 1], [-1.5, -1.0, -0.5, 0.0])
  np.testing.assert_allclose(y[0, 7, 0], np.array([-2, -1, 0, -1]) / 256)


def bucket_by_hand(relative, bidirectional, buckets=32, distance=128):
  """Raffel et al. in words: exact below half of the buckets, then logarithmic; in double precision."""
  start = 0
  if bidirectional:
    buckets //= 2
    start = buckets if relative > 0 else 0
    far = abs(relative)
  else:
    far = max(-relative, 0)
  exact = buckets // 2
  if far < exact:
    return start + far
  # the largest bucket whose lower edge exact * (distance / exact)^(i / (buckets - exact)) is reached
  steps = buckets - exact
  i = max(i for i in range(steps) if far**steps >= exact ** (steps - i) * distance**i)
  return start + exact + i


@pytest.mark.parametrize('bidirectional', [True, False])
def test_t5_buckets_from_minus_1000_to_1000(bidirectional):
  relative = np.arange(-1000, 1001)
  got = positions.bucket(jnp.asarray(relative), bidirectional, 32, 128)
  want = [bucket_by_hand(int(r), bidirectional) for r in relative]
  np.testing.assert_array_equal(got, want)
  assert min(want) == 0 and max(want) == 31


def test_t5_bias_reads_the_table_by_bucket():
  table = RNG.normal(size=(8, 3)).astype(np.float32)
  module = positions.Buckets(buckets=8, distance=16)
  y = module.apply({'params': dict(table=table)}, jnp.arange(6)[None], 6, 3, True)
  for i in range(6):
    for j in range(6):
      want = table[bucket_by_hand(j - i, True, 8, 16)]
      np.testing.assert_allclose(y[0, :, i, j], want, rtol=1e-6)


def test_frequencies_start_at_one_and_end_above_one_over_base():
  f = positions.frequencies(64, 10000.0)
  assert f[0] == 1 and math.isclose(f[-1], 10000 ** (-62 / 64), rel_tol=1e-6)
  assert jax.dtypes.canonicalize_dtype(f.dtype) == np.float32
