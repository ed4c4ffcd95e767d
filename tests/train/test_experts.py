"""Experts split over the mesh axis `expert`: what is computed does not change, and tokens move as the dispatch says."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, dispatch, ffn, routers, stack, transformer
from llm_jax.model.moe import MoE
from llm_jax.objectives import language
from llm_jax.optim import adafactor, chain, schedules
from llm_jax.train import state as state_lib
from llm_jax.train import step
from tests.variants import variants

partial = functools.partial
ROWS, LENGTH, VOCAB, E = 8, 8, 64, 4
ONE = dict(data=1)
FOUR, EIGHT = dict(data=1, expert=4), dict(data=2, expert=4)
THREE_AXES = dict(data=1, fsdp=2, expert=2, tensor=2)
WAYS = dict(dropless=dispatch.dropless, limited=partial(dispatch.limited, factor=0.75))


def model(way, runner=stack.scan, **kw):
  mixer = partial(attention.SelfAttention, heads=4)
  unit = partial(ffn.Gated, hidden=32, bias=True)
  moe = partial(
    MoE, experts=E, expert=unit, dispatch=WAYS[way], **dict(balance=0.1, z_loss=0.01) | kw
  )
  layers = (
    partial(block.decoder, mixer=mixer, ffn=unit),
    partial(block.decoder, mixer=mixer, ffn=moe),
  )
  return transformer.causal(
    vocab=VOCAB, embed=16, layers=2, length=LENGTH, block=layers, runner=runner
  )


def batch():
  """Documents of unequal length, a part of the targets not scored."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  weights = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
  segments = np.stack([[1] * (i % 4 + 2) + [2] * (5 - i % 4) + [0] for i in range(ROWS)])
  weights *= segments > 0
  return dict(
    inputs=ids, targets=np.roll(ids, -1, 1), weights=weights, segments=segments.astype(np.int32)
  )


def prepared(sizes, way, microbatches=1, **kw):
  """(update, state, batch, objective) on the current mesh."""
  m = model(way, **kw)
  tx = chain.make(
    m.axes,
    rule=partial(adafactor.adafactor, min_factored=8),
    schedule=partial(schedules.constant, peak=0.01),
  )
  layout = state_lib.layout(m, tx)
  objective = partial(language.next_token, m)
  update = step.make(objective, tx, layout, microbatches=microbatches)
  return update, state_lib.create(m, tx, 0, layout=layout), mesh.place(batch()), objective


def train(sizes, way, *, explicit=False, **kw):
  """Metrics of two updates, gradients of the first batch, parameters, all as numpy."""
  with jax.set_mesh(mesh.make(**sizes, explicit=explicit)), mesh.rules(**mesh.ZERO3):
    update, state, placed, objective = prepared(sizes, way, **kw)

    @jax.jit  # one program for both: compiling is what takes time here
    def both(state):
      grad = jax.grad(lambda p: objective(p, placed, jax.random.key(0)).sum)(state.params)
      return grad, update(state, placed, jax.random.key(0))

    metrics, grads = [], None
    for _ in range(2):
      found, (state, one) = both(state)
      grads = found if grads is None else grads
      metrics.append([float(one[name]) for name in ('loss', 'balance', 'router_z', 'seen/dropped')])
    return metrics, jax.tree.map(np.asarray, (grads, state.params))


@functools.cache
def alone(way):
  return train(ONE, way)


def assert_same(found, wanted, rtol=1e-5):
  np.testing.assert_allclose(found[0], wanted[0], rtol=rtol, atol=1e-6)
  for got, want in zip(found[1], wanted[1], strict=True):
    scale = max(float(np.abs(w).max()) for w in jax.tree.leaves(want))
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize(('sizes', 'way', 'explicit'), variants([
  (FOUR, 'dropless', False), (FOUR, 'limited', False), (EIGHT, 'dropless', True), (EIGHT, 'limited', True),
  (THREE_AXES, 'dropless', False), (THREE_AXES, 'limited', True),
], [(THREE_AXES, 'limited', True)]), ids=str)  # fmt: skip
def test_experts_on_several_devices_compute_what_one_does(sizes, way, explicit):
  """Losses, dropped tokens, gradients and two Adafactor updates."""
  assert_same(train(sizes, way, explicit=explicit), alone(way))


