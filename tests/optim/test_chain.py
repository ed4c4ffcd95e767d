"""The chain against optax's own compositions; masks, multipliers, averages; where the state lives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core import mesh, tree, weights
from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.optim import chain, rules, schedules
from llm_jax.optim.adafactor import adafactor
from tests.variants import variants

AXES = {
  'embedding': {'table': ('vocab', 'embed')},
  'decoder': {
    'layers': {
      'q': ('layers', 'embed', 'heads', 'head_dim'),
      'q_bias': ('layers', 'heads', 'head_dim'),
      'up': ('layers', 'embed', 'ffn'),
      'scale': ('layers', 'norm'),
    },
    'buckets': ('buckets', 'heads'),
  },
  'head': {'w': ('embed', 'vocab')},
}
SIZES = dict(vocab=24, embed=16, layers=2, heads=4, head_dim=8, ffn=32, norm=16, buckets=4)
RULES = dict(
  adamw=rules.adamw,
  lion=rules.lion,
  sgd=rules.sgd,
  t5=functools.partial(adafactor, min_factored=4),
  palm=functools.partial(adafactor, beta1=0.9, min_factored=None),
  narrow=functools.partial(rules.adamw, mu_dtype='bfloat16'),
)
RATE = functools.partial(schedules.cosine, peak=0.05, steps=10, warmup=2)


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  shape = lambda names: tuple(SIZES[n] for n in names)
  return jax.tree.map(
    lambda n: jnp.asarray(scale * rng.normal(size=shape(n)), jnp.float32),
    AXES,
    is_leaf=tree.is_names,
  )


PARAMS = draw(0)


def run(tx, steps=4, params=PARAMS, scale=1.0, grads=draw):
  @jax.jit
  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  for i in range(steps):
    params, state = update(grads(1 + i, scale), state, params)
  return params, state


def assert_close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


OPTAX = dict(
  adamw=(
    rules.adamw,
    lambda mask: optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask),
  ),
  lion=(rules.lion, lambda mask: optax.lion(RATE, b1=0.9, b2=0.99, weight_decay=0.1, mask=mask)),
  sgd=(
    rules.sgd,
    lambda mask: optax.chain(
      optax.trace(0.9), optax.add_decayed_weights(0.1, mask), optax.scale_by_learning_rate(RATE)
    ),
  ),
)


@pytest.mark.parametrize('scale', [1e-3, 10.0])  # below and above the clip
@pytest.mark.parametrize('name', OPTAX)
def test_optax(name, scale):
  rule, theirs = OPTAX[name]
  mask = {
    'embedding': {'table': False},
    'decoder': {
      'layers': {'q': True, 'q_bias': False, 'up': True, 'scale': False},
      'buckets': False,
    },
    'head': {'w': True},
  }
  expected, _ = run(optax.chain(optax.clip_by_global_norm(1.0), theirs(mask)), scale=scale)
  got, _ = run(chain.make(AXES, rule=rule, schedule=RATE, weight_decay=0.1), scale=scale)
  assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'decayed, expected', [(chain.everything, 7), (chain.matrices, 5), (chain.hidden_matrices, 3)]
)
def test_masks_by_axis_name(decayed, expected):
  chosen = {
    path for path, names in tree.flatten(AXES, is_leaf=tree.is_names).items() if decayed(names)
  }
  tx = chain.make(AXES, rule=rules.sgd, schedule=RATE, weight_decay=0.5, decayed=decayed)
  updates, _ = jax.jit(tx.update)(
    jax.tree.map(jnp.zeros_like, PARAMS), jax.jit(tx.init)(PARAMS), PARAMS
  )
  assert {path for path, u in tree.flatten(updates).items() if np.any(u)} == chosen
  assert len(chosen) == expected


@pytest.mark.parametrize('name', ['adamw', 't5'])
def test_multipliers_scale_the_learning_rate(name):
  slow, _ = run(
    chain.make(
      AXES, rule=RULES[name], schedule=RATE, multipliers=(('layers/q', 0.25), ('head|layers', 0.5))
    ),
    steps=1,
  )
  plain, _ = run(chain.make(AXES, rule=RULES[name], schedule=RATE), steps=1)
  moved = lambda after: tree.flatten(jax.tree.map(jnp.subtract, after, PARAMS))
  factor = {
    'embedding/table': 1,
    'decoder/buckets': 1,
    'decoder/layers/q': 0.25,
    'decoder/layers/q_bias': 0.25,
  }
  for path, step in moved(plain).items():
    np.testing.assert_allclose(
      moved(slow)[path], factor.get(path, 0.5) * step, rtol=1e-3, atol=1e-6
    )


def test_learning_rate_of_the_last_update():
  tx = chain.make(AXES, schedule=RATE)
  for steps in (1, 3):
    state = run(tx, steps=steps)[1]
    rate = optax.tree_utils.tree_get(state, 'learning_rate')
    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, RATE(steps - 1), rtol=1e-6)


def test_average_in_closed_form():
  """After n updates: d^n p_0 + (1 - d) sum_i d^(n - i) p_i."""
  tx, d = chain.make(AXES, rule=rules.sgd, schedule=RATE, ema=0.992), 0.992
  update = jax.jit(tx.update)
  path, state = [PARAMS], jax.jit(tx.init)(PARAMS)
  for i in range(4):
    updates, state = update(draw(1 + i), state, path[-1])
    path.append(optax.apply_updates(path[-1], updates))
  expected = jax.tree.map(
    lambda *p: d**4 * p[0] + (1 - d) * sum(d ** (4 - i) * p[i] for i in range(1, 5)), *path
  )
  assert_close(optax.tree_utils.tree_get(state, 'ema'), expected, rtol=1e-5, atol=1e-6)
  assert optax.tree_utils.tree_get(chain.make(AXES).init(PARAMS), 'ema') is None


@pytest.mark.parametrize('ema', [None, 0.9])
@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('trainable', [None, 'layers'])
def test_axes_name_every_leaf_of_the_state(name, ema, trainable):
  params = PARAMS if trainable is None else tree.split(PARAMS, tree.select(PARAMS, trainable))[0]
  tx = chain.make(AXES, rule=RULES[name], schedule=RATE, ema=ema)
  state = jax.eval_shape(tx.init, params)
  names = tx.axes(params)
  assert jax.tree.structure(names, is_leaf=tree.is_names) == jax.tree.structure(state)
  jax.tree.map(lambda s, n: len(s.shape) == len(n) or pytest.fail(f'{s.shape} {n}'), state, names)
  jax.tree.map(
    lambda s, n: s.shape == tuple(SIZES[i] for i in n) or pytest.fail(f'{s.shape} {n}'),
    state,
    names,
  )
  after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), (params, state)
  )


def test_only_the_trained_part_moves():
  part, _ = tree.split(PARAMS, tree.select(PARAMS, 'layers'))
  grads = lambda seed, scale: tree.split(draw(seed, scale), tree.select(PARAMS, 'layers'))[0]
  for name in ('adamw', 't5', 'palm'):
    after, state = run(
      chain.make(AXES, rule=RULES[name], schedule=RATE, weight_decay=0.1),
      params=part,
      grads=grads,
      steps=2,
    )
    assert set(tree.flatten(after)) == {p for p in tree.flatten(PARAMS) if 'layers' in p}
    assert tree.count(state) <= 2 * tree.count(part) + 3


def test_leaf_types():
  """The parts of an adapter are parameters like any other."""
  axes = {'w': weights.LowRank(None, ('embed', 'rank'), ('rank', 'ffn'))}
  params = {'w': weights.LowRank(None, jnp.ones((16, 2)), jnp.ones((2, 32)))}
  for name in RULES:
    tx = chain.make(axes, rule=RULES[name], schedule=RATE, weight_decay=0.1)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params) and np.all(updates['w'].a < 0)
    assert jax.tree.structure(tx.axes(params), is_leaf=tree.is_names) == jax.tree.structure(state)


def test_175b_needs_no_memory_to_plan():
  """GPT-3's shape, Adam and Adafactor, state bytes from shapes alone."""
  sizes = dict(layers=96, embed=12288, heads=96, head_dim=128, ffn=49152, vocab=50304)
  axes = {
    'embedding': {'table': ('vocab', 'embed')},
    'q': ('layers', 'embed', 'heads', 'head_dim'),
    'up': ('layers', 'embed', 'ffn'),
    'down': ('layers', 'ffn', 'embed'),
  }
  params = jax.tree.map(
    lambda n: jax.ShapeDtypeStruct(tuple(sizes[i] for i in n), jnp.float32),
    axes,
    is_leaf=tree.is_names,
  )
  adam, t5 = (
    jax.eval_shape(chain.make(axes, rule=RULES[name]).init, params) for name in ('adamw', 't5')
  )
  assert tree.count(adam) == 2 * tree.count(params) + 3
  assert tree.count(t5) == sum(((50304 + 12288), 96 * 2 * 12288, 2 * 96 * (12288 + 49152))) + 3
  assert jax.tree.structure(
    chain.make(axes, rule=RULES['t5']).axes(params), is_leaf=tree.is_names
  ) == jax.tree.structure(t5)


