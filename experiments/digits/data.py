"""Sums of two numbers below 1,000 as tokens, in four ways.

    digits     0 1 7 + 9 8 5 = 1 0 0 2    a token for each digit
    reversed   0 1 7 + 9 8 5 = 2 0 0 1    the same, the answer's last digit first (Lee et al. 2023, arXiv:2307.03381)
    pairs      00 17 + 09 85 = 10 02      a token for two digits, counted from the right
    numbers    017 + 985 = 1 002          a token for up to three (as GPT-4 has them; Singh and Strouse 2024,
                                          arXiv:2402.14903), counted from the right

Numbers have leading zeros, so that every answer is of one length and its places of one meaning.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data.pipeline import Batch

TOP = 1000
FIRST, PLUS, EQUALS, PIECES = 0, 1, 2, 3  # the token a row begins with, the marks, the first piece


class Way(NamedTuple):
  """base: of a piece, 10 for a digit. operand, answer: pieces of each. backwards: the answer's last one comes first."""

  base: int
  operand: int
  answer: int
  backwards: bool = False

  @property
  def vocab(self) -> int:
    """Tokens in all."""
    return PIECES + self.base

  @property
  def length(self) -> int:
    """Tokens of a sum."""
    return 2 * self.operand + 2 + self.answer


WAYS = dict(
  digits=Way(10, 3, 4),
  reversed=Way(10, 3, 4, backwards=True),
  pairs=Way(100, 2, 2),
  numbers=Way(1000, 1, 2),
)


def problems(seed: int, train: int, heldout: int) -> tuple[np.ndarray, np.ndarray]:
  """(a, b) of the sums to learn and of those to be asked, [n, 2], all different."""
  chosen = np.random.default_rng(seed).choice(TOP * TOP, train + heldout, replace=False)
  pairs = np.stack(divmod(chosen, TOP), 1)
  return pairs[:train], pairs[train:]


def tokens(way: Way, pairs: np.ndarray) -> np.ndarray:
  """int32 [n, length] of the sums of [n, 2]."""

  def pieces(x: np.ndarray, places: Iterable[int]) -> np.ndarray:
    return x[:, None] // way.base ** np.array(list(places)) % way.base + PIECES

  a, b = pairs.T
  mark = lambda token: np.full((len(pairs), 1), token)
  down, answer = range(way.operand)[::-1], range(way.answer)
  parts = [pieces(a, down), mark(PLUS), pieces(b, down), mark(EQUALS)]
  parts.append(pieces(a + b, answer if way.backwards else reversed(answer)))
  return np.concatenate(parts, 1).astype(np.int32)


def batch_of(way: Way, rows: np.ndarray) -> Batch:
  """Rows as a batch; only the answer counts."""
  inputs = np.pad(rows, ((0, 0), (1, 0)), constant_values=FIRST)[:, :-1]
  weights = np.zeros(rows.shape, np.float32)
  weights[:, -way.answer :] = 1
  return dict(inputs=inputs, targets=rows, weights=weights)


class Source:
  """Batches of sums drawn from those to learn, a new order in every epoch."""

  def __init__(self, way: Way, pairs: np.ndarray, batch: int, seed: int):
    self.batch, self.length, self.vocab = batch, way.length, None
    self._way, self._rows, self._rng = way, tokens(way, pairs), np.random.default_rng(seed)
    self._order = np.zeros(0, np.int64)

  def __call__(self, state: Any = None) -> Batch:
    """The next batch."""
    if len(self._order) < self.batch:
      self._order = self._rng.permutation(len(self._rows))
    now, self._order = self._order[: self.batch], self._order[self.batch :]
    return batch_of(self._way, self._rows[now])
