"""The sums of experiments/digits are right in every way of writing them, and its results show what its README says."""

import json
import pathlib

import numpy as np
import pytest

from experiments.digits import data, report

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')


@pytest.mark.parametrize('name', data.WAYS)
def test_sums_are_right_and_the_answer_is_what_counts(name):
  way, (learnt, asked) = data.WAYS[name], data.problems(0, 200, 100)
  assert len({tuple(p) for p in np.concatenate([learnt, asked]).tolist()}) == 300
  rows = data.tokens(way, learnt)
  batch = data.batch_of(way, rows)
  number = lambda pieces: int(
    ''.join(f'{p - data.PIECES:0{len(str(way.base)) - 1}}' for p in pieces)
  )
  for row, weights, (a, b) in zip(rows.tolist(), batch['weights'], learnt.tolist(), strict=True):
    plus, equals = row.index(data.PLUS), row.index(data.EQUALS)
    answer = row[equals + 1 :]
    assert (number(row[:plus]), number(row[plus + 1 : equals])) == (a, b)
    assert number(answer[::-1] if way.backwards else answer) == a + b
    assert np.flatnonzero(weights).tolist() == list(range(equals + 1, len(row)))
    assert len(row) == way.length and max(row) < way.vocab
  assert (batch['inputs'][:, 1:] == rows[:, :-1]).all() and not batch['inputs'][:, 0].any()


def test_an_epoch_has_every_sum_once():
  source = data.Source(data.WAYS['digits'], data.problems(1, 32, 1)[0], 8, 0)
  rows = [tuple(r) for _ in range(4) for r in source()['targets'].tolist()]
  assert len(set(rows)) == 32


def test_intervals_are_students():
  """Mean 2, deviation 1 of three: 4.303 / sqrt(3)."""
  found = report.interval([1.0, 2.0, 3.0])
  assert found['mean'] == 2 and abs(found['half'] - 2.484) < 1e-3


def test_shipped_results_show_what_the_readme_says():
  """Every figure of its table, the order of digits, pairs and numbers, and that intervals do not overlap there."""
  told = json.loads(SHIPPED.read_text())
  readme = SHIPPED.with_name('README.md').read_text()
  again = report.summarise(told['runs'])
  assert again['ways'] == told['ways'] and len(told['runs']) == 12
  exact = {name: way['exact'] for name, way in told['ways'].items()}
  for found in exact.values():
    assert f'{found["mean"]:.3f} ± {found["half"]:.3f}' in readme
  low, high = (lambda x: x['mean'] - x['half']), (lambda x: x['mean'] + x['half'])
  assert low(exact['digits']) > high(exact['pairs']) and low(exact['pairs']) > high(
    exact['numbers']
  )
  assert [at is not None for at in told['ways']['reversed']['solved_at']] == [False, False, True]
  assert f'{round(told["cpu"])} seconds of CPU time' in readme
