"""The log-probability of every target of a batch: what preference and policy objectives are made of.

A batch may hold several texts per row under names, `chosen/inputs` beside `rejected/inputs`; `join` lays them under one
another for one forward, and `parts` takes the result apart again.

    told = sequence.join(batch, ('chosen', 'rejected'))
    found = sequence.tokens(model, params, told, rng)
    chosen, rejected = sequence.parts(sequence.total(found.logp, told['weights']), 2)    # nats, [batch] each

Or its rows branch (data/branches.py) and hold several comparisons without names. `together` and `totals` do either:

    told = sequence.together(batch, ('chosen', 'rejected'))
    found = sequence.tokens(model, params, told, rng)
    chosen, rejected = sequence.totals(found.logp, told, 2)    # nats, [batch] or [batch, comparisons] each
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError

READ = (
  'inputs',
  'targets',
  'weights',
  'positions',
  'segments',
  'prefix',
)  # and encoder/*: see data/batch.py
BRANCHES = ('chosen', 'rejected')  # the texts of a comparison in a row that branches, from branch 1


class Tokens(NamedTuple):
  """logp: of the targets, nats, f32 [batch, length]. entropy: of the model's distribution there, nats, likewise. x:
  [batch, length, embed], what the logits were read from. aux: the model's auxiliary losses by name, [batch]."""

  logp: jax.Array
  entropy: jax.Array
  x: jax.Array
  aux: dict[str, jax.Array]


def tokens(
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rng: jax.Array | None = None,
  *,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Tokens:
  """log p(target | what its position sees) at every position of batch['targets'], which can be differentiated.

  rng: for dropout, None for none. chunk: positions of the length whose logits exist at one time (they are computed
  again for the gradient), None for all at once. temperature: logits are divided by it first. Where there are prompts
  apart (`prompt/inputs`, see `hidden`), the targets are those behind them.
  """
  if chunk is not None and chunk < 1:
    raise UserError(f'chunk={chunk} positions: choose at least 1, or None for the whole length')
  x, aux = hidden(model, params, batch, rng)
  head, targets = model.head(params), batch['targets']

  def score(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model.logits(head, x).astype(jnp.float32) / temperature
    logp = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return own, -(jnp.exp(logp) * logp).sum(-1)

  if chunk is None or chunk >= x.shape[1]:
    return Tokens(*score(x, targets), x, aux)
  cut = lambda a: jnp.moveaxis(
    jnp.pad(a, ((0, 0), (0, -a.shape[1] % chunk), *((0, 0),) * (a.ndim - 2))).reshape(
      a.shape[0], -1, chunk, *a.shape[2:]
    ),
    1,
    0,
  )
  found = jax.lax.map(lambda part: jax.checkpoint(score)(*part), (cut(x), cut(targets)))
  whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(x.shape[0], -1)[:, : x.shape[1]]
  return Tokens(*jax.tree.map(whole, found), x, aux)


def hidden(
  model: Any, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(x [batch, length, embed], aux) of `model.hidden`.

  Where `prompt/inputs` [prompts, ...] stand apart, each is read once, into a state, and the rows of the batch are read
  behind it as in decoding, the first `batch / prompts` of them behind the first. Their `positions` go on where the
  prompt ends; what pads a prompt is overwritten or, in a recurrent state, left out (`prompt/segments`). Then aux is
  that of the rows, and there is no dropout.
  """
  if 'prompt/inputs' not in batch:
    x, _, aux = model.hidden(params, batch, rng=rng)
    return x, aux
  if rng is not None:
    raise UserError('texts behind prompts of their own are read without dropout')
  before = side(batch, 'prompt')
  (count, width), (rows, length) = before['inputs'].shape, batch['inputs'].shape
  empty = model.states(params, before, width + length)
  states = model.hidden(params, before, states=empty).states
  states = jax.tree.map(lambda s: jnp.repeat(s, rows // count, axis=1), states)
  own = {name: batch[name] for name in ('inputs', 'positions', 'segments')}
  x, _, aux = model.hidden(params, own, states=states)
  return x, aux


def total(values: jax.Array, weights: jax.Array) -> jax.Array:
  """The weighted sum of [batch, length] over the length: [batch]."""
  return (values * weights).sum(-1)


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """The weighted mean of [batch, length] over the length, 0 where nothing counts: [batch]."""
  return total(values, weights) / jnp.maximum(weights.sum(-1), 1e-9)


def side(batch: Mapping[str, jax.Array], name: str) -> dict[str, jax.Array]:
  """What `name/...` holds of a text: {'inputs': ..., 'targets': ..., ...}."""
  start = f'{name}/'
  found = {key[len(start) :]: value for key, value in batch.items() if key.startswith(start)}
  if 'inputs' not in found:
    raise UserError(f'the batch has no {name}/inputs: choose a source that gives {name!r} texts')
  return {k: v for k, v in found.items() if k in READ or k.startswith('encoder/')}


def join(batch: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, jax.Array]:
  """The texts called `names` under one another: every array [len(names) * batch, ...]."""
  sides = [side(batch, name) for name in names]
  return {key: jnp.concatenate([s[key] for s in sides]) for key in sides[0]}


def parts(joined: jax.Array, count: int) -> list[jax.Array]:
  """Undoes `join` for one array."""
  return jnp.split(joined, count)


def together(batch: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, jax.Array]:
  """What the model reads of the texts called `names` in one forward: `join`, or the rows themselves if they branch."""
  if 'branches' not in batch:
    return join(batch, names)
  if tuple(names) != BRANCHES:
    raise UserError(
      f'rows that branch hold {" and ".join(BRANCHES)}, not {", ".join(names)}: give every text a row of its own'
    )
  return {key: batch[key] for key in (*READ, 'branches', 'compared') if key in batch}


def owned(told: Mapping[str, jax.Array], count: int) -> list[jax.Array]:
  """Which slots of rows that branch are of each of the `count` texts of every comparison: bool
  [rows, length, comparisons]."""
  numbers = jnp.arange(1, told['compared'].shape[1] + 1)
  own, branch = told['segments'][..., None] == numbers, told['branches'][..., None]
  return [own & (branch == k) for k in range(1, count + 1)]


def totals(values: jax.Array, told: Mapping[str, jax.Array], count: int) -> list[jax.Array]:
  """The weighted sums over each of the `count` texts of what `together` gave, from values [rows, length]: [batch] each,
  or [batch, comparisons] where rows branch."""
  if 'branches' not in told:
    return parts(total(values, told['weights']), count)
  weighted = (values * told['weights'])[..., None]
  return [jnp.where(own, weighted, 0).sum(1) for own in owned(told, count)]


def between(value: jax.Array, told: Mapping[str, jax.Array], count: int) -> jax.Array:
  """What is one number per row, [rows], as one per comparison: the mean over its texts' rows."""
  if 'branches' not in told:
    return sum(parts(value, count)) / count
  return jnp.broadcast_to(value[:, None], told['compared'].shape)
