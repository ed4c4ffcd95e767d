"""Vectors of words in their context from a language model that reads both ways (ELMo; Peters et al. 2018,
arXiv:1802.05365).

    made = elmo.make(transformer.causal(...blocks of recurrent.lstm...))
    h = elmo.layers(made, params, batch)               # [layers + 1, batch, t, 2 embed]
    x = elmo.mix(h, scores, gamma)                     # [batch, t, 2 embed], for a task

The model reads the text once from the left and once from the right, with an embedding and a head for both directions
(section 3.1). Its words come from a table, or as in the paper from their characters, with `characters.Characters` as
the embedding; `layers` then takes the characters of any words, also those that the vocabulary lacks.
`objectives.language.both_ways` trains it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import depth
from llm_jax.model.functions import Batch, Model, Params


class Both(NamedTuple):
  """init(key) -> {forward: the parameters of `one`, backward: {decoder}: of its layers alone}; axes: a tree like it.

  one: the causal model of each direction.
  """

  init: Callable[[jax.Array], Params]
  axes: Any
  one: Model


def make(one: Model) -> Both:
  """Two of `one`, which share all but their layers."""
  if one.card.kind != 'causal':
    raise UserError(f'the model is {one.card.kind}: both ways need a causal one')

  def init(key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    return dict(forward=one.init(first), backward=dict(decoder=one.init(second)['decoder']))

  axes = dict(forward=one.axes, backward=dict(decoder=one.axes['decoder']))
  return Both(init, axes, one)


def backward(params: Params) -> Params:
  """The parameters of the model that reads from the right."""
  return dict(params['forward'], **params['backward'])


def turned(x: jax.Array, segments: jax.Array | None) -> jax.Array:
  """The text from its end, padding (segments 0, behind the text) where it was. x: [batch, t, ...]."""
  at = jnp.arange(x.shape[1])[None]
  if segments is not None:
    n = (segments > 0).sum(1, keepdims=True)
    at = jnp.where(at < n, n - 1 - at, at)
  else:
    at = jnp.broadcast_to(at[:, ::-1], x.shape[:2])
  return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def layers(model: Both, params: Params, batch: Batch) -> jax.Array:
  """[layers + 1, batch, t, 2 embed]: of every token the embedding twice, then each layer after reading it from the left
  and from the right (eq. 1).

  batch: inputs int [batch, t], the text itself, not shifted, or [batch, t, letters], its characters; segments: int
  [batch, t], 1 for its tokens, absent without padding.
  """
  every = depth.exits(tuple(range(model.one.card.layers + 1)))
  segments = batch.get('segments')
  told = {k: v for k, v in batch.items() if k in ('inputs', 'segments')}
  left = model.one.hidden(params['forward'], told, around=every).aux['around']
  told['inputs'] = turned(batch['inputs'], segments)
  right = model.one.hidden(backward(params), told, around=every).aux['around']
  right = jax.vmap(turned, in_axes=(0, None))(right, segments)
  return jnp.concatenate([left, right], axis=-1)


def mix(h: jax.Array, scores: jax.Array, gamma: jax.Array) -> jax.Array:
  """gamma sum_j softmax(scores)_j h_j (eq. 1). h: [layers + 1, ...], scores: [layers + 1], gamma: []; the task trains
  scores and gamma."""
  return gamma * jnp.tensordot(jax.nn.softmax(scores), h, axes=1)
