"""Advantages against sums written out in float64, and the numbers that the papers' formulas give by hand."""

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.rl import advantage

SPANS = ((2, 9), (0, 10), (4, 5), (3, 3))  # where each row's answer is; the last row has none


def make_told(group=2, values=True, seed=0):
  rng = np.random.default_rng(seed)
  weights = np.zeros((4, 10), np.float32)
  for row, (start, end) in zip(weights, SPANS):
    row[start:end] = 1
  draw = lambda: rng.normal(size=(4, 10)).astype(np.float32)
  return advantage.Told(
    draw()[:, 0], draw() * weights, draw() * weights if values else None, weights, group
  )


def explicit(rewards, values, start, end, gamma, lam):
  """A_t = sum over k of (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}), for every t, in float64."""
  rewards, values = np.float64(rewards), np.float64(values)
  after = lambda t: values[t + 1] if t + 1 < end else 0.0
  delta = [rewards[t] + gamma * after(t) - values[t] for t in range(end)]
  return [
    sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, end)) for t in range(start, end)
  ]


@pytest.mark.parametrize(('gamma', 'lam'), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
  told = make_told()
  found = advantage.discounted(told.rewards, told.values, told.weights, gamma, lam)
  for i, (start, end) in enumerate(SPANS):
    expected = explicit(told.rewards[i], told.values[i], start, end, gamma, lam)
    np.testing.assert_allclose(found[i, start:end], expected, rtol=1e-5, atol=1e-6)
  assert not found[told.weights == 0].any()
  credit, _ = advantage.gae(told, {}, gamma=gamma, lam=lam)
  np.testing.assert_allclose(credit.returns, found + told.values, atol=1e-6)
  own = credit.advantages[told.weights > 0]
  assert abs(own.mean()) < 1e-6 and abs(own.std() - 1) < 1e-5
  assert not credit.advantages[told.weights == 0].any()


def test_gae_steps_over_what_does_not_count():
  """Between two turns of the policy stand the user's tokens: the second follows the first as if they were not there."""
  told = make_told()
  split = [np.insert(x, 5, 7.0, axis=1) for x in (told.rewards, told.values)]
  weights = np.insert(told.weights, 5, 0.0, axis=1)
  found = advantage.discounted(*split, weights, 0.9, 0.8)
  whole = advantage.discounted(told.rewards, told.values, told.weights, 0.9, 0.8)
  np.testing.assert_array_equal(np.delete(found, 5, axis=1), whole)


def test_the_score_is_paid_with_the_last_token_and_the_divergence_with_each():
  weights = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.float32)
  logp = np.array([[-1.0, -2, -3, -4, -5], [-1, -1, -1, -1, -1]])
  ref = np.array([[-9.0, -1, -3, -6, -9], [-2, -1, 0, 0, 0]])
  found = advantage.penalised(np.array([10.0, -10.0]), logp, ref, weights, 0.5)
  expected = [[0, 0.5, 0, 10 - 1, 0], [-0.5, -10, 0, 0, 0]]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # the sum is the reward of the whole answer (InstructGPT, eq. 2)
  np.testing.assert_allclose(
    found.sum(1), np.array([10, -10]) - 0.5 * ((logp - ref) * weights).sum(1)
  )


def test_baselines_by_hand():
  """Two prompts with the scores (1, 3) and (2, 6)."""
  weights = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]], np.float32)
  rewards = np.zeros((4, 3), np.float32)
  rewards[[0, 1, 2, 3], [1, 2, 0, 2]] = scores = np.array([1.0, 3, 2, 6], np.float32)
  told = advantage.Told(scores, rewards, None, weights, 2)
  expected = dict(
    leave_one_out=[1 - 3, 3 - 1, 2 - 6, 6 - 2],
    batch_mean=scores - 3,
    dr_grpo=[-1, 1, -2, 2],
    grpo=[-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), -2 / (8**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)],
    score=scores,
  )
  for name, each in expected.items():
    credit, _ = getattr(advantage, name)(told, {})
    np.testing.assert_allclose(credit.advantages, np.reshape(each, (4, 1)) * weights, rtol=1e-6)


def test_the_moving_baseline_is_an_average_of_the_rounds_before():
  memory, seen = {}, []
  for r in range(4):
    told = make_told(seed=r)
    credit, memory = advantage.moving(told, memory, decay=0.8)
    share = np.array([0.8 ** (r - 1 - i) for i in range(r)])
    baseline = float(share @ seen / share.sum()) if r else 0.0
    total = told.rewards.sum(1, dtype=np.float64)
    np.testing.assert_allclose(
      credit.advantages, (total - baseline)[:, None] * told.weights, atol=1e-6
    )
    seen.append(total.mean())


def test_the_coefficient_follows_zieglers_rule():
  beta = lambda kl: advantage.adaptive(0.2, kl, target=6.0)
  assert beta(6.0) == 0.2
  np.testing.assert_allclose(
    [beta(6.6), beta(5.4), beta(100.0), beta(0.0)],
    [0.2 * 1.01, 0.2 * 0.99, 0.2 * 1.02, 0.2 * 0.98],
  )
  assert advantage.fixed(0.2, 100.0) == 0.2


def test_a_long_answer_is_punished_softly():
  found = advantage.overlong(np.array([1, 48, 56, 64, 70]), limit=64, buffer=16)
  np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])


def test_what_cannot_be_estimated_is_refused():
  with pytest.raises(UserError, match='gae needs values'):
    advantage.gae(make_told(values=False), {})
  for estimate in (advantage.leave_one_out, advantage.grpo):
    with pytest.raises(UserError, match='set group to 2 or more'):
      estimate(make_told(group=1), {})
  with pytest.raises(UserError, match='must be positive'):
    advantage.adaptive(0.1, 1.0, target=0.0)
  with pytest.raises(UserError, match='between 1 and limit=8'):
    advantage.overlong(np.ones(3), limit=8, buffer=9)
