"""ELMo: who reads what, the LSTMs of both directions by their recurrence, and the mix of layers by its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import block, elmo, heads, init, norms, transformer
from llm_jax.model.recurrent import lstm
from llm_jax.objectives import language
from tests.model import recurrences

VOCAB, EMBED, T = 11, 6, 5
IDS = np.random.default_rng(0).integers(1, VOCAB, (2, T))
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope='module')
def made():
  mixer = functools.partial(lstm.LSTM, hidden=8)
  layer = functools.partial(block.mixers, mixer=mixer, residual=norms.plain)
  one = transformer.causal(
    vocab=VOCAB, embed=EMBED, layers=2, block=layer, norm=None, head=heads.Untied, init=init.palm
  )
  model = elmo.make(one)
  return model, jax.jit(model.init)(jax.random.key(0))


def by_hand(params, ids):
  """[3, t, embed] in float64: the embeddings and what two LSTMs make of them."""
  table = np.asarray(params['embedding']['table'], np.float64)
  found = [table[ids]]
  mixers = params['decoder']['layers']['block_0']['mixer']
  for i in range(2):
    weights = {name: np.asarray(w[i], np.float64) for name, w in mixers.items()}
    found.append(recurrences.lstm(None, weights, found[-1]))
  return np.stack(found)


def test_layers_read_from_both_ends(made):
  """Also where a row ends before the others."""
  model, params = made
  batch = dict(inputs=jnp.asarray(IDS), segments=jnp.asarray(REAL))
  found = np.asarray(jax.jit(functools.partial(elmo.layers, model))(params, batch))
  assert found.shape == (3, 2, T, 2 * EMBED)
  for row, ids in enumerate((IDS[0], IDS[1, :3])):
    left, right = by_hand(params['forward'], ids), by_hand(elmo.backward(params), ids[::-1])
    wanted = np.concatenate([left, right[:, ::-1]], axis=-1)
    np.testing.assert_allclose(found[:, row, : len(ids)], wanted, atol=1e-5)
  np.testing.assert_array_equal(found[0, ..., :EMBED], found[0, ..., EMBED:])


def test_the_mix_is_equation_1():
  h = np.random.default_rng(1).normal(size=(3, 2, 4, 6)).astype(np.float32)
  scores, gamma = np.array([0.5, -1.0, 2.0]), 0.7
  share = np.exp(scores) / np.exp(scores).sum()
  wanted = 0.7 * sum(share[j] * h[j] for j in range(3))
  np.testing.assert_allclose(elmo.mix(h, jnp.asarray(scores), gamma), wanted, atol=1e-5)
  even = elmo.mix(h, jnp.zeros(3), 1.0)
  np.testing.assert_allclose(even, h.mean(0), atol=1e-6)


def test_the_loss_is_that_of_both_directions(made):
  """-log p of each word after those before it, and of each before those after it, from the recurrences by hand."""
  model, params = made
  inputs = np.pad(IDS[:, :-1], ((0, 0), (1, 0))) * REAL
  batch = dict(inputs=inputs, targets=IDS * REAL, weights=REAL.astype(np.float32), segments=REAL)
  batch = jax.tree.map(jnp.asarray, batch)
  loss = lambda params: language.both_ways(model, params, batch, None, chunk=None)
  wanted = 0.0
  for ids in (IDS[0], IDS[1, :3]):
    for p, text in ((params['forward'], ids), (elmo.backward(params), ids[::-1])):
      h = by_hand(p, np.concatenate([[0], text[:-1]]))[-1]
      logits = h @ np.asarray(p['head']['w'], np.float64)
      wanted -= (logits[np.arange(len(text)), text] - np.log(np.exp(logits).sum(1))).sum()
  sums = lambda params: ((told := loss(params)).sum, told.weight)
  (total, weight), grads = jax.jit(jax.value_and_grad(sums, has_aux=True))(params)
  assert total == pytest.approx(wanted, rel=1e-5) and weight == 2 * REAL.sum()
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_only_causal_models(made):
  one = made[0].one
  with pytest.raises(UserError, match='need a causal one'):
    elmo.make(one._replace(card=one.card._replace(kind='prefix')))
