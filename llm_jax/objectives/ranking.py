"""Learning from several answers to one prompt, or from one answer under several instructions.

Sides `answer0/...` to `answerK-1/...` hold the answers, the best first, with `ranked` bool [batch, K] for those that
exist (absent: all do).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.objectives import preference
from llm_jax.objectives.loss import Loss
from llm_jax.objectives.preference import Batch


def names(batch: Batch, stem: str = 'answer') -> list[str]:
  """`answer0`, `answer1` ...: the numbered sides of a batch."""
  count = sum(re.fullmatch(rf'{stem}\d+/inputs', key) is not None for key in batch)
  if count < 2:
    raise UserError(
      f'the batch has {count} sides called {stem}0, {stem}1 ...: choose a source with two or more'
    )
  return [f'{stem}{i}' for i in range(count)]


def existing(batch: Batch, sides: list[str]) -> jax.Array:
  """Which answers there are, bool [batch, K]."""
  there = jnp.stack([batch[f'{side}/weights'].sum(-1) > 0 for side in sides], 1)
  return there & batch['ranked'] if 'ranked' in batch else there


def pairs(there: jax.Array) -> jax.Array:
  """The pairs (better, worse) of a prompt, bool [batch, K, K]."""
  return jnp.triu(there[:, :, None] & there[:, None, :], 1)


def _scores(model, params, batch, rng, sides, chunk):
  """(texts, log p(y) / |y| [batch, K], which exist [batch, K])."""
  texts = preference.read(model, params, batch, rng, sides, chunk)
  there = existing(batch, sides)
  size = jnp.maximum(jnp.stack(texts.size, 1), 1)
  texts = texts._replace(counts=there[:, 0].astype(jnp.float32))
  return texts, jnp.stack(texts.logp, 1) / size, there


def _right(scores: jax.Array, apart: jax.Array) -> jax.Array:
  """The share of a prompt's pairs that `scores` [batch, K] order rightly, [batch]."""
  right = (scores[:, :, None] > scores[:, None, :]) & apart
  return right.sum((1, 2)) / jnp.maximum(apart.sum((1, 2)), 1)


def rrhf(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  nll: float = 1.0,
  chunk: int | None = 32,
) -> Loss:
  """sum over i better than j of max(0, p_j - p_i) - nll log p(best), with p = log p(y) / |y|.

  RRHF, arXiv:2304.05302, equations 2 to 5. Per prompt.
  """
  sides = names(batch)
  texts, p, there = _scores(model, params, batch, rng, sides, chunk)
  apart = pairs(there)
  ranking = jnp.where(apart, jax.nn.relu(p[:, None, :] - p[:, :, None]), 0).sum((1, 2))
  metrics = dict(accuracy=_right(p, apart), ranking=ranking, nll=-texts.logp[0])
  return preference.settle(ranking - nll * texts.logp[0], texts.counts, metrics, texts.aux)


def stable_alignment(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  margin: float = 1.0,
  scale: float = 7.0,
  ratio: float = 0.5,
  chunk: int | None = 32,
) -> Loss:
  """n_best + ratio mean_i max(0, n_best - n_i + margin (r_best - r_i) / scale), with n = -log p(y) / |y|.

  Contrastive learning from the ratings of simulated societies (Stable Alignment, arXiv:2305.16960, section 3.3; margin,
  scale and ratio as in its code). The batch also has `ratings` f32 [batch, K]. Per prompt.
  """
  sides = names(batch)
  texts, p, there = _scores(model, params, batch, rng, sides, chunk)
  away = margin * (batch['ratings'][:, :1] - batch['ratings']) / scale
  hinge = jnp.where(there, jax.nn.relu(p - p[:, :1] + away), 0)[:, 1:]
  penalty = hinge.sum(1) / jnp.maximum(there[:, 1:].sum(1), 1)
  metrics = dict(accuracy=_right(p, pairs(there)), penalty=penalty, nll=-p[:, 0])
  return preference.settle(ratio * penalty - p[:, 0], texts.counts, metrics, texts.aux)


def hindsight_instruction(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  contrast: float = 0.3,
  entropy: float = 0.001,
  chunk: int | None = 32,
) -> Loss:
  """-log p(y | I_0) - contrast log softmax_k(log p(y | I_k))_0 - entropy H(p(. | I_0)): an answer belongs to its
  instruction, and the model should not be too sure of what it says, so that it goes on trying.

  Hindsight instruction relabelling (arXiv:2302.05206, equations 3 to 5). The sides are `instruction0/...` (the
  relabelled instruction that the answer fulfils) and other instructions with the same answer. H is summed over the
  answer's tokens, as log p is. Per answer.
  """
  sides = names(batch, 'instruction')
  texts = preference.read(model, params, batch, rng, sides, chunk)
  logp = jnp.stack(texts.logp, 1)
  own = jax.nn.log_softmax(logp)[:, 0]
  spread = texts.entropy[0]
  metrics = dict(accuracy=logp[:, 0] >= logp.max(1), contrast=-own, nll=-logp[:, 0], entropy=spread)
  loss = -logp[:, 0] - contrast * own - entropy * spread
  return preference.settle(loss, texts.counts, metrics, texts.aux)
