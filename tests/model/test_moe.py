"""Mixtures of experts: routers and dispatch against loops over tokens and experts, losses against their formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import (
  attention,
  block,
  dispatch,
  ffn,
  grouped,
  init,
  param,
  routers,
  stack,
  transformer,
)
from llm_jax.model.attention import Context
from llm_jax.model.masks import Mask
from llm_jax.model.moe import MoE, Weighed

partial = functools.partial
B, T, D, F, E = 3, 7, 6, 10, 4
ROUTERS = dict(
  softmax_top_k=(routers.softmax_top_k, 3),
  top_k_softmax=(routers.top_k_softmax, 3),
  switch=(routers.switch, 1),
  gshard=(routers.gshard, 2),
  expert_choice=(routers.expert_choice, 2),
  hashed=(routers.hashed, 1),
)
DISPATCH = dict(
  dropless=dispatch.dropless,
  ragged=partial(dispatch.dropless, product=grouped.ragged),
  limited=partial(dispatch.limited, factor=float(E)),
)
EXPERT = partial(ffn.Gated, hidden=F)


def x_(seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), dtype)


IDS = jnp.asarray(np.random.default_rng(5).integers(1, 50, (B, T)), jnp.int32)
SEGMENTS = jnp.asarray([[1] * T, [1, 1, 1, 2, 2, 0, 0], [0] * T], jnp.int32)


def ctx_(causal=True, segments=None, rng=None):
  told = None if segments is None else (segments, segments)
  return Context(Mask(causal, segments=told), jnp.arange(T)[None], rng=rng, ids=IDS)


def params_(module, seed=1, scale=1.0):
  boxes = param.declare(module, jnp.zeros((1, 1, D)), ctx_(causal=False)._replace(ids=IDS[:1, :1]))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda b: jnp.asarray(scale * rng.normal(size=b.value.shape), jnp.float32),
    boxes,
    is_leaf=param.is_box,
  )


def run(module, w, x=None, ctx=None):
  """Compiled as a whole: op by op takes seconds."""
  ctx = ctx or ctx_()
  return jax.jit(lambda w, x: module.apply({'params': w}, x, ctx))(w, x_() if x is None else x)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def hashed_(token):
  """MurmurHash3's finaliser on Python's integers."""
  x = (token + 0x9E3779B9) % 2**32
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = (x ^ (x >> shift)) * factor % 2**32
  return x % E


def gates(name, k, logits, ids, real):
  """[t, experts] weights of one row, by the papers' words: what each token gets of each expert."""
  p, found = softmax(logits), np.zeros((len(logits), E))
  if name == 'expert_choice':
    n = min(len(logits), math.ceil(k * len(logits) / E))
    for e in range(E):
      likes = [(p[i, e], i) for i in range(len(logits)) if real[i]]
      for value, i in sorted(likes, reverse=True)[:n]:
        found[i, e] = value
    return found
  for i in range(len(logits)):
    if not real[i]:
      continue
    if name == 'hashed':
      found[i, hashed_(int(ids[i]))] = 1
      continue
    best = np.argsort(-logits[i])[:k]
    found[i, best] = p[i, best]
    if name in ('top_k_softmax', 'gshard'):
      found[i] /= found[i].sum()
  return found


def one_expert(w, e, x, gated=True, act=None):
  """float64, one token."""
  act = act or (lambda z: z / (1 + np.exp(-z)))
  b = {n: w[f'{n}_bias'][e] if f'{n}_bias' in w else 0.0 for n in ('gate', 'up', 'down')}
  up = x @ w['up'][e] + b['up']
  h = act(x @ w['gate'][e] + b['gate']) * up if gated else act(up)
  return h @ w['down'][e] + b['down']


def loop(name, k, w, x, real=None, gated=True, act=None):
  """y [b, t, d]: every token through every expert that it was given, one after the other."""
  w = {n: np.asarray(v, np.float64) for n, v in w.items() if n != 'shared'}
  x, y = np.asarray(x, np.float64), np.zeros((B, T, D))
  for b in range(B):
    logits = x[b] @ w['router'] if 'router' in w else np.zeros((T, E))
    mine = np.ones(T) if real is None else real[b]
    g = gates(name, k, logits, IDS[b], mine)
    for i, e in np.argwhere(g):
      y[b, i] += g[i, e] * one_expert(w, e, x[b, i], gated, act)
  return y


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('way', DISPATCH)
@pytest.mark.parametrize('name', ROUTERS)
def test_nothing_dropped_is_a_loop_over_tokens_and_experts(name, way, padded):
  router, k = ROUTERS[name]
  module = MoE(E, EXPERT, k, router, DISPATCH[way])
  w, segments = params_(module), SEGMENTS if padded else None
  assert ('router' in w) == (name != 'hashed')
  ctx = ctx_(name != 'expert_choice', segments)
  y, aux = run(module, w, ctx=ctx)
  wanted = loop(name, k, w, x_(), None if segments is None else segments > 0)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(aux['seen/dropped'], 0)


