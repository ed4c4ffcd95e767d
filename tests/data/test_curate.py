"""Overlap against Google's rouge-score and a recursion, selections against brute force, richness by hand."""

import functools
import itertools
import json
import pathlib

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import curate

# [text, text, rougeL fmeasure of rouge-score 0.1.2 without stemming]
ROUGE = json.loads(pathlib.Path(__file__).with_name('rouge.json').read_text(encoding='utf-8'))


def longest(a, b) -> int:
  """The longest common subsequence by recursion."""

  @functools.cache
  def at(i, j):
    if i == len(a) or j == len(b):
      return 0
    return 1 + at(i + 1, j + 1) if a[i] == b[j] else max(at(i + 1, j), at(i, j + 1))

  return at(0, 0)


def test_rouge_is_that_of_google():
  for a, b, expected in ROUGE:
    assert abs(curate.rouge_l(a, b) - expected) < 1e-9, (a, b)
    assert abs(curate.rouge_l(b, a) - expected) < 1e-9
  assert len({round(x, 6) for *_, x in ROUGE}) > 5


def test_the_common_subsequence_by_brute_force():
  rng = np.random.default_rng(0)
  for _ in range(300):
    a, b = (tuple(rng.integers(0, 4, rng.integers(0, 12)).tolist()) for _ in range(2))
    assert curate.common(a, b) == longest(a, b)
  assert curate.common('x' * 200, 'x' * 150) == 150


def test_the_pool_refuses_exactly_what_rouge_refuses():
  rng = np.random.default_rng(1)
  text = lambda: ' '.join(map(str, rng.integers(0, 12, rng.integers(1, 9))))
  known = [text() for _ in range(40)]
  pool, hits = curate.Pool(known), 0
  for _ in range(300):
    new = text()
    for limit in (0.3, 0.7, 1.0):
      expected = any(curate.rouge_l(new, old) >= limit - 1e-9 for old in known)
      assert pool.similar(new, limit) == expected
      hits += expected
  assert 100 < hits < 800 and len(pool) == 40
  assert not pool.similar('!', 0.1)
  with pytest.raises(UserError, match='limit=0'):
    pool.similar('a', 0)


def radius(x, chosen) -> float:
  return np.linalg.norm(x[:, None] - x[list(chosen)], axis=-1).min(1).max()


def test_the_k_centres_cover_within_twice_the_best():
  rng = np.random.default_rng(2)
  for _ in range(20):
    x = rng.normal(size=(9, 2))
    reach = functools.partial(radius, x)
    for count in (1, 2, 3, 4):
      chosen = curate.k_centre(x, count)
      best = min(reach(c) for c in itertools.combinations(range(9), count))
      assert len(set(chosen)) == count and reach(chosen) <= 2 * best + 1e-9
  with pytest.raises(UserError, match='count=10 of 9'):
    curate.k_centre(x, 10)


def test_features_bring_like_texts_together():
  texts = ['sort a list of numbers', 'sort the numbers of a list', 'write a poem about the sea', '']
  x = curate.features(texts)
  assert x.dtype == np.float32 and (x == curate.features(texts)).all()
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1, 1, 0], rtol=1e-6)
  near = x @ x.T
  assert near[0, 1] > 0.5 > near[0, 2] + 0.2
  assert curate.k_centre(x[:3], 2).tolist() == [0, 2]


def test_quality_and_difficulty():
  scores = [5.0, 4.4, 4.5, 1.0]
  assert curate.above(scores).tolist() == [0, 2]
  difficulty = np.random.default_rng(3).permutation(11)
  assert sorted(difficulty[curate.moderate(difficulty, 5)]) == [3, 4, 5, 6, 7]
  assert curate.moderate(difficulty, 11).tolist() == list(range(11))
  stages = curate.progressive(difficulty, 3)
  assert [len(s) for s in stages] == [4, 4, 3]
  assert [int(difficulty[s].max()) for s in stages] == [3, 7, 10]
  with pytest.raises(UserError, match='count=12 of 11'):
    curate.moderate(difficulty, 12)


def test_richness():
  assert curate.distinct(['a b a b', 'a b']) == 2 / 4  # ab ba ab, ab
  assert curate.distinct(['a'], 2) == 0
  assert curate.distinct(['A, a!'], 1) == 0.5
  # a b a: 2 of 3 words differ, below 0.72, one factor, and b c repeat nothing; backwards c b a b a is one factor
  assert curate.mtld('a b a b c') == 5
  assert curate.mtld('a a b a b') == 5 / 2  # a a, b a b; backwards b a b, a a
  assert curate.mtld('a b c a') == pytest.approx(4 / ((1 - 3 / 4) / (1 - 0.72)))  # part of a factor
  assert curate.mtld('one two three') == 3
  assert curate.mtld('') == 0
  assert curate.mtld('a a a a') == 2  # every second word ends a factor


def test_checks_are_counted_by_the_first_that_refuses():
  records = [dict(n=n) for n in range(10)]
  kept, refused = curate.filtered(
    records, dict(small=lambda r: r['n'] > 2, odd=lambda r: r['n'] % 2, never=lambda r: True)
  )
  assert [r['n'] for r in kept] == [3, 5, 7, 9] and refused == dict(small=3, odd=3, never=0)
