"""Leaving the stack early: each token runs as many layers as it needs, or as its position is granted.

    softmax    the two likeliest tokens are far apart  CALM; Schuster et al. 2022, arXiv:2207.07061
    similar    the layer changed the vector little     CALM
    schedule   fewer layers the farther the text       SkipDecode; Del Corro et al. 2023, arXiv:2307.02628

A rule `(model, params, x, before, position, layer) -> bool [batch, t]` says which tokens leave after `layer` layers.
Their vector stays what it is; the layers above still get their keys and values, or move their recurrent states, from it
(state propagation, CALM, section 3.2), so later tokens find every layer filled. `early_exit` makes a `Model` that works
so, which whatever decodes a model decodes. It leaves prompts alone.

What it saves: shapes are fixed, so a layer is skipped only where all rows of a one-token step have left; then it costs
what its states need (of attention, the keys and values), the rest is not computed (`lax.cond`). Rows that wait for
others are computed and dropped. `depths` tells after how many layers each token left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.model import depth

Rule = Callable[[Any, Any, jax.Array, jax.Array, jax.Array, Any], jax.Array]


def softmax(threshold: float = 0.9) -> Rule:
  """Leaves where the likeliest token leads by more than `threshold` in probability (CALM, equation 5). Reads the head
  after each layer that may be left; a threshold of 1 never leaves."""

  def rule(model, params, x, before, position, layer) -> jax.Array:
    del before, position, layer
    p, _ = jax.lax.top_k(jax.nn.softmax(model.logits(params, x)), 2)
    return p[..., 0] - p[..., 1] > threshold

  return rule


def similar(threshold: float = 0.99) -> Rule:
  """Leaves where the cosine between the layer's input and output exceeds `threshold` (CALM, section 3.3); 1 never."""

  def rule(model, params, x, before, position, layer) -> jax.Array:
    del model, params, position, layer
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    size = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(before, axis=-1)
    return (
      (x * before).sum(-1) / jnp.maximum(size, 1e-30) > threshold if threshold < 1 else size < 0
    )

  return rule


def schedule(most: int, least: int, length: int) -> Rule:
  """SkipDecode's monotone schedule: `most` layers at position 0, falling linearly to `least` at position `length` and
  staying there.

  All rows at one position leave together, and no token needs a layer that an earlier one of its text left out.
  """
  if not 1 <= least <= most or length < 1:
    raise UserError(
      f'schedule needs 1 <= least <= most and a length, got {most}, {least}, {length}'
    )

  def rule(model, params, x, before, position, layer) -> jax.Array:
    del model, params, x, before
    done = jnp.minimum(position / length, 1.0)
    return layer >= jnp.round(most - (most - least) * done)

  return rule


def early_exit(model: Any, rule: Rule, *, layers: Sequence[int] | None = None) -> Any:
  """The `Model` whose tokens leave by `rule`. layers: after which ones (default: each but the last).

  With states, calls of more than one token read a prompt and leave nowhere. Without, batch['full'] (bool [batch, t],
  optional) says which tokens do not leave, and aux['around'] is `depths`.
  """
  every = range(1, model.card.layers)
  layers = tuple(every if layers is None else layers)
  if not set(layers) <= set(every):
    raise UserError(f'layers must be among 1 to {model.card.layers - 1}, got {layers}')

  def hidden(params: Any, batch: dict, *, states: Any = None, rng: Any = None) -> Any:
    t = batch['inputs'].shape[1]
    if states is not None and t > 1:
      return model.hidden(params, batch, states=states, rng=rng)
    position = batch.get('positions')
    position = jnp.arange(t)[None] if position is None else position
    full = batch.get('full')
    decide = lambda x, before, layer: rule(model, params, x, before, position, layer)
    around = _around(decide, layers, model.card.layers, full, skip=states is not None)
    return model.hidden(params, batch, states=states, rng=rng, around=around)

  return model._replace(hidden=hidden)


def depths(
  model: Any, params: Any, prompts: Any, lengths: Any, answers: Any, start: int | None = 0
) -> np.ndarray:
  """int32 [batch, n]: after how many layers each step left that drew `answers` [batch, n]; decoders only.

  model: of `early_exit`. prompts, lengths, start: as told to `generate`.
  """
  if model.card.kind != 'causal':
    raise UserError(f'depths are those of causal models, this one is {model.card.kind}')
  prompts, lengths, answers = (np.asarray(x, np.int32) for x in (prompts, lengths, answers))
  front = lengths - (start is None)  # the position that predicts the first answer
  rows = [
    [*([] if start is None else [start]), *p[:n], *a]
    for p, n, a in zip(prompts.tolist(), lengths.tolist(), answers.tolist(), strict=True)
  ]
  width = max(map(len, rows))
  inputs = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
  full = np.arange(width) <= front[:, None]
  found = jax.jit(model.hidden)(params, dict(inputs=inputs, full=full)).aux['around']
  index = front[:, None] + np.arange(answers.shape[1])
  return np.take_along_axis(np.asarray(found), index, axis=1)


def _around(
  decide: Callable, layers: tuple[int, ...], last: int, full: jax.Array | None, skip: bool
) -> depth.Around:
  """Carries int32 [batch, t]: the number of layers after which each token left, 0 while it goes on."""

  def start(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape[:2], jnp.int32)

  def step(apply: Callable, layer: Callable, finish: Callable) -> Callable:
    def work(params: Any, x: jax.Array, left: jax.Array, states: Any, index: Any) -> tuple:
      y, states, aux = apply(params, x, states, index)
      y = jnp.where((left > 0)[..., None], x, y)
      done = layer(index)
      may = jnp.isin(done, jnp.asarray(layers)) & ~(left > 0).all()
      never = jnp.zeros(left.shape, bool)
      sure = jax.lax.cond(may, lambda: never | decide(finish(y), finish(x), done), lambda: never)
      sure = sure if full is None else sure & ~full
      return y, jnp.where((left == 0) & sure, done, left), states, aux

    def pass_on(params: Any, x: jax.Array, left: jax.Array, states: Any, index: Any) -> tuple:
      _, states, aux = apply(params, x, states, index)  # what only the output needs is not computed
      return x, left, states, jax.tree.map(jnp.zeros_like, aux)

    def run(params: Any, carry: tuple, states: Any, index: Any) -> tuple:
      told = params, *carry, states, index
      if not skip:
        x, left, states, aux = work(*told)
      else:
        x, left, states, aux = jax.lax.cond((carry[1] > 0).all(), pass_on, work, *told)
      return (x, left), states, aux

    return run

  return depth.Around(start, step, lambda left, _: jnp.where(left == 0, last, left), layers)
