"""The numbers of a model, read off its parts: what sizes, FLOPs and memory are computed from (model/count.py).

Attention and dense feed-forwards are described by their sizes, so that closed forms count them. Any other module is
described by what it declares: of a weight with an `expert` axis in front a token meets `top_k` of the module's
`experts`. Such a module may have a method `flops(length, embed)`, the FLOPs of its products between activations over
one sequence; its state is what the method `initial(batch, length, embed, dtype)` of all mixers returns.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import tree
from llm_jax.model import attention, ffn, param, stack

# What the closed form of an attention covers; whatever else it declares is counted as declared.
_PROJECTIONS = ('query', 'key', 'value', 'out')
_COVERED = (*_PROJECTIONS, *(f'{name}_bias' for name in _PROJECTIONS))


class Declared(NamedTuple):
  """What a module declares per layer, in elements.

  weights: of matrices; vectors: biases, scales, gates; active and active_vectors: those of them that a token meets.
  """

  module: Any
  weights: int
  vectors: int
  active: int
  active_vectors: int

  def flops(self, length: int, embed: int) -> float:
    """FLOPs of the products between activations over a sequence, as far as the module says."""
    return self.module.flops(length, embed) if hasattr(self.module, 'flops') else 0

  def state_bytes(self, length: int, embed: int, width: int) -> int:
    """Bytes of a mixer's state after `length` tokens, where numbers of the model's dtype take `width`."""
    dtype = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}[width]
    return tree.nbytes(jax.eval_shape(lambda: self.module.initial(1, length, embed, dtype)))


class Attention(NamedTuple):
  """An attention's sizes.

  window: the keys a query sees, sinks among them, None for all (and for other patterns). relative: whether queries also
  meet a vector for every distance. more: what it declares besides its four projections.
  """

  heads: int
  groups: int
  head_dim: int
  bias: bool
  out_bias: bool
  window: int | None
  cross: bool
  relative: bool
  more: Declared


class Dense(NamedTuple):
  """A dense feed-forward's sizes."""

  hidden: int
  gated: bool
  bias: bool


class Spelled(NamedTuple):
  """An embedding that makes vectors of words from their characters: parameters, and forward FLOPs of one word."""

  parameters: int
  flops: int


class Kind(NamedTuple):
  """Blocks that are alike, and how many there are.

  ffn: None without. norm: vectors of `embed` entries in one norm, 1 or 2.
  """

  repeats: int
  mixers: tuple[Attention | Declared, ...]
  ffn: Dense | Declared | None
  residual: str
  norm: int

  @property
  def sublayers(self) -> int:
    """Additions to the residual stream per block."""
    return len(self.mixers) + (self.ffn is not None)


class Card(NamedTuple):
  """The numbers of a model from which its size, FLOPs and memory follow (see model/count.py).

  kind: 'causal', 'prefix', 'encoder' or 'encoder_decoder'. vocab: ids; rows: of the embedding table (vocab padded).
  length: the longest context, None = unlimited. decoder, encoder: the kinds of blocks in the order of the stack; an
  encoder alone stands where the decoder of others does. norm: name of the first block's; final_norm, embedding_norm,
  stem_norm (of each stack): their vectors of `embed` entries, 0 without. rank: width of the embedding table, None =
  embed. positions: names joined by '+', of 'rope', 'rope_interleaved', 'Learned', 'Sinusoidal', 'Alibi', 'Buckets',
  ..., or 'none'. buckets: rows of the relative table (0 without). types: rows of the table of token types. head_more:
  parameters of the head beside its table and bias. pooled: those of a pooler and a classifier (model/classes.py).
  spelled: what stands in the place of the embedding table, None where there is one (model/characters.py).
  unbranched: why several continuations of one text cannot lie in a row (data/branches.py), None where they can.
  """

  kind: str
  vocab: int
  rows: int
  embed: int
  length: int | None
  decoder: tuple[Kind, ...]
  encoder: tuple[Kind, ...]
  norm: str
  final_norm: int
  positions: str
  buckets: int
  tied: bool
  head_bias: bool
  embedding_norm: int
  stem_norm: int
  rank: int | None
  dtype: str
  types: int = 0
  head_more: int = 0
  pooled: int = 0
  spelled: Spelled | None = None
  unbranched: str | None = None

  @property
  def layers(self) -> int:
    """Blocks of the decoder."""
    return sum(kind.repeats for kind in self.decoder)

  @property
  def encoder_layers(self) -> int:
    """Blocks of the encoder, 0 without one."""
    return sum(kind.repeats for kind in self.encoder)

  @property
  def attention(self) -> Attention | None:
    """The decoder's first attention, None without any."""
    found = (m for kind in self.decoder for m in kind.mixers if isinstance(m, Attention))
    return next(found, None)

  @property
  def heads(self) -> int | None:
    """Query heads of the first attention."""
    return self.attention and self.attention.heads

  @property
  def groups(self) -> int | None:
    """Heads of keys and values of the first attention."""
    return self.attention and self.attention.groups

  @property
  def head_dim(self) -> int | None:
    """Size of a head of the first attention."""
    return self.attention and self.attention.head_dim

  @property
  def ffn(self) -> int | None:
    """Hidden size of the first dense feed-forward."""
    return next((k.ffn.hidden for k in self.decoder if isinstance(k.ffn, Dense)), None)

  @property
  def residual(self) -> str:
    """Name of the first block's residual topology."""
    return self.decoder[0].residual


