"""ELMo: who reads what, the LSTMs of both directions by their recurrence, the mix of layers by its formula, words from
their characters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.data import words
from llm_jax.model import block, characters, count, elmo, heads, init, norms, transformer
from llm_jax.model.recurrent import lstm
from llm_jax.objectives import language
from tests.model import recurrences

VOCAB, EMBED, T = 11, 6, 5
IDS = np.random.default_rng(0).integers(1, VOCAB, (2, T))
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


KNOWN = words.Words(['a', 'cat', 'sat', 'on', 'the', 'mat', 'xylem', '.'])
SMALL = dict(filters=((1, 2), (3, 4)), size=3)


def causal(vocab=VOCAB, embed=EMBED, hidden=8, **kw):
  mixer = functools.partial(lstm.LSTM, hidden=hidden)
  layer = functools.partial(block.mixers, mixer=mixer, residual=norms.plain)
  kw = dict(head=heads.Untied, init=init.palm) | kw
  return transformer.causal(vocab=vocab, embed=embed, layers=2, block=layer, norm=None, **kw)


def spelt(letters, **kw):
  """An embedding from characters, for the words of `KNOWN`."""
  spelling = functools.partial(KNOWN.spelling, letters)
  return functools.partial(characters.Characters, spelling=spelling, **kw)


@pytest.fixture(scope='module')
def made():
  model = elmo.make(causal())
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


def test_words_from_characters_are_those_of_pytorch():
  """Embedding, Conv1d, max, relu, two highways of Linear layers and a Linear of torch 2.13 in 64 bits, with weights
  sin(1.7 n + shift), for two words of six characters, given as ids and as characters."""
  fill = lambda shape, shift: np.sin(np.arange(np.prod(shape)) * 1.7 + shift).reshape(shape)
  params = dict(table=fill((262, 3), 0.0))
  for i, (width, n) in enumerate(SMALL['filters']):
    params[f'width_{width}'] = fill((n, 3, width), 1.0 + i).T
    params[f'width_{width}_bias'] = fill((n,), 1.1 + i)
  named = [('highway_0', 3.0), ('highway_1', 4.0), ('highway_0_gate', 4.0), ('highway_1_gate', 5.0)]
  for name, shift, n in (*((*one, 6) for one in named), ('project', 5.0, 5)):
    params |= {name: fill((n, 6), shift).T, f'{name}_bias': fill((n,), shift + 0.1)}
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  module = spelt(6, **SMALL)()
  vectors = jax.jit(lambda ids: module.apply(dict(params=params), ids, 0, 5, jnp.float32))
  wanted = [
    [-3.86372372, 0.19942217, 4.15737172, -5.20345532, 2.45648419],
    [-3.91024604, -0.38737699, 5.04215501, -5.88059678, 2.53901868],
  ]
  ids = KNOWN.ids(['cat', 'xylem'])
  spelling = words.spelled(['cat', 'xylem'], 6)
  np.testing.assert_allclose(vectors(ids[None])[0], wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(vectors(spelling[:, None])[:, 0], wanted, rtol=1e-6, atol=1e-6)
  with pytest.raises(UserError, match='letters=3 or more'):
    vectors(spelling[None, :, :2])


@pytest.mark.parametrize('cells, embed, highways, published', [
  (1024, 128, 1, 13.6), (2048, 256, 1, 28.0), (4096, 512, 2, 93.6),
])  # fmt: skip
def test_parameters_of_published_elmos(cells, embed, highways, published):
  """The millions that allennlp.org/elmo tells of its three models. Their LSTMs, two for each direction, feed back what
  their projection makes (Sak et al. 2014), those here what the cells make, so they are added by hand."""
  made = causal(embed=embed, hidden=4, embedding=spelt(50, highways=highways))
  found = count.parameters(made.card)['embedding']
  assert count.total(made.card) == tree.count(jax.eval_shape(made.init, jax.random.key(0)))
  projected = 4 * (2 * embed * cells + cells) + cells * embed
  assert round((found + 4 * projected) / 1e6, 1) == published
  if highways == 2:
    banks = 32 * 17 + 32 * 33 + 64 * 49 + 128 * 65 + 256 * 81 + 512 * 97 + 1024 * 113
    assert found == 262 * 16 + banks + 2 * 2 * 2048 * 2049 + 2049 * 512 == 18_037_856


def test_flops_of_characters_are_what_xla_counts():
  module = spelt(20, filters=((1, 64), (4, 192)))()
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  params = jax.eval_shape(
    causal(embed=128, embedding=spelt(20, **dict(filters=module.filters))).init, jax.random.key(0)
  )
  run = lambda params, ids: module.apply(dict(params=params), ids, 0, 128, jnp.float32)
  xla = jax.jit(run).lower(params['embedding'], ids).cost_analysis()['flops']
  assert 8 * module.flops(128) <= xla <= 1.05 * 8 * module.flops(128)


def test_elmo_of_characters_knows_every_word():
  """A word of no vocabulary has vectors of its own and moves those around it; what is trained reads ids."""
  model = elmo.make(causal(vocab=KNOWN.size, embedding=spelt(7, **SMALL)))
  shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(3)
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 2, shapes)
  spelling = KNOWN.spelling(7)[np.concatenate([IDS, IDS])]
  spelling[0, 2] = words.spelled(['phloem'], 7)[0]
  told = dict(inputs=spelling, segments=np.concatenate([REAL, REAL]))
  found = jax.jit(functools.partial(elmo.layers, model))(params, told)
  moved = np.abs(found[:, :2] - found[:, 2:]).max(-1)
  assert (moved[1:, 0] > 1e-6).any(0).all() and moved[0, 0, 2] > 1e-4
  assert not moved[0, 0, [0, 1, 3, 4]].any() and not moved[:, 1].any()
  batch = dict(inputs=IDS, targets=IDS, weights=REAL.astype(np.float32), segments=REAL)
  loss = lambda params: language.both_ways(model, params, batch, None, chunk=None).sum
  assert jax.eval_shape(jax.grad(loss), shapes) == shapes


def test_no_head_is_tied_to_characters():
  with pytest.raises(UserError, match='use heads.Untied'):
    causal(vocab=KNOWN.size, embedding=spelt(7, **SMALL), head=heads.Tied)
