"""Metrics against their definitions, PassUntil against sums over its distribution, task laws, sharpness."""

import itertools

import numpy as np
import pytest
from scipy import stats

from llm_jax.core.errors import UserError
from llm_jax.scaling import emergence


def levenshtein(a, b):
  """The recursion of the definition."""
  if not a or not b:
    return len(a) + len(b)
  if a[0] == b[0]:
    return levenshtein(a[1:], b[1:])
  return 1 + min(levenshtein(a[1:], b), levenshtein(a, b[1:]), levenshtein(a[1:], b[1:]))


def test_token_edit_distance_is_that_of_the_definition():
  pairs = list(
    itertools.product(itertools.product(range(3), repeat=3), itertools.product(range(3), repeat=4))
  )
  a, b = (np.array(x) for x in zip(*pairs))
  expected = [levenshtein(x, y) for x, y in pairs]
  np.testing.assert_array_equal(emergence.token_edit_distance(a, b), expected)
  same = emergence.exact_match(b, b[::-1])
  np.testing.assert_array_equal(same, [tuple(x) == tuple(y) for x, y in zip(b, b[::-1])])


def test_smooth_metrics():
  """Brier's score is the squared error over all classes; two answers worked out by hand."""
  p = np.array(
    [[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[1.0, 1e-300, 1e-300], [1e-300, 1.0, 1e-300]]]
  )
  targets = np.array([[0, 1], [0, 2]])
  scores = emergence.brier(np.log(p), targets)
  np.testing.assert_allclose(scores, [(0.375 + 0.06) / 2, 1.0])
  expected = [(np.log(0.5) + np.log(0.8)) / 2, np.log(1e-300) / 2]
  np.testing.assert_allclose(emergence.log_likelihood(np.log(p), targets), expected)


def test_a_sharp_metric_of_a_smooth_model():
  """Schaeffer et al. 2023, section 2: cross entropy c N^-alpha per token, answers of L tokens sampled."""
  size = np.logspace(4, 10, 13)
  nats = (size / 1e5) ** -0.3
  p, length = np.exp(-nats), 16
  rng = np.random.default_rng(0)
  targets = np.zeros((1000, length), int)
  matches, edits = [], []
  for one in p:
    answers = (rng.random(targets.shape) > one).astype(int)
    matches.append(emergence.exact_match(answers, targets).mean())
    edits.append(emergence.token_edit_distance(answers, targets).mean())
  expected = emergence.whole(p, length)
  assert np.all(np.abs(matches - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000) + 1e-12)
  np.testing.assert_allclose(edits, length * (1 - p), atol=0.3)
  assert emergence.sharpness(size, matches) > 1.3 * emergence.sharpness(size, edits)
  assert matches[4] < 0.01 and p[4] > 0.6  # most tokens are right and hardly any answer


def test_sharpness():
  size = np.array([1e3, 1e4, 1e5, 1e6])
  assert abs(emergence.sharpness(size, [1, 2, 3, 4]) - 1) < 1e-12
  assert abs(emergence.sharpness(size, [0, 0, 0, 1]) - 3) < 1e-12
  assert abs(emergence.sharpness(size, [0, 0, -1, -1]) - 3) < 1e-12
  with pytest.raises(UserError, match='does not change'):
    emergence.sharpness(size, [1, 1, 1, 1])


@pytest.mark.parametrize('p', [0.5, 0.05])
def test_pass_until(p):
  """Means over the distribution of the number of samples, summed (scipy's counts failures before the r-th pass)."""
  passes, failures = 3, np.arange(20_000)
  weight = stats.nbinom.pmf(failures, passes, p)
  rate = emergence.pass_rate(failures + passes, passes=passes)
  np.testing.assert_allclose(weight @ rate, p, rtol=1e-9)
  k = np.arange(1, 20_000)
  np.testing.assert_allclose(
    emergence.first_pass_mean(p), stats.geom.pmf(k, p) @ (1 / k), rtol=1e-9
  )
  assert emergence.first_pass_mean(p) > 1.3 * p
  draw = lambda rng: rng.random() < p
  found = np.array([emergence.pass_until(draw, passes=passes, seed=s) for s in range(800)])
  rates = emergence.pass_rate(found, passes=passes)
  assert abs(rates.mean() - p) < 4 * rates.std() / np.sqrt(800)
  assert abs(found.mean() - passes / p) < 4 * found.std() / np.sqrt(800)


def test_pass_until_ends():
  assert emergence.pass_until(lambda rng: False, most=50) is None
  assert emergence.pass_until(lambda rng: True, passes=7) == 7
  with pytest.raises(UserError, match='2 or more'):
    emergence.pass_rate(np.array([5]), passes=1)
  with pytest.raises(UserError, match='at least 1'):
    emergence.pass_until(lambda rng: True, passes=0)


def test_a_task_law_predicts_what_a_test_set_cannot_see():
  """p = exp(-c N^-alpha): fitted where 1,000 problems would all fail, right where half of them pass."""
  law = lambda n: np.exp(-((n / 1e8) ** -0.5))
  small = np.array([5e5, 1e6, 2e6, 4e6])
  assert law(small[0]) < 1e-6
  fit = emergence.predict(small, law(small))
  np.testing.assert_allclose(
    fit(np.array([1e7, 2e8, 1e9])), law(np.array([1e7, 2e8, 1e9])), rtol=1e-9
  )
  with pytest.raises(UserError, match='pass_rate'):
    emergence.predict(small, np.zeros(4))
