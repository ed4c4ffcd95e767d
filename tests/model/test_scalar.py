"""The scalar head: the language model is untouched, the number is the dot product, only its own texts move it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.model import attention, block, ffn, scalar, transformer


def make():
  layer = partial(
    block.decoder,
    mixer=partial(attention.SelfAttention, heads=2),
    ffn=partial(ffn.Gated, hidden=16),
  )
  return transformer.causal(vocab=32, embed=16, layers=2, block=layer)


def test_the_language_model_is_the_one_it_was():
  plain = make()
  model = scalar.head(plain)
  params, before = model.init(jax.random.key(0)), plain.init(jax.random.key(0))
  assert tree.count(params) == tree.count(before) + 17
  batch = dict(inputs=jnp.arange(16).reshape(2, 8))
  x = model.hidden(params, batch).x
  np.testing.assert_array_equal(x, plain.hidden(before, batch).x)
  np.testing.assert_array_equal(model.logits(params, x), plain.logits(before, x))
  assert jax.tree.structure(
    model.axes, is_leaf=lambda a: isinstance(a, tuple)
  ) == jax.tree.structure(params)


def test_the_number_is_a_dot_product_and_begins_at_unit_scale():
  model = scalar.make(model=make)
  params = model.init(jax.random.key(1))
  params['scalar']['bias'] += 0.5
  x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
  expected = x @ np.asarray(params['scalar']['w']) + 0.5
  np.testing.assert_allclose(scalar.read(params, x), expected, rtol=1e-5, atol=1e-6)
  many = [scalar.head(make()).init(jax.random.key(i))['scalar']['w'] for i in range(40)]
  assert abs(np.var(np.stack(many)) * 17 - 1) < 0.2  # 640 draws: 3.6 standard errors