def describe(ends: Any, boxes: Any, decoder: Any, encoder: Any | None) -> Card:
  """The card of a model from its parts in `assembly.py` and the weights they declare, by the stack's name."""
  norm = decoder.segments[0].blocks[0].norm()
  mixers = [make() for s in decoder.segments for b in s.blocks for _, make in b.mixers]
  own = [getattr(m, name, None) for m in mixers for name in ('rotate', 'relative')]
  named = [*own, decoder.bias, ends.positions]
  where = [getattr(p, 'func', p) for p in named if p is not None]
  names = ['Learned'] if decoder.stem is not None else []
  names += [p.__name__ if hasattr(p, '__name__') else type(p).__name__ for p in where]
  embedding_norm = getattr(ends.embedding, 'norm', None)
  return Card(
    kind=ends.kind,
    vocab=ends.vocab,
    rows=ends.rows,
    embed=ends.embed,
    length=ends.length,
    decoder=_kinds(decoder, boxes, ends.embed),
    encoder=_kinds(encoder, boxes, ends.embed) if encoder else (),
    norm=type(norm).__name__,
    final_norm=0 if decoder.norm is None else _vectors(decoder.norm),
    positions='+'.join(dict.fromkeys(names)) or 'none',
    buckets=getattr(decoder.bias, 'buckets', 0),
    tied=ends.head.reads == 'embedding',
    head_bias=bool(getattr(ends.head, 'bias', False)),
    embedding_norm=0 if embedding_norm is None else _vectors(embedding_norm()),
    stem_norm=0 if decoder.stem is None else _vectors(decoder.stem.norm()),
    rank=getattr(ends.embedding, 'rank', None),
    dtype=jnp.dtype(ends.dtype).name,
    types=getattr(decoder.stem, 'types', 0),
    head_more=_head_more(boxes.get('head', {})),
    spelled=_spelled(ends, boxes['embedding']),
    unbranched=unbranched(ends, decoder),
  )


def _spelled(ends: Any, boxes: Any) -> Spelled | None:
  if not hasattr(ends.embedding, 'flops'):
    return None
  found = tree.flatten(boxes, is_leaf=param.is_box).values()
  return Spelled(sum(math.prod(b.value.shape) for b in found), ends.embedding.flops(ends.embed))


def unbranched(ends: Any, decoder: Any) -> str | None:
  """Why the mask cannot keep the branches of a row apart, in words; None where it can."""
  if ends.kind != 'causal':
    return f'the model is {ends.kind}, not causal'
  for mixer in (make() for s in decoder.segments for b in s.blocks for _, make in b.mixers):
    if not isinstance(mixer, attention.SelfAttention):
      return f'{type(mixer).__name__} reads a row as one text'
    if mixer.relative is not None:
      return 'its attention counts distances in slots of the row'
  return None if decoder.bias is None else 'its position bias counts slots of the row'


def _head_more(boxes: Any) -> int:
  """What a head declares beside a table of the vocabulary, its bias and the projection of a narrow one."""
  found = tree.flatten(boxes, is_leaf=param.is_box)
  known = [path for path, box in found.items() if path == 'project' or 'vocab' in box.axes]
  return sum(math.prod(box.value.shape) for path, box in found.items() if path not in known)


def _vectors(norm: Any) -> int:
  return 1 + bool(getattr(norm, 'bias', False))


def _kinds(part: Any, boxes: Any, embed: int) -> tuple[Kind, ...]:
  return tuple(
    _kind(block, boxes[part.name][key][f'block_{i}'], segment.repeats, embed)
    for key, segment in zip(stack.keys(part.segments), part.segments, strict=True)
    for i, block in enumerate(segment.blocks)
  )


def _kind(block: Any, boxes: Any, repeats: int, embed: int) -> Kind:
  mixers = tuple(_mixer(make(), boxes.get(name, {}), embed) for name, make in block.mixers)
  feed = None if block.ffn is None else block.ffn()
  if type(feed) in (ffn.MLP, ffn.Gated):
    feed = Dense(feed.hidden, isinstance(feed, ffn.Gated), feed.bias)
  elif feed is not None:
    feed = _declared(feed, boxes.get('ffn', {}))
  residual = getattr(block.residual, 'func', block.residual).__name__
  return Kind(repeats, mixers, feed, residual, _vectors(block.norm()))


def _reach(module: Any) -> int | None:
  """The keys that a query sees, sinks included; None for all."""
  window = getattr(module, 'window', None)
  return None if window is None else window + module.sinks


def _mixer(module: Any, boxes: Any, embed: int) -> Attention | Declared:
  if not isinstance(module, attention.SelfAttention | attention.CrossAttention):
    return _declared(module, boxes)
  return Attention(
    heads=module.heads,
    groups=module.groups or module.heads,
    head_dim=module.head_dim or embed // module.heads,
    bias=module.bias,
    out_bias=module.bias if module.out_bias is None else module.out_bias,
    window=_reach(module),
    cross=isinstance(module, attention.CrossAttention),
    relative=getattr(module, 'relative', None) is not None,
    more=_declared(module, {n: box for n, box in boxes.items() if n not in _COVERED}),
  )


def _declared(module: Any, boxes: Any) -> Declared:
  experts, chosen = getattr(module, 'experts', None), getattr(module, 'top_k', 1)
  found = dict(weights=0, vectors=0, active=0, active_vectors=0)
  for box in tree.flatten(boxes, is_leaf=param.is_box).values():
    shape, axes = box.value.shape[1:], box.axes[1:]  # less the layers
    size = met = math.prod(shape)
    if axes and axes[0] == 'expert' and shape[0] == experts:
      axes, met = axes[1:], size * min(chosen, experts) // experts
    matrix = len({'heads' if a in ('groups', 'head_dim') else a for a in axes}) > 1
    found['weights' if matrix else 'vectors'] += size
    found['active' if matrix else 'active_vectors'] += met
  return Declared(module, **found)
