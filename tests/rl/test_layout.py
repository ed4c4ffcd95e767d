"""Rows and answers behind shared prompts: shapes by hand, and that either way the same is learned."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, scalar, transformer
from llm_jax.model.recurrent import mamba
from llm_jax.objectives import policy, sequence
from llm_jax.optim import chain, rules
from llm_jax.rl import layout
from llm_jax.train import state, step
from tests.variants import variants


def test_lengths():
  assert [layout.width(n, 100, 4) for n in (0, 1, 25, 26, 75, 76, 100)] == [
    25,
    25,
    25,
    50,
    75,
    100,
    100,
  ]
  assert [layout.width(n, 40, 4) for n in (1, 16, 17, 33)] == [16, 16, 32, 40]
  assert layout.width(3, 9, 4) == 9 and layout.width(3, 100, 1) == 100


def rows(group=2, start=0, seed=0, prompts=(3, 1, 5), most=4):
  """Answers of unequal lengths to prompts of unequal lengths."""
  rng = np.random.default_rng(seed)
  n, width = len(prompts) * group, max(prompts)
  ids = np.zeros((len(prompts), width), np.int32)
  for row, size in zip(ids, prompts, strict=True):
    row[:size] = rng.integers(3, 16, size)
  tokens = rng.integers(3, 16, (n, most)).astype(np.int32)
  ends = rng.integers(1, most + 1, n)
  ends[-1] = most
  told = np.repeat(ids, group, 0), np.repeat(np.array(prompts), group), tokens, ends
  made = layout.lay(model('attention')[0], *told, start)
  weights = made['weights']
  noise = lambda *shape: rng.normal(size=shape).astype(np.float32)
  made |= {name: noise(*weights.shape) * weights for name in ('advantages', 'old_logp', 'ref_logp')}
  made |= dict(reward=noise(n), fresh=np.zeros(n, np.float32))
  return made | dict(index=np.repeat(np.arange(len(prompts)), group).astype(np.int32))


MIXERS = dict(
  attention=partial(attention.SelfAttention, heads=2),
  window=partial(attention.SelfAttention, heads=2, window=3),
  mamba=partial(mamba.Mamba, state=4),
)


@functools.cache
def model(mixer):
  layer = partial(block.decoder, mixer=MIXERS[mixer], ffn=partial(ffn.Gated, hidden=24))
  made = scalar.head(transformer.causal(vocab=16, embed=16, layers=2, block=layer))
  params = made.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  return made, jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def test_answers_lie_behind_their_prompts():
  made = rows()
  shape = layout.shape(made, 2, 8, 8, 4)
  assert shape == (2, 8, 8)  # no two lengths are less than 16 apart
  found = layout.shared().cut(made, layout.Shape(2, 6, 4))
  np.testing.assert_array_equal(found['prompt/segments'].sum(1), [3, 1, 5])
  for i in range(6):
    own, size = made['weights'][i] > 0, int(made['weights'][i].sum())
    for name in ('inputs', 'targets', 'positions', 'advantages', 'old_logp', 'segments'):
      np.testing.assert_array_equal(found[name][i, :size], made[name][i, own], err_msg=name)
    np.testing.assert_array_equal(found['weights'][i], np.arange(4) < size)
    before = found['prompt/inputs'][i // 2][found['prompt/segments'][i // 2] > 0]
    np.testing.assert_array_equal(before, made['inputs'][i, : int(np.argmax(own))])
  np.testing.assert_array_equal(layout.shared().back(found['advantages'], made), made['advantages'])


@pytest.mark.parametrize(
  ('mixer', 'start'), variants(itertools.product(MIXERS, (0, None)), [('attention', None)])
)
def test_the_same_is_learned_from_both(mixer, start):
  """Log-probabilities, loss, metrics and gradients of GRPO, and the critic's values: against rows read whole."""
  (made, params), batch = model(mixer), rows(group=3, start=start)
  cut = layout.shared().cut(batch, layout.Shape(3, 7, 5))

  @jax.jit
  def found(params, batch):
    told = sequence.tokens(made, params, batch)
    loss = lambda p: (lambda out: (out.sum, out))(policy.grpo(made, p, batch, None, beta=0.1))
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return (told.logp, told.entropy, policy.value_head(made, params, batch, told.x)), out, grads

  (each, out, grads), (other, loss, gradient) = found(params, batch), found(params, cut)
  for a, b in zip(each, other, strict=True):
    back = layout.shared().back(np.asarray(b), batch)
    np.testing.assert_allclose(back * batch['weights'], a * batch['weights'], atol=2e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), loss, out)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradient, grads)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) > 0.1


def test_microbatches_keep_groups_together():
  """Two microbatches are the whole batch: same loss, same parameters after an update; three of four groups are not."""
  made, params = model('attention')
  batch = layout.shared().cut(rows(group=3, prompts=(3, 1, 5, 2)), layout.Shape(3, 7, 5))
  tx = chain.make(made.axes, schedule=lambda step: 0.1, rule=rules.sgd)

  def updated(parts):
    copy = jax.tree.map(jnp.array, params)  # an update reuses its own
    first = state.State(jnp.zeros((), jnp.int32), copy, tx.init(copy))
    update = step.make(partial(policy.grpo, made), tx, microbatches=parts)
    last, metrics = update(first, batch, jax.random.key(0))
    return last.params, metrics

  (whole, told), (parts, metrics) = updated(1), updated(2)
  close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, parts, whole)
  close(metrics['loss'], told['loss'])
  with pytest.raises(UserError, match='do not divide into 3 microbatches'):
    updated(3)


def test_rows_of_another_length():
  made = rows()
  length = made['inputs'].shape[1]
  longer = layout.fit(made, length + 3)
  assert longer['positions'][0].tolist() == list(range(length + 3))
  assert not longer['segments'][:, length:].any() and longer['reward'] is made['reward']
  for name, x in layout.fit(longer, length).items():
    np.testing.assert_array_equal(x, made[name], err_msg=name)
  assert layout.used(made) == layout.used(longer) <= length


def test_what_cannot_share_a_prompt_is_refused():
  made, shape = rows(), layout.Shape(2, 6, 4)
  part = {name: x[1:5] for name, x in made.items()}
  with pytest.raises(UserError, match='needs the answers of a group side by side'):
    layout.shared().cut(part, shape)
  with pytest.raises(UserError, match='for causal decoders'):
    layout.shared().cut(dict(made, prefix=made['weights'] > 0), shape)
