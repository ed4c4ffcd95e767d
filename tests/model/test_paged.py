"""Attention in pages against the same attention over whole sequences, and layers that lie apart against a stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llm_jax.core import weights
from llm_jax.decode.generate import generate
from llm_jax.model import kernels, paged, stack
from llm_jax.model.masks import Mask
from tests.variants import variants

from .conftest import causal, t5

GROUPS, HEADS, WIDE, SIZE, PAGES = 2, 6, 8, 4, 40


def filled(dtype, lengths: list[int], seed: int = 0) -> tuple:
  """(pools, table, keys, values) of sequences whose slots were written, pages in no order."""
  rng = np.random.default_rng(seed)
  most = -(-max(lengths) // SIZE)
  table = np.full((len(lengths), most + 2), -1, np.int32)
  free = rng.permutation(PAGES).tolist()
  for row, n in zip(table, lengths, strict=True):
    row[: -(-n // SIZE)] = [free.pop() for _ in range(-(-n // SIZE))]
  pool = lambda: paged.pool(GROUPS, PAGES, SIZE, WIDE, dtype)
  k, v = (rng.normal(size=(len(lengths), max(lengths), GROUPS, WIDE)) for _ in 'kv')
  k, v = jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
  slots = np.broadcast_to(np.arange(max(lengths)), k.shape[:2])
  real = slots < np.array(lengths)[:, None]
  state = paged.write(dict(k=pool(), v=pool()), dict(k=k, v=v), table, slots, real)
  return state, table, k, v


@pytest.mark.parametrize('t', [1, 3])
@pytest.mark.parametrize(
  ('block', 'cap', 'biased'),
  [(4, None, False), (7, 5.0, True), (64, None, False)],
)
def test_pages_are_attention_over_the_whole(t, block, cap, biased):
  lengths = [13, 4, 30, 8]
  state, table, k, v = filled(jnp.float32, lengths)
  q = jnp.asarray(np.random.default_rng(1).normal(size=(4, t, HEADS, WIDE)), jnp.float32)
  slots = np.array(lengths)[:, None] - t + np.arange(t)
  bias = None
  if biased:
    shape = 4, HEADS, t, table.shape[1] * SIZE
    bias = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
  told = dict(cap=cap, block=block, bias=bias)
  found = paged.attend(q, state['k'], state['v'], table, slots, **told)
  bias = None if bias is None else bias[..., : k.shape[1]]
  mask = Mask(True, queries=jnp.asarray(slots))
  expected = kernels.reference(q, k, v, mask, bias, cap=cap)
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_row_has_the_same_bits_however_far_the_others_go():
  q = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, HEADS, WIDE)), jnp.float32)
  state, table, _, _ = filled(jnp.float32, [9, 40, 17])
  run = functools.partial(paged.attend, q, state['k'], state['v'], table, block=8)
  near, far = run(np.array([[8], [0], [0]])), run(np.array([[8], [39], [16]]))
  assert (near[0] == far[0]).all() and (near[1] != far[1]).any()


def wide(dtype=jnp.float32) -> tuple:
  """(queries, pools, table, slots) whose heads are wide enough for the kernel of TPUs."""
  rng = np.random.default_rng(0)
  k, v = (jnp.asarray(rng.normal(size=(2, 16, 16, 128)), dtype) for _ in 'kv')
  q = jnp.asarray(rng.normal(size=(2, 1, 8, 128)), dtype)
  return q, k, v, np.array([[3, 5, 7, 9], [1, 2, -1, -1]]), np.array([[50], [20]])


def test_tpus_use_their_kernel_and_others_do_not():
  traced = jax.jit(paged.attend).trace(*wide())
  assert 'tpu_custom_call' in traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'custom_call' not in traced.lower(lowering_platforms=('cpu',)).as_text()


@pytest.mark.parametrize('cap', [None, 3.0])
def test_the_kernel_of_tpus_agrees(cap):
  q, k, v, table, slots = wide()
  table = np.pad(table, ((0, 0), (0, 4)), constant_values=-1)
  with pltpu.force_tpu_interpret_mode():
    found = jax.jit(functools.partial(paged._tpu, cap=cap, per=8))(q / 128**0.5, k, v, table, slots)
  expected = paged.attend(q, k, v, table, slots, cap=cap)
  np.testing.assert_allclose(found, expected, atol=0.02)  # its products are of bfloat16


def test_slots_without_a_page_and_padding_are_not_written():
  state, table, k, v = filled(jnp.float32, [6, 6])
  before = jax.tree.map(np.array, state)
  none = np.full_like(table, -1)
  slots = np.array([[6, 7], [6, 400]])
  same = paged.write(state, dict(k=k[:, :2], v=v[:, :2]), none, slots)
  jax.tree.map(np.testing.assert_array_equal, same, before)
  again = paged.write(state, dict(k=k[:, :2], v=v[:, :2]), table, slots, np.zeros((2, 2), bool))
  jax.tree.map(np.testing.assert_array_equal, again, before)
  new = paged.write(state, dict(k=k[:, :2], v=v[:, :2]), table, slots)['k']
  page = int(table[0, 1])
  np.testing.assert_array_equal(new[:, page, 2:], np.moveaxis(k[0, :2], 1, 0))
  assert (np.asarray(new) != before['k']).any((0, 2, 3)).sum() == 2  # one page of each row


def test_int8_pages_err_by_half_a_step_at_most():
  state, table, k, _ = filled(jnp.int8, [11])
  assert isinstance(state['k'], weights.Quantized) and state['k'].values.dtype == jnp.int8
  back = np.moveaxis(np.asarray(paged.gather(state['k'], table, jnp.float32))[:, 0, :11], 0, 1)
  step = np.abs(k[0]).max(-1, keepdims=True) / 127
  assert (np.abs(back - k[0]) <= step / 2 * 1.001).all() and (back != k[0]).any()


@pytest.mark.parametrize('kind', variants(['causal', 'encoder_decoder'], ['causal']))
def test_layers_apart_are_the_stack(kind):
  model = t5() if kind == 'encoder_decoder' else causal(dict(groups=2))
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), params)
  split = stack.apart(params)
  assert stack.is_apart(split['decoder']) and not stack.is_apart(params['decoder'])
  ids = rng.integers(2, 40, (2, 5))
  batch = {'inputs': ids}
  if kind == 'encoder_decoder':
    batch['encoder/inputs'] = ids[:, ::-1]
  np.testing.assert_allclose(model.hidden(split, batch).x, model.hidden(params, batch).x, atol=1e-5)
  outs = [
    generate(model, p, ids, [5, 3], jax.random.key(1), max_new=6, eos=None) for p in (split, params)
  ]
  assert (outs[0].tokens == outs[1].tokens).all()
  np.testing.assert_allclose(outs[0].logp, outs[1].logp, atol=1e-4)


def test_apart_frees_the_stack_when_told_to():
  model = causal()
  params = model.init(jax.random.key(0))
  table = params['embedding']['table']
  stacked = jax.tree.leaves(params['decoder']['layers'])
  stack.apart(params, free=True)
  assert all(x.is_deleted() for x in stacked) and not table.is_deleted()
