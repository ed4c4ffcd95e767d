import os

import pytest

from llm_jax.core import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
  path = str(tmp_path / 'told.json')
  assert files.write(path, 'first') == path
  with pytest.raises(ZeroDivisionError), files.whole(path) as f:
    f.write('half')
    f.flush()
    1 / 0  # noqa: B018
  with open(path) as f:
    assert f.read() == 'first'
  with files.whole(path, 'wb') as f:
    f.write(b'second')
    with open(path) as now:
      assert now.read() == 'first'
  with open(path) as f:
    assert f.read() == 'second'
  assert os.listdir(tmp_path) == ['told.json']


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert files.lines(str(path)) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert files.lines(str(path)) == [dict(step=1), dict(step=2)]
