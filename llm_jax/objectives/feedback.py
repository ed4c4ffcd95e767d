"""Supervised learning from feedback: what was good or bad about a text is told as data.

Quark conditions on a token for the reward, Chain of Hindsight on words about the answers, FIGA weighs every token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.objectives import language, preference, sequence
from llm_jax.objectives.loss import Loss
from llm_jax.objectives.preference import Batch


def quark(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  kl: float = 0.05,
  chunk: int | None = 32,
) -> Loss:
  """-log p(y_t | x, r) + kl KL(ref(. | x, y_<t) || p(. | x, r, y_<t)) per target (Quark, arXiv:2205.13636, equation 2).

  The batch is a text whose prompt has the token r of its reward's quantile, with `ref_ids` int32 and `ref_top` f32
  [batch, length, k], the reference's k likeliest tokens and their log-probabilities without that token in the prompt:
  `annotate.with_top`. The tokens beyond those k count as one, a lower bound of the KL that is exact for k = vocabulary.
  """
  ids, ref = preference.reference(batch, 'ref_ids'), preference.reference(batch, 'ref_top')
  weights = batch['weights']
  found = sequence.tokens(model, params, batch, rng, chunk=chunk)
  own = _at(model, params, found.x, ids, chunk)
  rest = lambda logp: jnp.log(jnp.maximum(1 - jnp.exp(logp).sum(-1), 1e-6))
  apart = (jnp.exp(ref) * (ref - own)).sum(-1) + jnp.exp(rest(ref)) * (rest(ref) - rest(own))
  nats, away = -(found.logp * weights).sum(), (apart * weights).sum()
  aux = {name: (value * weights.sum(-1)).sum() for name, value in found.aux.items()}
  added = sum(value for name, value in aux.items() if not name.startswith('seen/'))
  return Loss(nats + kl * away + added, weights.sum(), dict(nats=nats, kl=away, **aux))


def _at(model: Any, params: Any, x: jax.Array, ids: jax.Array, chunk: int | None) -> jax.Array:
  """Log-probabilities of the tokens `ids` [batch, length, k] at each position; at most `chunk` logits at a time."""
  head, length = model.head(params), x.shape[1]

  @jax.checkpoint
  def score(x: jax.Array, ids: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(model.logits(head, x).astype(jnp.float32))
    return jnp.take_along_axis(logp, ids, axis=-1)

  if chunk is None or chunk >= length:
    return score(x, ids)
  pad = lambda a: jnp.pad(a, ((0, 0), (0, -length % chunk), (0, 0)))
  cut = lambda a: jnp.moveaxis(pad(a).reshape(a.shape[0], -1, chunk, a.shape[-1]), 1, 0)
  found = jax.lax.map(lambda part: score(*part), (cut(x), cut(ids)))
  return jnp.moveaxis(found, 0, 1).reshape(x.shape[0], -1, ids.shape[-1])[:, :length]


def hindsight(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  forget: float = 0.15,
  mask: int = 0,
  chunk: int | None = 32,
) -> Loss:
  """Language modelling of the responses in a chain of hindsight (arXiv:2302.02676), where past tokens are forgotten.

  The text names the answers ('A helpful answer: ... An unhelpful answer: ...') and has weights on the answers alone.
  Of what a row reads, a part drawn evenly from 0 to `forget` is replaced by the id `mask`, so that an answer is not
  just copied from the one before it. (The paper's code hides those positions from attention instead.) Nothing is
  forgotten without `rng`. Per target.
  """
  if not 0 <= forget < 1:
    raise UserError(f'forget={forget} is a part of what is read: choose 0 <= forget < 1')
  if rng is not None and forget:
    rng, part, which = jax.random.split(rng, 3)
    inputs = batch['inputs']
    most = jax.random.uniform(part, (inputs.shape[0], 1), maxval=forget)
    lost = jax.random.uniform(which, inputs.shape) < most
    lost = lost & (jnp.arange(inputs.shape[1]) > 0)  # the start of a text is no token of it
    batch = dict(batch, inputs=jnp.where(lost, mask, inputs))
  return language.next_token(model, params, batch, rng, chunk=chunk)


def figa(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  chunk: int | None = 32,
) -> Loss:
  """-sum_t c_t log p(w_t) + sum_t d_t log p(l_t): likelihood up where a revision put tokens, down where it took some.

  FIGA, arXiv:2311.04072, equation 6. The sides are `chosen` (the revised answer) and `rejected` (the one before), with
  `chosen/credit` (c) and `rejected/credit` (d), f32 [batch, length]: see `rl/edits.py`. Per pair.
  """
  told = sequence.join(batch, ('chosen', 'rejected'))
  found = sequence.tokens(model, params, told, rng, chunk=chunk)
  credit = jnp.concatenate([batch['chosen/credit'], -batch['rejected/credit']])
  w, l = sequence.parts(sequence.total(found.logp, told['weights'] * credit), 2)
  size = jnp.stack(sequence.parts(told['weights'].sum(-1), 2))
  aux = {name: sum(sequence.parts(value, 2)) / 2 for name, value in found.aux.items()}
  counts = (size.min(0) > 0).astype(jnp.float32)
  return preference.settle(-w - l, counts, dict(encouraged=w, discouraged=-l), aux)
