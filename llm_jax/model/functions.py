"""What a model is to the rest of the code: pure functions over its parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from llm_jax.model.card import Card

Params = Any  # nested dicts of arrays or of the leaf types of core/weights.py
Batch = Mapping[str, jax.Array]


class Hidden(NamedTuple):
  """What the layers make of a batch.

  x: [batch, length, embed], after the final norm. states: as given, moved on; None without. aux: losses by name,
  [batch], each the mean over a row's tokens, summed over layers (see `model/ffn.py`); and `around`, where asked for.
  """

  x: jax.Array
  states: Any
  aux: dict[str, jax.Array]


class Model(NamedTuple):
  """A model as pure functions.

  init(key) -> params, plain f32 arrays; call it outside a mesh, or under jit with out_shardings.
  axes: a tree like params with a tuple of axis names for every leaf.
  hidden(params, batch, *, states=None, rng=None, layers=None, around=None) -> Hidden; dropout is on when there is a key
    `rng`. layers: run only the decoder's first ones (states may be those of all; those that come back are theirs).
    around: what looks in between, see `model/depth.py`. Besides `inputs`, a batch may have `positions`, `segments`
    (packed documents), `branches` (continuations of one beginning), `prefix`, `types` and `order` (of an encoder's
    tokens), `encoder/*`, and for parallel context windows `windows` [batch, t], with a state also `slots` [batch, t]
    and `slot_windows` [batch, slots]. `pages` [batch, n]: the attention states are pools (model/paged.py), whose
    `prefix` names the first slots; `encoder/pages` [batch, n] and `encoder/lengths` [batch]: those of cross-attention
    are too.
  logits(params, x [batch, length, embed]) -> f32 [batch, length, rows]; reads only `head(params)`.
  head(params) -> the part of params that logits reads.
  states(params, batch, length) -> an empty context of `length` slots per row of batch['inputs'], every leaf
    [layers, batch, ...]; an encoder-decoder runs its encoder here.
  """

  init: Callable[..., Params]
  axes: Any
  hidden: Callable[..., Hidden]
  logits: Callable[..., jax.Array]
  head: Callable[[Params], Params]
  states: Callable[..., Any]
  card: Card
