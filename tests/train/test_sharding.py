"""Sharding changes where a step runs, not what it computes: meshes and rules against one device."""

import functools
import re
from collections import Counter

import jax
import numpy as np
import pytest

from llm_jax.core import mesh, tree
from llm_jax.core.errors import UserError
from llm_jax.model import attention, block, ffn, kernels, masks, stack, transformer
from llm_jax.objectives import language
from llm_jax.optim import adafactor, chain, rules, schedules
from llm_jax.train import state as state_lib
from llm_jax.train import step
from tests.variants import variants

LAYERS, ROWS, LENGTH, VOCAB = 2, 8, 8, 64
MESHES = {
  'data=8': dict(data=8),
  'fsdp=8': dict(data=1, fsdp=8),
  'data=4,tensor=2': dict(data=4, tensor=2),
  'fsdp=4,tensor=2': dict(data=1, fsdp=4, tensor=2),
  'data=2,fsdp=2,tensor=2': dict(data=2, fsdp=2, tensor=2),
  'tensor=4': dict(data=1, tensor=4),
}
ALL_RULES = dict(zero1=mesh.ZERO1, zero2=mesh.ZERO2, zero3=mesh.ZERO3)


def model(runner=stack.scan, **mixer):
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=4, bias=True, **mixer),
    ffn=functools.partial(ffn.Gated, hidden=32, bias=True),
  )
  return transformer.causal(
    vocab=VOCAB, embed=16, layers=LAYERS, length=LENGTH, block=layer, runner=runner
  )


def batch():
  rng = np.random.default_rng(0)
  ids = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  weights = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
  segments = np.repeat([[1] * 5 + [2] * 3], ROWS, 0).astype(np.int32)
  positions = np.repeat([[0, 1, 2, 3, 4, 0, 1, 2]], ROWS, 0).astype(np.int32)
  return dict(
    inputs=ids, targets=np.roll(ids, -1, 1), weights=weights, segments=segments, positions=positions
  )


def optimizer(m, rule):
  rule = dict(
    adamw=functools.partial(rules.adamw, eps=1e-3),
    adafactor=functools.partial(adafactor.adafactor, min_factored=8),
  )[rule]
  return chain.make(
    m.axes, rule=rule, schedule=functools.partial(schedules.constant, peak=0.01), weight_decay=0.1
  )


def train(
  sizes,
  table,
  *,
  explicit=False,
  rule='adafactor',
  microbatches=1,
  updates=3,
  runner=stack.scan,
  **mixer,
):
  """Losses, parameters after `updates`, and gradients of the first batch, all as numpy."""
  m = model(runner, **mixer)
  with jax.set_mesh(mesh.make(**sizes, explicit=explicit)), mesh.rules(**table):
    tx = optimizer(m, rule)
    objective = functools.partial(language.next_token, m)
    layout = state_lib.layout(m, tx)
    state = state_lib.create(m, tx, 0, layout=layout)
    placed = mesh.place(batch())
    update = step.make(objective, tx, layout, microbatches=microbatches)
    key = jax.random.key(0)

    @jax.jit  # one program for both: compiling is what takes time here
    def both(state):
      return jax.grad(lambda p: objective(p, placed, key).sum)(state.params), update(
        state, placed, key
      )

    losses, grads = [], None
    for _ in range(updates):
      found, (state, metrics) = both(state)
      grads = jax.tree.map(np.asarray, found) if grads is None else grads
      losses.append(float(metrics['loss']))
    where = jax.tree.map(lambda x: x.sharding, state)
    return losses, jax.tree.map(np.asarray, state.params), grads, where


@functools.cache
def alone(rule='adafactor'):
  return train(dict(data=1), mesh.ZERO3, rule=rule)[:3]


def assert_same(found, wanted, rtol=1e-5):
  np.testing.assert_allclose(found[0], wanted[0], rtol=rtol)
  for got, want in zip(found[1:3], wanted[1:3], strict=True):
    scale = max(float(np.abs(w).max()) for w in jax.tree.leaves(want))
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize('name', variants(MESHES, ['data=2,fsdp=2,tensor=2']))
def test_every_mesh_computes_what_one_device_does(name):
  assert_same(train(MESHES[name], mesh.ZERO3), alone())


EXPLICIT = ['fsdp=8', 'data=4,tensor=2', 'data=2,fsdp=2,tensor=2']


@pytest.mark.parametrize('name', variants(EXPLICIT, ['data=4,tensor=2']))
def test_explicit_meshes_compute_what_one_device_does(name):
  assert_same(train(MESHES[name], mesh.ZERO3, explicit=True), alone())


@pytest.mark.parametrize(
  ('rules_name', 'explicit'),
  variants([('zero1', False), ('zero2', False), ('zero2', True)], [('zero2', True)]),
)
def test_zero_stages_compute_what_one_device_does(rules_name, explicit):
  found = train(
    MESHES['data=2,fsdp=2,tensor=2'], ALL_RULES[rules_name], explicit=explicit, rule='adamw'
  )
  assert_same(found, alone('adamw'))


def test_microbatches_and_unrolled_layers_on_a_mesh():
  found = train(
    dict(data=2, fsdp=1, tensor=2), mesh.ZERO3, explicit=True, microbatches=2, runner=stack.loop
  )
  assert_same(found, alone())


