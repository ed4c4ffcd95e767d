"""The rollout: its log-probabilities, order, resumption in the middle of a round, one compilation per shape, errors."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import score
from llm_jax.objectives import policy
from llm_jax.rl import advantage, layout, rollout, toy
from llm_jax.train import checkpoint, hooks, report
from llm_jax.train.state import State
from tests.rl import toys


@pytest.fixture(autouse=True)
def one_device():
  with toys.world():
    yield


def same(a, b):
  assert sorted(a) == sorted(b)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_log_probabilities_are_those_of_the_learner_and_of_the_sampler():
  """Against `score.tokens`, another program; the sampler's own differ in the last bits of f32."""
  source = toys.make_source(method='ppo', round=128, batch=32, beta=0.5)
  state = toys.first(method='ppo')
  source(state)
  rows, words = source.rows, source.vocab
  assert rows['gap'].max() < 5e-6
  assert len(set(rows['weights'].sum(1))) > 3, 'answers of many lengths'
  prompts, answers, _ = source.answers()
  for i in range(0, 128, 17):
    answer, n = rows['weights'][i] > 0, int(rows['weights'][i].sum())
    ids = rows['targets'][i, answer]
    assert words.eos not in ids[:-1] and (n == 8 or ids[-1] == words.eos)
    told = [np.array([x], np.int32) for x in (words.encode(prompts[i]), ids)]
    expected = score.tokens(
      toys.model(), state.params, told[0], np.array([2]), told[1], np.array([n])
    )
    np.testing.assert_allclose(rows['old_logp'][i, answer], expected.logp[0], atol=5e-6)
    np.testing.assert_array_equal(rows['old_logp'][i], rows['ref_logp'][i])
    assert rows['reward'][i] == toy.gold(None, [answers[i]], None)[0]


def test_the_first_minibatch_is_at_ratio_one_exactly():
  """Not nearly: the policy has not moved, so no token may seem to have."""
  for method in ('ppo', 'grpo', 'rloo', 'shared'):
    _, seen = toys.train(
      toys.make_source(method=method, round=128, epochs=2),
      toys.first(method=method),
      method,
      steps=5,
    )
    assert seen[0]['old_kl'] == 0 and seen[0]['clipped'] == 0
    assert all(m['old_kl'] > 0 for m in seen[1:4])
    assert seen[4]['old_kl'] == 0  # 128 answers twice in minibatches of 64: the second round


def test_prompts_and_minibatches_are_fixed_by_the_seed():
  a, b, c = (toys.make_source(seed=s, round=128, batch=32, epochs=2) for s in (0, 0, 1))
  state = toys.first()
  first = [a(state) for _ in range(8)]
  for batch in first:
    same(batch, b(state))
  assert not np.array_equal(first[0]['targets'], c(state)['targets'])
  for epoch in (first[:4], first[4:]):  # each epoch is all 128 answers, in another order
    found = np.concatenate([x['old_logp'].sum(1) for x in epoch])
    np.testing.assert_array_equal(np.sort(found), np.sort(a.rows['old_logp'].sum(1)))
  assert not np.array_equal(first[0]['targets'], first[4]['targets'])
  seen = set(a.rows['index'])
  assert len(seen) == 16  # 64 prompts, 16 a round: none twice within four rounds
  for _ in range(3):
    [a(state) for _ in range(8)]
    assert not seen & set(a.rows['index'])
    seen |= set(a.rows['index'])


