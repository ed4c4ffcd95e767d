"""Methods on the toy with a gold reward, and best-of-n on answers that can be listed."""

import jax
import numpy as np
import pytest

from llm_jax.rl import toy
from tests.rl import toys


@pytest.fixture(autouse=True)
def one_device():
  with toys.world():
    yield


@pytest.mark.parametrize('method', ['ppo', 'grpo', 'rloo', 'reinforce', 'raft'])
def test_the_gold_reward_rises(method):
  """Ten updates; all ten seeds and the divergence: tests below, marked slow."""
  _, seen = toys.train(toys.make_source(method=method), toys.first(method=method), method, steps=10)
  if method == 'raft':
    assert seen[-1]['loss'] < seen[0]['loss'] - 0.2
  else:
    assert seen[-1]['reward'] > seen[0]['reward'] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize('method', ['ppo', 'grpo', 'rloo', 'raft'])
def test_ten_seeds_of_ten_improve_within_their_divergence(method):
  for seed in range(10):
    before, none = toys.mean_gold(toys.start(seed), seed)
    source, begin = toys.make_source(seed=seed, method=method), toys.first(seed, method)
    last, _ = toys.train(source, begin, method, steps=30)
    after, kl = toys.mean_gold(last.params, seed)
    assert none == 0 and after > before + 0.3 and 0 < kl < 8, (seed, before, after, kl)


def listed(letters=3):
  """All 2,197 answers of three letters with a reward for each that no two share."""
  texts, logp = toy.enumerate_answers(toys.model(), toys.start(0), 'ab', letters=letters)
  rewards = toy.gold(None, texts, [{}] * len(texts)) + 1e-4 * np.arange(len(texts)) / len(texts)
  return texts, logp, rewards


def test_the_answers_are_all_there():
  texts, logp, _ = listed()
  assert len(set(texts)) == 13**3
  np.testing.assert_allclose(np.exp(logp).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize('n', [1, 2, 4, 16, 64])
def test_best_of_n_costs_what_the_formula_says(n):
  """log n - (n - 1) / n holds for continuous rewards and is a bound for these; the largest answer has 0.3 %."""
  _, logp, rewards = listed()
  best = toy.best_of_n(logp, rewards, n)
  np.testing.assert_allclose(np.exp(best).sum(), 1, rtol=1e-9)
  found, formula = toy.divergence(best, logp), toy.best_of_n_kl(n)
  assert found <= formula + 1e-9
  np.testing.assert_allclose(found, formula, rtol=0.03, atol=1e-9)
  assert (np.exp(best) @ rewards > np.exp(logp) @ rewards + 0.02) == (n > 1)


def test_the_distribution_of_the_best_is_that_of_drawing_and_choosing():
  _, logp, rewards = listed(letters=1)
  rng, n = np.random.default_rng(0), 4
  drawn = rng.choice(13, p=np.exp(logp), size=(200_000, n))
  best = drawn[np.arange(len(drawn)), rewards[drawn].argmax(1)]
  share = np.bincount(best, minlength=13) / len(best)
  expected = np.exp(toy.best_of_n(logp, rewards, n))
  np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / len(best)))


def test_the_vocabulary_spells():
  words = toy.Letters()
  assert words.size == 16 and words.encode('amz') == [3, 15, 2]
  assert words.decode([3, 15, 1, 0]) == 'am'
  assert toy.gold(None, ['abcd', 'mm', ''], [{}] * 3) == pytest.approx([1.0, -0.2, -0.4])
  assert toy.proxy(None, ['abcd', 'mm'], [{}] * 2) == pytest.approx([1.0, 1.8])
  assert jax.tree.leaves(toys.start(0))
