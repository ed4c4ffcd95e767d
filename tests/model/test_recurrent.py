"""Every recurrent mixer: the paper's recurrence step by step in float64, then what holds for all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, tree
from llm_jax.decode import generate
from llm_jax.model import attention, block, ffn, heads, init, norms, stack, transformer
from llm_jax.model.attention import Context
from llm_jax.model.masks import Mask
from llm_jax.model.recurrent import (
  convolution,
  dplr,
  gss,
  h3,
  hyena,
  lstm,
  mamba,
  mamba2,
  nplm,
  retnet,
  rwkv,
  s4,
  scan,
  ssm,
)
from llm_jax.objectives import language
from tests.model import recurrences
from tests.variants import variants

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
  s4d=partial(s4.S4D, pairs=3),
  s4d_bilinear=partial(s4.S4D, pairs=3, rates=ssm.inverse, rule=ssm.bilinear),
  h3=partial(h3.H3, pairs=3),
  gss=partial(gss.GatedStateSpace, hidden=24, narrow=8, pairs=3),
  hyena=partial(hyena.Hyena, length=16, width=8, bands=2),
  lstm=partial(lstm.LSTM, hidden=24),
  nplm=partial(nplm.NPLM, window=3, hidden=24),
)
NAMES = [name for name in MIXERS if name != 's4d_bilinear']
# what the others share with these is tested on these
MOST = [name for name in NAMES if name not in ('lstm', 'nplm')]
BLOCKS = [*NAMES, 'hybrid']


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
  elif name in ('lstm', 'nplm'):
    pattern, layers = partial(block.mixers, mixer=MIXERS[name], residual=norms.plain), 2
    kw = dict(norm=None, head=partial(heads.Untied, bias=True), init=init.palm) | kw
  elif name in ('mamba', 'mamba2', 'rwkv_channel'):
    pattern, layers = partial(block.mixers, mixer=MIXERS[name]), 2
  else:
    pattern, layers = partial(block.decoder, mixer=MIXERS[name], ffn=feed), 2
  return transformer.causal(vocab=VOCAB, embed=EMBED, layers=layers, block=pattern, **kw)


@functools.cache
def weights_of(name):
  """Parameters strong enough that a leak would show."""
  params = model_of(name).init(jax.random.key(1))
  strong = lambda x: x * (0.3 / x.std()) if 1e-3 < x.std() < 0.1 else x
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


@pytest.mark.parametrize('name', MIXERS)
def test_the_recurrence_of_the_paper_step_by_step(name):
  mixer, params, x, run = alone(name)
  wide = {n: np.asarray(p, np.float64) for n, p in params.items()}
  wanted = [getattr(recurrences, name)(mixer, wide, np.asarray(row, np.float64)) for row in x]
  np.testing.assert_allclose(run(params, x), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', variants(NAMES, MOST))
def test_no_output_sees_a_later_token(name, ids):
  changed = ids.at[:, 7].set(ids[:, 7] % (VOCAB - 2) + 1)
  a, b = forward(name, dict(inputs=ids)), forward(name, dict(inputs=changed))
  np.testing.assert_allclose(a[:, :7], b[:, :7], atol=1e-5)  # the FFT rounds
  back = dict(rwkv_channel=1, nplm=2).get(name, LENGTH)  # these look so many tokens back, twice
  reach = min(7 + 2 * back, LENGTH)
  assert np.abs(a[:, 7:reach] - b[:, 7:reach]).max(axis=(0, 2)).min() > 1e-4


@functools.cache
def _step(name):
  model = model_of(name)
  return jax.jit(lambda p, b, s: model.hidden(p, b, states=s))


@pytest.mark.parametrize('name', variants(BLOCKS, ['mamba', 'rwkv', 's4', 'hyena', 'lstm', 'nplm']))
def test_a_state_is_the_whole_sequence(name, ids):
  """A prefill, then token by token, then several at once."""
  model, params, found = model_of(name), weights_of(name), []
  states, at = model.states(params, dict(inputs=ids), LENGTH), 0
  for n in (6, 1, 1, 1, LENGTH - 9):
    positions = jnp.broadcast_to(jnp.arange(at, at + n), (2, n))
    out = _step(name)(params, dict(inputs=ids[:, at : at + n], positions=positions), states)
    states, at = out.states, at + n
    found.append(model.logits(params, out.x))
  np.testing.assert_allclose(jnp.concatenate(found, 1), forward(name, dict(inputs=ids)), atol=1e-4)


@pytest.mark.parametrize('name', variants(BLOCKS, ['mamba2', 'retention', 'h3', 'lstm', 'hybrid']))
def test_packed_is_separate_and_padded_is_unpadded(name, ids):
  cuts = (
    0,
    1,
    4,
    11,
  )  # a document of one token, one within a chunk, one over several; the rest is padding
  segments, places = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
  for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
    segments[:, start:stop], places[:, start:stop] = i + 1, np.arange(stop - start)
  batch = dict(inputs=ids, segments=jnp.asarray(segments), positions=jnp.asarray(places))
  packed = forward(name, batch)
  for start, stop in itertools.pairwise(cuts):
    separate = forward(name, dict(inputs=ids[:, start:stop]))
    np.testing.assert_allclose(packed[:, start:stop], separate, atol=1e-4)


@pytest.mark.parametrize('name', variants(BLOCKS, ['mamba2']))
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


@pytest.mark.parametrize('name', variants(NAMES, ['mamba', 'rwkv_channel', 'retention', 's4d']))
def test_bfloat16_is_close(name, ids):
  whole = forward(name, dict(inputs=ids))
  half = forward(name, dict(inputs=ids), dtype='bfloat16')
  assert np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


@pytest.mark.parametrize('name', variants(NAMES, ['rwkv']))
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


@pytest.mark.parametrize('name', variants(NAMES, ['mamba', 'mamba2', 'rwkv', 'hyena']))
def test_split_over_a_mesh(name, ids):
  """tensor=2 x fsdp=2 computes what one device does; every weight has names that the rules know."""
  model, params = model_of(name), weights_of(name)
  with jax.set_mesh(mesh.make(data=1, fsdp=2, tensor=2)), mesh.rules(**mesh.ZERO3):
    placed = jax.device_put(params, mesh.shardings(model.axes, params))
    found = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))(placed, dict(inputs=ids))
    split = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
  assert len(split) >= 4
  np.testing.assert_allclose(found, forward(name, dict(inputs=ids)), atol=1e-4)


@pytest.mark.parametrize('size', [1, 5, LENGTH])
def test_retention_is_the_same_recurrent_chunkwise_and_parallel(size):
  """Chunks of one token, of a few, of all: against eq. 6, with a state to begin with and two documents."""
  rng = np.random.default_rng(1)
  q, k = (rng.normal(size=(1, LENGTH, 2, 4)) for _ in range(2))
  v, decay = rng.normal(size=(1, LENGTH, 2, 1, 3)), -rng.random((1, LENGTH, 2, 1))
  first, s = np.arange(LENGTH)[None] == 7, rng.normal(size=(1, 2, 1, 4, 3))
  given = (jnp.asarray(x, jnp.float32) for x in (q, k, v, decay))
  found = scan.chunked(*given, jnp.asarray(first), jnp.asarray(s, jnp.float32), size=size)
  ys, s = [], s[0, :, 0]
  for t in range(LENGTH):
    s = (0 if first[0, t] else np.exp(decay[0, t])[..., None]) * s + k[0, t, :, :, None] * v[0, t]
    ys.append(np.einsum('hk,hkp->hp', q[0, t], s))
  np.testing.assert_allclose(found[0][0, :, :, 0], ys, atol=1e-5)
  np.testing.assert_allclose(found[1][0, :, 0], s, atol=1e-5)


def test_the_parallel_retention_is_equation_5():
  x = np.random.default_rng(2).normal(size=(3, LENGTH, 4))
  gamma = np.asarray(retnet.gammas(3), np.float64)
  np.testing.assert_allclose(gamma, [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
  i = np.arange(LENGTH)
  wanted = np.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i), 0)
  wanted = (x @ x.transpose(0, 2, 1) * wanted) @ x
  heads = jnp.asarray(x.transpose(1, 0, 2)[None], jnp.float32)
  decay = jnp.broadcast_to(jnp.log(retnet.gammas(3)), (1, LENGTH, 3))[..., None]
  state = jnp.zeros((1, 3, 1, 4, 4))
  y, _ = scan.chunked(heads, heads, heads[:, :, :, None], decay, None, state, size=LENGTH)
  np.testing.assert_allclose(y[0, :, :, 0].transpose(1, 0, 2), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('rule', 'method'), [(ssm.hold, 'zoh'), (ssm.bilinear, 'bilinear')])
def test_discretisation_is_scipys(rule, method):
  signal = pytest.importorskip('scipy.signal')
  rates = ssm.inverse(3)
  decay, scale = rule(jnp.asarray(rates, jnp.complex64), 0.07)
  a, b, *_ = signal.cont2discrete(
    (np.diag(rates), np.ones((3, 1)), np.ones((1, 3)), np.zeros((1, 1))), 0.07, method
  )
  np.testing.assert_allclose(decay, np.diag(a), atol=1e-5)
  np.testing.assert_allclose(scale, b[:, 0], atol=1e-5)


def test_the_lstm_is_that_of_pytorch():
  """torch.nn.LSTM(3, 4).double() of torch 2.13 with weights sin(1.7 n + shift), its last outputs and cells."""
  fill = lambda shape, shift: np.sin(np.arange(np.prod(shape)) * 1.7 + shift).reshape(shape)
  x, inward, hidden = fill((1, 5, 3), 2.0), fill((4, 4, 3), 0.0), fill((4, 4, 4), 0.5)
  params = dict(out=np.eye(4)[:, :3])
  for name, w, u, bias in zip(lstm.GATES, inward, hidden, fill((4, 4), 1.0)):
    params |= {name: w.T, f'{name}_hidden': u.T, f'{name}_bias': bias}
  mixer, ctx = lstm.LSTM(hidden=4), Context(Mask(True), jnp.arange(5)[None])
  params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
  y, state = mixer.apply(dict(params=params), x, ctx, mixer.initial(1, 5, 3, jnp.float32))
  np.testing.assert_allclose(y[0, 1], [0.1629996, 0.0392436, 0.0342776], atol=1e-6)
  np.testing.assert_allclose(
    state['h'], [[0.4507256, -0.4934394, -0.4121499, 0.1607001]], atol=1e-6
  )
  np.testing.assert_allclose(
    state['c'], [[0.6623680, -1.0654624, -0.9588689, 0.2620003]], atol=1e-6
  )


def test_hippo_is_normal_less_rank_one():
  """The first entries of LegS, and S4's theorem 1: what is left is normal, and these are its eigenvalues."""
  n = 4
  a = ssm.hippo_matrix(2 * n)
  root = np.sqrt([3, 5, 15])
  np.testing.assert_allclose(a[:3, :3], [[-1, 0, 0], [-root[0], -2, 0], [-root[1], -root[2], -3]])
  p = np.sqrt(np.arange(2 * n) + 0.5)
  normal = a + np.outer(p, p)
  np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=1e-9)
  found = np.linalg.eigvals(normal)
  wanted = sorted(found[found.imag > 0], key=lambda z: z.imag)
  np.testing.assert_allclose(ssm.legs(n), wanted, atol=1e-9)


