"""Models put together: embedding, stacks of blocks and head as the functions of a `Model`.

The builders of model/transformer.py fill in `Ends` and `Stack`; what follows from them is here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh
from llm_jax.core import tree as tree_lib
from llm_jax.core.errors import UserError
from llm_jax.model import param, stack
from llm_jax.model import positions as positions_lib
from llm_jax.model.attention import Context
from llm_jax.model.card import describe, unbranched
from llm_jax.model.depth import Around
from llm_jax.model.functions import Batch, Hidden, Model, Params
from llm_jax.model.masks import Mask

PADDED = -1e30  # the logit of a row that pads the vocabulary: probability 0, and 0 * log 0 stays 0


class Stack(NamedTuple):
  """The parts of an encoder or a decoder."""

  name: str
  segments: tuple[stack.Segment, ...]
  norm: nn.Module | None
  bias: nn.Module | None
  stem: nn.Module | None
  causal: bool
  bidirectional: bool  # T5 buckets for keys after the query
  runner: Callable


class Ends(NamedTuple):
  """What the stacks share: sizes, the input and the output side."""

  kind: str
  vocab: int
  rows: int
  embed: int
  length: int | None
  dtype: Any
  embedding: nn.Module
  positions: nn.Module | None
  head: nn.Module
  recipe: Callable


def decoder_only(ends: Ends, decoder: Stack) -> Model:
  """A causal or prefix decoder."""
  why = unbranched(ends, decoder)

  def hidden(
    params: Params,
    batch: Batch,
    *,
    states: Any = None,
    rng: jax.Array | None = None,
    layers: int | None = None,
    around: Around | None = None,
  ) -> Hidden:
    rngs = _keys(rng, 2)
    x, positions = _embed(decoder, ends, params, batch['inputs'], batch.get('positions'), rngs[0])
    keys = _length(batch, states) or x.shape[1]
    segments = None if states is not None or 'segments' not in batch else (batch['segments'],) * 2
    seen = _prefix(batch, keys) if ends.kind == 'prefix' else None
    slots = None if states is None else batch.get('slots', positions)
    told = dict(windows=_windows(batch, states), branches=_branches(batch, why))
    mask = Mask(True, seen, segments, slots, **told)
    bias = _bias(decoder, params, mask, x.shape[1], keys)
    told = dict(ids=batch['inputs'], real=_real(batch, states), pages=batch.get('pages'))
    ctx = Context(mask, positions, bias, rngs[1], **told)
    return _run(_upto(decoder, layers), params, x, ctx, states, around)

  def states(params: Params, batch: Batch, length: int) -> dict:
    _check_length(decoder, ends, length)
    return _initial(decoder, ends, params, batch['inputs'].shape[0], length)

  return _model(ends, hidden, states, decoder)


def encoder_only(ends: Ends, encoder: Stack) -> Model:
  """An encoder without a decoder."""

  def hidden(
    params: Params,
    batch: Batch,
    *,
    states: Any = None,
    rng: jax.Array | None = None,
    layers: int | None = None,
    around: Around | None = None,
  ) -> Hidden:
    if states is not None:
      refuse()
    rngs = _keys(rng, 2)
    x, ctx = _whole(encoder, ends, params, batch, '', rngs)
    return _run(_upto(encoder, layers), params, x, ctx, None, around)

  def refuse(*_: Any) -> dict:
    raise UserError('an encoder keeps no states and cannot generate: use a decoder for that')

  return _model(ends, hidden, refuse, encoder)


def encoder_decoder(ends: Ends, encoder: Stack, decoder: Stack) -> Model:
  """An encoder, and a decoder that reads its output."""

  def encode(params: Params, batch: Batch, rng: jax.Array | None) -> Hidden:
    x, ctx = _whole(encoder, ends, params, batch, 'encoder/', _keys(rng, 2))
    return _run(encoder, params, x, ctx, None)

  def hidden(
    params: Params,
    batch: Batch,
    *,
    states: Any = None,
    rng: jax.Array | None = None,
    layers: int | None = None,
    around: Around | None = None,
  ) -> Hidden:
    rngs = _keys(rng, 3)
    read = None if states is not None and not _unread(states) else encode(params, batch, rngs[2])
    x, positions = _embed(decoder, ends, params, batch['inputs'], batch.get('positions'), rngs[0])
    keys = _length(batch, states) or x.shape[1]
    segments = None if states is not None or 'segments' not in batch else (batch['segments'],) * 2
    mask = Mask(True, None, segments, None if states is None else positions)
    bias = _bias(decoder, params, mask, x.shape[1], keys)
    encoded = (read and read.x, _encoded_mask(batch, segments))
    told = dict(ids=batch['inputs'], real=_real(batch, states), pages=batch.get('pages'))
    if 'encoder/pages' in batch:
      told['encoded_pages'] = batch['encoder/pages'], batch['encoder/lengths']
    ctx = Context(mask, positions, bias, rngs[1], *encoded, **told)
    found = _run(_upto(decoder, layers), params, x, ctx, states, around)
    return found._replace(aux=stack.add(read.aux, found.aux)) if read else found

  def states(params: Params, batch: Batch, length: int) -> dict:
    _check_length(decoder, ends, length)
    rows = batch['inputs'].shape[0]
    empty = _initial(decoder, ends, params, rows, length)
    # One step of padding whose key and value fall outside the slots: it only leaves the cross-attention's.
    none = jnp.zeros((rows, 1), jnp.int32)
    step = dict(batch, inputs=none, positions=none + length, segments=none)
    return hidden(params, step, states=empty).states

  return _model(ends, hidden, states, decoder, encoder)


def _whole(
  part: Stack, ends: Ends, params: Params, batch: Batch, side: str, rngs: Any
) -> tuple[jax.Array, Context]:
  """What an encoder's layers are given of the arrays of the batch whose names begin with `side`."""
  ids, segments = batch[f'{side}inputs'], batch.get(f'{side}segments')
  told = batch.get(f'{side}positions'), rngs[0], batch.get(f'{side}types')
  x, positions = _embed(part, ends, params, ids, *told)
  pair = lambda told: None if told is None else (told, told)
  mask = Mask(segments=pair(segments), order=pair(batch.get(f'{side}order')))
  bias = _bias(part, params, mask, x.shape[1], x.shape[1])
  return x, Context(mask, positions, bias, rngs[1], ids=ids)


