"""Causal decoders, prefix decoders and encoder-decoders from the same blocks and runners, as pure functions.

The builders return a `Model`: that is all of this package that the rest of the code sees.

    model = transformer.causal(vocab=256, embed=64, layers=2, block=functools.partial(block.decoder, ...))
    params = model.init(jax.random.key(0))
    x, _, _ = model.hidden(params, dict(inputs=ids))      # [batch, length, embed]
    logits = model.logits(params, x)                      # f32 [batch, length, vocab]

The default is the recipe of the survey's section 4.2.5 (ARC-045): pre-RMSNorm, RoPE, no biases, no norm after the
embedding; its feed-forward is `ffn.Gated` (SwiGLU).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh
from llm_jax.core import tree as tree_lib
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import heads, init, norms, param, stack
from llm_jax.model import positions as positions_lib
from llm_jax.model.attention import Context
from llm_jax.model.card import Card, describe
from llm_jax.model.masks import Mask

Params = Any  # nested dicts of arrays or of the leaf types of core/weights.py
Batch = Mapping[str, jax.Array]

PADDED = -1e30  # the logit of a row that pads the vocabulary: probability 0, and 0 * log 0 stays 0


class Hidden(NamedTuple):
  """What the layers make of a batch.

  x: [batch, length, embed], after the final norm. states: as given, moved on; None without. aux: losses by name,
  [batch], each the mean over a row's tokens, summed over layers (see `model/ffn.py`).
  """

  x: jax.Array
  states: Any
  aux: dict[str, jax.Array]


class Model(NamedTuple):
  """A model as pure functions.

  init(key) -> params, plain f32 arrays; call it outside a mesh, or under jit with out_shardings.
  axes: a tree like params with a tuple of axis names for every leaf.
  hidden(params, batch, *, states=None, rng=None) -> Hidden; dropout is on when there is a key `rng`.
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


class _Stack(NamedTuple):
  """The parts of an encoder or a decoder."""

  name: str
  segments: tuple[stack.Segment, ...]
  norm: nn.Module | None
  bias: nn.Module | None
  causal: bool
  bidirectional: bool  # T5 buckets for keys after the query
  runner: Callable


class _Ends(NamedTuple):
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