def test_microbatches_are_the_whole_batch():
  """Rows are routed, balanced and dropped by themselves, and weighed by their targets."""
  assert alone('limited')[0][0][3] > 0.05  # some are dropped
  assert_same(train(ONE, 'limited', microbatches=4), alone('limited'))


ROUTERS = [
  ('gshard', dict(router=routers.gshard)),
  ('switch', dict(router=routers.switch, top_k=1, jitter=0.1)),
  ('hashed', dict(router=routers.hashed, top_k=1, balance=0.0, z_loss=0.0)),
]


@pytest.mark.parametrize(('name', 'kw'), variants(ROUTERS, ROUTERS[1:]))
def test_routers_on_a_mesh(name, kw):
  """The draws of a router while training are those of one device too."""
  found = []
  for sizes in (ONE, dict(data=2, expert=2, tensor=2)):
    with jax.set_mesh(mesh.make(**sizes, explicit=sizes != ONE)), mesh.rules(**mesh.ZERO3):
      m = model('limited', **kw)
      params = jax.device_put(
        m.init(jax.random.key(0)),
        mesh.shardings(m.axes, jax.eval_shape(m.init, jax.random.key(0))),
      )
      run = jax.jit(lambda p, b, m=m: m.hidden(p, b, rng=jax.random.key(1)))
      hidden = run(params, mesh.place(batch()))
      found.append([np.asarray(hidden.x), *map(np.asarray, hidden.aux.values())])
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)


@pytest.mark.slow
def test_expert_choice_on_a_mesh():
  moe = partial(MoE, experts=E, expert=partial(ffn.Gated, hidden=32), router=routers.expert_choice)
  mixer = partial(attention.SelfAttention, heads=4)
  plain = partial(
    block.cross_decoder, mixer=mixer, cross=partial(attention.CrossAttention, heads=4)
  )
  m = transformer.encoder_decoder(
    vocab=VOCAB,
    embed=16,
    layers=1,
    block=partial(plain, ffn=partial(ffn.MLP, hidden=8)),
    encoder_layers=1,
    encoder_block=partial(block.decoder, mixer=mixer, ffn=moe),
  )
  told, found = {**batch(), 'encoder/inputs': batch()['inputs']}, []
  for sizes, explicit in ((ONE, False), (EIGHT, False), (EIGHT, True)):
    with jax.set_mesh(mesh.make(**sizes, explicit=explicit)), mesh.rules(**mesh.ZERO3):
      params = m.init(jax.random.key(0))
      params = jax.device_put(params, mesh.shardings(m.axes, params))
      found.append(np.asarray(jax.jit(lambda p, b: m.hidden(p, b).x)(params, mesh.place(told))))
  for other in found[1:]:
    np.testing.assert_allclose(found[0], other, atol=1e-5)


def test_experts_drop_units_on_every_device_differently():
  """Expert dropout (Switch, section 2.2) inside the `shard_map`: about that many zeros, nowhere the same ones."""
  unit = partial(ffn.MLP, hidden=512, activation=ffn.identity, dropout=0.4)
  module = MoE(1, unit, 1, dispatch=dispatch.dropless)
  ctx = attention.Context(attention.Mask(True), jnp.zeros((1, 1), jnp.int32), rng=jax.random.key(0))
  w = dict(router=jnp.zeros((1, 1)), up=jnp.ones((1, 1, 512)), down=jnp.ones((1, 512, 1)))
  with jax.set_mesh(mesh.make(data=4, tensor=2)), mesh.rules(**mesh.ZERO3):
    y = jax.jit(lambda w, x: module.apply({'params': w}, x, ctx)[0])(w, jnp.ones((4, 1, 1)))
  kept = np.asarray(y).ravel() * 0.6
  assert len(set(kept)) > 1
  np.testing.assert_allclose(kept / 512, 0.6, atol=4 * (0.24 / 512) ** 0.5)


