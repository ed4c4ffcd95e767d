"""Words as tokens: a vocabulary of the words of a text, and the characters of any word.

    texts = [words.split(text) for text in ...]
    known = words.frequent(texts, 10_000)
    known.ids(texts[0])                        # int32 [n]
    known.spelling()                           # int32 [size, letters], for model/characters.py
    words.spelled(['xylem', 'phloem'])         # int32 [2, letters], of words that nobody has to know

Ids: 0 begins a text and is padding, 1 ends it, 2 is every word that is not known, then the words.
"""

import collections
import re
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jax.core.errors import UserError

START, END, UNKNOWN = 0, 1, 2
SPECIAL = 3  # ids before the first word
LETTERS = 50
CHARACTERS = 262
# of ELMo's code: 0 is nothing, 1 .. 256 the bytes, then the marks
_BEGIN_TEXT, _END_TEXT, _BEGIN, _END, _FILL = range(257, 262)
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def split(text: str) -> list[str]:
  """Words, with apostrophes and hyphens inside them, and marks, each by itself."""
  return _WORD.findall(text)


class Words:
  """The words `known`, in this order."""

  def __init__(self, known: Sequence[str]):
    self.known = tuple(known)
    self._ids = {word: SPECIAL + i for i, word in enumerate(self.known)}
    self.size = SPECIAL + len(self.known)
    if len(self._ids) < len(self.known):
      twice = collections.Counter(self.known).most_common(1)[0][0]
      raise UserError(f'{twice!r} is there twice: give every word once')

  def ids(self, words: Iterable[str]) -> np.ndarray:
    """int32 [n]."""
    return np.array([self._ids.get(word, UNKNOWN) for word in words], np.int32)

  def spelling(self, letters: int = LETTERS) -> np.ndarray:
    """int32 [size, letters]: the characters of every id."""
    marks = [_framed([mark], letters) for mark in (_BEGIN_TEXT, _END_TEXT)]
    return np.concatenate([marks, spelled(['<UNK>', *self.known], letters)])


def frequent(texts: Iterable[Iterable[str]], size: int) -> Words:
  """The vocabulary of at most `size` ids: the most frequent words of the texts, those as frequent by the alphabet."""
  if size <= SPECIAL:
    raise UserError(f'a vocabulary of {size} ids has no word: choose more than {SPECIAL}')
  counts = collections.Counter(word for text in texts for word in text)
  order = sorted(counts, key=lambda word: (-counts[word], word))
  return Words(order[: size - SPECIAL])


def spelled(words: Sequence[str], letters: int = LETTERS) -> np.ndarray:
  """int32 [words, letters]: the UTF-8 bytes of each word, its beginning and end marked, cut to what fits, then filled
  up (Peters et al. 2018, arXiv:1802.05365; the numbers are those of its code, byte + 1)."""
  if letters < 3:
    raise UserError(f'letters={letters} leaves no room between two marks: choose 3 or more')
  rows = [_framed([byte + 1 for byte in word.encode()], letters) for word in words]
  return np.array(rows, np.int32).reshape(-1, letters)


def _framed(inner: list[int], letters: int) -> np.ndarray:
  row = np.full(letters, _FILL, np.int32)
  told = [_BEGIN, *inner[: letters - 2], _END]
  row[: len(told)] = told
  return row
