"""Tags that a text gives by itself, word by word, and their batches."""

import numpy as np

from llm_jax.data import tags, words
from tests.data.conftest import says

TEXT = 'Alice said, "Do cats eat bats?" NASA and I... McGee (1865) said so'


def test_case_and_mark_of_every_word():
  first, second, third = tags.sentences(TEXT)
  told = lambda one: [
    (w, tags.CASES[c], tags.MARKS[m])
    for w, c, m in zip(one.words, one.tags['case'], one.tags['mark'], strict=True)
  ]
  assert told(first) == [
    ('alice', 'first', 'none'), ('said', 'lower', ','), ('do', 'first', 'none'), ('cats', 'lower', 'none'),
    ('eat', 'lower', 'none'), ('bats', 'lower', '?'),
  ]  # fmt: skip
  assert told(second) == [('nasa', 'upper', 'none'), ('and', 'lower', 'none'), ('i', 'first', '.')]
  assert told(third) == [
    ('mcgee', 'mixed', 'other'), ('1865', 'lower', 'other'), ('said', 'lower', 'none'), ('so', 'lower', 'none'),
  ]  # fmt: skip
  assert tags.sentences('... ! "') == []


def test_batches_hold_every_word_once_with_its_tags():
  """Pieces of at most four words, the rest padding; the order resumes."""
  found = tags.sentences(TEXT)
  known = words.frequent((one.words for one in found), 100)
  make = lambda **kw: tags.source(sentences=found, known=known, batch=3, length=4, **kw)
  spelt, seen = dict(enumerate(known.known, words.SPECIAL)), []
  for batch in make().once():
    for row in range(3):
      n = batch['segments'][row].sum()
      assert (batch['segments'][row, :n] == 1).all() and not batch['inputs'][row, n:].any()
      np.testing.assert_array_equal(batch['mark/weights'][row], np.arange(4) < n)
      columns = (
        batch['inputs'][row, :n, 0],
        *(batch[f'{t}/targets'][row, :n] for t in ('case', 'mark')),
      )
      seen += [(spelt[w], c, m) for w, c, m in np.transpose(columns).tolist()]
  wanted = [list(zip(one.words, *map(np.ndarray.tolist, one.tags.values()))) for one in found]
  assert seen == [word for one in wanted for word in one]
  source = make()
  source()
  state, second = source.state(), source()
  again = make()
  again.restore(state)
  third = again()
  assert all((third[name] == second[name]).all() for name in second)
  for one in (source, again):
    one.close()


def test_errors():
  known = words.Words(['a'])
  says('0 sentences', lambda: tags.source(sentences=[], known=known))
  one = tags.Sentence(('a', 'a'), dict(case=np.zeros(1, np.int32)))
  says("'a a' needs one tag a word", lambda: tags.source(sentences=[one], known=known))
