"""The mask formula, entry by entry."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model.masks import Mask

T = 6


def by_hand(causal, prefix, segments):
  m = np.zeros((len(segments), T, T), bool)
  for b in range(len(segments)):
    for i in range(T):
      for j in range(T):
        m[b, i, j] = segments[b][i] == segments[b][j] and (not causal or j <= i or prefix[b][j])
  return m


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('p', [0, 1, 3, T])
def test_prefix_and_segments(causal, p):
  segments = [[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0]]
  prefix = [[j < p for j in range(T)], [j in (0, 2, 3) for j in range(T)]]
  mask = Mask(causal, jnp.array(prefix), (jnp.array(segments),) * 2)
  np.testing.assert_array_equal(mask.dense(T, T)[:, 0], by_hand(causal, prefix, segments))


def test_a_prefix_of_none_or_one_is_causal_and_of_all_is_open():
  whole = lambda p: Mask(True, jnp.arange(T)[None] < p).dense(T, T)[0, 0]
  np.testing.assert_array_equal(whole(0), np.tril(np.ones((T, T), bool)))
  np.testing.assert_array_equal(whole(1), np.tril(np.ones((T, T), bool)))
  assert np.asarray(whole(T)).all()


def test_what_is_static_needs_no_array():
  assert Mask().static and Mask().dense(T, T) is None
  assert Mask(True).static
  assert not Mask(True, segments=(jnp.ones((1, T)),) * 2).static
  assert not Mask(True, queries=jnp.ones((1, 1))).static


def test_decoding_sees_slots_up_to_the_position():
  mask = Mask(True, queries=jnp.array([[2], [0]]))
  np.testing.assert_array_equal(mask.dense(1, 4)[:, 0, 0], [[1, 1, 1, 0], [1, 0, 0, 0]])
  prefix = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
  seen = mask._replace(prefix=prefix).dense(1, 4)[:, 0, 0]
  np.testing.assert_array_equal(seen, [[1, 1, 1, 0], [1, 1, 1, 0]])


def test_rows_are_rows_of_the_whole():
  segments = jnp.array([[1, 1, 2, 2, 2, 0]])
  mask = Mask(True, segments=(segments, segments))
  np.testing.assert_array_equal(mask.rows(2, 5).dense(3, 5), mask.dense(T, T)[:, :, 2:5, :5])
