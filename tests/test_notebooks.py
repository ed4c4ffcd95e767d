"""The notebooks run from top to bottom and print what is stored in them. `make notebook` stores it anew."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

from tests.variants import variants

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


FAST = [path for path in NOTEBOOKS if path.stem not in ('decoding', 'rlhf')]


@pytest.mark.parametrize('path', variants(NOTEBOOKS, FAST), ids=lambda p: p.stem)
def test_it_runs_and_prints_what_it_shows(path, monkeypatch):
  python_path = filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(python_path))
  notebook = nbformat.read(path, as_version=4)
  shown = [printed(cell) for cell in notebook.cells if cell.cell_type == 'code']
  where = {'metadata': {'path': str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=300, record_timing=False, resources=where).execute()
  if 'UPDATE' in os.environ:  # make notebook
    nbformat.write(notebook, path)
  else:
    fresh = [printed(cell) for cell in notebook.cells if cell.cell_type == 'code']
    assert fresh == shown, 'run `make notebook` and look at what changed'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_it_says_nothing_of_a_machine(path):
  notebook = nbformat.read(path, as_version=4)
  text = '\n'.join(cell.source + printed(cell) for cell in notebook.cells)
  assert not re.search(r'/(home|root|Users|tmp|usr)/', text)
  assert not [o for c in notebook.cells for o in c.get('outputs', []) if o.get('name') == 'stderr']


def test_there_is_one():
  assert NOTEBOOKS