def test_s4_starts_as_hippo():
  """Its matrix has HiPPO's eigenvalues -1, -2, ..., -N, and its first outputs those of the continuous system."""
  n = 4
  rates, low, _ = (np.concatenate([z, z.conj()]) for z in dplr.legs(n))
  found = np.linalg.eigvals(np.diag(rates) - np.outer(low, low.conj()))
  np.testing.assert_allclose(sorted(found.real), -np.arange(2 * n, 0, -1.0), atol=1e-6)
  np.testing.assert_allclose(found.imag, 0, atol=1e-6)


@pytest.mark.parametrize('t', [1, 2, 13, 64])
def test_the_kernel_of_s4_is_its_powers(t):
  """The generating function against C Abar^l Bbar, in float64 with scipy's discretisation (S4, eq. 5)."""
  signal = pytest.importorskip('scipy.signal')
  rates, low, into = dplr.legs(8)
  read = np.random.default_rng(0).normal(size=(8, 2)) @ [1, 1j]
  wide = lambda z: jnp.asarray(z, jnp.complex64)[None]
  system = dplr.System(*map(wide, (rates, low, into, read)), jnp.full((1,), 0.05), jnp.zeros((1,)))
  rates, low, into, read = (np.concatenate([z, z.conj()]) for z in (rates, low, into, read))
  a = np.diag(rates) - np.outer(low, low.conj())
  abar, bbar, *_ = signal.cont2discrete((a, into[:, None], read[None], [[0]]), 0.05, 'bilinear')
  x, wanted = bbar[:, 0], []
  for _ in range(t):
    wanted.append((read @ x).real)
    x = abar @ x
  np.testing.assert_allclose(dplr.kernel(system, t)[:, 0], wanted, atol=2e-4)