@pytest.mark.parametrize('way', ['ragged', 'limited'])
def test_gradients_of_all_ways_agree_with_finite_differences(way):
  """The blocks against other products, and one direction against the float64 loop."""
  found = {}
  for name in ('dropless', way):
    module = MoE(E, partial(EXPERT, bias=True), 2, dispatch=DISPATCH[name])
    w = params_(module)
    loss = lambda w, x, module=module: (module.apply({'params': w}, x, ctx_())[0] ** 2).sum()
    found[name] = jax.jit(jax.grad(loss, (0, 1)))(w, x_())
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found[way]))
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * scale)
  jax.tree.map(close, found['dropless'], found[way])
  at = (2, 3, 1)
  for name in ('up', 'down'):
    ends = []
    for sign in (1, -1):
      moved = {n: np.array(v, np.float64) for n, v in w.items()}
      moved[name][at] += sign * 1e-4
      ends.append((loop('top_k_softmax', 2, moved, x_()) ** 2).sum())
    slope = (ends[0] - ends[1]) / 2e-4
    np.testing.assert_allclose(found['dropless'][0][name][at], slope, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
  'sizes', [(300, 0, 1, 84), (0, 0, 0, 385), (128, 128, 100, 0), (0, 0, 0, 0)]
)
def test_grouped_products(sizes):
  """Groups of any sizes, rows of no group at the end, more rows than a block: each row with its own matrix."""
  m, rng = 385, np.random.default_rng(0)
  x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((m, D), (E, D, F), (m, F)))
  of = np.repeat(np.arange(E), sizes)
  y, dx, dw = np.zeros((m, F)), np.zeros((m, D)), np.zeros((E, D, F))
  for i, e in enumerate(of):
    y[i], dx[i] = x[i] @ w[e], w[e] @ dy[i]
    dw[e] += np.outer(x[i], dy[i])
  for product in (grouped.product, grouped.ragged):
    out, vjp = jax.vjp(lambda x, w, product=product: product(x, w, jnp.asarray(sizes)), x, w)
    for got, want in zip((out, *vjp(dy)), (y, dx, dw), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('bias', [False, True])
def test_experts_without_a_gate(bias):
  module = MoE(E, partial(ffn.MLP, hidden=F, activation=ffn.relu, bias=bias), 2)
  w = params_(module)
  assert set(w) == {'router', 'up', 'down'} | ({'up_bias', 'down_bias'} if bias else set())
  wanted = loop('top_k_softmax', 2, w, x_(), gated=False, act=lambda z: np.maximum(z, 0))
  for way in DISPATCH.values():
    y, _ = run(module.clone(dispatch=way), w)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


def test_one_expert_is_the_dense_layer():
  module = MoE(1, EXPERT, 1)
  w = params_(module)
  dense, _ = run(EXPERT(), {n: w[n][0] for n in ('gate', 'up', 'down')})
  np.testing.assert_allclose(run(module, w)[0], dense, rtol=1e-4, atol=1e-5)


def test_shared_experts():
  """DeepSeekMoE's are added; two are one of twice the width; Qwen2's is weighed by a sigmoid."""
  module = MoE(E, EXPERT, 2, shared=partial(ffn.Gated, hidden=2 * F))
  w = params_(module)
  y, _ = run(module, w)
  routed = loop('top_k_softmax', 2, w, x_())
  s, both = w['shared'], 0
  for half in (slice(0, F), slice(F, None)):
    part = dict(
      gate=s['gate'][None, :, half], up=s['up'][None, :, half], down=s['down'][None, half]
    )
    both += one_expert(part, 0, np.asarray(x_(), np.float64))
  np.testing.assert_allclose(y, routed + both, rtol=1e-4, atol=1e-4)
  module = MoE(E, EXPERT, 2, shared=partial(Weighed, ffn=partial(ffn.Gated, hidden=2 * F)))
  found = run(module, dict(w, shared=dict(ffn=s, weigh=jnp.arange(D) / 4.0)))
  weigh = 1 / (1 + np.exp(-np.asarray(x_()) @ np.arange(D) / 4))
  np.testing.assert_allclose(found[0], routed + weigh[..., None] * both, rtol=1e-4, atol=1e-4)


def drop(order, expert, kept, c):
  """Which pairs find a place, one after the other: expert and kept are [rounds, n]."""
  rounds, n = expert.shape
  pairs = [(r, i) for r in range(rounds) for i in range(n)]
  if order is dispatch.tokens_in_order:
    pairs = [(r, i) for i in range(n) for r in range(rounds)]
  used, found = np.zeros(E, int), np.zeros((rounds, n), bool)
  for r, i in pairs:
    if kept[r, i]:
      found[r, i] = used[expert[r, i]] < c
      used[expert[r, i]] += 1
  return found


@pytest.mark.parametrize('order', [dispatch.first_choices_first, dispatch.tokens_in_order])
@pytest.mark.parametrize(('k', 'factor', 'slots'), [(1, 1.0, None), (2, 0.5, None), (2, 1.0, 2)])
def test_a_full_expert_drops_the_rest(k, factor, slots, order):
  """GShard's algorithm 1 step by step; what is dropped adds nothing, and padding takes no place."""
  module = MoE(
    E, EXPERT, k, dispatch=partial(dispatch.limited, factor=factor, slots=slots, order=order)
  )
  w, real = params_(module), np.asarray(SEGMENTS > 0)
  y, aux = run(module, w, ctx=ctx_(segments=SEGMENTS))
  c, logits = slots or math.ceil(factor * k * T / E), np.asarray(x_() @ w['router'])
  wanted, dropped = np.zeros((B, T, D)), np.zeros(B)
  arrays = {n: np.asarray(v, np.float64) for n, v in w.items()}
  for b in range(B):
    expert = np.argsort(-logits[b])[:, :k].T
    kept = np.stack([real[b]] * k)
    fits = drop(order, expert, kept, c)
    g = gates('top_k_softmax', k, logits[b], IDS[b], real[b])
    for r, i in np.argwhere(fits):
      e = expert[r, i]
      wanted[b, i] += g[i, e] * one_expert(arrays, e, np.asarray(x_(), np.float64)[b, i])
    dropped[b] = 1 - fits.sum() / kept.sum() if kept.any() else 0
  assert dropped.any()
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(aux['seen/dropped'], dropped, atol=1e-6)


def test_capacity_differs_in_evaluation():
  kw = dict(dispatch=partial(dispatch.limited, factor=0.25, evaluation=float(E)))
  module = MoE(E, EXPERT, 1, routers.switch, **kw)
  w = params_(module)
  assert not run(module, w)[1]['seen/dropped'].any()
  assert run(module, w, ctx=ctx_(rng=jax.random.key(0)))[1]['seen/dropped'].all()


def test_balance_and_z_losses_are_the_formulas():
  """Switch's eq. 4-6, GShard's (first choices, times E^2), ST-MoE's eq. 5: per row, over real tokens."""
  real = np.asarray(SEGMENTS > 0)
  for name in ('switch', 'gshard', 'softmax_top_k'):
    router, k = ROUTERS[name]
    module = MoE(E, EXPERT, k, router, balance=0.01, z_loss=0.001)
    w = params_(module)
    _, aux = run(module, w, ctx=ctx_(segments=SEGMENTS))
    for b in range(2):
      logits = (np.asarray(x_(), np.float64)[b] @ np.asarray(w['router'], np.float64))[real[b]]
      counted = np.argsort(-logits)[:, : 1 if name == 'gshard' else k]
      f = np.bincount(counted.ravel(), minlength=E) / counted.size
      m = softmax(logits).mean(0)
      gshard = sum(np.bincount(counted[:, 0], minlength=E) / len(logits) * m) / E  # l_aux
      wanted = 0.01 * E * (f * m).sum()
      if k == 1 or name == 'gshard':
        np.testing.assert_allclose(wanted, 0.01 * E**2 * gshard)
      np.testing.assert_allclose(aux['balance'][b], wanted, rtol=1e-4)
      z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
      np.testing.assert_allclose(aux['router_z'][b], 0.001 * z, rtol=1e-4)
    assert aux['balance'][2] == aux['router_z'][2] == 0  # a row of padding


def test_a_balanced_router_pays_the_coefficient():
  """Switch, section 2.2: the minimum, under uniform routing, is alpha."""
  told = routers.Told(E, 1, jnp.ones((1, 8), bool), True, None, None)
  logits = 30.0 * jnp.eye(E)[jnp.arange(8) % E][None]
  loss = jax.jit(lambda logits: routers.balance(routers.switch(lambda: logits, told), told))
  np.testing.assert_allclose(loss(logits), 1, rtol=1e-5)
  np.testing.assert_allclose(loss(logits.at[:].set(logits[:, 2:3])), E, rtol=1e-5)


def test_the_second_expert_is_kept_with_twice_its_weight():
  """GShard: probability min(1, 2 g2), to 4 standard deviations."""
  n, p = 20_000, np.array([0.8, 0.2])
  told = routers.Told(2, 2, jnp.ones((1, n), bool), True, None, jax.random.key(1))
  logits = jnp.broadcast_to(jnp.log(p), (1, n, 2))
  found = routers.gshard(lambda: logits, told)
  assert found.kept[0, 0].all()
  assert abs(float(found.kept[0, 1].mean()) - 0.4) < 4 * (0.4 * 0.6 / n) ** 0.5
  assert routers.gshard(lambda: logits, told._replace(rng=None)).kept.all()


def test_jitter_only_moves_the_router_and_only_in_training():
  kw = dict(router=routers.softmax_top_k, top_k=E)
  module = MoE(E, EXPERT, jitter=0.1, z_loss=1.0, **kw)
  w = params_(module)
  still, noisy = (run(module, w, ctx=ctx_(rng=r)) for r in (None, jax.random.key(0)))
  np.testing.assert_allclose(still[0], run(MoE(E, EXPERT, **kw), w)[0], rtol=1e-6)
  assert not np.allclose(noisy[1]['router_z'], still[1]['router_z'])
  # every logit is within 10 % of its terms' sizes, and experts get x itself: gates of 1 hide the router
  same = MoE(1, EXPERT, 1, jitter=0.1)
  one = {n: v[:1] if n != 'router' else v[:, :1] for n, v in w.items()}
  a, b = (run(same, one, ctx=ctx_(rng=r))[0] for r in (None, jax.random.key(0)))
  np.testing.assert_array_equal(a, b)


def test_the_router_is_f32_in_bfloat16():
  """Two logits that bfloat16 cannot tell apart."""
  x = jnp.ones((1, 1, D), jnp.bfloat16)
  ctx = Context(Mask(True), jnp.zeros((1, 1), jnp.int32))
  module = MoE(2, EXPERT, 1, routers.switch, z_loss=1.0)
  w = params_(MoE(2, EXPERT, 1))
  w['router'] = jnp.zeros((D, 2)).at[0].set(jnp.array([1.0, 1.001]))
  y, aux = run(module, w, x, ctx)
  assert y.dtype == jnp.bfloat16 and aux['router_z'].dtype == jnp.float32
  np.testing.assert_allclose(aux['router_z'], np.log(np.exp(1) + np.exp(1.001)) ** 2, rtol=1e-5)
  second = run(EXPERT(), {n: w[n][1] for n in ('gate', 'up', 'down')}, x, ctx)[0]
  gate = 1 / (1 + np.exp(-0.001))
  np.testing.assert_allclose(y.astype(float), gate * second.astype(float), rtol=2e-2)


CAUSAL = dict(
  dropless=(routers.top_k_softmax, 2, dispatch.dropless),
  switch=(routers.switch, 1, partial(dispatch.limited, factor=0.5)),
  in_order=(routers.top_k_softmax, 2, partial(dispatch.limited, factor=0.5, order=dispatch.tokens_in_order)),
  hashed=(routers.hashed, 1, partial(dispatch.limited, factor=0.5)),
)  # fmt: skip


@pytest.mark.parametrize('name', CAUSAL)
def test_no_output_depends_on_a_later_token(name):
  router, k, way = CAUSAL[name]
  module = MoE(E, EXPERT, k, router, way)
  w = params_(module)
  apply = jax.jit(lambda x, ids: module.apply({'params': w}, x, ctx_()._replace(ids=ids))[0])
  y = apply(x_(), IDS)
  for i in range(1, T):
    later = jnp.arange(T) >= i
    other = apply(jnp.where(later[:, None], x_(7), x_()), jnp.where(later, IDS + 3, IDS))
    np.testing.assert_allclose(other[:, :i], y[:, :i], atol=1e-6)


def test_wrong_arguments_are_named():
  apply = lambda **kw: MoE(E, EXPERT, **kw).apply({'params': params_(MoE(E, EXPERT))}, x_(), ctx_())
  cases = [
    (dict(router=routers.expert_choice), 'later ones.*use another router'),
    (dict(router=routers.switch), 'switch.*set top_k=1, not 2'),
    (dict(top_k=9), 'top_k=9 of 4 experts'),
    (dict(router=routers.hashed, top_k=1, balance=0.1), 'set balance=0'),
    (dict(router=routers.hashed, top_k=1, z_loss=0.1), 'set z_loss=0'),
    (dict(dispatch=partial(dispatch.limited, factor=0.0)), 'must be positive'),
  ]
  for kw, message in cases:
    with pytest.raises(UserError, match=message):
      apply(**kw)


# --- in a model ------------------------------------------------------------------------------------


def glam(**kw):
  """Every other layer is a mixture (Du et al. 2021, figure 2)."""
  mixer = partial(attention.SelfAttention, heads=2)
  dense = partial(block.decoder, mixer=mixer, ffn=partial(ffn.Gated, hidden=F))
  routed = partial(block.decoder, mixer=mixer, ffn=partial(MoE, experts=E, expert=EXPERT, **kw))
  settings = dict(vocab=50, embed=16, layers=4, block=(dense, routed))
  return partial(transformer.causal, **settings)


@functools.cache
def weights_of():
  model = glam()()
  shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(2)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes)


