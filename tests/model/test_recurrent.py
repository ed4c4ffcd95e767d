"""Every recurrent mixer: the paper's recurrence step by step in float64, then what holds for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, tree
from llm_jax.decode import generate
from llm_jax.model import attention, block, ffn, stack, transformer
from llm_jax.model.attention import Context
from llm_jax.model.masks import Mask
from llm_jax.model.recurrent import gss, h3, hyena, mamba, mamba2, retnet, rwkv, s4, ssm
from llm_jax.objectives import language
from tests.model import recurrences

VOCAB, EMBED, LENGTH = 40, 16, 13
partial = functools.partial

# small chunks, which do not divide the length
MIXERS = dict(
  mamba=partial(mamba.Mamba, state=4, rank=3, chunk=4, bias=True),
  mamba2=partial(mamba2.Mamba2, head_dim=8, state=4, groups=2, chunk=4, bias=True),
  rwkv=partial(rwkv.TimeMix, chunk=4),
  rwkv_channel=partial(rwkv.ChannelMix, hidden=24),
  retention=partial(retnet.Retention, heads=2, chunk=4),
  s4=partial(s4.S4, pairs=3),
  s4_bilinear=partial(s4.S4, pairs=3, rates=ssm.inverse, rule=ssm.bilinear),
  h3=partial(h3.H3, pairs=3),
  gss=partial(gss.GatedStateSpace, hidden=24, narrow=8, pairs=3),
  hyena=partial(hyena.Hyena, length=16, width=8, bands=2),
)
EVERY = pytest.mark.parametrize('name', MIXERS)


@functools.cache
def model_of(name, **kw):
  """Two blocks of the mixer, or of the mixers of a pattern."""
  feed = partial(ffn.Gated, hidden=24)
  if name == 'hybrid':
    attend = partial(attention.SelfAttention, heads=2)
    one = partial(block.mixers, mixer=MIXERS['mamba'])
    pattern, layers = (one, one, partial(block.decoder, mixer=attend, ffn=feed)), 3
  elif name == 'rwkv':
    pattern = partial(block.mixers, mixer=MIXERS[name], channel=MIXERS['rwkv_channel'])
    layers = 2
  elif name in ('mamba', 'mamba2', 'rwkv_channel'):
    pattern, layers = partial(block.mixers, mixer=MIXERS[name]), 2
  else:
    pattern, layers = partial(block.decoder, mixer=MIXERS[name], ffn=feed), 2
  return transformer.causal(vocab=VOCAB, embed=EMBED, layers=layers, block=pattern, **kw)


@functools.cache
def weights_of(name):
  """Parameters strong enough that a leak would show."""
  params = model_of(name).init(jax.random.key(1))
  strong = lambda x: x if x.std() > 0.1 or x.std() == 0 else x * (0.3 / x.std())
  return jax.tree.map(strong, params)


@functools.cache
def _forward(name, **kw):
  model = model_of(name, **kw)
  return jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))


def forward(name, batch, **kw):
  return _forward(name, **kw)(weights_of(name), batch)


@pytest.fixture(scope='module')
def ids():
  return jnp.asarray(np.random.default_rng(3).integers(2, VOCAB, (2, LENGTH)), jnp.int32)


@functools.cache
def alone(name):
  """(the mixer, its parameters, an input [2, LENGTH, EMBED], what it makes of it)."""
  mixer = MIXERS[name]()
  x = jnp.asarray(np.random.default_rng(5).normal(size=(2, LENGTH, EMBED)), jnp.float32)
  ctx = Context(Mask(True), jnp.arange(LENGTH)[None])
  declared = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, ctx)['params'])
  key = jax.random.key(7)
  params = {
    n: 0.4 * jax.random.normal(jax.random.fold_in(key, i), box.value.shape)
    for i, (n, box) in enumerate(sorted(declared.items()))
  }
  run = jax.jit(lambda p, x: mixer.apply(dict(params=p), x, ctx)[0])
  return mixer, params, x, run


@EVERY
def test_the_recurrence_of_the_paper_step_by_step(name):
  mixer, params, x, run = alone(name)
  wide = {n: np.asarray(p, np.float64) for n, p in params.items()}
  wanted = [getattr(recurrences, name)(mixer, wide, np.asarray(row, np.float64)) for row in x]
  np.testing.assert_allclose(run(params, x), wanted, rtol=2e-4, atol=2e-5)


@EVERY
def test_no_output_sees_a_later_token(name, ids):
  changed = ids.at[:, 7].set(ids[:, 7] % (VOCAB - 2) + 1)
  a, b = forward(name, dict(inputs=ids)), forward(name, dict(inputs=changed))
  np.testing.assert_allclose(a[:, :7], b[:, :7], atol=1e-6)
  reach = 9 if name == 'rwkv_channel' else LENGTH  # it looks one token back, twice
  assert np.abs(a[:, 7:reach] - b[:, 7:reach]).max(axis=(0, 2)).min() > 1e-5


@functools.cache
def _step(name):
  model = model_of(name)
  return jax.jit(lambda p, b, s: model.hidden(p, b, states=s))


@pytest.mark.parametrize('name', [*MIXERS, 'hybrid'])
@pytest.mark.parametrize('first', [1, 6])
def test_a_state_is_the_whole_sequence(name, first, ids):
  """Token by token, and a prefill of several tokens first."""
  model, params, found = model_of(name), weights_of(name), []
  states, at = model.states(params, dict(inputs=ids), LENGTH), 0
  for n in (first, *(1,) * 4, LENGTH - first - 4):
    positions = jnp.broadcast_to(jnp.arange(at, at + n), (2, n))
    out = _step(name)(params, dict(inputs=ids[:, at : at + n], positions=positions), states)
    states, at = out.states, at + n
    found.append(model.logits(params, out.x))
  np.testing.assert_allclose(
    jnp.concatenate(found, 1), forward(name, dict(inputs=ids)), atol=1e-4
  )


@pytest.mark.parametrize('name', [*MIXERS, 'hybrid'])
def test_packed_is_separate_and_padded_is_unpadded(name, ids):
  cuts = (0, 1, 4, 11)  # a document of one token, one within a chunk, one over several; the rest is padding
  segments, places = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
  for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
    segments[:, start:stop], places[:, start:stop] = i + 1, np.arange(stop - start)
  batch = dict(inputs=ids, segments=jnp.asarray(segments), positions=jnp.asarray(places))
  packed = forward(name, batch)
  for start, stop in zip(cuts, cuts[1:], strict=False):
    separate = forward(name, dict(inputs=ids[:, start:stop]))
    np.testing.assert_allclose(packed[:, start:stop], separate, atol=1e-4)


@pytest.mark.parametrize('name', [*MIXERS, 'hybrid'])
def test_prompts_of_unequal_length_are_continued_as_if_alone(name, ids):
  model, params = model_of(name), weights_of(name)
  prompts, lengths = np.asarray(ids[:, :8]), np.array([3, 8])
  settings = dict(max_new=4, temperature=0.0, eos=None)
  both = generate.generate(model, params, prompts, lengths, jax.random.key(0), **settings)
  for row, n in enumerate(lengths):
    one = prompts[row : row + 1, :n]
    alone = generate.generate(model, params, one, [n], jax.random.key(0), **settings)
    np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
    np.testing.assert_allclose(both.logp[row], alone.logp[0], atol=1e-4)


@EVERY
def test_bfloat16_is_close(name, ids):
  whole = forward(name, dict(inputs=ids))
  half = forward(name, dict(inputs=ids), dtype='bfloat16')
  assert np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


@EVERY
def test_runners_and_gradients(name, ids):
  """Scan is the loop, and no gradient is lost or infinite, with packed documents too."""
  segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], [2, 5, 4, 2], axis=1), jnp.int32)
  batch = dict(inputs=ids, targets=ids, segments=jnp.broadcast_to(segments, ids.shape))
  grads = []
  for runner in (stack.scan, stack.loop):
    model = model_of(name, runner=runner)

    def loss(params, model=model):
      out = language.next_token(model, params, batch, None)
      return out.sum / out.weight

    grads.append(tree.flatten(jax.jit(jax.grad(loss))(weights_of(name))))
  for path, g in grads[0].items():
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path
    np.testing.assert_allclose(g, grads[1][path], atol=1e-5, err_msg=path)


@EVERY
def test_split_over_a_mesh(name, ids):
  """tensor=2 x fsdp=2 computes what one device does; every weight has names that the rules know."""
  model, params = model_of(name), weights_of(name)
  with jax.set_mesh(mesh.make(data=1, fsdp=2, tensor=2)), mesh.rules(**mesh.ZERO3):
    placed = jax.device_put(params, mesh.shardings(model.axes, params))
    found = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))(placed, dict(inputs=ids))
    split = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
  assert len(split) >= 4
  np.testing.assert_allclose(found, forward(name, dict(inputs=ids)), atol=1e-4)