def _windows(batch: Batch, states: Any) -> tuple | None:
  """Parallel context windows: of the tokens, and of the slots of a state."""
  if 'windows' not in batch:
    return None
  return batch['windows'], batch['windows'] if states is None else batch['slot_windows']


def _branches(batch: Batch, why: str | None) -> tuple | None:
  """Continuations of one beginning; `why` not, where the model cannot tell them apart."""
  if 'branches' in batch and why:
    raise UserError(f'{why}: its rows cannot branch, give every text a row of its own')
  return (batch['branches'],) * 2 if 'branches' in batch else None


def _model(
  ends: Ends, hidden: Callable, states: Callable, decoder: Stack, encoder: Stack | None = None
) -> Model:
  """The parameters of all parts, and the functions that need nothing but those."""
  x, ids = jnp.zeros((1, 1, ends.embed)), jnp.zeros((1, 1), jnp.int32)
  shared = dict(embedding=param.declare(ends.embedding, ids, ends.rows, ends.embed, ends.dtype))
  if ends.positions is not None:
    shared['positions'] = param.declare(ends.positions, ids, ends.embed, ends.length)
  table = shared['embedding']['table']
  if ends.head.reads == 'embedding' and table.axes[0] != 'vocab':
    raise UserError(
      'the embedding has no row for an id that the head could be tied to: use heads.Untied'
    )
  table = table.value
  shared['head'] = param.declare(ends.head, x, ends.rows, table)
  stacks = [s for s in (encoder, decoder) if s is not None]
  parts = {s.name: _declare(s, ends) for s in stacks}
  boxes = {name: tree for name, tree in {**shared, **parts}.items() if tree}
  residuals = {s.name: _residuals(s) for s in stacks}

  def init(key: jax.Array) -> Params:
    return {
      name: param.sample(
        tree, jax.random.fold_in(key, i), ends.recipe, ends.embed, residuals.get(name, 1)
      )
      for i, (name, tree) in enumerate(boxes.items())
    }

  def head(params: Params) -> Params:
    return {name: params[name] for name in ('head', ends.head.reads) if name in params}

  def logits(params: Params, x: jax.Array) -> jax.Array:
    table = params['embedding']['table'] if ends.head.reads == 'embedding' else None
    y = ends.head.apply({'params': params.get('head', {})}, x, ends.rows, table)
    if ends.rows == ends.vocab:
      return y
    return jnp.where(jnp.arange(ends.rows) < ends.vocab, y, PADDED)

  return Model(
    init,
    param.unbox(boxes)[1],
    hidden,
    logits,
    head,
    states,
    describe(ends, boxes, decoder, encoder),
  )


