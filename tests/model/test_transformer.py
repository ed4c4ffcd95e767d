"""Whole models: what may depend on what, decoding, packing, precision, initialisation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.model import (
  attention,
  block,
  extension,
  ffn,
  heads,
  init,
  kernels,
  masks,
  norms,
  positions,
  stack,
  transformer,
)
from tests.variants import variants

P = functools.partial
VARIANTS = dict(
  rope={},
  interleaved=dict(mixer=dict(rotate=P(positions.rope_interleaved, fraction=0.5))),
  gqa=dict(mixer=dict(groups=2)),
  mqa=dict(mixer=dict(groups=1, cap=5.0)),
  blocked=dict(mixer=dict(kernel=kernels.blocked)),
  learned=dict(
    mixer=dict(rotate=None, bias=True, kernel=kernels.dot_product),
    feed=P(ffn.MLP, hidden=24, bias=True),
    blocks=dict(norm=norms.LayerNorm, residual=norms.post),
    norm=None,
    positions=positions.Learned,
    head=heads.Untied,
  ),
  sinusoidal=dict(
    mixer=dict(rotate=None),
    positions=positions.Sinusoidal,
    embedding=P(heads.Embedding, scaled=True),
    blocks=dict(residual=norms.sandwich),
  ),
  alibi=dict(mixer=dict(rotate=None), bias=positions.Alibi, blocks=dict(residual=norms.parallel)),
  buckets=dict(mixer=dict(rotate=None), bias=P(positions.Buckets, buckets=8, distance=10)),
  loop=dict(runner=stack.loop, vocab_multiple=64),
  window=dict(mixer=dict(window=4, sinks=1, qk_norm=norms.RMSNorm)),
  banded=dict(mixer=dict(window=3, sinks=2, kernel=kernels.banded)),
  strided=dict(mixer=dict(sees=P(masks.strided, size=3))),
  factored=dict(embedding=P(heads.Embedding, rank=6)),
  deepnorm=dict(blocks=dict(residual=P(norms.deepnorm, alpha=2.0)), norm=None),
  xpos=dict(mixer=dict(rotate=P(positions.xpos, unit=8.0))),
  transformer_xl=dict(mixer=dict(rotate=None, relative=positions.TransformerXL)),
  rerope=dict(mixer=dict(rotate=None, groups=2, relative=P(extension.ReRoPE, window=3, slope=0.5))),
)
SEEN = dict(window=(4, 1), banded=(3, 2))
FAST = (
  'rope',
  'mqa',
  'blocked',
  'learned',
  'alibi',
  'buckets',
  'loop',
  'banded',
  'rerope',
  'deepnorm',
)
every = pytest.mark.parametrize('name', variants(VARIANTS, FAST))


@functools.cache
def _model(causal, name):
  return causal(**VARIANTS[name])


@pytest.fixture
def model(tiny, name):
  return _model(tiny.causal, name)


def change(ids, t):
  return ids.at[:, t].set(jnp.where(ids[:, t] == 7, 8, 7))


@every
def test_no_output_sees_a_later_token(tiny, ids, model, name):
  f, params = tiny.forward(model), tiny.large(model)
  for t in (1, 6, tiny.LENGTH - 1):
    a, b = f(params, dict(inputs=ids)), f(params, dict(inputs=change(ids, t)))
    np.testing.assert_array_equal(a[:, :t], b[:, :t])
    moved = np.abs(a[:, t:] - b[:, t:]).max((0, 2)) > 1e-4
    window, sinks = SEEN.get(
      name, (tiny.LENGTH, 0)
    )  # through two layers a window reaches twice as far
    reach = tiny.LENGTH if t < sinks else 2 * (window - 1) + 1
    assert moved[:reach].all() and not moved[reach:].any()


@every
def test_packed_documents_are_separate_documents(tiny, ids, model, name):
  f, params = tiny.forward(model), tiny.large(model)
  n = 5  # two documents of this length and padding
  end = tiny.LENGTH - 2 * n
  segments = jnp.array([[1] * n + [2] * n + [0] * end] * 3)
  where = jnp.array([[*range(n), *range(n), *([0] * end)]] * 3)
  batch = dict(inputs=ids, segments=segments, positions=where)
  packed = f(params, batch)
  alone = f(params, dict(inputs=jnp.concatenate([ids[:, :n], ids[:, n : 2 * n]])))
  np.testing.assert_allclose(packed[:, :n], alone[:3], atol=2e-5)
  np.testing.assert_allclose(packed[:, n : 2 * n], alone[3:], atol=2e-5)
  other = f(params, dict(batch, inputs=change(ids, tiny.LENGTH - 1)))
  np.testing.assert_array_equal(packed[:, : 2 * n], other[:, : 2 * n])


def stepper(model):
  """jit of (params, batch, states) -> (logits, states)."""

  @jax.jit
  def step(params, batch, states):
    x, states, _ = model.hidden(params, batch, states=states)
    return model.logits(params, x), states

  return step


def decode(model, params, ids, chunks, batch=None):
  """Logits of `ids` fed in chunks of these sizes."""
  states, out, start = model.states(params, dict(batch or {}, inputs=ids), ids.shape[1]), [], 0
  step = stepper(model)
  for n in chunks:
    rows = jnp.broadcast_to(jnp.arange(start, start + n), (ids.shape[0], n))
    logits, states = step(params, dict(inputs=ids[:, start : start + n], positions=rows), states)
    out.append(logits)
    start += n
  return jnp.concatenate(out, 1)


WITH_STATE = [
  'rope',
  'learned',
  'buckets',
  'window',
  'banded',
  'strided',
  'xpos',
  'transformer_xl',
  'rerope',
]


@pytest.mark.parametrize(
  'name', variants(WITH_STATE, ['rope', 'learned', 'window', 'transformer_xl'])
)
def test_with_a_state_is_without(tiny, ids, model, name):
  params = tiny.large(model)
  full = tiny.forward(model)(params, dict(inputs=ids))
  for chunks in ([1] * tiny.LENGTH, [6, 5, 1]):
    np.testing.assert_allclose(decode(model, params, ids, chunks), full, atol=3e-5)


@every
def test_ragged_prompts_are_the_whole_sequences(tiny, ids, model, name):
  """Right-padded prompts of unequal length, then two more tokens each: the padding's slots are overwritten, and a ring
  is told by `segments` what is padding.
  """
  params, lengths, step = tiny.large(model), np.array([3, 6, 5]), stepper(model)
  full = tiny.forward(model)(params, dict(inputs=ids))  # causal: a prompt's logits are its slice
  states = model.states(params, dict(inputs=ids), tiny.LENGTH)
  prompt = jnp.where(jnp.arange(6) < lengths[:, None], ids[:, :6], 0)
  where = jnp.broadcast_to(jnp.arange(6), (3, 6))
  real = (where < lengths[:, None]).astype(jnp.int32)
  told = dict(segments=real) if name in SEEN else {}
  logits, states = step(params, dict(inputs=prompt, positions=where, **told), states)
  got = [[logits[i, n - 1]] for i, n in enumerate(lengths)]
  for j in range(2):
    at = jnp.asarray(lengths + j)[:, None]
    told = dict(inputs=jnp.take_along_axis(ids, at, 1), positions=at)
    logits, states = step(params, told, states)
    for i in range(3):
      got[i].append(logits[i, 0])
  for i, n in enumerate(lengths):
    np.testing.assert_allclose(jnp.stack(got[i]), full[i, n - 1 : n + 2], atol=3e-5)


@pytest.mark.parametrize('name', ['rope', 'mqa', 'learned', 'sinusoidal', 'buckets'])
def test_bf16_is_close_and_gradients_are_finite(tiny, ids, model, name):
  low = tiny.causal(**VARIANTS[name], dtype='bfloat16')
  params = jax.tree.map(lambda x: x / 2 if x.ndim > 2 else x, tiny.large(model))

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    x, _, _ = low.hidden(params, dict(inputs=ids))
    logits = low.logits(params, x)
    return jax.nn.log_softmax(logits)[..., 3].mean(), (x, logits)

  (_, (x, logits)), grads = jax.jit(loss)(params)
  assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  want = tiny.forward(model)(params, dict(inputs=ids))[..., : tiny.VOCAB]
  assert np.abs(logits[..., : tiny.VOCAB] - want).max() < 0.1 * want.std()
  for path, g in tree.flatten(grads).items():
    assert g.dtype == jnp.float32 and np.isfinite(g).all(), path
    assert np.abs(g).max() > 0 or 'key_bias' in path, path  # softmax ignores a constant


@every
def test_every_parameter_names_every_axis(tiny, model, name):
  params = jax.eval_shape(model.init, jax.random.key(0))
  axes = tree.flatten(model.axes, is_leaf=lambda x: isinstance(x, tuple))
  flat = tree.flatten(params)
  assert list(flat) == list(axes)
  assert all(len(axes[n]) == x.ndim and x.dtype == jnp.float32 for n, x in flat.items())
  assert all(('layers' == axes[n][0]) == ('/layers' in n) for n in flat)


def test_the_gradient_of_an_output_stops_at_its_token(tiny):
  model = tiny.causal()
  params = tiny.large(model)
  vectors = jax.random.normal(jax.random.key(1), (tiny.LENGTH, tiny.EMBED))

  def last(vectors):  # each position reads a row of its own
    table = jnp.zeros((tiny.VOCAB, tiny.EMBED)).at[: tiny.LENGTH].set(vectors)
    told = {**params, 'embedding': dict(table=table)}
    return model.hidden(told, dict(inputs=jnp.arange(tiny.LENGTH)[None])).x[0, 6].sum()

  g = np.abs(jax.grad(last)(vectors)).sum(-1)
  assert (g[:7] > 0).all() and (g[7:] == 0).all()


def test_a_prefix_is_seen_by_all_and_seals_nothing_else(tiny, ids):
  model = tiny.causal(kind=transformer.prefix)
  params, f = tiny.large(model), tiny.forward(model)
  seen = jnp.arange(tiny.LENGTH)[None] < jnp.array([[5], [0], [tiny.LENGTH]])
  batch = lambda x: dict(inputs=x, prefix=seen)
  a = f(params, batch(ids))
  moved = lambda t: np.abs(f(params, batch(change(ids, t))) - a).max(-1) > 1e-5
  four, five = moved(4), moved(5)
  assert four[0].all() and not five[0, :5].any() and five[0, 5:].all()
  assert not four[1, :4].any() and four[1, 4:].all() and five[2].all()
  causal = tiny.forward(tiny.causal())(params, dict(inputs=ids))
  np.testing.assert_allclose(f(params, dict(inputs=ids)), causal, atol=1e-6)
  np.testing.assert_allclose(a[1], causal[1], atol=1e-6)


def test_prefix_decoding(tiny, ids):
  model = tiny.causal(kind=transformer.prefix, bias=positions.Buckets, mixer=dict(rotate=None))
  params, p = tiny.large(model), 5
  seen = jnp.arange(tiny.LENGTH)[None].repeat(3, 0) < p
  full = tiny.forward(model)(params, dict(inputs=ids, prefix=seen))
  states, out, step = model.states(params, dict(inputs=ids), tiny.LENGTH), [], stepper(model)
  for start, n in ((0, p), *((i, 1) for i in range(p, tiny.LENGTH))):
    rows = jnp.broadcast_to(jnp.arange(start, start + n), (3, n))
    given = seen if start else seen[:, :p]  # slots that are not named are not in the prefix
    told = dict(inputs=ids[:, start : start + n], positions=rows, prefix=given)
    logits, states = step(params, told, states)
    out.append(logits)
  np.testing.assert_allclose(jnp.concatenate(out, 1), full, atol=3e-5)


def test_encoder_decoder(tiny, ids):
  model = tiny.t5()
  params, f = tiny.large(model), tiny.forward(model)
  read = ids[:, :9]
  seen = jnp.arange(9)[None] < jnp.array([[9], [4], [6]])
  source = {'encoder/inputs': read, 'encoder/segments': seen.astype(jnp.int32)}
  full = f(params, dict(source, inputs=ids))
  # causal in its own tokens, open to all of the input, closed to the padding of the input
  np.testing.assert_array_equal(full[:, :6], f(params, dict(source, inputs=change(ids, 6)))[:, :6])
  other = f(params, {**source, 'encoder/inputs': change(read, 3), 'inputs': ids})
  assert (np.abs(full - other).max((0, 2)) > 1e-5).all()
  other = f(params, {**source, 'encoder/inputs': change(read, 8), 'inputs': ids})
  np.testing.assert_array_equal(full[1:], other[1:])
  np.testing.assert_allclose(
    full[1], f(params, {'encoder/inputs': read[1:2, :4], 'inputs': ids[1:2]})[0], atol=2e-5
  )
  for chunks in ([1] * tiny.LENGTH, [5, 7]):
    np.testing.assert_allclose(decode(model, params, ids, chunks, source), full, atol=3e-5)
  states = model.states(params, dict(source, inputs=ids), tiny.LENGTH)
  assert all(x.shape[:2] == (2, 3) for x in jax.tree.leaves(states))


def test_packed_encoder_decoder(tiny, ids):
  model = tiny.t5()
  params, f = tiny.large(model), tiny.forward(model)
  segments = jnp.array([[1] * 5 + [2] * 7] * 3)
  encoder = jnp.array([[1] * 4 + [2] * 6 + [0] * 2] * 3)
  read = ids[:, ::-1]
  packed = f(
    params,
    {'inputs': ids, 'segments': segments, 'encoder/inputs': read, 'encoder/segments': encoder},
  )
  first = f(params, {'inputs': ids[:, :5], 'encoder/inputs': read[:, :4]})
  second = f(params, {'inputs': ids[:, 5:], 'encoder/inputs': read[:, 4:10]})
  np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), atol=3e-5)


def test_a_window_is_decoded_from_a_ring(tiny, ids):
  """In any cut, longer than the ring or shorter, from rows of unequal length; no more slots than window and sinks."""
  model = _model(tiny.causal, 'window')
  params, want = tiny.large(model), tiny.forward(model)(tiny.large(model), dict(inputs=ids))
  step = jax.jit(lambda params, batch, states: model.hidden(params, batch, states=states))
  for cuts in ([0, 8, 9, 10, 11, 12], [0, 3, 10, 12], range(13)):
    states, out = model.states(params, dict(inputs=ids), 64), []
    for start, stop in itertools.pairwise(cuts):
      positions = jnp.broadcast_to(jnp.arange(start, stop), (len(ids), stop - start))
      told = dict(inputs=ids[:, start:stop], positions=positions)
      x, states, _ = step(params, told, states)
      out.append(model.logits(params, x))
    assert {x.shape[2] for x in jax.tree.leaves(states)} == {5}
    np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=2e-5)
  lengths = jnp.array([3, 9, 6])  # right-padded prompts, then the rest one by one
  at = jnp.broadcast_to(jnp.arange(9), (3, 9))
  told = dict(inputs=ids[:, :9], positions=at, segments=(at < lengths[:, None]).astype(jnp.int32))
  _, states, _ = step(params, told, model.states(params, told, 12))
  for i in range(3):
    where = (lengths + i)[:, None]
    told = dict(inputs=jnp.take_along_axis(ids, where, 1), positions=where)
    x, states, _ = step(params, told, states)
    got = model.logits(params, x)[:, 0]
    np.testing.assert_allclose(got, want[jnp.arange(3), lengths + i], atol=2e-5)


def test_parallel_context_windows(tiny, ids):
  """A window is as if alone, the task reads both; with a state the same (Ratner et al. 2022, section 2)."""
  model = _model(tiny.causal, 'gqa')
  params, f = tiny.large(model), tiny.forward(model)
  windows = jnp.broadcast_to(jnp.array([1] * 4 + [2] * 4 + [0] * 4), ids.shape)
  positions = jnp.broadcast_to(jnp.array([*range(4), *range(4), *range(4, 8)]), ids.shape)
  batch = dict(inputs=ids, windows=windows, positions=positions)
  got = f(params, batch)
  for start in (0, 4):
    alone = f(params, dict(inputs=ids[:, start : start + 4]))
    np.testing.assert_allclose(got[:, start : start + 4], alone, atol=1e-5)
    other = f(params, dict(batch, inputs=change(ids, start)))
    assert (np.abs(got - other)[:, 8:].max((0, 2)) > 1e-4).all()
  states = model.states(params, dict(inputs=ids), 12)
  slots, out = jnp.broadcast_to(jnp.arange(12), ids.shape), []
  for part in (slice(0, 10), slice(10, 11), slice(11, 12)):
    told = {k: v[:, part] for k, v in dict(batch, slots=slots).items()} | dict(slot_windows=windows)
    x, states, _ = model.hidden(params, told, states=states)
    out.append(model.logits(params, x))
  np.testing.assert_allclose(jnp.concatenate(out, 1), got, atol=2e-5)


def test_dropout_follows_the_key(tiny, ids):
  model = tiny.causal(
    mixer=dict(dropout=0.2),
    feed=P(ffn.Gated, hidden=24, dropout=0.2),
    blocks=dict(dropout=0.2),
    embedding=P(heads.Embedding, dropout=0.2),
  )
  params = tiny.large(model)
  x = jax.jit(lambda key: model.hidden(params, dict(inputs=ids), rng=key).x)
  one, two = jax.random.key(1), jax.random.key(2)
  plain = tiny.causal()
  np.testing.assert_allclose(x(None), plain.hidden(params, dict(inputs=ids)).x, atol=1e-6)
  np.testing.assert_array_equal(x(one), x(one))
  assert np.abs(x(one) - x(two)).max() > 0.1


def test_embedding_gradient_is_scaled_exactly(tiny, ids):
  # untied, so that all of the table's gradient comes through the lookup
  make = lambda a: tiny.causal(head=heads.Untied, embedding=P(heads.Embedding, gradient=a))
  model = make(1.0)
  params = tiny.large(model)
  loss = lambda m: lambda p: jnp.sin(m.logits(p, m.hidden(p, dict(inputs=ids)).x)).sum()
  (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(loss(make(x))))(params) for x in (1.0, 0.1))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  ga, gb = tree.flatten(ga), tree.flatten(gb)
  for path in ga:
    factor = 0.1 if path == 'embedding/table' else 1.0
    np.testing.assert_allclose(gb[path], factor * ga[path], rtol=1e-3, atol=1e-6)


def test_heads(tiny, ids):
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  w = jax.random.normal(jax.random.key(1), (8, 5))
  plain = heads.Untied().apply({'params': dict(w=w)}, x, 5, None)
  np.testing.assert_allclose(plain, np.asarray(x) @ np.asarray(w), atol=1e-5)
  tied = heads.Tied(scaled=True, cap=2.0).apply({}, x, 5, w.T)
  np.testing.assert_allclose(tied, 2 * np.tanh(plain / 8**0.5 / 2), atol=1e-5)
  table, project = np.ones((5, 3)), np.arange(24.0).reshape(8, 3)
  narrow = heads.Tied().apply({'params': dict(project=project)}, x, 5, table)
  np.testing.assert_allclose(narrow, np.asarray(x) @ project @ table.T, rtol=1e-4, atol=1e-4)


def test_neftune_adds_uniform_noise_while_there_is_a_key(tiny, ids):
  """Uniform in +-alpha / sqrt(L d) (Jain et al. 2023, algorithm 1), so of deviation alpha / sqrt(3 L d)."""
  x = jnp.zeros((64, 50, 32))
  noisy = heads.Embedding(noise=5.0)
  added = np.asarray(noisy.finish(x, jax.random.key(0)))
  most = 5.0 / (50 * 32) ** 0.5
  assert 0.999 * most < np.abs(added).max() <= most
  np.testing.assert_allclose(added.std(), most / 3**0.5, rtol=0.01)
  assert abs(added.mean()) < 4 * added.std() / added.size**0.5
  assert (added != np.asarray(noisy.finish(x, jax.random.key(1)))).all()
  model = tiny.causal(embedding=functools.partial(heads.Embedding, noise=5.0))
  params, batch = model.init(jax.random.key(0)), dict(inputs=ids)
  plain = tiny.causal().hidden(params, batch).x
  np.testing.assert_array_equal(model.hidden(params, batch).x, plain)
  assert (model.hidden(params, batch, rng=jax.random.key(0)).x != plain).any()


@pytest.mark.parametrize('head', [heads.Tied, heads.Untied])
def test_rows_that_pad_the_vocabulary_have_no_probability(tiny, ids, head):
  model = tiny.causal(head=head, vocab_multiple=32)
  params = model.init(jax.random.key(0))
  logits = tiny.forward(model)(params, dict(inputs=ids))
  assert logits.shape[-1] == 64 == model.card.rows and model.card.vocab == tiny.VOCAB
  p = jax.nn.softmax(logits)
  assert (p[..., tiny.VOCAB :] == 0).all()
  assert np.isfinite(p * jax.nn.log_softmax(logits)).all()  # entropies stay finite
  x = model.hidden(params, dict(inputs=ids)).x
  np.testing.assert_array_equal(model.logits(model.head(params), x), model.logits(params, x))


def std(params):
  return {n: float(x.std()) for n, x in tree.flatten(params).items()}


def near(found, **want):
  for path, value in want.items():
    match = [n for n in found if n.endswith(path.replace('__', '/'))]
    assert match, path
    for n in match:
      assert abs(found[n] / value - 1) < 0.12, (n, found[n], value)


def test_initial_deviations_per_tensor():
  sizes = dict(vocab=300, embed=64, layers=4, length=64)
  mixer = P(attention.SelfAttention, heads=4, head_dim=24)
  gated = P(block.decoder, mixer=mixer, ffn=P(ffn.Gated, hidden=160))
  learned = dict(positions=positions.Learned, head=heads.Untied)
  make = lambda **kw: std(transformer.causal(**sizes, **kw, block=gated).init(jax.random.key(0)))
  inner = (2 * 4) ** -0.5
  near(
    make(init=init.gpt2, **learned),
    embedding__table=0.02, positions__table=0.02, head__w=0.02, query=0.02, key=0.02, value=0.02,
    gate=0.02, up=0.02, out=0.02 * inner, down=0.02 * inner,
  )  # fmt: skip
  near(
    make(init=init.palm),
    embedding__table=1.0, query=1 / 8, key=1 / 8, value=1 / 8, gate=1 / 8, up=1 / 8,
    out=96**-0.5, down=160**-0.5,
  )  # fmt: skip
  t5 = P(positions.Buckets, buckets=256)
  near(
    make(init=init.t5, bias=t5),
    embedding__table=1.0, query=(64 * 24) ** -0.5, key=1 / 8, value=1 / 8, gate=1 / 8, up=1 / 8,
    out=96**-0.5, down=160**-0.5, bias__table=1 / 8,
  )  # fmt: skip
  deep = make(init=P(init.deepnorm, beta=0.5))
  near(deep, query=(2 / 160) ** 0.5, key=(2 / 160) ** 0.5, value=0.5 * (2 / 160) ** 0.5)
  near(deep, out=0.5 * (2 / 160) ** 0.5, up=0.5 * (2 / 224) ** 0.5, down=0.5 * (2 / 224) ** 0.5)


def test_the_default_is_the_recommended_recipe(tiny):
  model = tiny.causal()
  card = model.card
  assert (card.norm, card.residual, card.positions) == ('RMSNorm', 'pre', 'rope')
  feed = card.decoder[0].ffn
  assert feed.gated and not feed.bias and not card.attention.bias and card.final_norm
  assert ffn.Gated(hidden=1).activation is ffn.silu
  assert set(tree.flatten(model.axes['embedding'], lambda x: isinstance(x, tuple))) == {'table'}


def test_longer_than_the_learned_table(tiny):
  model = tiny.causal(positions=positions.Learned)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  long = dict(inputs=jnp.zeros((1, tiny.LENGTH + 1), jnp.int32))
  with pytest.raises(UserError, match='13 is longer than the table of 12'):
    jax.eval_shape(model.hidden, shapes, long)
  with pytest.raises(UserError, match='longer than the table'):
    model.states(shapes, long, tiny.LENGTH + 1)
  with pytest.raises(UserError, match='length'):
    tiny.causal(positions=positions.Learned, length=None)


def test_wrong_arguments(tiny):
  with pytest.raises(UserError, match='bfloat16'):
    tiny.causal(dtype='bfloat15')
  with pytest.raises(UserError, match='set bias=Alibi, and positions=None'):
    tiny.causal(positions=positions.Alibi)
  with pytest.raises(UserError, match='set positions=Learned, and bias=None'):
    tiny.causal(bias=positions.Learned)
  heads_differ = (tiny.block(dict(rotate=None)), tiny.block(dict(rotate=None, head_dim=4)))
  blocks = (heads_differ[0], P(heads_differ[1], mixer=P(attention.SelfAttention, heads=2)))
  with pytest.raises(UserError, match='one number'):
    transformer.causal(vocab=8, embed=16, layers=2, block=blocks, bias=positions.Alibi)


def test_a_model_from_a_config(ids):
  cfg = use(
    transformer.causal,
    vocab=64,
    embed=16,
    layers=2,
    length=16,
    block=use(
      block.decoder,
      mixer=use(attention.SelfAttention, heads=4),
      ffn=use(ffn.Gated, hidden=24),
      norm=use(norms.RMSNorm),
      residual=use(norms.pre),
    ),
    runner=use(stack.scan, remat='full'),
  )
  model = build(cfg)()
  params = model.init(jax.random.key(0))
  assert model.hidden(params, dict(inputs=ids)).x.shape == (*ids.shape, 16)
  flat = tree.flatten(params)
  assert flat['decoder/layers/block_0/mixer/query'].shape == (2, 16, 4, 4)
  assert {'embedding/table', 'decoder/norm/scale'} < set(flat)
