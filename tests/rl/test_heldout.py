"""What the calibration hook says of a reward model, against margins worked out row by row."""

import contextlib

import jax
import numpy as np

from llm_jax.model import scalar
from llm_jax.rl import heldout, preferences
from llm_jax.train.hooks import Run
from llm_jax.train.state import State
from tests.model.test_scalar import make

LENGTH = 8


class Writer:
  def __init__(self):
    self.values, self.said = {}, []

  def aside(self):
    return contextlib.nullcontext()

  def write(self, step, values):
    self.values |= values

  def say(self, text):
    self.said.append(text)


class Pairs:
  """Two batches of four pairs; the last two rows are padding."""

  def once(self):
    rng = np.random.default_rng(0)
    for used in (4, 2):
      batch = {}
      for side in ('chosen', 'rejected'):
        ids = rng.integers(1, 32, (4, LENGTH + 1)).astype(np.int32)
        weights = np.zeros((4, LENGTH), np.float32)
        for row in range(used):
          weights[row, 3 : 5 + row] = 1
        told = dict(inputs=ids[:, :-1], targets=ids[:, 1:], weights=weights)
        batch |= {f'{side}/{name}': value for name, value in told.items()}
      yield batch


def test_calibration_is_that_of_the_margins(tmp_path):
  model, writer = scalar.make(model=make), Writer()
  params = model.init(jax.random.key(3))
  run = Run(model, None, None, writer, str(tmp_path), 10)
  hook = heldout.calibration(run, source=lambda model: Pairs(), every=5, bins=3)
  state = State(np.int32(10), params, ())
  hook(3, state, {})
  assert not writer.said
  hook(10, state, {})
  margins = []
  for batch in Pairs().once():
    for row in range(4):
      if batch['chosen/weights'][row].any():
        values = []
        for side in ('chosen', 'rejected'):
          x = model.hidden(params, dict(inputs=batch[f'{side}/inputs'][row][None])).x
          last = np.flatnonzero(batch[f'{side}/weights'][row])[-1]
          values.append(float(scalar.read(params, x)[0, last]))
        margins.append(values[0] - values[1])
  assert len(margins) == 6
  np.testing.assert_allclose(writer.values['heldout/accuracy'], np.mean(np.array(margins) > 0))
  error = preferences.calibration_error(margins, bins=3)
  np.testing.assert_allclose(writer.values['heldout/calibration_error'], error, atol=1e-5)
  assert 'of 6 pairs' in writer.said[0]
  assert (tmp_path / 'heldout_calibration.png').stat().st_size > 10_000
