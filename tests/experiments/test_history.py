"""The shipped results of experiments/history say what its README does, and its models are of one size."""

import json
import pathlib

import pytest

from experiments.history import models, report
from llm_jax.model import count

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')


@pytest.fixture(scope='module')
def shipped():
  return {one['cell']: one for one in json.loads(SHIPPED.read_text(encoding='utf-8'))}


def test_shipped_results_show_what_the_readme_says(shipped, tmp_path):
  """Perplexities of the NPLM below the bigram's, of longer histories below those of shorter ones."""
  bits = {name: one['bits'] for name, one in shipped.items()}
  assert bits['NPLM'] < bits['2-gram'] < bits['1-gram']
  assert bits['5-gram'] < bits['4-gram'] < bits['3-gram'] < bits['2-gram']
  for one in shipped.values():
    assert one['curve'][-1][1] == one['bits'] < one['curve'][0][1]
  rows = SHIPPED.with_name('README.md').read_text(encoding='utf-8')
  assert report.table(shipped) in rows
  report.write(shipped, str(tmp_path))
  assert (tmp_path / 'results.json').read_text() == SHIPPED.read_text()
  assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'


def test_neural_models_are_of_one_size(shipped):
  sizes = {name: count.total(make().card) for name, make in models.MODELS.items()}
  assert sizes == {name: shipped[name]['parameters'] for name in sizes}
  assert max(sizes.values()) < 1.01 * min(sizes.values())
