"""The samplers against numpy's definitions and against the frequencies they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.core.errors import UserError
from llm_jax.decode import logits as logits_lib

DRAWS = 20_000
PROBS = np.array([0.05, 0.3, 0.02, 0.25, 0.08, 0.2, 0.1])


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def support(logits: jax.Array) -> np.ndarray:
  return np.isfinite(np.asarray(logits))


def frequencies(seed: int, **settings) -> np.ndarray:
  rows = np.tile(np.log(PROBS).astype(np.float32), (DRAWS, 1))
  ids = jax.jit(lambda logits, key: logits_lib.sample(logits, key, **settings))(
    rows, jax.random.key(seed)
  )
  return np.bincount(np.asarray(ids), minlength=len(PROBS))


def nucleus(probs: np.ndarray, p: float) -> np.ndarray:
  """The smallest set of mass >= p, by trying every size."""
  order = np.argsort(-probs, kind='stable')
  size = next(n for n in range(1, len(probs) + 1) if probs[order[:n]].sum() >= p or n == len(probs))
  return np.isin(np.arange(len(probs)), order[:size])


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    (dict(), PROBS),
    (dict(temperature=0.5), PROBS**2),
    (dict(temperature=2.0), PROBS**0.5),
    (dict(top_k=3), PROBS * [0, 1, 0, 1, 0, 1, 0]),
    (dict(top_p=0.7), PROBS * [0, 1, 0, 1, 0, 1, 0]),
    (dict(temperature=0.5, top_k=4, top_p=0.85), PROBS**2 * [0, 1, 0, 1, 0, 1, 0]),
    (dict(allowed=np.array([1, 0, 1, 1, 1, 1, 1], bool)), PROBS * [1, 0, 1, 1, 1, 1, 1]),
  ],
)
def test_frequencies_are_those_of_the_distribution(settings, expected):
  counts, expected = frequencies(1, **settings), expected / expected.sum()
  assert counts[expected == 0].sum() == 0
  kept = expected > 0
  assert stats.chisquare(counts[kept], DRAWS * expected[kept]).pvalue > 1e-3


def test_the_chi_square_test_would_notice():
  wrong = PROBS**1.05
  assert stats.chisquare(frequencies(1), DRAWS * wrong / wrong.sum()).pvalue < 1e-3


def test_temperature_limits():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 11)), jnp.float32)
  best = np.argmax(logits, axis=-1)
  assert (logits_lib.sample(logits, jax.random.key(0), temperature=0.0) == best).all()
  assert (logits_lib.sample(logits, jax.random.key(0), temperature=1e-30) == best).all()
  np.testing.assert_allclose(jax.nn.softmax(logits_lib.scale(logits, 1e20)), 1 / 11, rtol=1e-6)
  np.testing.assert_allclose(
    jax.nn.softmax(logits_lib.scale(logits, 1.0)), jax.nn.softmax(logits), rtol=1e-6
  )


def test_banned_ids_stay_banned_at_any_temperature():
  logits = logits_lib.ban(jnp.zeros((1, 4)), jnp.array([True, False, True, False]))
  for temperature in (1e-30, 1.0, 1e30):
    assert support(logits_lib.scale(logits, temperature)).tolist() == [[True, False, True, False]]


def test_top_k_keeps_exactly_k_and_of_ties_the_lowest_ids():
  words = ['coffee', 'water', 'tea', 'rice', 'chai']  # the survey's figure 10
  logits = jnp.log(jnp.array([[0.661, 0.119, 0.057, 0.017, 0.057]]))
  for k, kept in (
    (1, 'coffee'),
    (2, 'coffee water'),
    (3, 'coffee water tea'),
    (4, 'coffee water tea chai'),
  ):
    assert [
      w for w, s in zip(words, support(logits_lib.keep_top_k(logits, k))[0]) if s
    ] == kept.split()
  assert logits_lib.keep_top_k(logits, 0) is logits
  assert logits_lib.keep_top_k(logits, 5) is logits
  assert (
    support(logits_lib.keep_top_k(jnp.zeros((2, 6)), 2)).tolist() == [[True] * 2 + [False] * 4] * 2
  )


def test_top_k_equals_a_stable_sort():
  logits = np.random.default_rng(1).integers(0, 5, size=(50, 12)).astype(np.float32)  # many ties
  for k in (1, 3, 7, 11):
    order = np.argsort(-logits, axis=-1, kind='stable')[:, :k]
    expected = np.zeros_like(logits, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    assert (support(logits_lib.keep_top_k(jnp.asarray(logits), k)) == expected).all()


@pytest.mark.parametrize('p', [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_support_is_the_smallest_set_of_that_mass(p):
  logits = np.random.default_rng(2).normal(size=(200, 30)).astype(np.float32) * 3
  found = support(logits_lib.keep_top_p(jnp.asarray(logits), p))
  expected = np.stack([nucleus(row, p) for row in softmax(logits.astype(np.float64))])
  assert (found == expected).all()
  assert (found.sum(-1) >= 1).all()


def test_top_p_of_one_changes_nothing_and_ties_go_to_the_lowest_ids():
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, 9)), jnp.float32)
  assert logits_lib.keep_top_p(logits, 1.0) is logits
  assert support(logits_lib.keep_top_p(jnp.zeros((1, 4)), 0.5)).tolist() == [
    [True, True, False, False]
  ]


def test_a_row_does_not_depend_on_the_others():
  logits = jnp.asarray(np.random.default_rng(5).normal(size=(6, 9)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 6)
  draw = jax.jit(lambda x, k: logits_lib.sample(x, k, temperature=1.3, top_k=5, top_p=0.9))
  together = draw(logits, keys)
  alone = [int(draw(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(6)]
  assert together.tolist() == alone


def test_presets_are_settings_of_sample():
  for settings in logits_lib.PRESETS.values():
    logits_lib.check(**settings)
    draw = jax.jit(lambda x, k: logits_lib.sample(x, k, **settings))  # noqa: B023
    assert 0 <= int(draw(jnp.zeros((1, 60)), jax.random.key(0))[0]) < 60


@pytest.mark.parametrize(
  ('wrong', 'word'),
  [
    (dict(temperature=-1.0), 'temperature'),
    (dict(temperature=float('inf')), 'temperature'),
    (dict(temperature=float('nan')), 'temperature'),
    (dict(top_k=-1), 'top_k'),
    (dict(top_p=0.0), 'top_p'),
    (dict(top_p=1.5), 'top_p'),
  ],
)
def test_settings_outside_their_range(wrong, word):
  with pytest.raises(UserError, match=word):
    logits_lib.check(**wrong)