SHARDED = list(itertools.product(('adamw', 't5'), ('ZERO1', 'ZERO3'), (False, True)))


@pytest.mark.parametrize(
  ('name', 'zero', 'explicit'),
  variants(SHARDED, [('adamw', 'ZERO1', False), ('t5', 'ZERO3', True)]),
)
def test_devices(name, zero, explicit):
  """Parameters, gradients and state split over eight devices: the updates of one, and state where the rules put it."""
  tx = chain.make(AXES, rule=RULES[name], schedule=RATE, weight_decay=0.1, ema=0.9)
  expected = run(tx, scale=10.0, steps=3)
  table = getattr(mesh, zero)
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2, explicit=explicit)), mesh.rules(**table):
    state = jax.eval_shape(tx.init, PARAMS)
    where = dict(
      params=mesh.shardings(AXES, PARAMS), state=mesh.shardings(tx.axes(PARAMS), state, 'optimizer')
    )
    params = jax.device_put(PARAMS, where['params'])
    state = jax.jit(tx.init, out_shardings=where['state'])(params)

    @functools.partial(jax.jit, out_shardings=(where['params'], where['state']))
    def update(params, grads, state):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for i in range(3):
      grads = jax.device_put(draw(1 + i, 10.0), mesh.shardings(AXES, PARAMS, 'gradients'))
      params, state = update(params, grads, state)
    got = jax.device_get((params, state))
  assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  'kw, remedy',
  [
    (dict(clip=0.0), 'None for no limit'),
    (dict(weight_decay=-0.1), '0 is none'),
    (dict(ema=1.0), 'None for no average'),
    (dict(multipliers=(('decoder/layer/', 0.1),)), 'matches no parameter'),
    (dict(multipliers=((0.5, 'head'),)), 'multipliers read'),
    (
      dict(schedule=functools.partial(schedules.cosine, peak=0.1, steps=5, warmup=9)),
      'lower warmup',
    ),
  ],
)
def test_nonsense_is_refused_before_the_first_step(kw, remedy):
  with pytest.raises(UserError, match=remedy):
    chain.make(AXES, **kw)


def test_a_parameter_without_names_is_named():
  tx = chain.make(AXES)
  with pytest.raises(UserError, match="'extra' has no axis names"):
    tx.axes({'extra': jnp.ones(3)})
  with pytest.raises(UserError, match='one for each axis'):
    tx.axes({'head': {'w': jnp.ones(3)}})


def test_from_a_config():
  config = use(
    chain.make,
    rule=use(adafactor, min_factored=4),
    schedule=use(schedules.rsqrt, hold=3),
    weight_decay=1.0,
    decay=use(chain.squared),
  )
  assert config.decayed.fn.endswith('hidden_matrices') and config.schedule.peak == 0.01
  after, state = run(build(config)(AXES))
  expected, _ = run(
    chain.make(
      AXES,
      rule=RULES['t5'],
      schedule=functools.partial(schedules.rsqrt, hold=3),
      weight_decay=1.0,
      decay=chain.squared,
    )
  )
  assert_close(after, expected, rtol=0)
  assert int(state.count) == 4
