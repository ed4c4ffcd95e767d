"""experiments/chinchilla_refit on points of a known law: the numbers of its result are about that law."""

import numpy as np
import pytest

from experiments.chinchilla_refit import run
from llm_jax.scaling import laws, runs


def test_what_is_written_is_about_the_points():
  law = laws.BESIROGLU
  n, d = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 1.5e10, 9), np.geomspace(1e9, 3e11, 9)))
  noise = 0.002 * np.random.default_rng(0).normal(size=81)
  points = runs.Runs(np.full(81, ''), n, d, 6 * n * d, laws.chinchilla(law, n, d) * np.exp(noise))
  found = run.refit(points, trials=30, steps=5)
  assert found['runs'] == 81
  assert found['fit']['E'] == pytest.approx(law.E, rel=0.03)
  assert (
    found['objective'] <= found['objectives_of']['BESIROGLU'] < found['objectives_of']['HOFFMANN']
  )
  for name, (low, high) in found['interval'].items():
    assert low < found['fit'][name] < high
  gopher = found['at_gopher']
  assert 6 * gopher['parameters'] * gopher['tokens'] == pytest.approx(run.GOPHER)
  assert found['residuals']['deviation'] == pytest.approx(0.002, rel=0.25)
  for name, profile in found['profile'].items():
    values, objectives = np.array(profile).T
    assert np.all(np.diff(values) > 0)
    assert values[2] == pytest.approx(found['fit'][name])
    assert np.argmin(objectives) == 2
    assert objectives[2] == pytest.approx(found['objective'], rel=1e-6)