def _declare(part: Stack, ends: Ends) -> dict:
  tree = stack.declare(part.segments, ends.embed)
  if part.norm is not None:
    tree['norm'] = param.declare(part.norm, jnp.zeros((1, 1, ends.embed)))
  if part.stem is not None:
    x, ids = jnp.zeros((1, 1, ends.embed)), jnp.zeros((1, 1), jnp.int32)
    tree['stem'] = param.declare(part.stem, x, ids, ends.length, None, ids)
  if part.bias is not None:
    found = param.declare(
      part.bias, jnp.zeros((1, 1), jnp.int32), 1, _heads(part), part.bidirectional
    )
    tree.update(dict(bias=found) if found else {})
  return tree


def _residuals(part: Stack) -> int:
  """The number of additions to the residual stream."""
  return sum(
    s.repeats * (len(b.mixers) + (b.ffn is not None)) for s in part.segments for b in s.blocks
  )


def _heads(part: Stack) -> int:
  """The query heads of every mixer, which share one bias."""
  made = [
    make() for s in part.segments for b in s.blocks for name, make in b.mixers if name == 'mixer'
  ]
  found = {m.heads for m in made if hasattr(m, 'heads')}
  if len(found) != 1:
    raise UserError(
      f'a position bias is shared by all layers, but they have {sorted(found)} heads: use one number'
    )
  return found.pop()


def _keys(rng: jax.Array | None, n: int) -> Any:
  return (None,) * n if rng is None else jax.random.split(rng, n)


def _check_length(part: Stack, ends: Ends, length: int) -> None:
  learned = part.stem is not None or isinstance(ends.positions, positions_lib.Learned)
  if learned and ends.length is not None and length > ends.length:
    raise UserError(
      f'a context of {length} is longer than the table of {ends.length} learned positions: '
      'shorten it, or set --config.model.length before training'
    )


def _embed(
  part: Stack,
  ends: Ends,
  params: Params,
  ids: jax.Array,
  positions: jax.Array | None,
  rng: jax.Array | None,
  types: jax.Array | None = None,
) -> tuple:
  """ids, types [batch, t] -> ([batch, t, embed], positions [batch or 1, t])."""
  _check_length(part, ends, ids.shape[1])
  if positions is None:
    positions = jnp.arange(ids.shape[1])[None]
  x = ends.embedding.apply({'params': params['embedding']}, ids, ends.rows, ends.embed, ends.dtype)
  if ends.positions is not None:
    p = ends.positions.apply(
      {'params': params.get('positions', {})}, positions, ends.embed, ends.length
    )
    x = x + p.astype(x.dtype)
  x = ends.embedding.finish(x, rng)
  if part.stem is not None:
    rng = None if rng is None else jax.random.fold_in(rng, 0)
    x = part.stem.apply(
      {'params': params[part.name]['stem']}, x, positions, ends.length, rng, types
    )
  return mesh.shard(x, 'batch', 'length', 'embed'), positions


