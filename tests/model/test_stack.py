"""Runners, patterns, segments and remat: one function, however it is executed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.model import depth, dropout, ffn, norms, stack, transformer

P = functools.partial


def value_and_grad(model, params, batch, rng=None):
  def loss(params):
    x, _, _ = model.hidden(params, batch, rng=rng)
    return jnp.sin(model.logits(params, x)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


def same(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


@pytest.fixture(scope='module')
def plain(tiny, ids):
  """What `scan` without remat computes, with dropout on."""
  model = tiny.causal(blocks=dict(dropout=0.2))
  return value_and_grad(model, tiny.large(model), dict(inputs=ids), jax.random.key(3))


@pytest.mark.parametrize('runner', [stack.scan, stack.loop])
@pytest.mark.parametrize('remat', ['none', 'full', 'dots', 'names'])
def test_runners_and_remat_policies_agree(tiny, ids, plain, runner, remat):
  model = tiny.causal(blocks=dict(dropout=0.2), runner=P(runner, remat=remat))
  got = value_and_grad(model, tiny.large(model), dict(inputs=ids), jax.random.key(3))
  same(got, plain)


@pytest.mark.parametrize('runner', [stack.scan, stack.loop])
def test_patterns_and_segments_are_layers_in_order(tiny, ids, runner):
  thin, wide = tiny.block(), tiny.block(feed=P(ffn.MLP, hidden=8))
  make = P(transformer.causal, vocab=tiny.VOCAB, embed=tiny.EMBED, runner=runner)
  pattern = make(layers=4, block=(thin, wide))
  parts = make(layers=(1, 1, 1, 1), block=(thin, wide, thin, wide))
  params = tiny.large(pattern)
  blocks = params['decoder']['layers']
  assert blocks['block_0']['mixer']['query'].shape[0] == 2
  pick = lambda i: {'block_0': jax.tree.map(lambda x: x[i // 2][None], blocks[f'block_{i % 2}'])}
  split = {'layers': pick(0), **{f'layers_{i}': pick(i) for i in (1, 2, 3)}}
  split = {**params, 'decoder': {**split, 'norm': params['decoder']['norm']}}
  a = tiny.forward(pattern)(params, dict(inputs=ids))
  np.testing.assert_allclose(a, tiny.forward(parts)(split, dict(inputs=ids)), atol=1e-5)


@pytest.mark.parametrize('runner', [stack.scan, stack.loop])
def test_a_mixed_stack_decodes(tiny, ids, runner):
  mixed = (tiny.block(), (tiny.block(dict(groups=2)), tiny.block(dict(groups=1))))
  model = transformer.causal(
    vocab=tiny.VOCAB, embed=tiny.EMBED, layers=(1, 4), block=mixed, runner=runner
  )
  params = tiny.large(model)
  states = jax.jit(lambda: model.states(params, dict(inputs=ids), tiny.LENGTH))()
  rows = jnp.broadcast_to(jnp.arange(tiny.LENGTH), ids.shape)
  told = dict(inputs=ids, positions=rows)
  x, after, _ = jax.jit(lambda s: model.hidden(params, told, states=s))(states)
  want = tiny.forward(model)(params, dict(inputs=ids))
  np.testing.assert_allclose(x @ params['embedding']['table'].T, want, atol=1e-5)
  assert jax.tree.structure(after) == jax.tree.structure(states)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), after, states)
  assert after['layers_1']['block_1']['mixer']['k'].shape == (2, 3, 1, tiny.LENGTH, 4)


def test_the_scanned_program_does_not_grow_with_depth(tiny, ids):
  def size(layers):
    model = tiny.causal(layers=layers)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    grad = jax.grad(lambda p: model.hidden(p, dict(inputs=ids)).x.sum())
    return len(jax.jit(grad).lower(shapes).as_text().splitlines())

  assert size(4) == size(16)


def test_the_loop_adds_up_no_padded_gradients(tiny, ids):
  """Slicing a stacked weight L times would give L gradients of L layers each; here they are stacked once."""

  def made(layers):
    """How many values of the stacked weights' shape the backward pass makes."""
    model = tiny.causal(layers=layers, runner=stack.loop)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    grad = jax.grad(lambda p: model.hidden(p, dict(inputs=ids)).x.sum())
    lines = jax.jit(grad).lower(shapes).as_text().splitlines()
    return sum(line.endswith(f'tensor<{layers}x16x24xf32>') for line in lines)

  assert made(3) == made(7)


def test_each_layer_has_its_own_dropout_key(tiny, ids):
  """An entry passes a layer unchanged where both sublayers drop it: a quarter, and not the same quarter twice."""

  @jax.jit
  def streams():
    seen = []

    def record(apply, params, x, states, repeats):
      for i in range(repeats):
        seen.append(x)
        x, _, _ = apply(jax.tree.map(lambda p: p[0], params), x, None, i)
      seen.append(x)
      return x, None, {}

    model = tiny.causal(blocks=dict(dropout=0.5), runner=record)
    model.hidden(tiny.large(model), dict(inputs=ids), rng=jax.random.key(0))
    return seen

  x, y, z = map(np.asarray, streams())
  first, second = x == y, y == z
  sigma = (0.25 * 0.75 / x.size) ** 0.5
  for share, expected in ((first, 1 / 4), (second, 1 / 4), (first & second, 1 / 16)):
    assert abs(share.mean() - expected) < 4 * sigma


def test_a_ramp_drops_more_in_higher_layers(tiny, ids):
  """As much as it should: an entry passes a layer unchanged where both sublayers drop it, rate squared."""
  rates = (0.0, 0.3, 0.6)
  model = tiny.causal(layers=3, blocks=dict(dropout=P(dropout.ramp, top=0.6)), norm=None)
  around, batch = depth.exits((0, 1, 2, 3)), dict(inputs=jnp.tile(ids, (8, 1)))
  hidden = jax.jit(
    lambda params, rng: model.hidden(params, batch, rng=rng, around=around).aux['around']
  )
  x = np.asarray(hidden(tiny.large(model), jax.random.key(1)))
  for below, above, rate in zip(x, x[1:], rates):
    share, sigma = rate**2, (rate**2 * (1 - rate**2) / x[0].size) ** 0.5
    assert abs((below == above).mean() - share) <= 4 * sigma


def test_topologies_in_a_block(tiny, ids):
  """post and parallel blocks written out with the block's own parts."""
  for residual in (norms.pre, norms.post, norms.sandwich, norms.parallel):
    model = tiny.causal(blocks=dict(residual=residual), layers=1, norm=None)
    params = tiny.large(model)
    names = {n.split('/')[3] for n in tree.flatten(params) if 'norm' in n}
    want = dict(
      pre={'mixer_norm', 'ffn_norm'},
      post={'mixer_norm', 'ffn_norm'},
      sandwich={'mixer_norm', 'mixer_out_norm', 'ffn_norm', 'ffn_out_norm'},
      parallel={'norm'},
    )
    assert names == want[residual.__name__]
    assert np.isfinite(tiny.forward(model)(params, dict(inputs=ids))).all()


def test_wrong_stacks_name_the_remedy(tiny):
  with pytest.raises(UserError, match='pattern of 2'):
    stack.segments(3, (tiny.block(), tiny.block()))
  with pytest.raises(UserError, match='2 segments'):
    stack.segments((1, 2), tiny.block())
  with pytest.raises(UserError, match="did you mean 'full'"):
    stack.scan(None, {}, None, None, 1, remat='ful')


def test_an_unknown_axis_name_is_an_error():
  with pytest.raises(KeyError, match='embed'):
    mesh.spec('embd', 'heads')