@pytest.mark.parametrize('rows', [1, 3])
def test_rows_that_do_not_divide(rows):
  """Decoding takes any number of prompts."""
  m = model('dropless')
  params, ids = m.init(jax.random.key(0)), batch()['inputs'][:rows]
  run = jax.jit(lambda p: m.hidden(p, dict(inputs=ids)).x)
  alone = run(params)
  with jax.set_mesh(mesh.make(data=2, expert=4)), mesh.rules(**mesh.ZERO3):
    placed = jax.device_put(params, mesh.shardings(m.axes, params))
    np.testing.assert_allclose(run(placed), alone, atol=1e-5)


def moved(way):
  """Collectives of a forward pass of one mixture on expert=4, by kind and shape."""
  module = MoE(E, partial(ffn.Gated, hidden=32), 2, dispatch=WAYS[way])
  ctx = attention.Context(attention.Mask(True), jnp.zeros((1, 1), jnp.int32))
  sizes = dict(gate=(E, 16, 32), up=(E, 16, 32), down=(E, 32, 16))
  with jax.set_mesh(mesh.make(data=1, expert=4)), mesh.rules(**mesh.ZERO3):
    split = jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec('expert', 'embed', 'ffn'))
    w = {n: jax.device_put(jnp.ones(s), split) for n, s in sizes.items()}
    w['router'] = jnp.ones((16, E))
    x = mesh.place(dict(x=np.ones((ROWS, LENGTH, 16), np.float32)))['x']
    run = jax.jit(lambda w, x: module.apply({'params': w}, x, ctx)[0])
    text = run.lower(w, x).compile().as_text()
  text = re.sub(r'.*replica_groups=\{\{0\},\{1\}.*', '', text)  # of each device with itself
  kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
  return Counter(re.findall(rf'= [^\n]*? ({kinds})(?:-start)?\(', text)), text


def test_limited_experts_move_tokens_by_two_all_to_alls():
  found, _ = moved('limited')
  assert found == {'all-to-all': 2}


def test_dropless_experts_gather_tokens_and_scatter_sums():
  found, text = moved('dropless')
  assert found['all-gather'] > 0 and found['reduce-scatter'] == 1
  assert not found['all-to-all'] and not found['collective-permute']
  assert f'f32[{E},16,32]' not in text  # nobody ever holds all experts


def test_moments_of_experts_are_their_own():
  """Adafactor's statistics have the axis of the experts, so they are split like the weights."""
  with jax.set_mesh(mesh.make(**FOUR)), mesh.rules(**mesh.ZERO3):
    _, state, _, _ = prepared(FOUR, 'dropless')
    up = tree.flatten(state.params)['decoder/layers/block_1/ffn/up']
    rows = tree.flatten(state.opt_state.rule.row)['decoder/layers/block_1/ffn/up']
  assert up.shape == (1, E, 16, 32) and up.sharding.shard_shape(up.shape)[1] == 1
  assert rows.shape == (1, E, 16) and rows.sharding.shard_shape(rows.shape)[1] == 1


def test_tokens_and_experts_on_other_axes_are_refused():
  table = {kind: dict(names, batch=('data', 'fsdp')) for kind, names in mesh.ZERO3.items()}
  m = model('limited')
  params = m.init(jax.random.key(0))
  with (
    jax.set_mesh(mesh.make(**FOUR)),
    mesh.rules(**table),
    pytest.raises(UserError, match="let axes.activations.batch name the experts' mesh axes too"),
  ):
    jax.eval_shape(lambda p: m.hidden(p, dict(inputs=batch()['inputs'])).x, params)
