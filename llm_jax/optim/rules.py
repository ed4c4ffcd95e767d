"""Update rules through optax, with one signature: gradients and learning rates in, steps out.

A rule differs from an optax transformation in two ways. It is given the learning rate of each parameter, because
Adafactor's momentum averages whole steps, rate included; and it says by which axis names its state is split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from llm_jax.core import tree


class Rule(NamedTuple):
  """What `chain.make` composes.

  init: params -> state. update: (grads, state, params, rates) -> (steps, state), where `rates` holds a scalar per
  parameter and `steps` are subtracted from the parameters. axes: params (or their shapes) -> the tree of `init(params)`
  with tuples of axis names as leaves.
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
  axes: Callable[[Any], Any]


def adamw(
  axes: Any, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, mu_dtype: str | None = None
) -> Rule:
  """Adam (Kingma & Ba 2015, arXiv:1412.6980); decoupled decay is the chain's (Loshchilov & Hutter, arXiv:1711.05101).

  The defaults are GPT-3's and LLaMA's. mu_dtype: of the first moment (`'bfloat16'` saves 2 bytes a parameter).
  """
  return _scaled(
    optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
    lambda names: optax.ScaleByAdamState(count=(), mu=names, nu=names),
    axes,
  )


def lion(axes: Any, *, b1: float = 0.9, b2: float = 0.99, mu_dtype: str | None = None) -> Rule:
  """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675); half of Adam's state."""
  return _scaled(
    optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype),
    lambda names: optax.ScaleByLionState(count=(), mu=names),
    axes,
  )


def sgd(axes: Any, *, momentum: float = 0.9) -> Rule:
  """Gradient descent with heavy-ball momentum, `m = momentum * m + g`."""
  return _scaled(optax.trace(momentum), lambda names: optax.TraceState(trace=names), axes)


def _scaled(transform: Any, state_axes: Callable[[Any], Any], axes: Any) -> Rule:
  """A rule whose step is the learning rate times what an optax transformation returns."""

  def update(grads: Any, state: Any, params: Any, rates: Any) -> tuple[Any, Any]:
    directions, state = transform.update(grads, state, params)
    return jax.tree.map(lambda r, d: r * d, rates, directions), state

  return Rule(transform.init, update, lambda params: state_axes(tree.align(axes, params)))
