"""Permutation language modelling (XLNet, Yang et al. 2019, arXiv:1906.08237) as data for an encoder.

    source = use(permuted.orders, source=use(pipeline.make, length=128, rows=use(batch.pad)))

Of every row a factorisation order z is drawn, and the model is trained on sum_i log p(x_z(i) | x_z(1) ... x_z(i-1))
(equation 3). The two streams of the paper (section 2.3) lie side by side in one row of twice the length: the tokens
themselves, which see those up to their own place in the order, and queries, [MASK] at the same positions, which see
only those before it and predict. A query also sees itself, which says no more than its position. `order` is 2 r for a
token of place r and 2 r - 1 for its query; `Mask.order` does the rest. Objective: `language.next_token`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import denoise, masked

Batch = masked.Batch


def orders(model: Any, *, source: Callable, share: float = 1 / 6, seed: int = 0) -> masked.Wrapped:
  """Rows of two streams.

  source: of one text per row (`rows=batch.pad`) for an encoder alone; the rows that come out are twice as long. share:
  of the tokens that are predicted, the last ones of the order, at least one: easier than the first, which see little
  (the paper's 1 / K with K = 6, section 2.3). The model's `length` must be that of these rows.
  """
  if not 0 < share <= 1:
    raise UserError(f'share={share} of the tokens is predicted: choose 0 < share <= 1')
  inner = source(model)
  query = denoise.mark(inner.vocab, '[MASK]')

  def change(batch: Batch, rngs: list[np.random.Generator]) -> Batch:
    drawn = np.stack([rng.permutation(batch['inputs'].shape[1]) for rng in rngs])
    return two_streams(batch, drawn, query, share)

  return masked.Wrapped(inner, 2 * inner.length, change, seed)


def two_streams(batch: Batch, drawn: np.ndarray, query: int, share: float = 1.0) -> Batch:
  """The batch of an order for every row. drawn: int [batch, length], any numbers that differ; smaller ones come first
  among the tokens that count, and padding comes last. query: the id that the second stream reads.
  """
  there, ids = batch['weights'] > 0, batch['targets']
  sizes, length = there.sum(1, keepdims=True), ids.shape[1]
  place = np.where(there, drawn, drawn + drawn.max() + 1).argsort(1).argsort(1)
  asked = there & (place >= sizes - np.maximum(1, np.round(share * sizes)))
  both = lambda first, second: np.concatenate([first, second], 1)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  return dict(
    inputs=both(ids, np.full_like(ids, query)),
    targets=both(ids, ids),
    weights=both(np.zeros_like(asked), asked).astype(np.float32),
    positions=both(positions, positions),
    segments=both(there, there).astype(np.int32),
    order=both(2 * place, 2 * place - 1).astype(np.int32),
  )