@pytest.mark.slow
@pytest.mark.parametrize('explicit', [False, True])
def test_one_group_of_keys_is_kept_whole_under_tensor_parallelism(explicit):
  """Multi-query attention (Shazeer 2019): a table that does not split the axis `groups`, for every kind of array."""
  table = {kind: dict(names, groups=()) for kind, names in mesh.ZERO3.items()}
  found = train(dict(data=2, tensor=2), table, explicit=explicit, groups=1, updates=2)
  assert_same(found, train(dict(data=1), mesh.ZERO3, groups=1, updates=2))


SPARSE = dict(
  banded=dict(window=3, sinks=1, kernel=kernels.banded, groups=2),
  dilated=dict(sees=functools.partial(masks.dilated, size=2, step=2)),
)


KERNELS = [('banded', False), ('banded', True), ('dilated', False), ('dilated', True)]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'explicit'), KERNELS)
def test_sparse_attention_on_a_mesh(name, explicit):
  found = train(dict(data=2, tensor=2), mesh.ZERO3, explicit=explicit, updates=2, **SPARSE[name])
  assert_same(found, train(dict(data=1), mesh.ZERO3, updates=2, **SPARSE[name]))


def bytes_per_device(shardings, shapes):
  return sum(
    4 * int(np.prod(s.shard_shape(x.shape)))
    for s, x in zip(jax.tree.leaves(shardings), jax.tree.leaves(shapes), strict=True)
  )


def test_zero_stages_split_what_they_say():
  """Rajbhandari et al. 2020, figure 1: the optimizer state, the gradients, the weights, each over the fsdp devices."""
  m, found = model(), {}
  for name, table in ALL_RULES.items():
    with jax.set_mesh(mesh.make(data=1, fsdp=8)), mesh.rules(**table):
      tx = optimizer(m, 'adamw')
      layout = state_lib.layout(m, tx)
      params = jax.eval_shape(m.init, jax.random.key(0))
      split = bytes_per_device(layout.state.params, params)
      moments = layout.state.opt_state.rule
      found[name] = (
        split,
        bytes_per_device(layout.gradients, params),
        bytes_per_device(moments.mu, params),
      )
  with_embed = sum(
    4 * x.size
    for p, x in tree.flatten(params).items()
    if 'embed' in tree.flatten(m.axes, is_leaf=tree.is_names)[p]
  )
  full = 4 * tree.count(params)
  small = full - with_embed + with_embed // 8
  assert found == dict(
    zero1=(full, full, small), zero2=(full, small, small), zero3=(small, small, small)
  )


def collectives(sizes, table=mesh.ZERO3, *, forward=False):
  m = model(stack.loop)
  with jax.set_mesh(mesh.make(**sizes)), mesh.rules(**table):
    tx = optimizer(m, 'adamw')
    layout = state_lib.layout(m, tx)
    placed = mesh.place(batch())
    objective = functools.partial(language.next_token, m)
    if forward:
      params = state_lib.create(m, tx, 0, layout=layout).params
      lowered = jax.jit(lambda p, b: m.hidden(p, b).x).lower(params, placed)
    else:
      state = state_lib.create(m, tx, 0, layout=layout)
      lowered = step.make(objective, tx, layout).lower(state, placed, jax.random.key(0))
    text = lowered.compile().as_text()
  return Counter(
    re.findall(
      r'= [^\n]*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(',
      text,
    )
  )


def test_data_parallelism_only_reduces():
  assert set(collectives(dict(data=8))) == {'all-reduce'}


def test_data_parallel_forward_needs_no_communication():
  assert not collectives(dict(data=8), forward=True)


def test_fsdp_gathers_weights_and_reduces_gradients():
  found = collectives(dict(data=1, fsdp=8))
  assert found['all-gather'] >= 7 * LAYERS  # q k v out gate up down of every layer
  assert found['all-reduce'] + found['reduce-scatter'] > 0
  assert not found['collective-permute']


def test_tensor_parallel_forward_has_two_reductions_a_layer():
  """Shoeybi et al. 2019 (Megatron-LM): one after attention, one after the feed-forward."""
  found = collectives(dict(data=1, tensor=4), forward=True)
  assert found['all-reduce'] == 2 * LAYERS
  assert not found['all-to-all']


def test_a_width_that_does_not_divide_is_named():
  with (
    jax.set_mesh(mesh.make(data=1, fsdp=1, tensor=8)),
    mesh.rules(**mesh.ZERO3),
    pytest.raises(UserError) as e,
  ):
    m = model()
    state_lib.layout(m, optimizer(m, 'adamw'))
  assert "'groups' of size 4 does not divide" in str(
    e.value
  ) and '--config.axes.weights.groups' in str(e.value)


def test_a_batch_that_does_not_divide_is_named():
  with (
    jax.set_mesh(mesh.make(data=8)),
    mesh.rules(**mesh.ZERO3),
    pytest.raises(UserError, match='multiple of 8'),
  ):
    mesh.check_batch(12)
  with pytest.raises(UserError, match='divisor of 12'):
    mesh.check_batch(12, 5)
