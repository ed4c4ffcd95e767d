"""What every objective returns. The mean is taken once, by the step, after microbatches and devices have been added."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
  """Sums over what was scored.

  sum: f32 [], to be minimised. weight: f32 [], the number of targets (or sequences, pairs ...) behind it.
  metrics: name -> f32 [], further sums over the same weight.
  """

  sum: jax.Array
  weight: jax.Array
  metrics: Mapping[str, jax.Array]


def add(first: Loss, second: Loss) -> Loss:
  """The loss of two parts of a batch together."""
  return jax.tree.map(jnp.add, first, second)