def _bias(part: Stack, params: Params, mask: Mask, t: int, keys: int) -> jax.Array | None:
  """The position bias on the logits, [batch or 1, heads, t, keys]: distances count slots, which inside a segment are
  positions.
  """
  if part.bias is None:
    return None
  queries = jnp.arange(t)[None] if mask.queries is None else mask.queries
  variables = {'params': params[part.name].get('bias', {})}
  y = part.bias.apply(variables, queries, keys, _heads(part), part.bidirectional)
  return mesh.shard(y, 'batch' if y.shape[0] > 1 else None, 'heads', 'length', 'length')


def _upto(part: Stack, layers: int | None) -> Stack:
  return part if layers is None else part._replace(segments=stack.upto(part.segments, layers))


def _run(
  part: Stack,
  params: Params,
  x: jax.Array,
  ctx: Context,
  states: Any,
  around: Around | None = None,
) -> Hidden:
  def finish(x: jax.Array) -> jax.Array:
    return x if part.norm is None else part.norm.apply({'params': params[part.name]['norm']}, x)

  told = part.segments, part.runner, params[part.name]
  if around is None:
    x, states, aux = stack.run(*told, x, ctx, states)
    return Hidden(finish(x), states, aux)
  for layers in around.at:
    stack.upto(part.segments, layers)
  wrap = lambda apply, layer: around.step(apply, layer, finish)
  (x, kept), states, aux = stack.run(*told, (x, around.start(x)), ctx, states, wrap)
  return Hidden(finish(x), states, dict(aux, around=around.end(kept, finish)))


def _initial(part: Stack, ends: Ends, params: Params, rows: int, length: int) -> dict:
  states = stack.initial(part.segments, rows, length, ends.embed, ends.dtype)
  if stack.is_apart(params.get(part.name, {})):
    states = stack.apart(states)
  axes = stack.axes_apart(stack.state_axes(part.segments), states)
  names = tree_lib.flatten(axes, is_leaf=tree_lib.is_names)
  return tree_lib.map_paths(lambda path, x: mesh.shard(x, *names[path]), states)


def _length(batch: Batch, states: Any) -> int | None:
  """The number of slots of the attention states, or of all pages of a row; None without."""
  flat = {} if states is None else tree_lib.flatten(states)
  ends = 'mixer/k', 'mixer/k/values'
  length = next((x.shape[3] for path, x in flat.items() if path.endswith(ends)), None)
  return length if length is None or 'pages' not in batch else length * batch['pages'].shape[1]


def _real(batch: Batch, states: Any) -> jax.Array | None:
  """Which tokens of a call with states are real: those of batch['segments'] that are no padding."""
  return None if states is None or 'segments' not in batch else batch['segments'] > 0


def _unread(states: Any) -> bool:
  """Whether some cross-attention has not seen the encoder's output yet."""
  if isinstance(states, tuple):
    return any(map(_unread, states))
  if not isinstance(states, dict):
    return False
  return not states or any(_unread(s) for s in states.values())


def _prefix(batch: Batch, keys: int) -> jax.Array | None:
  """bool [batch, keys]: batch['prefix'], with the slots that it does not name left out."""
  seen = batch.get('prefix')
  if seen is None or seen.shape[1] >= keys:
    return seen
  return jnp.pad(seen, ((0, 0), (0, keys - seen.shape[1])))


def _encoded_mask(batch: Batch, segments: tuple | None) -> Mask:
  """Which encoder positions the decoder sees: those of its own segment, or of segment 1 when it has none."""
  key = batch.get('encoder/segments')
  if key is None:
    return Mask()
  return Mask(
    segments=(jnp.ones(batch['inputs'].shape, key.dtype) if segments is None else segments[0], key)
  )
