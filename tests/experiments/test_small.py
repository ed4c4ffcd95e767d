"""The store of finished runs: nothing is made twice, by whoever it was made."""

import pytest

from experiments import small


def test_what_is_there_is_not_made_again(tmp_path):
  made = []

  def make():
    made.append(1)
    return dict(loss=2.5, curve=[1, 2])

  first = small.Cells(str(tmp_path / 'new')).once('a', make)
  again = small.Cells(str(tmp_path / 'new'))
  assert again.once('a', make) == first and len(made) == 1
  assert first['cell'] == 'a' and first['loss'] == 2.5 and first['cpu'] >= 0
  again.once('b', make)
  assert list(again.all()) == ['a', 'b'] and len(made) == 2


def test_a_run_that_fails_leaves_nothing(tmp_path):
  cells = small.Cells(str(tmp_path))
  with pytest.raises(ZeroDivisionError):
    cells.once('a', lambda: dict(x=1 / 0))
  assert not cells.all()
