"""What experiments/mixture_lab says of its runs: intervals, paired differences, RegMix's correlations."""

import json
import pathlib

import numpy as np
import pytest

from experiments.mixture_lab import report
from llm_jax.scaling import mixture

DOMAINS = ('books', 'wikipedia', 'stories')
SHIPPED = pathlib.Path(report.__file__).with_name('results.json')


def made_up():
  """Seeds differ by far more than mixtures do; the tiny models follow a mixing law."""
  cells = {}
  for i, name in enumerate(DOMAINS):
    cells[f'large only {name} 0'] = dict(rates=[0, 0, 0], loss=[1.5 + i] * 3, cpu=60.0)
  for seed, shift in enumerate((0.0, 0.4, 0.9)):
    for arm, gain in (('uniform', 0.0), ('doremi', 0.1), ('regmix', 0.2)):
      loss = [2.0 + shift, 3.0 + shift - gain, 3.6 + shift + gain / 2]
      cells[f'large {arm} {seed}'] = dict(rates=[0.2, 0.5, 0.3], loss=loss, cpu=60.0)
  for i, rates in enumerate(mixture.dirichlet(18, (1, 1, 1), seed=0)):
    loss = [1 + np.exp(-2 * r) for r in rates]
    cells[f'tiny {i}'] = dict(rates=rates.tolist(), loss=loss, cpu=60.0)
  trace = [[0.5, 0.3, 0.2]] * 100
  told = dict(rates=trace[0], reference=[1, 1, 1], loss=[1, 1, 1], trace=trace, cpu=60.0)
  return cells | {'doremi round 0': dict(told, cell='doremi round 0')}


def test_differences_are_taken_seed_by_seed(tmp_path):
  summary = report.summarise(made_up(), DOMAINS, ('uniform', 'doremi', 'regmix'), 3, 6)
  one = summary['differences']['doremi']['worst']
  assert abs(one['mean'] - 0.05) < 1e-12 and one['half'] < 1e-9
  assert summary['rows']['uniform']['worst']['half'] > 1
  row = summary['rows']['uniform']['excess']  # 2.0 - 1.5, 3.0 - 2.5, 3.6 - 3.5: the largest is 0.5
  np.testing.assert_allclose(row['values'], [0.5, 0.9, 1.4])
  assert summary['cpu_minutes'] == 31
  laws = summary['regmix']['laws']
  assert (
    laws['exponential']['books']['rank'] > 0.99 and laws['exponential']['books']['error'] < 1e-3
  )
  assert laws['linear']['books']['error'] > 0.01
  report.write(summary, str(tmp_path))
  assert json.loads((tmp_path / 'results.json').read_text()) == summary
  assert '| doremi | +0.0500 ± 0.0000 |' in (tmp_path / 'results.md').read_text()
  assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'


def test_intervals_are_student_s():
  """Three values: t(0.975, 2) = 4.302653 in any table."""
  told = report.interval([1.0, 2.0, 4.0])
  assert abs(told['mean'] - 7 / 3) < 1e-12
  assert abs(told['half'] - 4.302653 * np.sqrt(7 / 3 / 3)) < 1e-5


def test_shipped_results_show_what_the_readme_says():
  """DoReMi's worst domain is better than the uniform mixture's, and the interval leaves out 0."""
  told = json.loads(SHIPPED.read_text(encoding='utf-8'))
  one = told['differences']['doremi']['worst']
  assert len(one['values']) >= 5 and one['mean'] + one['half'] < 0
  assert one['mean'] == pytest.approx(np.mean(one['values']))
  rows = SHIPPED.with_name('README.md').read_text(encoding='utf-8')
  assert f'{one["mean"]:+.4f} ± {one["half"]:.4f}' in rows
