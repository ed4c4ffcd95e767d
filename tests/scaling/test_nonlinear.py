"""Fits of tasks, experts and repetition against the laws that made the points."""

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.scaling import laws, nonlinear


@pytest.mark.parametrize(
  'law, fixed',
  [
    (laws.Sigmoid(0.25, 0.95, 6.0, 1.0), {}),
    (laws.Sigmoid(0.25, 0.95, 6.0, 1.0), dict(low=0.25)),
    (laws.Sigmoid(0.0, 0.8, 2.0, 3.0), dict(low=0.0, high=0.8)),
    (laws.Sigmoid(0.1, 0.9, -5.0, 1.2), dict(low=0.1)),  # a task that gets worse: inverse scaling
  ],
)
def test_a_sigmoid_comes_back(law, fixed):
  loss = np.linspace(law.middle - 1.5, law.middle + 1.5, 15)
  assert np.allclose(
    nonlinear.sigmoid(loss, laws.accuracy(law, loss), **fixed), law, rtol=1e-4, atol=1e-6
  )


def test_too_few_points_for_a_sigmoid():
  with pytest.raises(UserError, match='4 constants'):
    nonlinear.sigmoid([1, 2, 3], [0.2, 0.3, 0.4])
  with pytest.raises(UserError, match='3 constants'):
    nonlinear.decay([1, 2], [0.2, 0.3])


def test_an_exponential_comes_back():
  law, loss = laws.Decay(0.85, 2.1, 0.71), np.linspace(2.3, 4.5, 9)
  assert np.allclose(nonlinear.decay(loss, laws.task_error(law, loss)), law, rtol=1e-3)


def test_two_steps_predict_a_larger_model():
  first = laws.Chinchilla(E=0.4, A=90.0, B=300.0, alpha=0.3, beta=0.3)
  second = laws.Sigmoid(0.25, 0.95, 7.0, 0.75)
  n, d = (x.ravel() for x in np.meshgrid(np.geomspace(2e8, 3e9, 5), np.geomspace(4e9, 6e11, 5)))
  loss = laws.chinchilla(first, n, d)
  found = nonlinear.two_step(n, d, loss, laws.accuracy(second, loss), low=0.25)
  want = laws.accuracy(second, laws.chinchilla(first, 1e10, 1e13))
  assert nonlinear.predict_task(found, 1e10, 1e13) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize('law', [laws.SINKHORN_BASE, laws.REINFORCED, laws.HASH])
def test_the_law_of_experts_comes_back(law):
  n, e = (x.ravel() for x in np.meshgrid([1.5e7, 1.3e8, 1.3e9], [1, 2, 8, 32, 128, 512]))
  found = nonlinear.routed(n, e, laws.routed(law, n, e))
  assert np.allclose(found, law, rtol=1e-3)
  with pytest.raises(UserError, match='6 constants'):
    nonlinear.routed(n[:6], e[:6], n[:6])


def test_the_worth_of_repetitions_comes_back():
  law = laws.DataConstrained()
  n, epochs = (x.ravel() for x in np.meshgrid([1e8, 1e9, 8e9], [1, 2, 4, 16, 64]))
  unique = np.full_like(n, 4e9)
  loss = laws.data_constrained(law, n, epochs * unique, unique)
  found = nonlinear.repetition(law.fresh, n, epochs * unique, unique, loss)
  assert (found.tokens, found.parameters) == pytest.approx((15.387756, 5.309743), rel=1e-4)
  with pytest.raises(UserError, match='no run repeats'):
    nonlinear.repetition(law.fresh, n, unique, unique, loss)
