"""Stored parameters in a model with more ids: the rows that new tokens need."""

import re

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError


def vocabulary(
  path: str,
  old: jax.Array,
  fresh: jax.Array,
  *,
  noise: float = 0.0,
  tables: str = r'^embedding/table$|^head/(w|bias)$',
) -> jax.Array:
  """`old` with rows for the ids that `fresh` has more; the rows of the old ids, and so their logits, stay as they are.

  old, fresh: parameters [..., ids, ...], alike but for the number of ids. noise: a new row is the mean of the old ones
  plus `noise` times a fresh one. With 0 a new id's logit is the mean of the old ones, by Jensen's inequality at most
  log-sum-exp less log V, so n new ids cost an old text at most log(1 + n / V) nats per token (Hewitt 2021,
  "Initializing New Word Embeddings for Pretrained Language Models"). tables: regex on the paths that hold ids.
  Returns an array like `fresh`. Raises `UserError` for a parameter that is no such table, or has more ids than here.
  """
  differ = [i for i, (a, b) in enumerate(zip(old.shape, fresh.shape, strict=False)) if a != b]
  if old.ndim != fresh.ndim or len(differ) != 1 or not re.search(tables, path):
    raise UserError(
      f'{path!r} has shape {tuple(old.shape)} there and {tuple(fresh.shape)} here: only the vocabulary can grow, use a '
      'matching config'
    )
  axis = differ[0]
  here, there = fresh.shape[axis], old.shape[axis]
  if here < there:
    raise UserError(
      f'{path!r} has {there} ids there and {here} here: a vocabulary can grow, not shrink'
    )
  more = jax.lax.slice_in_dim(fresh, there, here, axis=axis)
  rows = old.mean(axis, keepdims=True) + noise * more
  grown = jnp.concatenate([old, rows.astype(old.dtype)], axis)
  return jax.device_put(grown, fresh.sharding)
