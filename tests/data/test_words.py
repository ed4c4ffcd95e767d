"""Words and their characters: the numbers of AllenNLP's tests of ELMo's indexer, and what is cut and unknown."""

import numpy as np

from llm_jax.data import words
from tests.data.conftest import says

BEGIN, END, FILL = 259, 260, 261


def test_characters_are_those_of_elmo():
  """'Second' and '.' are from `elmo_indexer_test.py` of AllenNLP, the row of a text's beginning too."""
  found = words.spelled(['Second', '.'])
  assert found[0].tolist() == [BEGIN, 84, 102, 100, 112, 111, 101, END, *[FILL] * 42]
  assert found[1].tolist() == [BEGIN, 47, END, *[FILL] * 47]
  table = words.Words(['Second', '.']).spelling()
  assert table[words.START].tolist() == [BEGIN, 257, END, *[FILL] * 47]
  assert table[words.END].tolist() == [BEGIN, 258, END, *[FILL] * 47]
  np.testing.assert_array_equal(table[words.SPECIAL :], found)
  assert words.spelled(['é'], 5).tolist() == [[BEGIN, 0xC3 + 1, 0xA9 + 1, END, FILL]]
  assert words.spelled(['long'], 5).tolist() == [[BEGIN, 109, 112, 111, END]]
  assert table.max() < words.CHARACTERS and words.spelled([], 5).shape == (0, 5)


def test_the_most_frequent_words_are_known():
  texts = [words.split("Don't stop: the well-known cat, the other cat."), ['the', 'b', 'a']]
  assert texts[0] == [
    "Don't", 'stop', ':', 'the', 'well-known', 'cat', ',', 'the', 'other', 'cat', '.',
  ]  # fmt: skip
  known = words.frequent(texts, 6)
  assert known.known == ('the', 'cat', ',') and known.size == 6
  assert known.ids(['cat', 'dog', 'the']).tolist() == [4, words.UNKNOWN, 3]
  says('3 ids has no word', lambda: words.frequent(texts, 3))
  says("'a' is there twice", lambda: words.Words(['a', 'b', 'a']))
  says('letters=2', lambda: words.spelled(['a'], 2))
