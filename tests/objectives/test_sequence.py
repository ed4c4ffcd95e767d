"""Log-probabilities of targets against numpy in float64, whole and in chunks; join and parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.objectives import language, sequence
from tests.model.test_scalar import make


def make_batch():
  rng = np.random.default_rng(0)
  ids = lambda: rng.integers(0, 32, (3, 10)).astype(np.int32)
  weights = (rng.random((3, 10)) < 0.6).astype(np.float32)
  return dict(inputs=ids(), targets=ids(), weights=weights)


@pytest.mark.parametrize('chunk', [None, 1, 4, 10, 64])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_logp_and_entropy_are_those_of_float64(chunk, temperature):
  model, batch = make(), make_batch()
  params = model.init(jax.random.key(0))
  found = sequence.tokens(model, params, batch, chunk=chunk, temperature=temperature)
  logits = np.asarray(model.logits(params, model.hidden(params, batch).x), np.float64) / temperature
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  own = np.take_along_axis(np.log(p), batch['targets'][..., None], -1)[..., 0]
  np.testing.assert_allclose(found.logp, own, atol=1e-5)
  np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), atol=1e-5)


@pytest.mark.parametrize('chunk', [None, 3])
def test_the_sum_and_its_gradient_are_those_of_cross_entropy(chunk):
  model, batch = make(), make_batch()
  params = model.init(jax.random.key(0))

  def nats(params):
    logp = sequence.tokens(model, params, batch, chunk=chunk).logp
    return -sequence.total(logp, batch['weights']).sum()

  value, gradient = jax.value_and_grad(nats)(params)
  expected, wanted = jax.value_and_grad(lambda p: language.next_token(model, p, batch, None).sum)(
    params
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, wanted)


def test_joined_texts_come_apart_again():
  a, b = make_batch(), jax.tree.map(lambda x: x[::-1], make_batch())
  batch = {f'a/{k}': v for k, v in a.items()} | {f'b/{k}': v for k, v in b.items()}
  joined = sequence.join(batch | {'a/ref_logp': np.zeros(3)}, ('a', 'b'))
  assert set(joined) == {'inputs', 'targets', 'weights'}
  assert joined['inputs'].shape == (6, 10)
  first, second = sequence.parts(joined['targets'], 2)
  np.testing.assert_array_equal(first, a['targets'])
  np.testing.assert_array_equal(second, b['targets'])
  np.testing.assert_allclose(
    sequence.mean(jnp.asarray(a['targets']), a['weights']),
    [np.mean(t[w > 0]) for t, w in zip(a['targets'], a['weights'])],
    rtol=1e-6,
  )


def test_a_missing_text_is_named():
  with pytest.raises(UserError, match='no chosen/inputs'):
    sequence.join(make_batch(), ('chosen', 'rejected'))
