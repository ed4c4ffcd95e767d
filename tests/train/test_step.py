"""The step divides once, whatever the microbatches; only the chosen part learns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.train import state as state_lib
from llm_jax.train import step


class Loss(NamedTuple):
  sum: jax.Array
  weight: jax.Array
  metrics: dict


class Model(NamedTuple):
  """A linear regression, enough to check the arithmetic of a step by hand."""

  axes: dict = {'w': ('embed',), 'b': ()}

  def init(self, key):
    return {'w': jax.random.normal(key, (3,)), 'b': jnp.zeros(())}


def squares(params, batch, key):
  error = batch['x'] @ params['w'] + params['b'] - batch['y']
  return Loss(
    (batch['weights'] * error**2).sum(),
    batch['weights'].sum(),
    {'mae': (batch['weights'] * abs(error)).sum()},
  )


def ragged(rows=16, seed=0):
  rng = np.random.default_rng(seed)
  weights = (rng.random(rows) < 0.4).astype(np.float32)
  weights[:4] = 0  # a whole microbatch without a single target
  return {
    'x': rng.normal(size=(rows, 3)).astype(np.float32),
    'y': rng.normal(size=rows).astype(np.float32),
    'weights': weights,
  }


def run(microbatches, steps=3, trainable=None, tx=None):
  tx = tx or optax.sgd(0.1)
  state = state_lib.create(Model(), tx, 0, trainable=trainable)
  update = step.make(squares, tx, microbatches=microbatches, trainable=trainable)
  for i in range(steps):
    state, metrics = update(state, ragged(seed=i), jax.random.key(1))
  return state, metrics


@pytest.mark.parametrize('microbatches', [2, 4, 8])
def test_microbatches_give_the_update_of_the_whole_batch(microbatches):
  one, many = run(1), run(microbatches)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), one, many)


def test_update_is_gradient_descent_on_the_weighted_mean():
  batch = ragged()
  state = state_lib.create(Model(), optax.sgd(0.1), 0)
  w, b = np.asarray(state.params['w'], np.float64), 0.0
  weights = batch['weights'] / batch['weights'].sum()
  error = batch['x'] @ w + b - batch['y']
  expected = w - 0.1 * (2 * weights * error) @ batch['x']
  state, metrics = step.make(squares, optax.sgd(0.1))(state, batch, jax.random.key(0))
  np.testing.assert_allclose(state.params['w'], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], (weights * error**2).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics['mae'], (weights * abs(error)).sum(), rtol=1e-5)
  assert int(state.step) == 1 and float(metrics['weight']) == batch['weights'].sum()


def test_only_the_trainable_part_moves_and_has_optimizer_state():
  tx = optax.adam(0.1)
  start = state_lib.create(Model(), tx, 0, trainable='^w$')
  assert len(jax.tree.leaves(start.opt_state[0].mu)) == 1
  before = np.asarray(start.params['w'])
  end, _ = run(2, trainable='^w$', tx=tx)
  assert float(end.params['b']) == 0 and not np.allclose(end.params['w'], before)


def test_a_trainable_regex_that_matches_nothing_is_named():
  with pytest.raises(UserError, match='matches no parameter'):
    state_lib.create(Model(), optax.sgd(0.1), 0, trainable='lora')


def test_a_batch_without_targets_changes_nothing():
  batch = ragged()
  batch['weights'] = np.zeros_like(batch['weights'])
  state = state_lib.create(Model(), optax.sgd(0.1), 0)
  before = np.asarray(state.params['w'])
  state, metrics = step.make(squares, optax.sgd(0.1))(state, batch, jax.random.key(0))
  np.testing.assert_array_equal(state.params['w'], before)
  assert float(metrics['loss']) == 0
