"""Methods on the toy with a gold reward, and best-of-n on answers that can be listed."""

import jax
import numpy as np
import pytest

from llm_jax.rl import annotate, layout, reward, toy
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


def gold_pairs(seed):
  """256 pairs of random answers of one to eight letters, the one with the higher gold reward chosen."""
  rng, words = np.random.default_rng(seed), toy.Letters()
  prompts = [record['prompt'] for record in toy.prompts()]
  laid = dict(chosen=[], rejected=[])
  while len(laid['chosen']) < 256:
    two = [''.join(rng.choice(list(toy.LETTERS), rng.integers(1, 9))) for _ in range(2)]
    scores = toy.gold(None, two, [{}] * 2)
    if scores[0] != scores[1]:
      prompt = prompts[len(laid['chosen']) % len(prompts)]
      for side, text in zip(laid, sorted(two, key=lambda t: -scores[two.index(t)]), strict=True):
        laid[side].append((words.encode(prompt), [*words.encode(text), words.eos]))
  batch = {}
  for side, rows in laid.items():
    ids, ends = np.array([ids for ids, _ in rows], np.int32), [len(said) for _, said in rows]
    tokens = np.array([said + [0] * (9 - len(said)) for _, said in rows], np.int32)
    text = layout.lay(toys.model(), ids, np.full(256, 2), tokens, np.array(ends), words.start)
    batch |= {f'{side}/{name}': value for name, value in text.items()}
  return batch


class Pairs:
  """Minibatches of 64 pairs, as a source."""

  batch, length, vocab = 64, 11, toy.Letters()

  def __init__(self, seed):
    self.arrays, self.at = gold_pairs(seed), 0

  def __call__(self, state=None):
    self.at += 1
    return {k: v[np.arange(64) + 64 * (self.at % 4)] for k, v in self.arrays.items()}


@pytest.mark.slow
def test_dpo_improves_on_ten_seeds_of_ten_within_its_divergence():
  """The reference is what the run begins with; the pairs are random answers that the gold reward ordered."""
  for seed in range(10):
    before, none = toys.mean_gold(toys.start(seed), seed)
    source = annotate.with_reference(toys.model(), source=lambda _, s=seed: Pairs(s), seed=seed)
    last, seen = toys.train(source, toys.first(seed, 'dpo'), 'dpo', steps=40)
    after, kl = toys.mean_gold(last.params, seed)
    np.testing.assert_allclose(seen[0]['loss'], np.log(2), atol=1e-5)
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


@pytest.mark.parametrize('letters', [1, 3])
@pytest.mark.parametrize('n', [1, 2, 8, 64])
def test_the_formula_of_best_of_n_is_off_by_its_slack_at_most(letters, n):
  _, logp, rewards = listed(letters)
  off = toy.best_of_n_kl(n) - toy.divergence(toy.best_of_n(logp, rewards, n), logp)
  slack = toy.best_of_n_slack(logp, rewards, n)
  assert -1e-9 <= off <= slack + 1e-9 and (letters == 1 or slack < 0.1)


def test_answers_of_all_lengths_have_the_probabilities_of_drawing_token_by_token():
  """In float64, one forward per answer; 13 + 13^2 + 13^3 + 1 answers have all the mass."""
  model, params, words = toys.model(), toys.start(0), toy.Letters()
  texts = toy.texts(3)
  (found,) = toy.distribution(model, most=3)(params, ['ab'])
  assert len(texts) == len(set(texts)) == len(found) == 2380
  np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-12)
  allowed = [words.eos, *words.encode(toy.LETTERS)]
  for text in ['', 'm', 'ca', 'bdk', 'mmm']:
    ids = [0, *words.encode('ab' + text)]
    x = model.hidden(params, dict(inputs=np.array([ids], np.int32))).x
    logits = np.asarray(model.logits(params, x)[0], np.float64)[:, allowed]
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    drawn = [*words.encode(text), words.eos][:3]
    expected = sum(logp[2 + i, allowed.index(token)] for i, token in enumerate(drawn))
    np.testing.assert_allclose(found[texts.index(text)], expected, atol=1e-5)


def test_listed_rewards_are_those_of_the_reward_function():
  texts, prompts = toy.texts(2), ['ab', 'mc']
  found = toy.rewards(toys.model(), most=2)(toys.start(1), prompts)
  told = reward.of_model(toys.model(), toys.start(1), toy.Letters(), batch=64)
  for row, prompt in zip(found, prompts, strict=True):
    expected = told([prompt] * len(texts), texts, [{}] * len(texts))
    np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize('beta', [0.05, 0.5])
def test_tilting_is_the_best_that_a_divergence_buys(beta):
  """E r - beta KL is beta log E exp(r / beta) there, and less at 20 other distributions."""
  _, logp, rewards = listed(letters=1)
  value = lambda own: np.exp(own) @ rewards - beta * toy.divergence(own, logp)
  best = value(toy.tilted(logp, rewards, beta))
  np.testing.assert_allclose(best, beta * np.log(np.exp(logp) @ np.exp(rewards / beta)), rtol=1e-9)
  for other in np.log(np.random.default_rng(0).dirichlet(np.ones(13), 20)):
    assert value(other) < best


def test_the_vocabulary_spells():
  words = toy.Letters()
  assert words.size == 16 and words.encode('amz') == [3, 15, 2]
  assert words.decode([3, 15, 1, 0]) == 'am'
  assert toy.gold(None, ['abcd', 'mm', ''], [{}] * 3) == pytest.approx([1.0, -0.2, -0.4])
  assert toy.proxy(None, ['abcd', 'mm'], [{}] * 2) == pytest.approx([1.0, 1.8])
  assert jax.tree.leaves(toys.start(0))
