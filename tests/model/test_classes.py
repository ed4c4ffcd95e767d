"""The encoder alone, the class of a text, and which parameters the three ways of adapting a model train."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.model import (
  attention,
  block,
  classes,
  count,
  ffn,
  heads,
  norms,
  stack,
  transformer,
)
from llm_jax.train import state

P = functools.partial
NORM = P(norms.LayerNorm, eps=1e-12)


def bert(embed=16, hidden=24, vocab=40, length=12, **kw):
  mixer = P(attention.SelfAttention, heads=4, bias=True, rotate=None)
  layer = P(
    block.decoder,
    mixer=mixer,
    ffn=P(ffn.MLP, hidden=hidden, bias=True),
    norm=NORM,
    residual=norms.post,
  )
  ends = dict(stem=P(heads.Stem, norm=NORM, types=2), head=P(heads.Masked, norm=NORM), norm=None)
  return transformer.encoder(
    vocab=vocab, embed=embed, layers=2, block=layer, length=length, **ends, **kw
  )


def test_an_encoder_sees_all_of_its_segment_and_nothing_else(tiny, ids):
  model = bert()
  f, params = tiny.forward(model), tiny.large(model)
  n, types = 5, jnp.array([[0, 0, 1, 1, 1]] * 3)
  alone = f(params, dict(inputs=ids[:, :n], types=types))
  rest = tiny.LENGTH - n
  packed = dict(
    inputs=ids,
    types=jnp.pad(types, ((0, 0), (0, rest))),
    segments=jnp.array([[1] * n + [2] * (rest - 2) + [0] * 2] * 3),
    positions=jnp.array([[*range(n), *range(rest)]] * 3),
  )
  np.testing.assert_allclose(f(params, packed)[:, :n], alone, atol=2e-5)
  for t in range(n):  # every position moves with every other
    other = f(params, dict(inputs=ids[:, :n].at[:, t].add(1) % 40, types=types))
    assert (np.abs(other - alone).max(-1) > 1e-5).all()
  assert (np.abs(f(params, dict(inputs=ids[:, :n])) - alone).max(-1) > 1e-5).all()  # without types
  with pytest.raises(UserError, match='keeps no states'):
    model.states(params, dict(inputs=ids), 8)
  with pytest.raises(UserError, match='keeps no states'):
    model.hidden(params, dict(inputs=ids), states={})


def test_flops_of_an_encoder_are_what_xla_counts():
  model, length = bert(512, 1024, 256, 128, runner=stack.loop), 128
  assert count.total(model.card) == tree.count(jax.eval_shape(model.init, jax.random.key(0)))
  params = jax.eval_shape(model.init, jax.random.key(0))
  batch = dict(inputs=jax.ShapeDtypeStruct((1, length), jnp.int32))
  forward = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch).x))
  xla = forward.lower(params, batch).cost_analysis()['flops']
  ours = sum(count.forward_flops(model.card, length).values())
  assert ours <= xla <= 1.03 * ours


def test_the_class_is_read_where_it_stands():
  """numpy in 64 bits, with and without the pooler, which is BERT's (tests/interop has that of transformers)."""
  model = classes.head(classes.pooled(bert()), count=3)
  shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
  draw = lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32)
  params = {n: jax.tree.map(draw, shapes[n]) for n in ('pooler', 'classes')}
  x, at = rng.normal(size=(2, 5, 16)), np.array([3, 0])
  p, c = (
    jax.tree.map(lambda a: np.asarray(a, np.float64), params[n]) for n in ('pooler', 'classes')
  )
  first = x[[0, 1], at]
  wanted = np.tanh(first @ p['w'] + p['bias']) @ c['w'] + c['bias']
  read = lambda params: classes.read(params, jnp.asarray(x, jnp.float32), jnp.asarray(at))
  np.testing.assert_allclose(read(params), wanted, atol=1e-5)
  bare = {n: v for n, v in params.items() if n != 'pooler'}
  np.testing.assert_allclose(read(bare), first @ c['w'] + c['bias'], atol=1e-5)


WAYS = dict(
  features=(classes.FEATURES, {'classes/w', 'classes/bias'}),
  output=(
    classes.OUTPUT,
    {'classes/w', 'classes/bias', 'pooler/w', 'pooler/bias', 'decoder/norm/scale'},
  ),
  everything=(classes.EVERYTHING, None),
)


@pytest.mark.parametrize('way', WAYS)
def test_three_ways_train_exactly_their_parameters(tiny, way):
  """What `train/state.py` gives an optimizer state to."""
  model = classes.head(classes.pooled(tiny.causal()), count=3)
  params = jax.eval_shape(model.init, jax.random.key(0))
  pattern, wanted = WAYS[way]
  found = set(tree.flatten(state.trained(params, pattern)))
  assert found == (set(tree.flatten(params)) if wanted is None else wanted)
  if wanted is not None:  # of an encoder too, which has another final norm or none
    encoder = jax.eval_shape(classes.head(classes.pooled(bert()), count=3).init, jax.random.key(0))
    left = {re.sub('^encoder', 'decoder', p) for p in tree.flatten(state.trained(encoder, pattern))}
    assert left == wanted - {'decoder/norm/scale'}
