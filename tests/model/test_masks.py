"""The mask formula, entry by entry."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model import masks
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


def test_branches_see_their_beginning_and_themselves():
  """Entry by entry: of one text, not later, and on the way from the root of the tree to the query."""
  segments = [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
  branches = [0, 0, 1, 1, 2, 1, 2, 2, 3, 0]
  n = len(segments)
  path = lambda i: (0, branches[i])
  want = [
    [j <= i and segments[i] == segments[j] and branches[j] in path(i) for j in range(n)]
    for i in range(n)
  ]
  pair = lambda x: (jnp.array([x]),) * 2
  mask = Mask(True, segments=pair(segments), branches=pair(branches))
  np.testing.assert_array_equal(mask.dense(n, n)[0, 0], want)
  np.testing.assert_array_equal(mask.rows(3, 7).dense(4, 7)[0, 0], np.array(want)[3:7, :7])
  assert not Mask(True, branches=pair(branches)).static


def pattern(sees, t=12):
  """bool [t, t] of a rule in plain Python, for a causal sequence."""
  return np.array([[j <= i and bool(sees(i, j)) for j in range(t)] for i in range(t)])


PATTERNS = {
  'window': (dict(window=3), lambda i, j: i - j < 3),
  'sinks': (dict(window=3, sinks=2), lambda i, j: i - j < 3 or j < 2),
  'strided': (
    dict(sees=functools.partial(masks.strided, size=4)),
    lambda i, j: i - j < 4 or (i - j) % 4 == 0,
  ),
  'fixed': (
    dict(sees=functools.partial(masks.fixed, size=4, summary=2)),
    lambda i, j: i // 4 == j // 4 or j % 4 in (2, 3),
  ),
  'dilated': (
    dict(sees=functools.partial(masks.dilated, size=3, step=2)),
    lambda i, j: i - j in (0, 2, 4),
  ),
  'blocks': (
    dict(sees=functools.partial(masks.blocks, size=2)),
    lambda i, j: i // 2 - j // 2 <= 1 or j < 2 or i < 2,
  ),
}


@pytest.mark.parametrize('name', PATTERNS)
def test_sparse_patterns(name):
  """Alone, beside another document, and as one row of decoding."""
  kw, rule = PATTERNS[name]
  want, t = pattern(rule), 12
  mask = Mask(True, **kw)
  np.testing.assert_array_equal(mask.dense(t, t)[0, 0], want)
  segments = jnp.array([[1] * 5 + [2] * t])
  places = jnp.array([[*range(5), *range(t)]])
  packed = Mask(True, segments=(segments,) * 2, places=(places,) * 2, **kw).dense(5 + t, 5 + t)[
    0, 0
  ]
  np.testing.assert_array_equal(packed[5:, 5:], want)
  assert not packed[5:, :5].any()
  at = jnp.array([[7], [11]])
  slots = Mask(True, queries=at, places=(at, jnp.arange(t)[None]), **kw).dense(1, t)[:, 0, 0]
  np.testing.assert_array_equal(slots, want[[7, 11]])
  np.testing.assert_array_equal(mask.rows(4, 9).dense(5, 9)[0, 0], want[4:9, :9])


def test_windows_see_themselves_and_the_task_sees_all():
  mask = Mask(True, windows=(jnp.array([[1, 1, 2, 2, 0, 0]]),) * 2)
  seen = mask.dense(T, T)[0, 0]
  want = np.tril(np.ones((T, T), bool))
  want[2:4, :2] = False
  np.testing.assert_array_equal(seen, want)
  np.testing.assert_array_equal(mask.rows(2, 5).dense(3, 5)[0, 0], want[2:5, :5])
