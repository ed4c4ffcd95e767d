"""Position encodings against complex numbers, published values and independent derivations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, heads, positions, transformer
from llm_jax.model.masks import Mask

P = functools.partial
RNG = np.random.default_rng(0)


ROTATIONS = (
  positions.rope,
  positions.rope_interleaved,
  positions.xpos,
  positions.xpos_interleaved,
)


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
  q, k = jnp.float32(x), jnp.float32(x[:, ::-1, :1])
  y, z = positions.rope_interleaved(q, k, jnp.asarray(p), base=500.0)
  np.testing.assert_allclose(y, rotate(x, p, 500.0), atol=2e-5)
  np.testing.assert_allclose(z, rotate(x[:, ::-1, :1], p, 500.0), atol=2e-5)


@pytest.mark.parametrize('fn', [positions.rope, positions.xpos])
def test_keys_may_have_positions_of_their_own(fn):
  q, k = (jnp.float32(RNG.normal(size=(1, n, 2, 8))) for n in (3, 5))
  p, keys = jnp.array([[4, 0, 7]]), jnp.array([[3, 1, 2, 9, 5]])
  y, z = fn(q, k, p, keys)
  np.testing.assert_array_equal(y, fn(q, q, p)[0])
  np.testing.assert_array_equal(z, fn(k, k, keys)[1])


def test_the_two_layouts_are_one_permutation_apart():
  x, p = jnp.float32(RNG.normal(size=(2, 5, 3, 8))), jnp.asarray(RNG.integers(0, 60, (2, 5)))
  order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
  for half, neighbours in (
    (positions.rope, positions.rope_interleaved),
    (positions.xpos, positions.xpos_interleaved),
  ):
    for a, b in zip(half(x[..., order], x[..., order], p), neighbours(x, x, p), strict=True):
      np.testing.assert_allclose(a, b[..., order], atol=1e-6)


@pytest.mark.parametrize('fn', [*ROTATIONS])
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_rope_products_depend_on_the_distance_only(fn, fraction):
  q, k = (jnp.float32(RNG.normal(size=(1, 1, 2, 16))) for _ in range(2))

  def product(m, n):
    y, z = fn(q, k, jnp.array([[m]]), jnp.array([[n]]), fraction=fraction)
    return jnp.sum(y * z, -1)

  np.testing.assert_allclose(product(7, 3), product(104, 100), atol=1e-4)
  np.testing.assert_allclose(product(3, 7), product(100, 104), atol=1e-4)
  assert np.abs(product(7, 3) - product(8, 3)).max() > 1e-2


@pytest.mark.parametrize('fn', [*ROTATIONS])
def test_partial_rope_leaves_the_rest_alone(fn):
  x, p = jnp.float32(RNG.normal(size=(2, 5, 3, 16))), jnp.arange(5)[None]
  for y, whole in zip(fn(x, x, p, fraction=0.25), fn(x[..., :4], x[..., :4], p), strict=True):
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(y[..., :4], whole, atol=1e-6)
  with pytest.raises(UserError, match='fraction'):
    fn(x, x, p, fraction=1.5)


def test_xpos_is_its_formula():
  """Sun et al., algorithm 1 with complex numbers: q_m e^(i m theta) zeta^(m/512), k_n e^(i n theta) zeta^(-n/512)."""
  x, p = RNG.normal(size=(2, 5, 3, 8)), RNG.integers(0, 2000, (2, 5))
  zeta = np.array([(i / 4 + 0.4) / 1.4 for i in range(4)]).repeat(2)
  q, k = positions.xpos_interleaved(jnp.float32(x), jnp.float32(x), jnp.asarray(p))
  size = zeta ** (p[:, :, None, None] / 512)
  np.testing.assert_allclose(q, rotate(x, p) * size, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(k, rotate(x, p) / size, rtol=1e-3, atol=2e-2)


def test_xpos_decays_with_the_distance():
  x, distances = jnp.ones((1, 1, 1, 64)), jnp.arange(0, 4096, 8)[:, None]
  q, k = jax.vmap(lambda d: positions.xpos(x, x, d[None], jnp.array([[0]])))(distances)
  product = np.asarray((q * k).sum(-1)).ravel()
  means = np.abs(product).reshape(8, -1).mean(1)
  assert (np.diff(means) < 0).all() and means[-1] < means[0] / 8


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


def test_the_critical_dimension_of_a_trained_length():
  """Liu et al. 2023 (arXiv:2310.05209): 2 ceil(d/2 log_b(L/2pi)) entries of a head see a whole period in training."""
  longest = lambda base: 2 * np.pi / positions.frequencies(128, base)
  assert (
    2 * (longest(1e4) <= 4096).sum()
    == 2 * math.ceil(64 * math.log(4096 / (2 * math.pi), 1e4))
    == 92
  )
  assert (longest(500.0) < 4096).all() and (longest(1e6) > longest(1e4))[1:].all()


XL = dict(rotate=None, relative=positions.TransformerXL)


def transformer_xl(x, w, heads, causal):
  """Dai et al., section 3.3, with loops in double precision: x [t, embed] -> [t, embed]."""
  t, embed = x.shape
  w = {n: np.asarray(v, np.float64) for n, v in tree.flatten(w).items()}
  q, k, v = (np.einsum('td,dhk->thk', x, w[n]) for n in ('query', 'key', 'value'))
  out, size = np.zeros((t, embed)), q.shape[-1]
  for h in range(heads):
    for i in range(t):
      last = i + 1 if causal else t
      logits = np.zeros(last)
      for j in range(last):
        angles = [(i - j) / 10000 ** (2 * n / embed) for n in range(embed // 2)]
        r = np.array([f(a) for a in angles for f in (math.sin, math.cos)])
        by_content = (q[i, h] + w['relative/content_bias'][h]) @ k[j, h]
        by_place = (q[i, h] + w['relative/position_bias'][h]) @ (r @ w['relative/key'][:, h])
        logits[j] = (by_content + by_place) / math.sqrt(size)
      p = np.exp(logits - logits.max())
      out[i] += p / p.sum() @ v[:last, h] @ w['out'][h]
  return out


def xl_weights(embed, heads, head_dim):
  into, one = (embed, heads, head_dim), (heads, head_dim)
  shapes = dict(query=into, key=into, value=into, out=(heads, head_dim, embed))
  draw = lambda shape: jnp.float32(RNG.normal(size=shape) / 3)
  own = dict(key=draw(into), content_bias=draw(one), position_bias=draw(one))
  return {n: draw(s) for n, s in shapes.items()} | dict(relative=own)


@pytest.mark.parametrize('causal', [True, False])
def test_transformer_xl_is_its_formula(causal):
  w, x = xl_weights(12, 3, 4), jnp.float32(RNG.normal(size=(2, 7, 12)))
  module = attention.SelfAttention(heads=3, **XL)
  ctx = attention.Context(Mask(causal), jnp.arange(7)[None])
  y, _ = module.apply({'params': w}, x, ctx)
  for row in range(2):
    want = transformer_xl(np.asarray(x[row], np.float64), w, 3, causal)
    np.testing.assert_allclose(y[row], want, atol=2e-5)


def test_transformer_xl_with_a_prefix_in_the_state():
  """Prefilling sees keys after the query, at negative distances, among more slots than there are tokens."""
  w, x = xl_weights(12, 3, 4), jnp.float32(RNG.normal(size=(2, 5, 12)))
  module, where = attention.SelfAttention(heads=3, **XL), jnp.arange(5)[None].repeat(2, 0)
  seen = jnp.arange(9)[None].repeat(2, 0) < 5
  ctx = attention.Context(Mask(True, seen, None, where), where)
  y, _ = module.apply({'params': w}, x, ctx, module.initial(2, 9, 12, jnp.float32))
  for row in range(2):
    want = transformer_xl(np.asarray(x[row], np.float64), w, 3, causal=False)
    np.testing.assert_allclose(y[row], want, atol=2e-5)


def test_gopher_closes_with_the_projection():
  """Rae et al. 2021, table 1: 280B = 80 x 13 d^2 + vocabulary; without the projection it would be 258B."""
  model = transformer.causal(
    vocab=32_000,
    embed=16_384,
    layers=80,
    length=2048,
    block=P(
      block.decoder,
      mixer=P(attention.SelfAttention, heads=128, **XL),
      ffn=P(ffn.MLP, hidden=4 * 16_384),
    ),
    head=heads.Tied,
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  flat = tree.flatten(shapes)
  relative = {n: math.prod(s.shape) for n, s in flat.items() if '/relative/' in n}
  assert sum(relative.values()) == 80 * (16_384**2 + 2 * 16_384)
  assert round(tree.count(shapes) / 1e8) == 2797
  assert round((tree.count(shapes) - sum(relative.values())) / 1e8) == 2582
  assert model.card.positions == 'TransformerXL'


def test_relative_positions_replace_the_rotation():
  x, ctx = jnp.zeros((1, 2, 8)), attention.Context(Mask(True), jnp.arange(2)[None])
  module = attention.SelfAttention(heads=2, relative=positions.TransformerXL)
  with pytest.raises(UserError, match='set rotate=None'):
    jax.eval_shape(lambda: module.init(jax.random.key(0), x, ctx))
