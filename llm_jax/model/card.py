"""The numbers of a model, read off its parts: what sizes, FLOPs and memory are computed from."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from llm_jax.model import ffn


class Card(NamedTuple):
  """The numbers of a model from which its size, FLOPs and memory follow (see model/count.py).

  kind: 'causal', 'prefix' or 'encoder_decoder'. vocab: ids; rows: of the embedding table (vocab padded). layers: of the
  decoder,
  encoder_layers: of the encoder (0 without). length: the longest context, None = unlimited. heads, groups, head_dim,
  ffn (hidden size), gated and the biases are those of the first decoder block; None where it has no such part. norm,
  residual, positions: names; positions is one of 'rope', 'rope_interleaved', 'Learned', 'Sinusoidal', 'Alibi',
  'Buckets', 'none'. buckets: rows of the relative table (0 without).
  """

  kind: str
  vocab: int
  rows: int
  embed: int
  layers: int
  encoder_layers: int
  length: int | None
  heads: int | None
  groups: int | None
  head_dim: int | None
  ffn: int | None
  gated: bool
  attention_bias: bool
  attention_out_bias: bool
  ffn_bias: bool
  norm: str
  norm_bias: bool
  residual: str
  final_norm: bool
  positions: str
  buckets: int
  tied: bool
  head_bias: bool
  embedding_norm: bool
  dtype: str


def describe(ends: Any, decoder: Any, encoder: Any | None) -> Card:
  """The card of a model from its parts in `transformer.py`."""
  block = decoder.segments[0].blocks[0]
  mixer, feed, norm = block.mixers[0][1](), block.ffn and block.ffn(), block.norm()
  count = lambda part: sum(s.repeats * len(s.blocks) for s in part.segments) if part else 0
  bias, out_bias = bool(getattr(mixer, 'bias', False)), getattr(mixer, 'out_bias', None)
  query_heads = getattr(mixer, 'heads', None)
  named = [getattr(mixer, 'rotate', None), decoder.bias, ends.positions]
  where = [getattr(p, 'func', p) for p in named if p is not None]
  names = [p.__name__ if hasattr(p, '__name__') else type(p).__name__ for p in where]
  return Card(
    kind=ends.kind,
    vocab=ends.vocab,
    rows=ends.rows,
    embed=ends.embed,
    layers=count(decoder),
    encoder_layers=count(encoder),
    length=ends.length,
    heads=query_heads,
    groups=query_heads and (getattr(mixer, 'groups', None) or query_heads),
    head_dim=query_heads and (mixer.head_dim or ends.embed // query_heads),
    ffn=getattr(feed, 'hidden', None),
    gated=isinstance(feed, ffn.Gated),
    attention_bias=bias,
    attention_out_bias=bias if out_bias is None else out_bias,
    ffn_bias=bool(getattr(feed, 'bias', False)),
    norm=type(norm).__name__,
    norm_bias=bool(getattr(norm, 'bias', False)),
    residual=getattr(block.residual, 'func', block.residual).__name__,
    final_norm=decoder.norm is not None,
    positions='+'.join(names) or 'none',
    buckets=getattr(decoder.bias, 'buckets', 0),
    tied=ends.head.reads == 'embedding',
    head_bias=bool(getattr(ends.head, 'bias', False)),
    embedding_norm=getattr(ends.embedding, 'norm', None) is not None,
    dtype=jnp.dtype(ends.dtype).name,
  )
