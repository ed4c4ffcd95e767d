"""Ratings that were planted come back; proportions, agreement and edits against values worked out elsewhere."""

import itertools
import math

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.rl import preferences

PLANTED = dict(a=1300.0, b=1120.0, c=1000.0, d=880.0, e=700.0)


def games(count, seed=0):
  rng, found = np.random.default_rng(seed), []
  for a, b in itertools.combinations(PLANTED, 2):
    chance = 1 / (1 + 10 ** ((PLANTED[b] - PLANTED[a]) / 400))
    found += [(a, b, float(won)) for won in rng.random(count) < chance]
  return [found[i] for i in rng.permutation(len(found))]


def test_the_surveys_example():
  """GPT-4 with 1,274 points against LLaMA-13B with 826."""
  assert abs(preferences.expected(1274, 826) - 0.929) < 5e-4
  assert preferences.expected(826, 1274) == pytest.approx(1 - preferences.expected(1274, 826))


def test_one_game_moves_k_times_the_surprise():
  ratings = preferences.elo([('a', 'b', 1.0)], k=32)
  assert ratings == dict(a=1016.0, b=984.0)
  again = preferences.elo([('a', 'b', 1.0), ('b', 'a', 0.5)], k=32)
  chance = 1 / (1 + 10 ** (32 / 400))
  assert again['b'] == pytest.approx(984 + 32 * (0.5 - chance))


def test_planted_ratings_come_back():
  """2,000 games a pair: within 25 points (the standard error is about 5) by likelihood, 60 by Elo with a small k."""
  told = games(2000)
  likeliest, moved = preferences.bradley_terry(told), preferences.elo(told, k=4)
  for name, value in PLANTED.items():
    assert abs(likeliest[name] - value) < 25, name
    assert abs(moved[name] - value) < 60, name
  assert sum(likeliest.values()) / 5 == pytest.approx(1000)
  assert preferences.bradley_terry(told[::-1]) == pytest.approx(likeliest)  # order does not matter


def test_two_players_have_a_closed_form():
  """a won 30 of 40: the difference is 400 log10(3)."""
  found = preferences.bradley_terry([('a', 'b', 1.0)] * 30 + [('a', 'b', 0.0)] * 10)
  assert found['a'] - found['b'] == pytest.approx(400 * math.log10(3), abs=1e-6)


def test_the_likelihood_is_flat_at_the_maximum():
  told = games(50)
  best = preferences.bradley_terry(told)

  def likelihood(ratings):
    chance = lambda a, b: preferences.expected(ratings[a], ratings[b])
    return sum(math.log(chance(a, b) if won else chance(b, a)) for a, b, won in told)

  for name in PLANTED:
    for step in (-1.0, 1.0):
      assert likelihood(best | {name: best[name] + step}) < likelihood(best)


def test_wilson_intervals():
  """The textbook's 8 of 10 (0.4902, 0.9433) and 0 of 10 (0, 0.2775); they cover 95 % of binomial draws."""
  assert preferences.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
  assert preferences.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
  drawn = np.random.default_rng(0).binomial(50, 0.3, 4000)
  covered = np.mean(
    [low <= 0.3 <= high for low, high in (preferences.wilson(x, 50) for x in drawn)]
  )
  assert 0.93 < covered < 0.975


def test_rewards_that_mean_what_they_say_are_calibrated():
  rng = np.random.default_rng(0)
  size = rng.exponential(1.5, 20_000)
  margins = np.where(rng.random(len(size)) < 1 / (1 + np.exp(-size)), size, -size)
  found = preferences.calibration(margins)
  assert sum(b.count for b in found) == len(margins) and [b.margin for b in found] == sorted(
    b.margin for b in found
  )
  assert sum(b.low <= b.said <= b.high for b in found) >= 8
  assert (
    preferences.calibration_error(margins)
    < 0.015
    < 0.08
    < preferences.calibration_error(3 * margins)
  )


def test_kappa():
  """50 grants judged by two readers, 35 times alike: kappa 0.4 (the example of Cohen's kappa in textbooks)."""
  first = 'yes ' * 25 + 'no ' * 25
  second = 'yes ' * 20 + 'no ' * 5 + 'yes ' * 10 + 'no ' * 15
  assert preferences.kappa(first.split(), second.split()) == pytest.approx(0.4)
  assert preferences.kappa([1, 2, 3], [1, 2, 3]) == 1 and preferences.kappa([1, 1], [1, 1]) == 1


def test_a_plot(tmp_path):
  path = preferences.plot(
    str(tmp_path / 'r.png'), dict(model=np.random.default_rng(0).normal(1, 2, 300))
  )
  with open(path, 'rb') as f:
    assert f.read(8) == b'\x89PNG\r\n\x1a\n'


@pytest.mark.parametrize(
  ('call', 'remedy'),
  [
    (lambda: preferences.bradley_terry([('a', 'b', 1.0)]), "'b' never won against 'a'"),
    (lambda: preferences.elo([('a', 'a', 1.0)]), 'two players'),
    (lambda: preferences.calibration([1.0, float('nan')]), '1 are not'),
    (lambda: preferences.kappa([1], [1, 2]), 'two labels'),
  ],
)
def test_nonsense_is_refused(call, remedy):
  with pytest.raises(UserError, match=remedy):
    call()