@pytest.mark.parametrize('cuts', [(0, 37), (0, 1, 9, 22, 37), tuple(range(38))])
def test_long_convolutions_stop_where_documents_do(cuts):
  rng = np.random.default_rng(4)
  x, kernel = rng.normal(size=(1, 37, 2)), rng.normal(size=(37, 2))
  segments = np.zeros((1, 37), np.int32)
  wanted = np.zeros(x.shape)
  for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
    segments[:, start:stop] = i
    for f in range(2):
      wanted[0, start:stop, f] = np.convolve(x[0, start:stop, f], kernel[:, f])[: stop - start]
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  found = convolution.long(x, kernel, jnp.asarray(segments))
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  if len(cuts) == 2:
    np.testing.assert_allclose(convolution.long(x, kernel, None), wanted, atol=1e-4)


def test_keys_of_any_size_do_not_overflow():
  """RWKV's exponents: k of +-200 in f32, against float64 with the largest taken out."""
  key = np.random.default_rng(6).normal(size=(1, LENGTH, 2)) * 200
  value, decay, bonus = key / 100, np.array([0.5, 30.0]), np.array([1.0, -5.0])
  ctx = Context(Mask(True), jnp.arange(LENGTH)[None])
  given = (jnp.asarray(x, jnp.float32) for x in (key, value, decay, bonus))
  found, _ = rwkv.wkv_chunks(*given, None, ctx, 4)
  for t in range(LENGTH):
    i = np.arange(t)
    e = np.concatenate([-(t - 1 - i)[:, None] * decay + key[0, :t], (bonus + key[0, t])[None]])
    share = np.exp(e - e.max(0))
    wanted = (share * value[0, : t + 1]).sum(0) / share.sum(0)
    np.testing.assert_allclose(found[0, t], wanted, rtol=1e-3, atol=1e-3)
