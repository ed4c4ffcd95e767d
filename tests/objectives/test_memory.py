"""Segments with a memory: the same as the long forward, but nothing is learnt through the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, heads, positions, transformer
from llm_jax.objectives import language

P = functools.partial
MEMORY, LENGTH, VOCAB = 6, 10, 24


@functools.cache
def made():
  """(Transformer-XL with an untied head, its parameters, rows whose memory has words of its own)."""
  mixer = P(attention.SelfAttention, heads=2, rotate=None, relative=positions.TransformerXL)
  layer = P(block.decoder, mixer=mixer, ffn=P(ffn.Gated, hidden=16))
  model = transformer.causal(vocab=VOCAB, embed=8, layers=2, block=layer, head=heads.Untied)
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32)
  params = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))
  ids = np.concatenate(
    [rng.integers(12, 24, (2, MEMORY)), rng.integers(0, 12, (2, LENGTH + 1 - MEMORY))], 1
  )
  batch = dict(inputs=ids[:, :-1], targets=ids[:, 1:], weights=rng.random((2, LENGTH)))
  return (
    model,
    params,
    {k: jnp.asarray(v, jnp.float32 if k == 'weights' else jnp.int32) for k, v in batch.items()},
  )


@functools.cache
def gradient():
  """(loss, its gradient) with the memory."""
  model, params, batch = made()
  loss = lambda p: language.with_memory(model, p, batch, None, memory=MEMORY, chunk=None).sum
  found, by = jax.jit(jax.value_and_grad(loss))(params)
  return float(found), by


def test_a_segment_with_its_memory_is_the_end_of_the_long_forward():
  model, params, batch = made()
  late = dict(batch, weights=batch['weights'] * (np.arange(LENGTH) >= MEMORY))
  whole = jax.jit(lambda p: language.next_token(model, p, late, None, chunk=None))(params)
  np.testing.assert_allclose(gradient()[0], whole.sum, rtol=1e-5)
  short = {k: v[:, MEMORY:] for k, v in batch.items()}  # the memory is looked at
  alone = jax.jit(lambda p: language.next_token(model, p, short, None, chunk=None))(params)
  assert abs(gradient()[0] - float(alone.sum)) > 1e-2


def test_nothing_is_learnt_through_the_memory():
  """Words of the memory alone get no gradient; that of the rest is the slope of the loss while the memory stays."""
  model, params, batch = made()
  by = gradient()[1]
  table = np.asarray(by['embedding']['table'])
  assert not table[12:].any() and np.abs(table[:12]).max() > 1e-3
  at = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))
  before = dict(inputs=batch['inputs'][:, :MEMORY], positions=at[:, :MEMORY])
  states = model.hidden(params, before, states=model.states(params, before, LENGTH)).states
  now = dict(inputs=batch['inputs'][:, MEMORY:], positions=at[:, MEMORY:])
  rng = np.random.default_rng(5)
  way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)

  @jax.jit
  def loss(step):
    moved = jax.tree.map(lambda p, w: p + step * w, params, way)
    logp = jax.nn.log_softmax(model.logits(moved, model.hidden(moved, now, states=states).x))
    own = jnp.take_along_axis(logp, batch['targets'][:, MEMORY:, None], -1)[..., 0]
    return -(own * batch['weights'][:, MEMORY:]).sum()

  slope = (float(loss(2e-3)) - float(loss(-2e-3))) / 4e-3
  along = sum(
    float((g * w).sum()) for g, w in zip(jax.tree.leaves(by), jax.tree.leaves(way), strict=True)
  )
  np.testing.assert_allclose(slope, along, rtol=2e-2)
  assert set(tree.flatten(by)) == set(tree.flatten(params))


def test_rows_without_room_or_with_several_documents():
  model, params, batch = made()
  for told, memory in ((batch, LENGTH), (dict(batch, segments=batch['inputs']), MEMORY)):
    with pytest.raises(UserError, match='memory='):
      language.with_memory(model, params, told, None, memory=memory)
