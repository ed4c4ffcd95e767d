"""A class for a whole text: a linear layer on what the model makes of one position, with or without BERT's pooler.

    model = classes.head(transformer.causal(vocab=256, ...), count=2)
    logits = classes.read(params, x, at)        # f32 [batch, count], from position `at` [batch] of every row

The model stays what it was, with the entries `classes` and `pooler` among its parameters, so a checkpoint of the model
is a start for it. What is trained is said by a regex on the paths, the config's `trainable` (Zhao et al. 2023,
arXiv:2303.18223; the three ways are those of Devlin et al. 2018, arXiv:1810.04805, section 5.3, and earlier):

| way | pre-trained weights | `trainable` |
|---|---|---|
| feature-based | frozen, none of them is given a gradient or moments | `FEATURES` |
| finetuning I | frozen but for the layers at the output: final norm and pooler | `OUTPUT` |
| finetuning II | all trained | `EVERYTHING` |

Without a pooler finetuning I is the feature-based way: the final norm's scale is all that it adds, and the classifier's
weights can stand for that. What it gains is the pooler's, a deeper head on the same features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.core import tree, weights
from llm_jax.model.functions import Model, Params

NAME, POOLER = 'classes', 'pooler'
FEATURES = rf'^{NAME}/'
OUTPUT = rf'^({NAME}|{POOLER}|(de|en)coder/norm)/'
EVERYTHING = None


def pooled(model: Model, *, std: float = 0.02) -> Model:
  """`model` with a pooler, tanh(w x + bias) [embed] (BERT's code); weights begin as N(0, std^2), the bias as 0."""
  size = model.card.embed

  def make(key: jax.Array) -> Params:
    return dict(w=std * jax.random.normal(key, (size, size)), bias=jnp.zeros((size,)))

  return _with(model, POOLER, make, dict(w=('embed', 'rank'), bias=('rank',)))


def head(model: Model, *, count: int, std: float = 0.02) -> Model:
  """`model` with a linear layer embed -> `count`; weights begin as N(0, std^2), the bias as 0."""

  def make(key: jax.Array) -> Params:
    drawn = std * jax.random.normal(key, (model.card.embed, count))
    return dict(w=drawn, bias=jnp.zeros((count,)))

  return _with(model, NAME, make, dict(w=('embed', 'classes'), bias=('classes',)))


def make(*, model: Callable, count: int = 2, std: float = 0.02) -> Model:
  """As `head`, of what a config builds: `use(classes.make, model=use(transformer.causal, ...))`."""
  return head(model(), count=count, std=std)


def make_pooled(*, model: Callable, std: float = 0.02) -> Model:
  """As `pooled`, of what a config builds."""
  return pooled(model(), std=std)


def read(params: Params, x: jax.Array, at: jax.Array) -> jax.Array:
  """x: [batch, t, embed], after the final norm; at: int [batch], the position that stands for the text. Returns f32
  [batch, count]; through the pooler where the parameters have one.
  """
  own = params[NAME]
  x = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
  if POOLER in params:
    x = weights.einsum('bd,dr->br', x, params[POOLER]['w'])
    x = jnp.tanh(weights.add(x, params[POOLER]['bias'], 'r'))
  y = weights.einsum('bd,dc->bc', x, own['w'], dtype=jnp.float32)
  return weights.add(y, own['bias'], 'c')


def _with(model: Model, name: str, make: Callable, axes: dict) -> Model:
  """`model` with one more entry among its parameters."""

  def init(key: jax.Array) -> Params:
    return dict(model.init(key), **{name: make(jax.random.fold_in(key, len(name)))})

  size = tree.count(jax.eval_shape(make, jax.random.key(0)))
  card = model.card._replace(pooled=model.card.pooled + size)
  return model._replace(init=init, axes=dict(model.axes, **{name: axes}), card=card)
