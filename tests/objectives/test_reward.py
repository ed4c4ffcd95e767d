"""Reward models against formulas in float64; TRL's numbers are in test_trl.py."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.objectives import reward
from tests.objectives import pairs

CLOSE = dict(rtol=2e-5, atol=2e-5)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def read(batch, *sides):
  return [pairs.rewards(pairs.side(batch, s))[:3] for s in sides]


@pytest.mark.parametrize('noise', [0.0, 0.1])
def test_pairs_with_noise_margin_language_and_centre(noise):
  margin = np.array([1.0, 0.5, 0.0, 9.0], np.float32)
  batch = pairs.batch('chosen', 'rejected', margin=margin)
  out = pairs.run(reward.bradley_terry, batch, noise=noise, lm=0.3, centre=0.2)
  w, l = read(batch, 'chosen', 'rejected')
  (logp, size), _ = pairs.totals(batch, 'chosen', 'rejected')
  chance = (1 - noise) * sigmoid(w - l - margin[:3]) + noise / 2
  wanted = -np.log(chance) - 0.3 * logp / size + 0.2 * (w + l) ** 2
  np.testing.assert_allclose(out.sum, wanted.sum(), **CLOSE)
  np.testing.assert_allclose(out.metrics['accuracy'], (w > l).sum(), **CLOSE)
  assert out.weight == 3


def test_rankings_are_all_pairs_of_a_prompt():
  """InstructGPT's equation 1 by a loop over the pairs; a prompt with two answers has one pair."""
  there = np.ones((4, 4), bool)
  there[1, 2:] = False
  sides = [f'answer{i}' for i in range(4)]
  batch = pairs.batch(*sides, ranked=there)
  out = pairs.run(reward.ranked, batch)
  r = np.stack(read(batch, *sides), 1)
  wanted = []
  for row, exist in zip(r, there, strict=False):
    both = list(itertools.combinations([x for x, yes in zip(row, exist, strict=True) if yes], 2))
    wanted.append(-np.mean([math.log(sigmoid(better - worse)) for better, worse in both]))
  np.testing.assert_allclose(out.sum, sum(wanted), **CLOSE)
  assert out.weight == 3


def test_a_ranking_of_two_is_a_pair():
  batch = pairs.batch('chosen', 'rejected')
  renamed = {
    k.replace('chosen', 'answer0').replace('rejected', 'answer1'): v for k, v in batch.items()
  }
  pair, ranking = pairs.run(reward.bradley_terry, batch), pairs.run(reward.ranked, renamed)
  np.testing.assert_allclose(pair.sum, ranking.sum, rtol=1e-6)
  np.testing.assert_allclose(pair.metrics['accuracy'], ranking.metrics['accuracy'])


def test_the_reward_is_read_at_one_position():
  """Only the last target's position moves with the head; targets after the response change nothing."""
  text = pairs.text(np.random.default_rng(0), padding=False)
  made, params = pairs.model()
  x = made.hidden(params, text).x
  slope = jax.grad(lambda x: reward.rewards(params, x, text['weights']).sum())(x)
  touched = np.argwhere(np.abs(slope).sum(-1) > 0)
  last = [np.flatnonzero(w).max() for w in text['weights']]
  np.testing.assert_array_equal(touched, list(enumerate(last)))
  later = np.arange(pairs.LENGTH) > np.array(last)[:, None]
  changed = dict(text, inputs=np.where(later, 3, text['inputs']))
  np.testing.assert_allclose(
    reward.score(made, params, text), reward.score(made, params, changed), rtol=1e-5
  )
  np.testing.assert_allclose(reward.score(made, params, text), pairs.rewards(text), **CLOSE)


def test_regression():
  told = np.array([0.5, -1.0, 2.0, 8.0], np.float32)
  text = dict(pairs.text(np.random.default_rng(5)), reward=told)
  out = pairs.run(reward.regression, text)
  np.testing.assert_allclose(out.sum, ((pairs.rewards(text) - told)[:3] ** 2).sum(), **CLOSE)
  assert out.weight == 3


def test_steps_are_judged_by_one_of_three_words():
  text = pairs.text(np.random.default_rng(4))
  ends = {(0, 3): 3, (0, 5): 1, (1, 2): 2, (2, 7): 3}
  steps = np.zeros((4, pairs.LENGTH), np.int32)
  for at, judged in ends.items():
    steps[at] = judged
  labels = (4, 9, 6)  # bad, neutral, good
  out = pairs.run(reward.process, dict(text, steps=steps), labels=labels)
  p = np.exp(pairs.logp(text)[1])[..., labels]
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(
    out.sum, -sum(math.log(p[at][j - 1]) for at, j in ends.items()), **CLOSE
  )
  assert out.weight == 4
  made, params = pairs.model()
  batch = dict(text, steps=steps)
  product = reward.solutions(made, params, batch, labels=labels)
  least = reward.solutions(made, params, batch, labels=labels, combine=jnp.min)
  fine = 1 - p[..., 0]  # neutral counts as good
  np.testing.assert_allclose(
    product, [fine[0, 3] * fine[0, 5], fine[1, 2], fine[2, 7], 1], rtol=1e-5
  )
  np.testing.assert_allclose(
    least, [min(fine[0, 3], fine[0, 5]), fine[1, 2], fine[2, 7], 1], rtol=1e-5
  )


def test_centred_rewards_of_demonstrations_are_zero_on_average():
  made, params = pairs.model()
  batches = [pairs.text(np.random.default_rng(i)) for i in range(3)]
  moved = reward.centred(made, params, batches)
  found = np.concatenate([reward.score(made, moved, b)[:3] for b in batches])
  np.testing.assert_allclose(found.mean(), 0, atol=1e-6)
  assert found.std() > 0.1
  with pytest.raises(UserError, match='no demonstrations'):
    reward.centred(made, params, [])


def test_it_learns_which_token_is_liked():
  """Responses with token 7 are preferred: after 60 steps new pairs are told apart."""
  made, params = pairs.model()
  rng = np.random.default_rng(0)

  def batch(n=16):
    found = {}
    for side in ('chosen', 'rejected'):
      text = pairs.text(rng, n, padding=False)
      text['inputs'] = np.where(text['inputs'] == 7, 8, text['inputs'])
      if side == 'chosen':
        for inputs, w in zip(text['inputs'], text['weights'], strict=True):
          inputs[rng.integers(0, np.flatnonzero(w).max() + 1)] = 7
      found |= {f'{side}/{k}': v for k, v in text.items()}
    return found

  tx = optax.adam(1e-2)
  moments = tx.init(params)

  @jax.jit
  def update(params, moments, batch):
    def mean(p):
      out = reward.bradley_terry(made, p, batch, None)
      return out.sum / out.weight

    updates, moments = tx.update(jax.grad(mean)(params), moments)
    return optax.apply_updates(params, updates), moments

  for _ in range(60):
    params, moments = update(params, moments, batch())
  out = reward.bradley_terry(made, params, batch(256), None)
  assert out.metrics['accuracy'] / out.weight > 0.95


def test_a_model_without_a_number_is_refused():
  made, params = pairs.model()
  plain = {k: v for k, v in params.items() if k != 'scalar'}
  with pytest.raises(UserError, match='scalar.make'):
    reward.bradley_terry(made, plain, pairs.batch('chosen', 'rejected'), None)
