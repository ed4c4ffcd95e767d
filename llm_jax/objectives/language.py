"""Language modelling: predict each target from what its position sees (OBJ-001).

Causal, prefix and encoder-decoder models, plain text, span corruption and UL2 all come here: the batch says what is
read and what is predicted.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import elmo
from llm_jax.objectives import cross_entropy
from llm_jax.objectives.loss import Loss, add


def next_token(
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rng: jax.Array | None,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk: int | None = 32,
) -> Loss:
  """The cross entropy of batch['targets'] [batch, length], weighted by batch['weights'] (absent: ones), in f32.

  model: hidden, logits, head and card of `model/functions.py`. rng: for dropout, None for none. z_loss: weight of
  (log Z)^2 (PaLM: 1e-4). label_smoothing: probability spread over the other tokens (T5X). chunk: positions of the
  length whose logits exist at one time, None for all. 32 was the fastest of 8 to 128 on
  CPU at 8 rows and 32k tokens (145 MiB of temporaries; None: 1.5 GiB); a multiple suits accelerators with few rows.

  The sum has all penalties. `hidden`'s auxiliary losses, one per row, count with the weight of the row's targets, so
  they too are the same for any number of microbatches and devices. Metrics: `nats` the cross entropy without any
  penalty, `accuracy`, `z_loss`, and the auxiliary losses; those named `seen/` are only reported.
  """
  _check(z_loss, label_smoothing, chunk)
  targets = batch['targets']
  weights = batch.get('weights')
  weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
  x, _, aux = model.hidden(params, batch, rng=rng)
  penalty = cross_entropy.Penalty(z_loss, label_smoothing, model.card.vocab)
  scored = (model.logits, model.head(params), x, targets, weights, penalty)
  terms = cross_entropy.whole(*scored) if chunk is None else cross_entropy.fused(*scored, chunk)
  aux = {name: (value * weights.sum(-1)).sum() for name, value in aux.items()}
  metrics = dict(nats=terms.nats, accuracy=terms.accuracy, z_loss=terms.z_loss, **aux)
  losses = (value for name, value in aux.items() if not name.startswith('seen/'))
  return Loss(sum(losses, terms.loss), weights.sum(), metrics)


def both_ways(
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rng: jax.Array | None,
  *,
  chunk: int | None = 32,
) -> Loss:
  """The cross entropy of every target given those before it, and given those after it (Peters et al. 2018,
  arXiv:1802.05365, section 3.1).

  model: of `elmo.make`. batch: as in `next_token`, with ids of words also where the model reads their characters; one
  document a row (`batch.pad`, `batch.concatenate`).
  """
  segments, targets = batch.get('segments'), elmo.turned(batch['targets'], batch.get('segments'))
  inputs = jnp.concatenate([batch['inputs'][:, :1], targets[:, :-1]], axis=1)
  told = dict(batch, targets=targets, inputs=inputs)
  if 'weights' in batch:
    told['weights'] = elmo.turned(batch['weights'], segments)
  keys = (None, None) if rng is None else jax.random.split(rng)
  first = next_token(model.one, params['forward'], batch, keys[0], chunk=chunk)
  return add(first, next_token(model.one, elmo.backward(params), told, keys[1], chunk=chunk))


def with_memory(
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rng: jax.Array | None,
  *,
  memory: int,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk: int | None = 32,
) -> Loss:
  """`next_token` of all but the first `memory` positions, which are the segment before (Transformer-XL, Dai et al.
  2019, arXiv:1901.02860, section 3.2).

  What the layers keep of the memory is looked at and not changed: no gradient goes through it, and its activations are
  not stored. Rows are windows of one document (`rows=batch.concatenate`), so the source needs nothing but a longer
  length. The paper caches the layers' inputs and projects them anew, here their keys and values are kept, as in
  decoding; with `SelfAttention(relative=positions.TransformerXL)` it is the paper's model.
  """
  length = batch['inputs'].shape[1]
  if not 0 < memory < length or 'segments' in batch:
    raise UserError(
      f'memory={memory} of a row of {length}: choose a part of it, and a source with rows=batch.concatenate'
    )
  at = jnp.broadcast_to(jnp.arange(length)[None], batch['inputs'].shape)
  before = dict(inputs=batch['inputs'][:, :memory], positions=at[:, :memory])
  fixed = jax.lax.stop_gradient(params)
  states = model.hidden(fixed, before, states=model.states(fixed, before, length)).states
  told = {name: x[:, memory:] for name, x in dict(batch, positions=at).items()}
  hidden = lambda params, batch, rng: model.hidden(params, batch, rng=rng, states=states)
  penalties = dict(z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk)
  return next_token(model._replace(hidden=hidden), params, told, rng, **penalties)


def _check(z_loss: float, label_smoothing: float, chunk: int | None) -> None:
  if z_loss < 0:
    raise UserError(f'z_loss={z_loss} must not be negative: 0 is none, PaLM has 1e-4')
  if not 0 <= label_smoothing < 1:
    raise UserError(
      f'label_smoothing={label_smoothing} is a probability: choose 0 <= label_smoothing < 1'
    )
  if chunk is not None and chunk < 1:
    raise UserError(f'chunk={chunk} positions: choose at least 1, or None for the whole length')
