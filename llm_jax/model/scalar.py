"""A number for every position: the reward of a reward model, the value of a critic.

    model = scalar.head(transformer.causal(vocab=256, ...))
    rewards = scalar.read(params, model.hidden(params, batch).x)      # f32 [batch, length]

The model stays the language model that it was, with one more entry `scalar` among its parameters; so a checkpoint of
the language model is a start for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core import weights
from llm_jax.model.functions import Model, Params

NAME, CRITIC = 'scalar', 'critic'


def head(model: Model) -> Model:
  """`model` with a linear layer embed -> 1 beside its logits.

  The weights begin as N(0, 1 / (embed + 1)), the bias as 0 (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1).
  """

  def init(key: jax.Array) -> Params:
    size = model.card.embed
    w = jax.random.normal(jax.random.fold_in(key, 1), (size,), jnp.float32) / (size + 1) ** 0.5
    return dict(model.init(key), **{NAME: dict(w=w, bias=jnp.zeros((), jnp.float32))})

  axes = dict(model.axes, **{NAME: dict(w=('embed',), bias=())})
  return model._replace(init=init, axes=axes)


def make(*, model: Callable) -> Model:
  """As `head`, of what a config builds: `use(scalar.make, model=use(transformer.causal, ...))`."""
  return head(model())


def read(params: Params, x: jax.Array) -> jax.Array:
  """x: [batch, length, embed], after the final norm. Returns f32 [batch, length]."""
  own = params[NAME]
  y: Any = weights.einsum('btd,d->bt', x, own['w'], dtype=jnp.float32)
  return y.astype(jnp.float32) + own['bias'].astype(jnp.float32)


def with_critic(policy: Model, critic: Model) -> Model:
  """`policy` with a critic of its own weights among its parameters, under `critic`; the critic has a scalar head."""

  def init(key: jax.Array) -> Params:
    return dict(policy.init(key), **{CRITIC: critic.init(jax.random.fold_in(key, 2))})

  return policy._replace(init=init, axes=dict(policy.axes, **{CRITIC: critic.axes}))


def make_with_critic(*, model: Callable, critic: Callable) -> Model:
  """As `with_critic`, of what a config builds; the critic needs no head of its own, it gets one here."""
  return with_critic(model(), head(critic()))
