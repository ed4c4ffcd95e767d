"""Kernels against a numpy loop, and attention modules against one another."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import attention, kernels
from llm_jax.model.attention import Context
from llm_jax.model.masks import Mask

B, T, H, K = 2, 7, 4, 8
RNG = np.random.default_rng(0)
Q = RNG.normal(size=(B, T, H, K)).astype(np.float32)
SEGMENTS = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 0]])
MASKS = dict(
  open=Mask(),
  causal=Mask(True),
  packed=Mask(True, segments=(jnp.asarray(SEGMENTS),) * 2),
  prefix=Mask(True, prefix=jnp.arange(T)[None] < jnp.array([[3], [1]])),
  branches=Mask(True, branches=(jnp.asarray([[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 0, 1, 2]]),) * 2),
  decode=Mask(True, queries=jnp.asarray(RNG.integers(0, T, (B, T)))),
)


def by_hand(q, k, v, mask, bias=None, scale=None, cap=None):
  """softmax(q k^T scale + bias) v, one query at a time, in double precision."""
  seen = mask.dense(T, T)
  seen = np.ones((B, 1, T, T), bool) if seen is None else np.broadcast_to(seen, (B, 1, T, T))
  out = np.zeros(q.shape)
  for b in range(B):
    for h in range(H):
      g = h // (H // k.shape[2])
      for t in range(T):
        logits = k[b, :, g].astype(float) @ q[b, t, h] * (K**-0.5 if scale is None else scale)
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        logits = logits if bias is None else logits + bias[0, h, t]
        p = np.where(seen[b, 0, t], np.exp(logits - logits[seen[b, 0, t]].max()), 0)
        out[b, t, h] = p / p.sum() @ v[b, :, g]
  return out


def keys(groups):
  rng = np.random.default_rng(groups)
  return (rng.normal(size=(B, T, groups, K)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('groups', [4, 2, 1])
@pytest.mark.parametrize('kernel', [kernels.reference, kernels.blocked, kernels.dot_product])
def test_kernels_are_the_formula(kernel, groups, mask):
  k, v = keys(groups)
  bias = RNG.normal(size=(1, H, T, T)).astype(np.float32)
  for b, scale in ((None, None), (bias, 1.0)):
    got = jax.jit(lambda *a: kernel(*a, MASKS[mask], b, scale))(Q, k, v)  # noqa: B023
    np.testing.assert_allclose(got, by_hand(Q, k, v, MASKS[mask], b, scale), rtol=2e-5, atol=2e-5)


PLACES = jnp.array([[*range(7)], [0, 1, 2, 0, 1, 2, 0]])
PACKED = dict(segments=(jnp.asarray(SEGMENTS),) * 2, places=(PLACES,) * 2)
BANDS = {
  f'{kind} {window}+{sinks}': Mask(True, window=window, sinks=sinks, **(kw))
  for kind, kw in (('alone', {}), ('packed', PACKED))
  for window in (1, 3, 9)
  for sinks in (0, 2)
}


@pytest.mark.parametrize('mask', BANDS)
def test_a_band_is_the_formula(mask):
  k, v = keys(2)
  got = jax.jit(lambda *a: kernels.banded(*a, BANDS[mask], cap=2.0))(Q, k, v)
  np.testing.assert_allclose(got, by_hand(Q, k, v, BANDS[mask], cap=2.0), rtol=2e-5, atol=2e-5)
  weigh = RNG.normal(size=Q.shape).astype(np.float32)
  gradient = lambda f: jax.grad(lambda *a: (f(*a, BANDS[mask]) * weigh).sum(), (0, 1, 2))(Q, k, v)
  for a, b in zip(gradient(kernels.reference), gradient(kernels.banded), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_band_never_holds_the_square():
  """No intermediate of the compiled program has t * t entries."""
  t, mask = 512, Mask(True, window=16, sinks=4)
  x = jnp.zeros((1, t, 1, 4))
  text = jax.jit(lambda x: kernels.banded(x, x, x, mask)).lower(x).as_text()
  sizes = [np.prod([int(n) for n in m.split('x')]) for m in re.findall(r'<((?:\d+x)+\d+)x', text)]
  assert max(sizes) <= t * (2 * 16 + 4) * 4


@pytest.mark.parametrize(
  ('mask', 'bias', 'words'),
  [
    (Mask(True), None, 'needs causal attention with a window'),
    (Mask(True, window=2, prefix=jnp.ones((1, T), bool)), None, 'no prefix'),
    (Mask(True, window=2), jnp.zeros((1, 1, T, T)), 'no position bias'),
    (Mask(True, window=2, branches=(jnp.zeros((1, T)),) * 2), None, 'nor branches'),
  ],
)
def test_a_band_refuses_what_it_has_not(mask, bias, words):
  with pytest.raises(UserError, match=words):
    kernels.banded(Q, *keys(4), mask, bias)


@pytest.mark.parametrize('kernel', [kernels.reference, kernels.blocked])
@pytest.mark.parametrize('groups', [4, 1])
def test_soft_cap(kernel, groups):
  k, v = keys(groups)
  got = kernel(9 * Q, k, v, MASKS['packed'], cap=3.0)
  np.testing.assert_allclose(got, by_hand(9 * Q, k, v, MASKS['packed'], cap=3.0), atol=2e-5)
  assert np.abs(got - by_hand(9 * Q, k, v, MASKS['packed'])).max() > 0.1


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('other', [kernels.blocked, kernels.dot_product])
def test_kernels_have_one_gradient(other, mask):
  k, v = keys(2)
  weigh = RNG.normal(size=Q.shape).astype(np.float32)

  def gradient(kernel):
    loss = lambda *a: (kernel(*a, MASKS[mask]) * weigh).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2)))(Q, k, v)

  for a, b in zip(gradient(kernels.reference), gradient(other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('kernel', [kernels.reference, kernels.blocked, kernels.dot_product])
def test_a_query_that_sees_nothing_is_finite(kernel):
  mask = Mask(segments=(jnp.full((B, T), 5), jnp.ones((B, T), jnp.int32)))
  k, v = keys(4)
  f = lambda q: kernel(q, k, v, mask).sum()
  assert np.isfinite(f(Q)) and np.isfinite(jax.grad(f)(Q)).all()


def test_dropout_on_probabilities_keeps_the_mean():
  q, k, v = np.zeros((1, 1, 1, K)), np.zeros((1, 2000, 1, K)), np.ones((1, 2000, 1, K))
  got = kernels.reference(*map(jnp.float32, (q, k, v)), Mask(), dropout=0.25, rng=jax.random.key(0))
  kept = float(got[0, 0, 0, 0]) * 0.75  # share of the 2000 equal probabilities that stay
  assert 0 < abs(kept - 0.75) < 3 * (0.25 * 0.75 / 2000) ** 0.5


def test_dropout_in_a_band_differs_from_block_to_block():
  q, k, v = np.zeros((1, 64, 1, K)), np.zeros((1, 64, 1, K)), np.ones((1, 64, 1, K))
  args = dict(dropout=0.5, rng=jax.random.key(0))
  got = kernels.banded(*map(jnp.float32, (q, k, v)), Mask(True, window=16), **args)[0, 16:, 0, 0]
  kept = np.asarray(got).reshape(3, 16) / 2  # shares of 16 equal probabilities
  assert abs(kept.mean() - 0.5) < 3 * (0.25 / (48 * 16)) ** 0.5
  assert (kept[0] != kept[1]).any() and (kept[1] != kept[2]).any()


def test_dot_product_refuses_what_it_has_not():
  k, v = keys(4)
  with pytest.raises(UserError, match='soft cap.*reference'):
    kernels.dot_product(Q, k, v, cap=3.0)
  with pytest.raises(UserError, match='dropout.*reference'):
    kernels.dot_product(Q, k, v, dropout=0.1, rng=jax.random.key(0))


X = RNG.normal(size=(B, T, 16)).astype(np.float32)
CTX = Context(Mask(True), jnp.arange(T)[None])


def weights(heads, groups, head_dim=4, bias=False):
  shapes = dict(
    query=(16, heads, head_dim), key=(16, groups, head_dim), value=(16, groups, head_dim)
  )
  shapes['out'] = (heads, head_dim, 16)
  if bias:
    shapes.update({f'{n}_bias': s[1:] for n, s in shapes.items() if n != 'out'}, out_bias=(16,))
  rng = np.random.default_rng(1)
  return {n: rng.normal(size=s).astype(np.float32) / 3 for n, s in shapes.items()}


def test_grouped_queries_are_multi_head_with_repeated_keys():
  for groups in (2, 1):
    w = weights(4, groups)
    repeated = {
      n: np.repeat(x, 4 // groups, 1) if n in ('key', 'value') else x for n, x in w.items()
    }
    a, _ = attention.SelfAttention(heads=4, groups=groups).apply({'params': w}, X, CTX)
    b, _ = attention.SelfAttention(heads=4).apply({'params': repeated}, X, CTX)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_self_attention_with_biases_is_the_formula():
  w = weights(4, 4, 8, bias=True)
  module = attention.SelfAttention(heads=4, head_dim=8, bias=True, rotate=None, scale=0.5)
  got, _ = module.apply({'params': w}, X, CTX)
  q, k, v = (
    np.einsum('btd,dhk->bthk', X, w[n]) + w[f'{n}_bias'] for n in ('query', 'key', 'value')
  )
  want = np.einsum('bthk,hkd->btd', by_hand(q, k, v, Mask(True), scale=0.5), w['out'])
  np.testing.assert_allclose(got, want + w['out_bias'], atol=1e-4)


def test_writing_leaves_other_slots_and_rows_alone():
  state = dict(k=jnp.zeros((2, 5, 1, 1)))
  new = dict(k=jnp.arange(1.0, 5).reshape(2, 2, 1, 1))
  got = attention.write(state, new, jnp.array([[0, 1], [3, 5]]))['k'][..., 0, 0]
  np.testing.assert_array_equal(got, [[1, 2, 0, 0, 0], [0, 0, 0, 3, 0]])  # slot 5 is beyond the end
  state = dict(k=jnp.zeros((2, 1, 5, 1)))  # the same where groups come first
  kept = attention.keep(state, new, jnp.array([[0, 1], [3, 5]]))['k'][:, 0, :, 0]
  np.testing.assert_array_equal(kept, got)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_one_query_is_the_formula(groups):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, t, n, 8)) for t, n in ((1, 4), (7, groups), (7, groups)))
  bias, at = rng.normal(size=(1, 4, 1, 7)), np.array([[4], [6]])
  q, k, v, bias = (jnp.asarray(x, jnp.float32) for x in (q, k, v, bias))
  got = kernels.reference(q, k, v, Mask(True, queries=jnp.asarray(at)), bias, 0.3, 2.0)
  for row, end in enumerate(at[:, 0] + 1):
    for head in range(4):
      own = k[row, :end, head * groups // 4] @ q[row, 0, head] * 0.3
      own = 2 * np.tanh(own / 2) + bias[0, head, 0, :end]
      p = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
      np.testing.assert_allclose(got[row, 0, head], p @ v[row, :end, head * groups // 4], atol=1e-5)


def test_cross_attention_reads_its_state_and_not_the_encoder():
  module, w = attention.CrossAttention(heads=4), weights(4, 4)
  seen = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
  encoded = jnp.float32(RNG.normal(size=(B, 4, 16)))
  ones = jnp.ones((B, T), jnp.int32)
  ctx = CTX._replace(encoded=encoded, encoded_mask=Mask(segments=(ones, seen)))
  plain, none = module.apply({'params': w}, X, ctx)
  made, state = module.apply({'params': w}, X, ctx, {})
  read, _ = module.apply({'params': w}, X, CTX._replace(encoded=None), state)
  assert none is None
  np.testing.assert_array_equal(plain, made)
  np.testing.assert_allclose(plain, read, atol=1e-6)
  hidden = ctx._replace(encoded=encoded.at[0, 3].add(9.0).at[1, 2:].add(9.0))
  np.testing.assert_array_equal(plain, module.apply({'params': w}, X, hidden)[0])


def test_sizes_that_do_not_divide_name_the_remedy():
  for module, words in (
    (attention.SelfAttention(heads=3), 'head_dim'),
    (attention.SelfAttention(heads=4, groups=3), 'groups'),
  ):
    with pytest.raises(UserError, match=words):
      jax.eval_shape(lambda m=module: m.init(jax.random.key(0), X, CTX))