def causal(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.gpt2,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """A causal decoder: every position sees those before it (Radford et al. 2018).

  vocab: ids; the table gets that many rows, rounded up to `vocab_multiple`. layers, block: see `stack.segments`.
  length: the longest context (the size of a learned position table). norm: the final one, None for post-norm blocks.
  positions: added to the embedding. bias: added to the attention logits. init: a recipe of model/init.py. dtype: of the
  computation ('float32' or 'bfloat16'); parameters, softmax, norm statistics and logits are f32.
  """
  ends = _ends(
    'causal', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  return _decoder_only(
    ends, _stack('decoder', layers, block, norm, bias, runner, causal=True, bidirectional=False)
  )


def prefix(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.gpt2,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """A prefix decoder: `causal`, but the positions of batch['prefix'] are seen by all (Dong et al. 2019,
  arXiv:1905.03197).

  The parameters are those of `causal` with the same arguments, so a causal checkpoint can be trained on as a prefix
  decoder.
  """
  ends = _ends(
    'prefix', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  return _decoder_only(
    ends, _stack('decoder', layers, block, norm, bias, runner, causal=True, bidirectional=True)
  )


def encoder_decoder(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  encoder_layers: int | tuple,
  encoder_block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.t5,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """An encoder that sees all of batch['encoder/inputs'] and a causal decoder that reads its output (Vaswani et al.
  2017; T5).

  layers, block: of the decoder, made with `block.cross_decoder`. Other arguments as in `causal`, for both stacks; the
  embedding and the position table are shared.
  """
  ends = _ends(
    'encoder_decoder', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  encoder = _stack(
    'encoder', encoder_layers, encoder_block, norm, bias, runner, causal=False, bidirectional=True
  )
  decoder = _stack('decoder', layers, block, norm, bias, runner, causal=True, bidirectional=False)
  return _encoder_decoder(ends, encoder, decoder)


def _ends(
  kind, vocab, embed, length, dtype, embedding, positions, head, recipe, vocab_multiple
) -> _Ends:
  known = dict(float32=jnp.float32, bfloat16=jnp.bfloat16)
  if dtype not in known:
    raise UserError(f'dtype {dtype!r}: {nearest(dtype, known)}')
  rows = -(-vocab // vocab_multiple) * vocab_multiple
  made = [None if part is None else part() for part in (embedding, positions, head)]
  return _Ends(kind, vocab, rows, embed, length, known[dtype], *made, recipe)


def _stack(name, layers, block, norm, bias, runner, *, causal: bool, bidirectional: bool) -> _Stack:
  made = [None if part is None else part() for part in (norm, bias)]
  return _Stack(name, stack.segments(layers, block), *made, causal, bidirectional, runner)


def _decoder_only(ends: _Ends, decoder: _Stack) -> Model:
  def hidden(
    params: Params, batch: Batch, *, states: Any = None, rng: jax.Array | None = None
  ) -> Hidden:
    rngs = _keys(rng, 2)
    x, positions = _embed(ends, params, batch['inputs'], batch.get('positions'), rngs[0])
    keys = _length(states) or x.shape[1]
    segments = None if states is not None or 'segments' not in batch else (batch['segments'],) * 2
    seen = _prefix(batch, keys) if ends.kind == 'prefix' else None
    mask = Mask(True, seen, segments, None if states is None else positions)
    bias = _bias(decoder, params, mask, x.shape[1], keys)
    ctx = Context(mask, positions, bias, rngs[1], ids=batch['inputs'])
    return _run(decoder, params, x, ctx, states)

  def states(params: Params, batch: Batch, length: int) -> dict:
    del params
    _check_length(ends, length)
    return _initial(decoder, ends, batch['inputs'].shape[0], length)

  return _model(ends, hidden, states, decoder)


def _encoder_decoder(ends: _Ends, encoder: _Stack, decoder: _Stack) -> Model:
  def encode(params: Params, batch: Batch, rng: jax.Array | None) -> Hidden:
    rngs, segments = _keys(rng, 2), batch.get('encoder/segments')
    x, positions = _embed(
      ends, params, batch['encoder/inputs'], batch.get('encoder/positions'), rngs[0]
    )
    mask = Mask(segments=None if segments is None else (segments, segments))
    bias = _bias(encoder, params, mask, x.shape[1], x.shape[1])
    ctx = Context(mask, positions, bias, rngs[1], ids=batch['encoder/inputs'])
    return _run(encoder, params, x, ctx, None)

  def hidden(
    params: Params, batch: Batch, *, states: Any = None, rng: jax.Array | None = None
  ) -> Hidden:
    rngs = _keys(rng, 3)
    read = None if states is not None and not _unread(states) else encode(params, batch, rngs[2])
    x, positions = _embed(ends, params, batch['inputs'], batch.get('positions'), rngs[0])
    keys = _length(states) or x.shape[1]
    segments = None if states is not None or 'segments' not in batch else (batch['segments'],) * 2
    mask = Mask(True, None, segments, None if states is None else positions)
    bias = _bias(decoder, params, mask, x.shape[1], keys)
    encoded = (read and read.x, _encoded_mask(batch, segments))
    ctx = Context(mask, positions, bias, rngs[1], *encoded, ids=batch['inputs'])
    found = _run(decoder, params, x, ctx, states)
    return found._replace(aux=stack.add(read.aux, found.aux)) if read else found

  def states(params: Params, batch: Batch, length: int) -> dict:
    _check_length(ends, length)
    rows = batch['inputs'].shape[0]
    empty = _initial(decoder, ends, rows, length)
    # One step whose key and value fall outside the slots: it only leaves the cross-attention's.
    step = dict(
      batch, inputs=jnp.zeros((rows, 1), jnp.int32), positions=jnp.full((rows, 1), length)
    )
    return hidden(params, step, states=empty).states

  return _model(ends, hidden, states, decoder, encoder)


def _model(
  ends: _Ends, hidden: Callable, states: Callable, decoder: _Stack, encoder: _Stack | None = None
) -> Model:
  """The parameters of all parts, and the functions that need nothing but those."""
  x, ids = jnp.zeros((1, 1, ends.embed)), jnp.zeros((1, 1), jnp.int32)
  table = jax.ShapeDtypeStruct((ends.rows, ends.embed), jnp.float32)
  shared = dict(embedding=param.declare(ends.embedding, ids, ends.rows, ends.embed, ends.dtype))
  if ends.positions is not None:
    shared['positions'] = param.declare(ends.positions, ids, ends.embed, ends.length)
  shared['head'] = param.declare(ends.head, x, ends.rows, table)
  stacks = [s for s in (encoder, decoder) if s is not None]
  parts = {s.name: _declare(s, ends.embed) for s in stacks}
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
    return {ends.head.reads: params[ends.head.reads]}

  def logits(params: Params, x: jax.Array) -> jax.Array:
    table = params['embedding']['table'] if ends.head.reads == 'embedding' else None
    y = ends.head.apply({'params': params.get('head', {})}, x, ends.rows, table)
    if ends.rows == ends.vocab:
      return y
    return jnp.where(jnp.arange(ends.rows) < ends.vocab, y, PADDED)

  return Model(
    init, param.unbox(boxes)[1], hidden, logits, head, states, describe(ends, decoder, encoder)
  )


def _declare(part: _Stack, embed: int) -> dict:
  tree = stack.declare(part.segments, embed)
  if part.norm is not None:
    tree['norm'] = param.declare(part.norm, jnp.zeros((1, 1, embed)))
  if part.bias is not None:
    found = param.declare(
      part.bias, jnp.zeros((1, 1), jnp.int32), 1, _heads(part), part.bidirectional
    )
    tree.update(dict(bias=found) if found else {})
  return tree


def _residuals(part: _Stack) -> int:
  """The number of additions to the residual stream."""
  return sum(s.repeats * (len(b.mixers) + 1) for s in part.segments for b in s.blocks)


def _heads(part: _Stack) -> int:
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


def _check_length(ends: _Ends, length: int) -> None:
  if isinstance(ends.positions, positions_lib.Learned) and length > ends.length:
    raise UserError(
      f'a context of {length} is longer than the table of {ends.length} learned positions: '
      'shorten it, or set --config.model.length before training'
    )


def _embed(
  ends: _Ends, params: Params, ids: jax.Array, positions: jax.Array | None, rng: jax.Array | None
) -> tuple:
  """ids [batch, t] -> ([batch, t, embed], positions [batch or 1, t])."""
  _check_length(ends, ids.shape[1])
  if positions is None:
    positions = jnp.arange(ids.shape[1])[None]
  x = ends.embedding.apply({'params': params['embedding']}, ids, ends.rows, ends.embed, ends.dtype)
  if ends.positions is not None:
    p = ends.positions.apply(
      {'params': params.get('positions', {})}, positions, ends.embed, ends.length
    )
    x = x + p.astype(x.dtype)
  return mesh.shard(ends.embedding.finish(x, rng), 'batch', 'length', 'embed'), positions


def _bias(part: _Stack, params: Params, mask: Mask, t: int, keys: int) -> jax.Array | None:
  """The position bias on the logits, [batch or 1, heads, t, keys]: distances count slots, which inside a segment are
  positions.
  """
  if part.bias is None:
    return None
  queries = jnp.arange(t)[None] if mask.queries is None else mask.queries
  variables = {'params': params[part.name].get('bias', {})}
  y = part.bias.apply(variables, queries, keys, _heads(part), part.bidirectional)
  return mesh.shard(y, 'batch' if y.shape[0] > 1 else None, 'heads', 'length', 'length')


def _run(part: _Stack, params: Params, x: jax.Array, ctx: Context, states: Any) -> Hidden:
  x, states, aux = stack.run(part.segments, part.runner, params[part.name], x, ctx, states)
  if part.norm is not None:
    x = part.norm.apply({'params': params[part.name]['norm']}, x)
  return Hidden(x, states, aux)


def _initial(part: _Stack, ends: _Ends, rows: int, length: int) -> dict:
  def place(x: jax.Array) -> jax.Array:
    names = ('layers', 'batch', 'length', 'groups', 'head_dim')
    return mesh.shard(x, *names) if x.ndim == len(names) else x

  return jax.tree.map(place, stack.initial(part.segments, rows, length, ends.embed, ends.dtype))


def _length(states: Any) -> int | None:
  """The number of slots of the attention states; None without."""
  flat = {} if states is None else tree_lib.flatten(states)
  return next((x.shape[2] for path, x in flat.items() if path.endswith('mixer/k')), None)


def _unread(states: Any) -> bool:
  """Whether some cross-attention has not seen the encoder's output yet."""
  if not isinstance(states, dict):
    return False
  return not states or any(_unread(s) for s in states.values())


def _prefix(batch: Batch, keys: int) -> jax.Array | None:
  """bool [batch, keys]: batch['prefix'], with the slots that it does not name left out."""
  seen = batch.get('prefix')
  if seen is None or seen.shape[1] == keys:
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
