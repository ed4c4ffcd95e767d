"""Four tasks with known answers in a vocabulary of 96 tokens: three in rows of 20, one in rows of its own.

addition        4 7 + 1 9 = 6 6 0     the sum's digits, the last one first (Lee et al. 2023, arXiv:2307.03381)
recall          k3 c0 a1 p0 d2 b2 n1 e0 c 0 n 1 k 3 d 2     eight tokens of a key and its value, then the values of four
                of the keys: what goes with a key is drawn for each row, so it must be learned in context
misconceptions  k c ? y     a fact about each of 256 subjects, which four texts out of five get wrong
strings         k c 5 1 9 0 3 3 7 2     eight random digits that belong to each of many keys, to be known by heart

Misconceptions are an inverse-scaling task: a model that knows its texts better is right less often (TruthfulQA, Lin et
al. 2022, arXiv:2109.07958). In the strings there is nothing to be found out: a model knows as many digits as it has
room for. It is memory that is measured, so what is asked is what was learned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data import pipeline

DIGIT, KEY = 1, 11  # the first of 10 digits, of 16 keys; 0 is padding and what a row begins with
PLUS, EQUALS, QUESTION, NO, YES = range(27, 32)
PAIR, PAIRS, VOCAB = 32, 64, 96  # a key with its value, in one token
LENGTH, KEYS, VALUES, SHOWN, ASKED = 20, 16, 4, 8, 4
WRONG = 0.8  # of the texts about a subject
DIGITS = 2
STRINGS, DIGITS_OF_STRING = 1024, 8


class Examples(NamedTuple):
  """tokens: int32 [n, length], 0 after the end. answer: bool [n, length], the tokens that count."""

  tokens: np.ndarray
  answer: np.ndarray


def addition(rng: np.random.Generator, n: int, *, heldout: bool, digits: int = DIGITS) -> Examples:
  """Sums of two numbers below 10^digits. One pair in 16 is held out, by a hash."""
  top = 10**digits
  a, b = rng.integers(0, top, (2, 2 * n * (16 if heldout else 1) + 64))
  kept = np.flatnonzero((((a * top + b) * 2654435761 % 2**32) < 2**28) == heldout)[:n]
  a, b = a[kept], b[kept]
  spell = lambda x, places: x[:, None] // 10 ** np.array(places) % 10 + DIGIT
  parts = [
    spell(a, range(digits)[::-1]),
    np.full((n, 1), PLUS),
    spell(b, range(digits)[::-1]),
    np.full((n, 1), EQUALS),
    spell(a + b, range(digits + 1)),
  ]
  return _rows(parts, answers=range(2 * digits + 2, 3 * digits + 3))


def recall(rng: np.random.Generator, n: int) -> Examples:
  """SHOWN tokens, each a key with its value, then ASKED of the keys with the value after them."""
  keys = np.argsort(rng.random((n, KEYS)), 1)[:, :SHOWN]
  values = rng.integers(0, VALUES, (n, SHOWN))
  asked = np.argsort(rng.random((n, SHOWN)), 1)[:, :ASKED]
  pick = lambda x: np.take_along_axis(x, asked, 1)
  both = np.stack([pick(keys) + KEY, pick(values) + DIGIT], 2).reshape(n, -1)
  return _rows(
    [PAIR + VALUES * keys + values, both], answers=range(SHOWN + 1, SHOWN + 2 * ASKED, 2)
  )


def misconceptions(rng: np.random.Generator, n: int, *, wrong: float) -> Examples:
  """A question about a subject; the answer is wrong with this probability. 0: the truth."""
  subject = rng.integers(0, KEYS**2, n)
  truth = np.random.default_rng(0).integers(0, 2, KEYS**2)[subject] ^ (rng.random(n) < wrong)
  parts = [
    subject // KEYS + KEY,
    subject % KEYS + KEY,
    np.full(n, QUESTION),
    np.where(truth, YES, NO),
  ]
  return _rows([x[:, None] for x in parts], answers=[3])


def _rows(parts: list[np.ndarray], answers: Any, length: int = LENGTH) -> Examples:
  found = np.concatenate(parts, 1)
  tokens = np.zeros((len(found), length), np.int32)
  tokens[:, : found.shape[1]] = found
  answer = np.zeros(tokens.shape, bool)
  answer[:, list(answers)] = True
  return Examples(tokens, answer)


def batch_of(some: Examples) -> pipeline.Batch:
  """What a model reads and predicts; only answers count."""
  inputs = np.pad(some.tokens, ((0, 0), (1, 0)))[:, :-1]
  return dict(inputs=inputs, targets=some.tokens, weights=some.answer.astype(np.float32))


def heldout(n: int, seed: int = 10**6) -> dict[str, Examples]:
  """Task -> n examples that are not trained on (of `misconceptions`: the truth)."""
  rng = np.random.default_rng(seed)
  return dict(
    addition=addition(rng, n, heldout=True),
    recall=recall(rng, n),
    misconceptions=misconceptions(rng, n, wrong=0.0),
  )


def strings(seed: int) -> Examples:
  """Every key, in two tokens, with the digits that belong to it."""
  rng, keys = np.random.default_rng([seed, STRINGS]), np.arange(STRINGS)[:, None]
  digits = rng.integers(0, 10, (STRINGS, DIGITS_OF_STRING)) + DIGIT
  parts = [PAIR + keys % PAIRS, KEY + keys // PAIRS, digits]
  return _rows(parts, answers=range(2, 2 + DIGITS_OF_STRING), length=2 + DIGITS_OF_STRING)


def circuits(rng: np.random.Generator, rows: int) -> Examples:
  """Three rows of eight additions, three recall, two misconceptions. Short examples follow one another in a row."""
  n = rows // 8
  parts = (
    _packed(addition(rng, 6 * n, heldout=False), 2),
    recall(rng, 3 * n),
    _packed(misconceptions(rng, 10 * n, wrong=WRONG), 5),
  )
  return Examples(*(np.concatenate(x) for x in zip(*parts, strict=True)))


class Source:
  """Batches that `draw(rng)` makes, told by (seed, number of the batch)."""

  def __init__(self, draw: Callable[[np.random.Generator], Examples], seed: int):
    self._draw, self._seed, self._count = draw, seed, 0

  def __call__(self, state: Any = None) -> pipeline.Batch:
    """The next batch."""
    rng = np.random.default_rng([self._seed, self._count])
    self._count += 1
    return batch_of(self._draw(rng))


def _packed(some: Examples, times: int) -> Examples:
  """`times` examples to a row."""
  used = int((some.tokens > 0).sum(1).max())
  rows = [x[:, :used].reshape(-1, times * used) for x in some]
  return Examples(*(np.pad(x, ((0, 0), (0, LENGTH - times * used))) for x in rows))
