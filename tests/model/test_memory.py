"""Attention with an external memory against a loop in double precision; segments, planted tokens, documents."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, memory, transformer
from llm_jax.model.masks import Mask

P = functools.partial
RNG = np.random.default_rng(0)
EMBED, HEADS, GROUPS, SIZE = 16, 4, 2, 8
W = {
  name: RNG.normal(size=shape).astype(np.float32) / 2
  for name, shape in dict(
    query=(EMBED, HEADS, SIZE), key=(EMBED, GROUPS, SIZE), value=(EMBED, GROUPS, SIZE), out=(HEADS, SIZE, EMBED)
  ).items()
}  # fmt: skip
GATE = np.float32([-2.0, 0.0, 0.5, 3.0])
X = RNG.normal(size=(2, 20, EMBED)).astype(np.float32)


def rotated(x, p):
  theta = 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
  z = (x[: SIZE // 2] + 1j * x[SIZE // 2 :]) * np.exp(1j * p * theta)
  return np.concatenate([z.real, z.imag])


def by_hand(x, window, capacity, top, mix):
  """x [t, embed]: local and retrieved attention of one head and query at a time."""
  q, k, v = (np.einsum('td,dhk->thk', np.float64(x), np.float64(W[n])) for n in W if n != 'out')
  out = np.zeros(x.shape)
  for h in range(HEADS):
    g = h // (HEADS // GROUPS)
    for i in range(len(x)):
      near = [j for j in range(i + 1) if i - j < window]
      far = [j for j in range(i + 1) if window <= i - j < window + capacity]
      far = sorted(far, key=lambda j: -(q[i, h] @ k[j, g]))[:top]
      a = [rotated(q[i, h], i) @ rotated(k[j, g], j) / math.sqrt(SIZE) for j in near]
      b = [q[i, h] @ k[j, g] / math.sqrt(SIZE) for j in far]
      local, total = np.exp(a) @ v[near, g] / np.exp(a).sum(), np.exp(a).sum()
      y = local
      if far:
        share = mix(GATE[h], total, np.exp(b).sum())
        y = share * (np.exp(b) @ v[far, g] / np.exp(b).sum()) + (1 - share) * local
      out[i] += y @ W['out'][h]
  return out


MIXES = dict(
  gate=(memory.Gate, dict(bias=GATE), lambda bias, near, far: 1 / (1 + math.exp(-bias))),
  joint=(memory.Joint, {}, lambda bias, near, far: far / (near + far)),
)


def made(mix='gate', window=4, capacity=9, top=3):
  module = memory.MemoryAttention(
    heads=HEADS, groups=GROUPS, head_dim=SIZE, window=window, capacity=capacity, top=top, mix=MIXES[mix][0]
  )  # fmt: skip
  own = MIXES[mix][1]
  return module, {'params': dict(W, **(dict(mix=own) if own else {}))}


def context(start, stop):
  where = jnp.arange(start, stop)[None].repeat(2, 0)
  return attention.Context(Mask(True, queries=where), where)


def stepper(module, variables):
  """jit of (x [rows, n, embed], number of its first position, state) -> (y, state)."""

  @jax.jit
  def step(x, start, state):
    where = start + jnp.arange(x.shape[1])[None].repeat(x.shape[0], 0)
    return module.apply(variables, x, attention.Context(Mask(True, queries=where), where), state)

  return step


PLAIN = attention.Context(Mask(True), jnp.arange(X.shape[1])[None])


def apply(module, variables, x, ctx=PLAIN):
  """The output without a state, compiled: one operation after the other costs more than the test."""
  return jax.jit(lambda x: module.apply(variables, x, ctx)[0])(x)


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize(('capacity', 'top'), [(100, 100), (100, 3), (9, 2)])
def test_reads_what_the_formula_says(mix, capacity, top):
  """All of the memory, the best of it, the best of what has not been dropped."""
  module, variables = made(mix, capacity=capacity, top=top)
  y = apply(module, variables, X)
  for row in range(2):
    want = by_hand(X[row], 4, capacity, top, MIXES[mix][2])
    np.testing.assert_allclose(y[row], want, atol=2e-5)


def test_all_of_the_memory_in_one_softmax_is_full_attention():
  """Without positions, `Joint` over everything is the softmax over everything."""
  module, variables = made('joint', capacity=100, top=100)
  y = apply(module.clone(rotate=None), variables, X)
  full = attention.SelfAttention(heads=HEADS, groups=GROUPS, head_dim=SIZE, rotate=None)
  np.testing.assert_allclose(y, apply(full, variables, X), atol=1e-5)


def test_a_closed_gate_leaves_the_local_window():
  """g = 0: the numbers of attention that never saw the memory."""
  module, variables = made()
  variables['params'] |= dict(mix=dict(bias=np.full(HEADS, -100.0, np.float32)))
  y = apply(module, variables, X)
  t = np.arange(X.shape[1])
  allowed = (t[:, None] - t >= 0) & (t[:, None] - t < 4)
  far = jnp.where(jnp.asarray(allowed), 0.0, -1e9)[None, None]
  full = attention.SelfAttention(heads=HEADS, groups=GROUPS, head_dim=SIZE)
  want = apply(full, variables, X, PLAIN._replace(bias=far))
  np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize(
  ('mix', 'chunks'), [('gate', [1] * 20), ('joint', [5] * 4), ('gate', [7, 1, 12]), ('joint', [20])]
)
def test_segments_with_a_state_are_the_whole_document(mix, chunks):
  """The ring of 13 is written over; a segment may be longer than it."""
  module, variables = made(mix)
  whole = apply(module, variables, X)
  state, out, start = module.initial(2, 20, EMBED, jnp.float32), [], 0
  step = stepper(module, variables)
  for n in chunks:
    y, state = step(X[:, start : start + n], start, state)
    out.append(y)
    start += n
  np.testing.assert_allclose(np.concatenate(out, 1), whole, atol=2e-5)
  assert state['memory_k'].shape == (2, 13, GROUPS, SIZE)
  assert sorted(np.asarray(state['at'][0])) == list(range(7, 20))


def test_a_new_document_finds_an_empty_memory():
  module, variables = made()
  step = stepper(module, variables)
  _, state = step(X, 0, module.initial(2, 20, EMBED, jnp.float32))
  other = X[:, ::-1]
  out = []
  for n in range(0, 20, 5):
    y, state = step(other[:, n : n + 5], n, state)
    out.append(y)
  want = apply(module, variables, other)
  np.testing.assert_allclose(np.concatenate(out, 1), want, atol=2e-5)


def test_packed_documents_do_not_remember_one_another():
  module, variables = made()
  segments = jnp.array([[1] * 9 + [2] * 11] * 2)
  where = jnp.array([[*range(9), *range(11)]] * 2)
  packed = attention.Context(Mask(True, segments=(segments, segments)), where)
  y = apply(module, variables, X, packed)
  for part in (slice(0, 9), slice(9, 20)):
    n = part.stop - part.start
    alone = attention.Context(Mask(True), jnp.arange(n)[None])
    want = apply(module, variables, X[:, part], alone)
    np.testing.assert_allclose(y[:, part], want, atol=1e-5)


def test_a_token_far_behind_is_found():
  """Random vectors; the last repeats the one at 3, far out of the window: its value comes back, from 50 segments."""
  length, window = 400, 4
  x = RNG.normal(size=(1, length, EMBED)).astype(np.float32)
  x[0, -1] = x[0, 3]
  one = np.eye(EMBED, dtype=np.float32)[:, None]
  values = RNG.normal(size=(EMBED, 1, EMBED)).astype(np.float32)
  module = memory.MemoryAttention(heads=1, head_dim=EMBED, window=window, capacity=500, top=1)
  w = dict(query=one, key=one, value=values, out=np.eye(EMBED, dtype=np.float32)[None])
  variables = {'params': dict(w, mix=dict(bias=np.float32([100.0])))}
  state = module.initial(1, 8, EMBED, jnp.float32)
  step = stepper(module, variables)
  for start in range(0, length, 8):
    y, state = step(x[:, start : start + 8], start, state)
  np.testing.assert_allclose(y[0, -1], x[0, 3] @ values[:, 0], atol=1e-4)


def test_no_gradient_reaches_what_is_remembered():
  module, variables = made()
  last = lambda x: module.apply(variables, x, PLAIN)[0][0, -1].sum()
  g = np.abs(jax.jit(jax.grad(last))(X)[0]).sum(-1)
  assert (g[-4:] > 0).all() and (g[:-4] == 0).all()

  def second(x, bias):  # the gate and the query learn from what is read
    told = {'params': variables['params'] | dict(mix=dict(bias=bias))}
    state = module.apply(told, x, context(0, 10), module.initial(2, 20, EMBED, jnp.float32))[1]
    return module.apply(told, jnp.asarray(X[:, 10:]), context(10, 20), state)[0].sum()

  before, bias = jax.jit(jax.grad(second, (0, 1)))(jnp.asarray(X[:, :10]), jnp.asarray(GATE))
  assert (before == 0).all() and (np.abs(bias) > 0).all()


def test_one_layer_of_a_model_has_it(tiny, ids):
  """The whole model: causal, cached decoding, and training on the second segment with the state of the first."""
  own = P(memory.MemoryAttention, heads=4, window=3, capacity=6, top=2)
  pattern = (tiny.block(), P(block.decoder, mixer=own, ffn=P(ffn.Gated, hidden=24)))
  model = transformer.causal(vocab=tiny.VOCAB, embed=tiny.EMBED, layers=2, block=pattern)
  params = tiny.large(model)
  full = tiny.forward(model)(params, dict(inputs=ids))
  later = tiny.forward(model)(params, dict(inputs=ids.at[:, 8].set(3)))
  np.testing.assert_array_equal(full[:, :8], later[:, :8])
  states = model.states(params, dict(inputs=ids), tiny.LENGTH)

  @functools.partial(jax.jit, static_argnums=(2, 3))
  def segment(params, states, start, stop):
    where = jnp.arange(start, stop)[None].repeat(ids.shape[0], 0)
    told = dict(inputs=ids[:, start:stop], positions=where)
    x, states, _ = model.hidden(params, told, states=states)
    return model.logits(params, x), states

  first, states = segment(params, states, 0, 7)
  second, _ = segment(params, states, 7, tiny.LENGTH)
  np.testing.assert_allclose(np.concatenate([first, second], 1), full, atol=3e-5)
  loss = lambda p: jax.nn.log_softmax(segment(p, states, 7, tiny.LENGTH)[0])[..., 3].mean()
  grads = jax.jit(jax.grad(loss))(params)
  assert np.abs(grads['decoder']['layers']['block_1']['mixer']['mix']['bias']).max() > 0


def test_what_it_cannot_do_is_refused():
  module, variables = made()
  with pytest.raises(UserError, match='no bias on the logits'):
    module.apply(variables, X, PLAIN._replace(bias=jnp.zeros((1, 1, 20, 20))))
  ctx = context(0, 20)._replace(mask=Mask(True, prefix=jnp.ones((2, 20), bool)))
  with pytest.raises(UserError, match='no prefix in its state'):
    module.apply(variables, X, ctx, module.initial(2, 20, EMBED, jnp.float32))