@pytest.mark.parametrize(
  ('method', 'stop'), [*itertools.product(('ppo', 'grpo'), (2, 5, 8)), ('shared', 5)]
)
def test_a_killed_run_goes_on_bit_by_bit(method, stop, tmp_path):
  """Stopped in the first minibatches of a round, in the middle and at its end: what comes is what would have come."""
  make = partial(
    toys.make_source, method=method, batch=32, round=64, epochs=2,
    control=partial(advantage.adaptive, target=0.01),
  )  # fmt: skip
  make = make if method == 'ppo' else partial(make, beta=0.01)
  steps = 13
  with checkpoint.Saver(str(tmp_path / 'whole'), every=100) as saver:
    source = make()
    begin = saver.restore(toys.first(method=method), source)
    whole, seen = toys.train(source, begin, method, steps=steps)
    end = source.state()
  with checkpoint.Saver(str(tmp_path / 'killed'), every=stop) as saver:
    source = make()
    begin = saver.restore(toys.first(method=method), source)
    toys.train(source, begin, method, steps=stop, hooks=[saver.hook])
  with checkpoint.Saver(str(tmp_path / 'killed'), every=stop) as saver:
    source = make()
    begin = saver.restore(toys.first(method=method), source)
    assert int(begin.step) == stop
    assert (source.rows is None) == (stop == 8), 'a round is kept until it is used up'
    last, rest = toys.train(source, begin, method, steps=steps)
  jax.tree.map(np.testing.assert_array_equal, last.params, whole.params)
  for found, wanted in zip(rest, seen[stop:], strict=True):
    same(found, wanted)
  assert json.dumps(source.state()) == json.dumps(end)


def test_arrays_come_back_bit_by_bit():
  rng = np.random.default_rng(0)
  arrays = dict(
    a=rng.normal(size=(3, 5)).astype(np.float32), b=rng.integers(0, 9, (2, 2)).astype(np.int32),
    c=np.array([True, False]), d=np.array([np.nan, -0.0, np.inf], np.float32),
  )  # fmt: skip
  found = layout.unpack(json.loads(json.dumps(layout.pack(arrays))))
  for name, x in arrays.items():
    assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes()
    assert found[name].shape == x.shape


def test_one_program_for_every_round():
  source = toys.make_source(method='ppo', batch=32, round=64)
  state = toys.first(method='ppo')
  source(state)
  compiled = []
  listen = lambda name, *_, **__: compiled.append(name)
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: listen(name) if 'backend_compile' in name else None
  )
  for _ in range(8):
    source(state)
  assert compiled == [] and source.round == 2


def test_a_round_is_as_long_as_it_needs_and_no_longer():
  """Prompts of 2 to 60 letters: at most four lengths of prompts and of rows, compiled once each, and the log-
  probabilities are those of the learner at any of them."""
  model = toy.model(value=False, length=72)
  texts = [toy.LETTERS[i % 13] * n for i, n in enumerate((2, 60, 20, 40, 3, 30, 50, 10))]
  source = rollout.make(
    model, prompts=lambda: [dict(prompt=t) for t in texts], reward=toy.gold, vocab=toy.Letters,
    batch=8, round=8, max_new=8, epochs=2,
  )  # fmt: skip
  state = State(None, model.init(jax.random.key(0)), None)
  compiled, seen = [], set()
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if 'backend_compile' in name else None
  )
  for i in range(32):
    before, shape = len(compiled), source(state)['inputs'].shape[1]
    prompt = len(texts[source.rows['index'][0]])
    assert prompt < shape <= min(68, prompt + 8 + 17) and source.rows['gap'].max() < 1e-5
    assert i < 16 or len(compiled) == before, 'each prompt was there once'
    seen.add(shape)
  assert seen == {17, 34, 51, 68}


def test_a_round_of_one_update_is_read_once():
  """By the update: with the sampler's log-probabilities in the batch it finds the same loss and gradients, to the last
  bit, as with the learner's; the gap between the two is its metric."""
  source = toys.make_source(epochs=1, temperature=0.7)
  read, source._read = source._read, None
  source._reference = toys.start(0)
  source._s = source._s._replace(reference=None)
  with pytest.raises(TypeError):
    source(toys.first())  # the reference's forward, which nothing stands in for
  source._reference = None
  batch = source(toys.first())
  assert 'gap' not in batch and batch['fresh'].all()
  exact = np.asarray(read(toys.start(0), batch)['old_logp'])
  gap = (np.abs(exact - batch['old_logp']) * batch['weights']).max(1)
  assert 0 < gap.max() < 5e-6

  @jax.jit
  def found(params, batch):
    told = lambda p: (lambda out: (out.sum, out))(
      policy.grpo(toys.model(), p, batch, None, temperature=0.7)
    )
    return jax.value_and_grad(told, has_aux=True)(params)

  (_, out), grads = found(toys.start(0), batch)
  (_, before), wanted = found(toys.start(0), dict(batch, old_logp=exact, gap=gap))
  jax.tree.map(np.testing.assert_array_equal, (out.sum, grads), (before.sum, wanted))
  assert out.metrics['old_kl'] == 0 and max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0.01
  np.testing.assert_allclose(out.metrics['gap'], gap.sum(), atol=1e-5)
  off = dict(batch, old_logp=batch['old_logp'] + 0.1 * (np.arange(64) == 5)[:, None])
  metrics = found(toys.start(0), off)[0][1].metrics
  np.testing.assert_allclose(metrics['gap'], 0.1, rtol=1e-3)
  np.testing.assert_allclose(metrics['gap_squared'], 0.01, rtol=1e-3)


