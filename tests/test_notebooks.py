"""The notebooks run from top to bottom and print what is stored in them."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob('notebooks/*.ipynb'))


def printed(cell) -> str:
  """What a code cell printed, without the spaces at the ends of lines."""
  parts = []
  for output in cell.get('outputs', []):
    if output.output_type == 'stream' and output.name == 'stdout':
      parts.append(output.text)
    elif output.output_type == 'execute_result':
      parts.append(output.data.get('text/plain', ''))
  return '\n'.join(line.rstrip() for line in ''.join(parts).strip().splitlines())


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_prints_what_it_shows(path, monkeypatch):
  monkeypatch.setenv(
    'PYTHONPATH', os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
  )
  stored = nbformat.read(path, as_version=4)
  nbformat.validate(stored)
  fresh = nbformat.from_dict(stored)
  client = nbclient.NotebookClient(
    fresh, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}
  )
  before = [printed(cell) for cell in stored.cells if cell.cell_type == 'code']
  client.execute()
  after = [printed(cell) for cell in fresh.cells if cell.cell_type == 'code']
  assert after == before, 'run `make notebook` and look at what changed'
  assert any(before)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_it_says_nothing_of_a_machine(path):
  notebook = nbformat.read(path, as_version=4)
  text = '\n'.join(cell.source + printed(cell) for cell in notebook.cells)
  assert not re.search(r'/(home|root|Users|tmp|usr)/', text)
  assert [cell.execution_count for cell in notebook.cells if cell.cell_type == 'code'] == [
    i + 1 for i in range(sum(cell.cell_type == 'code' for cell in notebook.cells))
  ]


def test_there_is_one():
  assert NOTEBOOKS
