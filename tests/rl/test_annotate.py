"""Wrapped sources: the reference's numbers against float64, TRL's rotation, and that nothing else changes."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import vocab
from llm_jax.objectives import feedback, preference
from llm_jax.rl import annotate
from llm_jax.train import checkpoint, loop
from llm_jax.train import state as state_lib
from llm_jax.train import step as step_lib
from tests.model.test_scalar import make
from tests.objectives import make_reference, test_trl
from tests.objectives.pairs import text


class Fixed:
  """A source of 5 batches, over and over; what it is asked is written down."""

  batch, length, texts, vocab = 8, 9, 2, vocab.bytes_(extra_ids=0, modes=())

  def __init__(self, sides=('chosen', 'rejected')):
    rng = np.random.default_rng(7)
    one = lambda: {(f'{s}/{k}' if s else k): v for s in sides for k, v in text(rng, 8).items()}
    self.batches, self.at, self.closed = [one() for _ in range(5)], 0, False

  def __call__(self, state=None):
    self.at += 1
    return self.batches[(self.at - 1) % 5]

  def once(self):
    return iter(self.batches)

  def state(self):
    return dict(at=self.at)

  def restore(self, state):
    self.at = state['at']

  def skip(self, batches):
    self.at += batches

  def close(self):
    self.closed = True


def start(model, seed=0):
  params = jax.jit(model.init)(jax.random.key(seed))
  return state_lib.State(jnp.zeros((), jnp.int32), params, ())


def logp(model, params, told):
  """Summed over the targets that count, and of every token, in float64."""
  x = model.hidden(params, dict(inputs=told['inputs'])).x
  logits = np.asarray(model.logits(params, x), np.float64)
  every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  own = np.take_along_axis(every, told['targets'][..., None], -1)[..., 0]
  return (own * told['weights']).sum(1), every


def save(folder, model, seed, words=Fixed.vocab):
  with checkpoint.Saver(str(folder), asynchronous=False) as saver:
    saver.save(3, start(model, seed), {})
  words.save(str(folder / 'vocab'))
  return str(folder)


def test_without_a_run_the_reference_is_the_beginning_of_this_one():
  model, inner = make(), Fixed()
  source = annotate.with_reference(model, source=lambda _: inner)
  assert (source.batch, source.length, source.texts) == (8, 9, 2), 'what tokens/s are counted from'
  state = start(model)
  batch = source(state)
  for side in ('chosen', 'rejected'):
    told = {k: inner.batches[0][f'{side}/{k}'] for k in ('inputs', 'targets', 'weights')}
    assert batch[f'{side}/ref_logp'].dtype == np.float32
    np.testing.assert_allclose(
      batch[f'{side}/ref_logp'], logp(model, state.params, told)[0], atol=1e-4
    )
    np.testing.assert_array_equal(batch[f'{side}/inputs'], told['inputs'])
  out = preference.dpo(model, state.params, batch, None)
  np.testing.assert_allclose(out.sum / out.weight, np.log(2), rtol=1e-5)
  later = state.replace(step=jnp.int32(4), params=jax.tree.map(lambda x: x + 1, state.params))
  source.restore(dict(at=0))
  np.testing.assert_array_equal(source(later)['chosen/ref_logp'], batch['chosen/ref_logp'])


def test_a_run_is_read_from_its_folder(tmp_path):
  model = make()
  ref = save(tmp_path, model, seed=5)
  source = annotate.with_reference(model, source=lambda _: Fixed(), ref=ref)
  batch = source(start(model))
  told = {k: batch[f'chosen/{k}'] for k in ('inputs', 'targets', 'weights')}
  wanted = logp(model, start(model, 5).params, told)[0]
  np.testing.assert_allclose(batch['chosen/ref_logp'], wanted, atol=1e-4)


def test_all_else_is_the_sources_own():
  inner = Fixed()
  source = annotate.with_reference(make(), source=lambda _: inner)
  assert (source.batch, source.length, source.vocab) == (8, 9, inner.vocab)
  first = [source(None) for _ in range(3)]
  assert source.state() == dict(at=3)
  source.restore(dict(at=1))
  for name, value in source(None).items():
    np.testing.assert_array_equal(value, first[1][name])
  source.skip(2)
  assert inner.at == 4
  passes = list(source.once())
  assert len(passes) == 5
  np.testing.assert_array_equal(passes[0]['chosen/ref_logp'], first[0]['chosen/ref_logp'])
  source.close()
  assert inner.closed


def test_rows_split_over_eight_devices_have_the_same_reference():
  model = make()
  alone = annotate.with_reference(model, source=lambda _: Fixed())(None)
  with jax.set_mesh(mesh.make(data=4, fsdp=2)), mesh.rules(**mesh.ZERO3):
    spread = annotate.with_reference(model, source=lambda _: Fixed())(None)
  np.testing.assert_allclose(spread['chosen/ref_logp'], alone['chosen/ref_logp'], atol=1e-4)


def test_mismatched_responses_are_those_of_trl():
  rows = make_reference.singles()
  lay = lambda key: test_trl.text([(r['prompt_ids'], r[key]) for r in rows])
  found = annotate.mismatched(lay('completion_ids'))
  wanted = lay('KL_completion_ids')
  for name in ('targets', 'weights'):
    np.testing.assert_array_equal(found[name] * wanted['weights'], wanted[name] * wanted['weights'])
  read = np.cumsum(wanted['weights'][:, ::-1], 1)[:, ::-1] > 0
  np.testing.assert_array_equal(found['inputs'] * read, wanted['inputs'] * read)


def test_a_response_too_long_for_another_prompt_is_cut():
  ids = np.arange(1, 25, dtype=np.int32).reshape(2, 12)
  weights = np.zeros((2, 12), np.float32)
  weights[0, 9:], weights[1, 2:10] = 1, 1
  made = annotate.mismatched(dict(inputs=ids, targets=ids + 1, weights=weights))
  np.testing.assert_array_equal(made['targets'][0, 9:], [16, 17, 18])
  np.testing.assert_array_equal(made['inputs'][0], [*range(1, 11), 16, 17])
  np.testing.assert_array_equal(made['weights'].sum(1), [3, 3])


def test_kl_is_one_number_of_the_policy_as_it_stands():
  model, inner = make(), Fixed(('',))
  source = annotate.with_kl(model, source=lambda _: inner)
  state = start(model)
  first = source(state)
  np.testing.assert_allclose(first['kl'], np.zeros(8), atol=1e-5)
  moved = state.replace(params=start(model, 3).params, step=jnp.int32(1))
  source.restore(dict(at=0))
  again = source(moved)
  other = annotate.mismatched(inner.batches[0])
  gap = logp(model, moved.params, other)[0] - logp(model, state.params, other)[0]
  there = other['weights'].sum(1) > 0
  np.testing.assert_allclose(again['kl'], np.full(8, max(0.0, gap[there].mean())), atol=1e-4)
  np.testing.assert_array_equal(again['ref_logp'], first['ref_logp'])
  assert not next(iter(source.once()))['kl'].any()
  swapped = annotate.with_kl(model, source=lambda _: Fixed(('',)), seed=3)
  away = swapped(state.replace(step=jnp.int32(1)))[
    'kl'
  ]  # the other way round: clamped where it is negative
  np.testing.assert_allclose(away, np.full(8, max(0.0, -gap[there].mean())), atol=1e-4)
  assert (again['kl'] > 0).any() or (away > 0).any()


def test_quark_reads_its_token_and_the_reference_does_not():
  model, inner = make(), Fixed(('',))
  for batch in inner.batches:
    batch['quantile'] = np.arange(8, dtype=np.int32) % 3
  tokens = ('\x05', '\x06', '\x07')
  ids = [i for t in tokens for i in inner.vocab.encode(t)]
  inner.vocab = copy.copy(inner.vocab)
  source = annotate.with_top(model, source=lambda _: inner, tokens=tokens, top=4)
  batch, plain = source(start(model)), inner.batches[0]
  assert source.length == 10
  np.testing.assert_array_equal(batch['inputs'][:, 0], plain['inputs'][:, 0])
  np.testing.assert_array_equal(batch['inputs'][:, 1], np.array(ids)[plain['quantile']])
  np.testing.assert_array_equal(batch['targets'][:, 0], batch['inputs'][:, 1])
  for name in ('targets', 'weights'):
    np.testing.assert_array_equal(batch[name][:, 1:], plain[name])
  np.testing.assert_array_equal(batch['inputs'][:, 2:], plain['inputs'][:, 1:])
  assert not batch['weights'][:, 0].any()
  every = logp(model, start(model).params, plain)[1]
  np.testing.assert_allclose(batch['ref_top'][:, 1:], -np.sort(-every, -1)[..., :4], atol=1e-4)
  own = np.take_along_axis(every, batch['ref_ids'][:, 1:], -1)
  np.testing.assert_allclose(own, batch['ref_top'][:, 1:], atol=1e-4)
  out = feedback.quark(model, start(model).params, batch, None)
  assert np.isfinite(out.sum) and out.metrics['kl'] >= 0


@pytest.mark.parametrize(
  ('wrap', 'objective', 'sides'),
  [
    (annotate.with_reference, preference.dpo, ('chosen', 'rejected')),
    pytest.param(annotate.with_kl, preference.kto, ('',), marks=pytest.mark.slow),
  ],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, wrap, objective, sides):
  """Bit for bit, though the reference is loaded anew and KTO's point depends on the policy."""
  model, tx = make(), optax.adam(1e-2)
  update = step_lib.make(functools.partial(objective, model), tx)

  def begin():
    inner = Fixed(sides)
    for batch in inner.batches:
      batch |= dict(desirable=np.arange(8) % 2 == 0)
    params = jax.jit(model.init)(jax.random.key(0))
    state = state_lib.State(jnp.zeros((), jnp.int32), params, tx.init(params))
    return wrap(model, source=lambda _: inner), state

  def go(source, state, steps, saver):
    hooks = [saver.hook]
    return loop.train(state, source, update, steps=steps, key=jax.random.key(1), hooks=hooks)

  with checkpoint.Saver(str(tmp_path / 'whole'), asynchronous=False) as saver:
    source, state = begin()
    whole = go(source, saver.restore(state, source), 5, saver)
  for steps in (2, 5):
    with checkpoint.Saver(str(tmp_path / 'parts'), asynchronous=False, every=2) as saver:
      source, state = begin()
      parts = go(source, saver.restore(state, source), steps, saver)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_what_does_not_fit_is_refused(tmp_path):
  model = make()
  other = save(tmp_path / 'other', model, 0, vocab.bytes_(extra_ids=3, modes=()))
  wrap = lambda **kw: annotate.with_reference(model, source=lambda _: Fixed(), **kw)
  with pytest.raises(UserError, match='another tokenizer'):
    wrap(ref=other)
  with pytest.raises(UserError, match='no checkpoint'):
    wrap(ref=str(tmp_path / 'nothing'))
  with pytest.raises(UserError, match=r'source\.ref'):
    wrap()(start(model, seed=1))
  with pytest.raises(UserError, match='one token each'):
    annotate.with_top(model, source=lambda _: Fixed(('',)), tokens=('good', 'b'))