def test_dynamic_sampling_fills_the_round_with_what_can_be_learned_from():
  letters = lambda prompts, answers, told: np.array(
    [a.startswith('a') for a in answers], np.float32
  )
  source = toys.make_source(reward=letters, keep=rollout.varied, tries=9)
  rows = source(toys.first())
  scores = source.rows['reward'].reshape(-1, 8)
  assert rows['reward'].shape == (64,) and (np.ptp(scores, axis=1) > 0).all()
  plain = toys.make_source(reward=letters)
  plain(toys.first())
  assert (np.ptp(plain.rows['reward'].reshape(-1, 8), axis=1) == 0).any()
  never = toys.make_source(reward=lambda p, a, t: np.ones(len(a)), keep=rollout.varied, tries=2)
  with pytest.raises(UserError, match='2 draws gave 0 of 64 answers to learn from'):
    never(toys.first())


def test_best_of_n_keeps_the_best():
  scores = np.array([[1, 5, 3], [2, 2, 0]], np.float32)
  np.testing.assert_array_equal(rollout.best(scores), [[0, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(rollout.best(scores, k=2), [[0, 1, 1], [1, 1, 0]])
  source = toys.make_source(method='raft')
  plain = toys.make_source()
  source(toys.first()), plain(toys.first())
  every = plain.rows['reward'].reshape(8, 8)
  np.testing.assert_array_equal(source.rows['reward'][:8], every.max(1))


def test_temperature_is_that_of_the_policy():
  """Drawn and learned at 0.5: the log-probabilities are those of the sharper distribution; the gap is still none."""
  source = toys.make_source(temperature=0.5)
  state = toys.first()
  source(state)
  rows = source.rows
  logits = np.asarray(
    toys.model().logits(state.params, toys.model().hidden(state.params, rows).x), np.float64
  )
  p = np.exp(logits / 0.5)
  p /= p.sum(-1, keepdims=True)
  own = np.log(np.take_along_axis(p, rows['targets'][..., None], -1)[..., 0])
  np.testing.assert_allclose(rows['old_logp'] * rows['weights'], own * rows['weights'], atol=1e-5)
  assert rows['gap'].max() < 5e-6


def test_layouts_with_and_without_a_start():
  prompts, lengths = np.array([[5, 6, 0], [7, 8, 9]], np.int32), np.array([2, 3])
  tokens, ends = np.array([[4, 1], [3, 0]], np.int32), np.array([2, 1])
  made = layout.lay(toys.model(), prompts, lengths, tokens, ends, 0)
  np.testing.assert_array_equal(made['inputs'], [[0, 5, 6, 4, 1], [0, 7, 8, 9, 3]])
  np.testing.assert_array_equal(made['targets'], [[5, 6, 4, 1, 0], [7, 8, 9, 3, 0]])
  np.testing.assert_array_equal(made['weights'], [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
  np.testing.assert_array_equal(made['segments'], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
  made = layout.lay(toys.model(), prompts, lengths, tokens, ends, None)
  np.testing.assert_array_equal(made['inputs'], [[5, 6, 4, 1], [7, 8, 9, 3]])
  np.testing.assert_array_equal(made['targets'], [[6, 4, 1, 0], [8, 9, 3, 0]])
  np.testing.assert_array_equal(made['weights'], [[0, 1, 1, 0], [0, 0, 1, 0]])


def nan_at(prompts, answers, told):
  return np.array([np.nan if p == told[9]['prompt'] else 0.0 for p in prompts])


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(round=60), 'round=60 must be a multiple of batch=64 and of group=8'),
    (dict(temperature=0.0), 'a policy draws'),
    (dict(beta=0.1, reference=None), 'beta=0.1 needs a reference'),
    (dict(prompts=list), 'there are no prompts'),
    (dict(prompts=lambda: [dict(prompt='ab'), dict(prompt='abc')], prompt_length=2), "prompt 1 has 3 tokens.*'abc'"),
    (dict(max_new=20), 'do not fit into the 15 positions'),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(settings, message):
  with pytest.raises(UserError, match=message):
    toys.make_source(**settings)


def test_a_reward_that_is_no_number_names_its_prompt():
  source = toys.make_source(reward=nan_at)
  with pytest.raises(
    UserError, match=r"reward gives nan for the prompt '[a-m]{2}' and the answer '"
  ):
    source(toys.first())
  source = toys.make_source(reward=lambda p, a, t: np.zeros(3))
  with pytest.raises(UserError, match=r'a number for each of 64 answers, got \(3,\)'):
    source(toys.first())


def failing(number, score=toy.gold):
  """`score`, but not a number at all for the last answer of the `number`th round."""
  calls = []

  def scored(prompts, answers, told):
    calls.append(1)
    found = np.array(score(prompts, answers, told))
    return (
      np.where(np.arange(len(found)) + 1 < len(found), found, np.nan)
      if len(calls) == number
      else found
    )

  return scored


@pytest.mark.parametrize('number', [1, 3])
def test_a_reward_that_is_no_number_in_any_round_costs_nothing_that_was_learned(number, tmp_path):
  """The run stops with the state saved; with the reward mended it ends where one that never failed ends."""
  make = partial(toys.make_source, batch=32, round=64, epochs=1)
  whole, _ = toys.train(make(), toys.first(), steps=6)

  def run(source):
    with checkpoint.Saver(str(tmp_path), every=100) as saver:
      begin = saver.restore(toys.first(), source)
      told = hooks.Run(toys.model(), source, saver, toys.Quiet(), str(tmp_path), 6)
      return int(begin.step), toys.train(source, begin, steps=6, rescue=report.rescue(told))[0]

  with pytest.raises(UserError, match=r"^reward gives nan for the prompt '[a-m]{2}' and the ans"):
    run(make(reward=failing(number)))
  first, last = run(make())
  assert first == 4 * (number // 2), 'rounds of two steps'
  jax.tree.map(np.testing.assert_array_equal, last.params, whole.params)


def test_a_foreign_state_is_refused():
  source = toys.make_source()
  with pytest.raises(UserError, match='not the state of a rollout'):
    source.restore(dict(block=0, row=0, batch=0))
  source(toys.first())
  other = toys.make_source(round=128, epochs=2)
  half = toys.make_source(batch=32)
  half(toys.first())
  with pytest.raises(UserError, match='in the middle of a round of 64 answers, not 128'):
    other.restore(half.state())


def test_eight_devices_write_the_same_answers():
  alone = toys.make_source(batch=64)
  alone(toys.first())
  wanted = alone.rows
  with jax.set_mesh(mesh.make(data=4, tensor=2)):
    where = mesh.shardings(toys.model().axes, toys.start(0))
    params = jax.device_put(toys.start(0), where)
    source = toys.make_source(batch=64, reference=lambda model: params)
    source(State(jnp.zeros((), jnp.int32), params, None))
  for name in ('targets', 'reward'):
    np.testing.assert_array_equal(source.rows[name], wanted[name])
  np.testing.assert_allclose(source.rows['old_logp'], wanted['old_logp'], atol=1e-5)
  np.testing.assert_allclose(source.rows['ref_logp'], wanted['ref_logp'], atol=1e-5)
