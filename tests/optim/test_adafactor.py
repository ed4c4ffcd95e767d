"""Adafactor against optax's where they coincide, and against a numpy version written from the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.optim import adafactor as lib
from llm_jax.optim import chain, schedules

RATES = [0.02, 0.01, 0.03, 0.0, 0.02, 0.05]  # changing, one of them zero


def rate(step):
  return jnp.asarray(RATES, jnp.float32)[step]


def run(axes, params, grads, **kw):
  """The parameters after each of the updates."""
  rule = functools.partial(lib.adafactor, **kw)
  tx = chain.make(axes, rule=rule, schedule=rate, clip=None)
  state, update, seen = tx.init(params), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


def draw(shapes, n, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  one = lambda: {
    k: jnp.asarray(scale * rng.normal(size=s) * rng.gamma(1.0, size=s), jnp.float32)
    for k, s in shapes.items()
  }
  return [one() for _ in range(n)]


def rms(x, axes=None):
  return np.sqrt(np.mean(x * x, axis=axes, keepdims=True))


def paper(p, grads, *, factored, beta1=None, decay=0.8, d=1.0, eps1=1e-30, eps2=1e-3):
  """Algorithms 4 and 5 of arXiv:1804.04235 for one matrix or vector, rows on axis 0, in f64."""
  p = np.asarray(p, np.float64)
  row = column = full = m = 0.0
  for t, (g, lr) in enumerate(zip(grads, RATES, strict=False), 1):
    g = np.asarray(g, np.float64)
    beta2 = 1 - t**-decay
    square = g**2 + eps1
    if factored:
      rest = tuple(range(1, g.ndim))
      row = beta2 * row + (1 - beta2) * square.sum(rest)
      column = beta2 * column + (1 - beta2) * square.sum(0)
      estimate = np.multiply.outer(row, column) / row.sum()
    else:
      full = beta2 * full + (1 - beta2) * square
      estimate = full
    u = g / np.sqrt(estimate)
    u = u / np.maximum(1, rms(u) / d)
    step = lr * np.maximum(eps2, rms(p)) * u
    if beta1 is not None:
      m = beta1 * m + (1 - beta1) * step
      step = m
    p = p - step
  return p


@pytest.mark.parametrize(
  'kw',
  [dict(), dict(beta1=0.9), dict(beta1=0.9, min_factored=None), dict(min_scale=None, clip=None)],
)
@pytest.mark.parametrize('shape', [(6, 10), (10, 6)])
def test_optax(shape, kw):
  kw = dict(min_factored=4) | kw
  axes, shapes = {'w': ('embed', 'ffn'), 'b': ('ffn',)}, {'w': shape, 'b': shape[1:]}
  (params,), grads = draw(shapes, 1), draw(shapes, len(RATES), seed=1)
  tx = optax.adafactor(
    rate,
    min_dim_size_to_factor=kw['min_factored'] or 128,
    factored=kw['min_factored'] is not None,
    momentum=kw.get('beta1'),
    multiply_by_parameter_scale=kw.get('min_scale', 1) is not None,
    clipping_threshold=kw.get('clip', 1.0),
  )
  ours, _ = run(axes, params, grads, **kw)
  state, update = tx.init(params), jax.jit(tx.update)
  for g, got in zip(grads, ours, strict=True):
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), got, params)


@pytest.mark.parametrize('mode', ['t5', 'palm'])
def test_paper(mode):
  """2-D, 3-D with two column axes, an output projection whose rows come last, and vectors."""
  kw = dict(min_factored=4) if mode == 't5' else dict(beta1=0.9, min_factored=None)
  axes = dict(
    w=('embed', 'ffn'),
    q=('embed', 'heads', 'head_dim'),
    o=('heads', 'head_dim', 'embed'),
    n=('norm',),
    b=('heads', 'head_dim'),
  )
  shapes = dict(w=(8, 5), q=(8, 3, 4), o=(3, 4, 8), n=(8,), b=(3, 4))
  (params,), grads = draw(shapes, 1), draw(shapes, len(RATES), seed=1)
  ours, _ = run(axes, params, grads, **kw)
  for name in axes:
    rows_first = (lambda x: np.moveaxis(np.asarray(x), -1, 0)) if name == 'o' else np.asarray
    factored = mode == 't5' and name in 'wqo'
    expected = paper(
      rows_first(params[name]),
      [rows_first(g[name]) for g in grads],
      factored=factored,
      beta1=kw.get('beta1'),
    )
    np.testing.assert_allclose(rows_first(ours[-1][name]), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('kw', [dict(min_factored=4), dict(beta1=0.9, min_factored=None)])
def test_stacked_is_per_layer(kw):
  """Statistics, clipping and parameter scale of a stacked tree are those of its layers (and experts) one by one."""
  axes = dict(
    w=('layers', 'embed', 'ffn'), n=('layers', 'norm'), e=('layers', 'expert', 'embed', 'ffn')
  )
  shapes = dict(w=(3, 8, 5), n=(3, 8), e=(3, 2, 8, 5))
  layer_scale = lambda draws: [
    {k: v * 10.0 ** jnp.arange(-2, 1).reshape(3, *[1] * (v.ndim - 1)) for k, v in d.items()}
    for d in draws
  ]
  (params,), grads = layer_scale(draw(shapes, 1)), layer_scale(draw(shapes, len(RATES), seed=1))
  together, _ = run(axes, params, grads, **kw)
  for i in range(3):
    cut = lambda t, i=i: dict(w=t['w'][i], n=t['n'][i], e0=t['e'][i, 0], e1=t['e'][i, 1])
    alone, _ = run(
      dict(w=('embed', 'ffn'), n=('norm',), e0=('embed', 'ffn'), e1=('embed', 'ffn')),
      cut(params),
      [cut(g) for g in grads],
      **kw,
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9),
      cut(together[-1]),
      alone[-1],
    )


def test_state_is_rows_plus_columns():
  """T5: O(n + m) numbers, nothing else; PaLM: two per parameter."""
  axes = {'decoder': {'w': ('layers', 'embed', 'heads', 'head_dim'), 'n': ('layers', 'norm')}}
  params = {
    'decoder': {
      'w': jax.ShapeDtypeStruct((4, 512, 8, 64), jnp.float32),
      'n': jax.ShapeDtypeStruct((4, 512), jnp.float32),
    }
  }
  size = lambda **kw: tree.count(jax.eval_shape(lib.adafactor(axes, **kw).init, params))
  n = 4 * 512
  assert size() == 4 * (512 + 8 * 64) + n + 1
  assert size(beta1=0.9, min_factored=None) == 2 * (n + 4 * 512 * 8 * 64) + 1


def test_small_matrices_are_not_factored():
  rule = lib.adafactor({'w': ('embed', 'ffn')})
  state = rule.init({'w': jnp.zeros((127, 4096))})
  assert state.row['w'] is None and state.full['w'].shape == (127, 4096)


def test_names_follow_by_dropping_axes():
  axes = dict(
    w=('layers', 'embed', 'heads', 'head_dim'), router=('layers', 'embed', 'expert'), n=('norm',)
  )
  shapes = dict(w=(2, 128, 4, 64), router=(2, 128, 256), n=(128,))
  names = lib.adafactor(axes).axes(
    {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  )
  assert names.row == dict(w=('layers', 'embed'), router=('layers', 'embed'), n=None)
  assert names.column == dict(
    w=('layers', 'heads', 'head_dim'), router=('layers', 'expert'), n=None
  )
  assert names.full == dict(w=None, router=None, n=('norm',))
  assert names.momentum == dict(w=None, router=None, n=None)


def test_palm_decays_by_the_rate_squared():
  axes, params = {'w': ('embed', 'ffn')}, {'w': jnp.ones((4, 4))}
  rule = functools.partial(lib.adafactor, beta1=0.9, min_factored=None)
  schedule = functools.partial(schedules.constant, peak=0.2)
  tx = chain.make(axes, rule=rule, schedule=schedule, weight_decay=1.0, decay=chain.squared)
  updates, _ = tx.update({'w': jnp.zeros((4, 4))}, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], -(0.2**2), rtol=1e-6)


@pytest.mark.parametrize(
  'kw, remedy', [(dict(beta1=1.0), 'None for no momentum'), (dict(decay=0.0), 'the paper has 0.8')]
)
def test_nonsense_is_refused(kw, remedy):
  with pytest.raises(UserError, match=remedy):
    lib.adafactor({'w': ('embed', 'ffn')}, **kw)