def test_every_other_layer():
  layers = weights_of()['decoder']['layers']
  assert layers['block_0']['ffn']['up'].shape == (2, 16, F)
  assert layers['block_1']['ffn']['up'].shape == (2, E, 16, F)
  found = []
  for runner in (stack.scan, stack.loop, partial(stack.scan, remat='full')):
    model = glam(balance=0.01, z_loss=0.001)(runner=runner)
    hidden = jax.jit(model.hidden)(weights_of(), dict(inputs=IDS))
    assert set(hidden.aux) == {'balance', 'router_z', 'seen/dropped'}
    assert all(value.shape == (B,) for value in hidden.aux.values())
    found.append(jax.tree.leaves((hidden.x, hidden.aux)))
  for other in found[1:]:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[0], other)


def test_initial_deviations():
  """Every expert like a layer of its own: 1/sqrt(fan_in), and Switch's factor 0.1 on the variance (its table 3)."""
  wide = partial(MoE, experts=32, expert=partial(ffn.Gated, hidden=160))
  layer = partial(block.decoder, mixer=partial(attention.SelfAttention, heads=4), ffn=wide)
  for scale in (1.0, 0.1):
    recipe = partial(init.t5, scale=scale)
    m = transformer.causal(vocab=50, embed=64, layers=2, block=layer, init=recipe)
    found = jax.jit(m.init)(jax.random.key(0))['decoder']['layers']['block_0']['ffn']
    for name, fan_in in dict(router=64, gate=64, up=64, down=160).items():
      np.testing.assert_allclose(found[name].std(), (scale / fan_in) ** 0.5, rtol=0.05)


@pytest.mark.parametrize('router', ['top_k_softmax', 'hashed'])
def test_prefill_and_decoding_are_the_parallel_form(router):
  """Without dropping; one token at a time, and a prefill of three."""
  router, k = ROUTERS[router]
  model = glam(router=router, top_k=min(k, 2))()
  params = jax.tree.map(lambda x: x, weights_of())
  if router is routers.hashed:
    params['decoder']['layers']['block_1']['ffn'].pop('router')
  hidden = jax.jit(lambda params, batch, states: model.hidden(params, batch, states=states)[:2])
  whole, _ = hidden(params, dict(inputs=IDS), None)
  states, parts = model.states(params, dict(inputs=IDS), T), []
  for start, stop in ((0, 3), *((i, i + 1) for i in range(3, T))):
    positions = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
    batch = dict(inputs=IDS[:, start:stop], positions=positions)
    x, states = hidden(params, batch, states)
    parts.append(x)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
