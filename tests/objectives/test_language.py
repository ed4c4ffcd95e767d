"""The loss against closed forms and a numpy version of T5X's; fused = whole, on one device and on eight."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh, tree, weights
from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.objectives import cross_entropy, language, loss

B, T, D, V = 4, 10, 16, 24


class Hidden(NamedTuple):
  x: jax.Array
  states: object
  aux: dict


class Card(NamedTuple):
  vocab: int


class Fake(NamedTuple):
  """An embedding and a tied head, optionally soft-capped: the loss sees no more of a model than this."""

  card: Card = Card(V)
  cap: float | None = None
  dtype: str = 'float32'
  aux: tuple = ()

  def hidden(self, params, batch, *, states=None, rng=None):
    x = weights.lookup(params['embedding']['table'], batch['inputs'], dtype=self.dtype)
    x = weights.einsum('btd,df->btf', x, params['mix'])
    return Hidden(mesh.shard(jnp.tanh(x), 'batch', 'length', 'embed'), None, dict(self.aux))

  def head(self, params):
    return {'embedding': params['embedding']}

  def logits(self, params, x):
    y = weights.einsum('btd,vd->btv', x, params['embedding']['table'], dtype=jnp.float32)
    return y if self.cap is None else self.cap * jnp.tanh(y / self.cap)


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  table, mix = rng.normal(size=(V, D)), rng.normal(size=(D, D)) / 4
  return {
    'embedding': {'table': jnp.asarray(table, jnp.float32)},
    'mix': jnp.asarray(mix, jnp.float32),
  }


def make_batch(seed=1, rows=B):
  rng = np.random.default_rng(seed)
  ids = lambda: jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32)
  return dict(
    inputs=ids(),
    targets=ids(),
    weights=jnp.asarray(rng.random((rows, T)) * (rng.random((rows, T)) < 0.7), jnp.float32),
  )


def t5x(logits, targets, weight, z_loss, smoothing):
  """`compute_weighted_cross_entropy`, from its description, in f64."""
  logits, weight = np.asarray(logits, np.float64), np.asarray(weight, np.float64)
  vocab = logits.shape[-1]
  low = smoothing / (vocab - 1)
  soft = np.full(logits.shape, low)
  np.put_along_axis(soft, np.asarray(targets)[..., None], 1 - smoothing, -1)
  log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  entropy = -sum(q * math.log(q) * n for q, n in ((1 - smoothing, 1), (low, vocab - 1)) if q > 0)
  each = -(soft * (logits - log_z[..., None])).sum(-1) - entropy + z_loss * log_z**2
  return (weight * each).sum(), (weight * z_loss * log_z**2).sum()


def value_and_grad(model, params, batch, **kw):
  def total(params):
    out = language.next_token(model, params, batch, None, **kw)
    return out.sum, out

  (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return out, grads


def evaluate(model, params, batch, **kw):
  return jax.jit(lambda p, b: language.next_token(model, p, b, None, **kw))(params, batch)


def assert_close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


SETTINGS = [
  dict(),
  dict(z_loss=1e-2),
  dict(label_smoothing=0.1),
  dict(z_loss=1e-2, label_smoothing=0.2),
]


@pytest.mark.parametrize('kw', SETTINGS)
def test_t5x(kw):
  params, batch, model = make_params(), make_batch(), Fake()
  out = evaluate(model, params, batch, **kw)
  logits = model.logits(params, model.hidden(params, batch).x)
  expected, z = t5x(
    logits, batch['targets'], batch['weights'], kw.get('z_loss', 0), kw.get('label_smoothing', 0)
  )
  plain, _ = t5x(logits, batch['targets'], batch['weights'], 0, 0)
  right = (np.asarray(logits).argmax(-1) == batch['targets']) * batch['weights']
  np.testing.assert_allclose(out.sum, expected, rtol=2e-6)
  np.testing.assert_allclose(out.metrics['nats'], plain, rtol=2e-6)
  np.testing.assert_allclose(out.metrics['z_loss'], z, rtol=2e-6)
  np.testing.assert_allclose(out.metrics['accuracy'], right.sum(), rtol=2e-6)
  np.testing.assert_allclose(out.weight, batch['weights'].sum(), rtol=1e-6)


@pytest.mark.parametrize('chunk', [None, 3])
def test_uniform_logits_cost_log_v(chunk):
  params = jax.tree.map(jnp.zeros_like, make_params())
  batch = make_batch()
  out = evaluate(Fake(), params, batch, chunk=chunk)
  np.testing.assert_allclose(out.sum / out.weight, math.log(V), rtol=1e-6)
  np.testing.assert_allclose(out.metrics['accuracy'] / out.weight, 1 / V, rtol=1e-5)


@pytest.mark.parametrize('cap', [None, 5.0])
@pytest.mark.parametrize('chunk', [1, 3, 5, 64])
def test_fused_is_whole(chunk, cap):
  params, batch, kw = make_params(), make_batch(), SETTINGS[-1]
  whole = value_and_grad(Fake(cap=cap), params, batch, chunk=None, **kw)
  fused = value_and_grad(Fake(cap=cap), params, batch, chunk=chunk, **kw)
  assert_close(whole, fused, rtol=1e-5, atol=2e-6)
  evaluated = evaluate(Fake(cap=cap), params, batch, chunk=chunk, **kw)
  assert_close(evaluated, whole[0], rtol=1e-6)


def test_fused_gradient_scales_with_what_follows():
  params, batch = make_params(), make_batch()

  def tripled_mean(params, chunk):
    out = language.next_token(Fake(), params, batch, None, chunk=chunk)
    return 3 * out.sum / out.weight

  grad = jax.jit(jax.grad(tripled_mean), static_argnums=1)
  assert_close(grad(params, None), grad(params, 4), rtol=1e-5, atol=1e-7)


def test_only_what_is_differentiated_costs():
  """With a frozen head the backward pass has no [vocab, embed] gradient; without any, no gradient at all."""
  params, batch, model = make_params(), make_batch(), Fake()
  x = model.hidden(params, batch).x

  def loss_of(x, head):
    args = (model.logits, head, x, batch['targets'], batch['weights'], cross_entropy.Penalty())
    return cross_entropy.fused(*args, 5).loss

  def dots(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text().count(' dot(')

  head = model.head(params)
  both = dots(lambda x, h: jax.vjp(loss_of, x, h)[1](1.0), x, head)
  frozen = dots(lambda x: jax.vjp(lambda x: loss_of(x, head), x)[1](1.0), x)
  assert (dots(loss_of, x, head), frozen, both) == (1, 2, 3)
  frozen_grad = jax.jit(jax.grad(lambda x: loss_of(x, head)))(x)
  assert_close(frozen_grad, jax.jit(jax.grad(loss_of))(x, head), rtol=1e-6)


def test_logits_of_the_whole_length_never_exist():
  params, batch = make_params(), make_batch()
  out = lambda chunk: jax.jit(
    lambda p: jax.grad(lambda p: language.next_token(Fake(), p, batch, None, chunk=chunk).sum)(p)
  )
  shapes = lambda chunk: out(chunk).lower(params).as_text()
  assert f'{B}x{T}x{V}xf32' in shapes(None)
  assert f'{B}x{T}x{V}xf32' not in shapes(5) and f'{B}x5x{V}xf32' in shapes(5)


def test_z_loss_gradient_in_closed_form():
  """d (z log^2 Z) / d logits = 2 z log Z softmax."""
  rng = np.random.default_rng(3)
  logits = jnp.asarray(rng.normal(size=(1, 2, V)), jnp.float32)
  head, targets, ones = {'b': jnp.zeros(V)}, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
  z = 0.3
  for chunk in (None, 1):

    def total(x, z, chunk=chunk):
      args = (lambda h, x: x + h['b'], head, x, targets, ones, cross_entropy.Penalty(z))
      return (
        cross_entropy.whole(*args) if chunk is None else cross_entropy.fused(*args, chunk)
      ).loss

    grad = jax.jit(jax.grad(total), static_argnums=1)
    got = grad(logits, z) - grad(logits, 0.0)
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, 2 * z * log_z * np.exp(logits - log_z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('chunk', [None, 4])
def test_positions_of_weight_zero_do_not_exist(chunk):
  params, batch = make_params(), make_batch()
  changed = dict(
    batch, targets=jnp.where(batch['weights'] > 0, batch['targets'], (batch['targets'] + 7) % V)
  )
  kw = dict(SETTINGS[-1], chunk=chunk)
  assert_close(
    value_and_grad(Fake(), params, batch, **kw),
    value_and_grad(Fake(), params, changed, **kw),
    rtol=0,
  )
  nothing = dict(batch, weights=jnp.zeros((B, T)))
  out, grads = value_and_grad(Fake(), params, nothing, **kw)
  assert float(out.sum) == float(out.weight) == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_absent_weights_are_ones():
  batch = make_batch()
  without = {k: v for k, v in batch.items() if k != 'weights'}
  ones = dict(batch, weights=jnp.ones((B, T)))
  run = lambda b: evaluate(Fake(), make_params(), b)
  assert_close(run(without), run(ones), rtol=0)


@pytest.mark.parametrize('parts', [2, 4])
def test_microbatches_add_up(parts):
  params, batch = make_params(), make_batch()

  @jax.jit
  def run(batch):
    return value_and_grad(Fake(), params, batch, **SETTINGS[-1], chunk=4)

  pieces = [run({k: v[i::parts] for k, v in batch.items()}) for i in range(parts)]
  together = functools.reduce(loss.add, (p[0] for p in pieces))
  grads = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (p[1] for p in pieces))
  assert_close((together, grads), run(batch), rtol=2e-5, atol=2e-6)


def test_bfloat16_activations_leave_the_loss_in_float32():
  params, batch = make_params(), make_batch()
  exact, exact_grads = value_and_grad(Fake(), params, batch, chunk=4)
  out, grads = value_and_grad(Fake(dtype='bfloat16'), params, batch, chunk=4)
  assert {v.dtype for v in jax.tree.leaves((out, grads))} == {jnp.dtype('float32')}
  np.testing.assert_allclose(out.sum, exact.sum, rtol=2e-2)
  spread = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(exact_grads))
  assert_close(grads, exact_grads, atol=3e-2 * spread)


@pytest.mark.parametrize('chunk', [None, 4])
def test_padded_rows_of_the_table_are_no_tokens(chunk):
  """A vocabulary padded from V - 4 to V: the same loss as a table of V - 4 rows, also with smoothing."""

  class Padded(Fake):
    def logits(self, params, x):
      y = super().logits(params, x)
      return jnp.where(jnp.arange(V) < V - 4, y, -1e30)

  params, batch = make_params(), make_batch()
  batch = {k: v % (V - 4) if v.dtype == jnp.int32 else v for k, v in batch.items()}
  short = dict(params, embedding={'table': params['embedding']['table'][: V - 4]})
  kw = dict(SETTINGS[-1], chunk=chunk)
  out, grads = value_and_grad(Padded(card=Card(V - 4)), params, batch, **kw)
  expected, expected_grads = value_and_grad(Fake(card=Card(V - 4)), short, batch, **kw)
  assert_close(out, expected, rtol=1e-5)
  assert_close(grads['mix'], expected_grads['mix'], rtol=1e-4, atol=1e-5)
  assert not np.any(grads['embedding']['table'][V - 4 :])


def test_auxiliary_losses_count_like_the_targets_of_their_rows():
  """So their sum over the weight is their mean, whatever the batch was cut into."""
  each = np.arange(1.0, B + 1)
  model = Fake(aux=(('balance', jnp.asarray(each)), ('seen/dropped', jnp.asarray(each))))
  params, batch = make_params(), make_batch()
  plain, out = (evaluate(m, params, batch) for m in (Fake(), model))
  added = (each * np.asarray(batch['weights']).sum(-1)).sum()
  np.testing.assert_allclose(out.sum, plain.sum + added, rtol=1e-6)
  np.testing.assert_allclose(out.metrics['balance'], added, rtol=1e-6)
  np.testing.assert_allclose(out.metrics['seen/dropped'], added, rtol=1e-6)


@pytest.mark.parametrize('explicit', [False, True])
@pytest.mark.parametrize(
  'sizes', [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8), dict(data=1, tensor=8)], ids=str
)
@pytest.mark.parametrize('chunk', [None, 4])
def test_devices(chunk, sizes, explicit):
  """Rows, embedding and vocabulary split over eight devices: the loss and gradients of one."""
  params, batch, kw = make_params(), make_batch(rows=8), dict(SETTINGS[-1], chunk=chunk)
  expected = value_and_grad(Fake(), params, batch, **kw)
  axes = {'embedding': {'table': ('vocab', 'embed')}, 'mix': ('embed', 'ffn')}
  with (
    jax.set_mesh(mesh.make(explicit=explicit, **sizes)),
    mesh.rules(**dict(mesh.ZERO3, weights=dict(vocab=('tensor',), embed=('fsdp',)))),
  ):
    placed = jax.device_put(params, mesh.shardings(axes, params))
    if explicit:
      batch = {
        k: jax.device_put(
          v, jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec('batch', 'length'))
        )
        for k, v in batch.items()
      }
    got = value_and_grad(Fake(), placed, batch, **kw)
  assert_close(jax.device_get(got), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('explicit', [False, True])
def test_a_frozen_head_on_devices(explicit):
  params, batch = make_params(), make_batch(rows=8)

  def total(mix, table, batch):
    params = {'embedding': {'table': jax.lax.stop_gradient(table)}, 'mix': mix}
    return language.next_token(Fake(), params, batch, None, chunk=4).sum

  args = params['mix'], params['embedding']['table']
  expected = jax.jit(jax.grad(total))(*args, batch)
  with jax.set_mesh(mesh.make(data=2, fsdp=4, explicit=explicit)):
    got = jax.jit(jax.grad(total))(*args, mesh.place(batch))
  np.testing.assert_allclose(jax.device_get(got), expected, rtol=1e-5, atol=1e-5)


def test_head_gradients_cross_devices_once():
  """Chunks add up on each device: the loop over them holds no collective."""
  params, batch = make_params(), make_batch(rows=8)
  with jax.set_mesh(mesh.make(data=8)):
    total = lambda p, b: language.next_token(Fake(), p, b, None, chunk=2).sum
    text = jax.jit(jax.grad(total)).lower(params, mesh.place(batch)).compile().as_text()
  loops = {
    line.split('body=')[1].split(',')[0].strip() for line in text.splitlines() if ' while(' in line
  }
  bodies = [part for part in text.split('\n\n') if part.strip().split(' ')[0] in loops]
  assert loops and len(bodies) == len(loops)
  assert not [
    line
    for body in bodies
    for line in body.splitlines()
    if 'all-reduce' in line or 'all-gather' in line
  ]
  assert 'all-reduce' in text


@pytest.mark.parametrize(
  'kw, remedy',
  [
    (dict(z_loss=-1.0), '0 is none'),
    (dict(label_smoothing=1.0), 'probability'),
    (dict(chunk=0), 'None for the whole length'),
  ],
)
def test_nonsense_is_refused(kw, remedy):
  with pytest.raises(UserError, match=remedy):
    language.next_token(Fake(), make_params(), make_batch(), None, **kw)


def test_from_a_config():
  built = build(use(language.next_token, z_loss=1e-4))
  assert built.keywords == dict(z_loss=1e-4, label_smoothing=0.0, chunk=32)


@pytest.mark.parametrize('head', ['Tied', 'Untied'])
def test_transformer(head):
  """The real model: fused = whole for every parameter, log V on average before any training."""
  from llm_jax.model import attention, block, ffn, heads, transformer

  layers = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=2),
    ffn=functools.partial(ffn.Gated, hidden=32),
  )
  model = transformer.causal(
    vocab=V, embed=D, layers=1, block=layers, head=getattr(heads, head), vocab_multiple=16
  )
  params = jax.jit(model.init)(jax.random.key(0))
  batch = make_batch()
  kw = dict(SETTINGS[-1])
  whole, fused = (value_and_grad(model, params, batch, chunk=c, **kw) for c in (None, 4))
  assert_close(whole, fused, rtol=2e-5, atol=2e-6)
  out = whole[0]
  np.testing.assert_allclose(out.metrics['nats'] / out.weight, math.log(V), atol=0.3)
  assert all(np.any(g) for path, g in tree.flatten(whole[1]).items()), 'every parameter learns'
