"""Encoder-decoders: T5 and its descendants with relative buckets, BART and mBART."""

from collections.abc import Callable
from typing import Any

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import (
  BIAS,
  ENCODER,
  IN,
  LAYER,
  OUT,
  SAME,
  UP,
  Family,
  Row,
  linear,
  norm,
  rows,
)
from llm_jax.model import attention, block, ffn, heads, init, norms, positions, transformer


def t5(c: Settings) -> ConfigDict:
  """T5 1.0 and 1.1, Flan-T5, mT5 (arXiv:1910.10683, 2010.11934): unscaled attention, shared buckets."""
  gate, _, name = settings.get(c, 'feed_forward_proj').rpartition('-')
  name = 'gelu_new' if (gate, name) == ('gated', 'gelu') else name
  attend = dict(heads=settings.get(c, 'num_heads'), head_dim=settings.get(c, 'd_kv'), scale=1.0)
  norm = use(norms.RMSNorm, eps=float(settings.get(c, 'layer_norm_epsilon')))
  rest = dict(
    mixer=use(attention.SelfAttention, rotate=None, **attend),
    ffn=use(
      ffn.Gated if gate else ffn.MLP,
      hidden=settings.get(c, 'd_ff'),
      activation=settings.activation(name),
    ),
    norm=norm,
  )
  head = use(heads.Untied)
  if c.get('tie_word_embeddings', True):
    head = use(heads.Tied, scaled=c.get('scale_decoder_outputs', True))
  return use(
    transformer.encoder_decoder,
    vocab=settings.get(c, 'vocab_size'),
    embed=settings.get(c, 'd_model'),
    layers=settings.get(c, 'num_decoder_layers', 'num_layers'),
    encoder_layers=settings.get(c, 'num_layers'),
    block=use(block.cross_decoder, cross=use(attention.CrossAttention, **attend), **rest),
    encoder_block=use(block.decoder, **rest),
    norm=norm,
    bias=use(
      positions.Buckets,
      buckets=settings.get(c, 'relative_attention_num_buckets'),
      distance=settings.get(c, 'relative_attention_max_distance', default=128),
    ),
    head=head,
    init=use(init.t5),
  )


def bart(c: Settings) -> ConfigDict:
  """BART (arXiv:1910.13461): norms after the sublayers, positions and a norm of its own for each side."""
  return _bart(c, norms.post, None)


def mbart(c: Settings) -> ConfigDict:
  """mBART (arXiv:2001.08210): BART with the norms before the sublayers, and one more behind each side."""
  return _bart(c, norms.pre, settings.layer_norm(c))


def _bart(c: Settings, residual: Callable, final: ConfigDict | None) -> ConfigDict:
  norm, name = settings.layer_norm(c), settings.get(c, 'activation_function')

  def side(which: str, make: Callable, **more: Any) -> ConfigDict:
    attend = dict(heads=settings.get(c, f'{which}_attention_heads'), bias=True)
    more = {key: use(module, **attend) for key, module in more.items()}
    return use(
      make,
      mixer=use(attention.SelfAttention, rotate=None, **attend),
      ffn=settings.mlp(c, settings.get(c, f'{which}_ffn_dim'), name),
      norm=norm,
      residual=use(residual),
      **more,
    )

  return use(
    transformer.encoder_decoder,
    vocab=settings.get(c, 'vocab_size'),
    embed=settings.get(c, 'd_model'),
    layers=settings.get(c, 'decoder_layers'),
    encoder_layers=settings.get(c, 'encoder_layers'),
    length=settings.get(c, 'max_position_embeddings'),
    block=side('decoder', block.cross_decoder, cross=attention.CrossAttention),
    encoder_block=side('encoder', block.decoder),
    norm=final,
    embedding=use(heads.Embedding, scaled=bool(c.get('scale_embedding'))),
    stem=use(heads.Stem, norm=norm),
    head=settings.tied(c, True),
    init=use(init.gpt2),
  )


def _bart_rows() -> tuple[Row, ...]:
  found = [Row('embedding/table', 'shared.weight', 'v d -> v d')]
  for side, under in (('encoder', ENCODER), ('decoder', LAYER)):
    at = f'{side}.layers.*.'
    found += (
      Row(f'{side}/stem/positions/table', f'{side}.embed_positions.weight', 't d -> t d', skip=2),
      *norm(f'{side}/stem/norm', f'{side}.layernorm_embedding'),
      *norm(f'{under}mixer_norm', f'{at}self_attn_layer_norm'),
      *norm(f'{under}cross_norm', f'{at}encoder_attn_layer_norm'),
      *norm(f'{under}ffn_norm', f'{at}final_layer_norm'),
      *linear('ffn/up', f'{at}fc1', UP, under=under),
      *linear('ffn/down', f'{at}fc2', 'd f -> f d', under=under),
    )
    for ours, theirs in (('mixer', 'self_attn'), ('cross', 'encoder_attn')):
      for part, pattern in (('query', IN), ('key', IN), ('value', IN), ('out', OUT)):
        name = f'{at}{theirs}.{"out" if part == "out" else part[0]}_proj'
        bias = SAME if part == 'out' else BIAS
        found += linear(f'{ours}/{part}', name, pattern, bias, under)
  return tuple(found)


def _t5_rows() -> tuple[Row, ...]:
  """One side after the other; the feed-forward is the second sublayer of the encoder, the third of the decoder."""
  found = [
    Row('embedding/table', 'shared.weight', 'v d -> v d'),
    Row('head/w', 'lm_head.weight', 'v d -> d v'),
  ]
  for side, under, last in (('encoder', ENCODER, 1), ('decoder', LAYER, 2)):
    at = f'{side}.block.*.layer.'
    attends = [('mixer', f'{at}0.SelfAttention', f'{at}0.layer_norm')]
    if side == 'decoder':
      attends.append(('cross', f'{at}1.EncDecAttention', f'{at}1.layer_norm'))
    for ours, theirs, before in attends:
      found += rows(under, {
        f'{ours}/query': f'{theirs}.q.weight | {IN}', f'{ours}/key': f'{theirs}.k.weight | {IN}',
        f'{ours}/value': f'{theirs}.v.weight | {IN}', f'{ours}/out': f'{theirs}.o.weight | {OUT}',
        f'{ours}_norm/scale': f'{before}.weight',
      })  # fmt: skip
    feed = f'{at}{last}.DenseReluDense'
    found += rows(under, {
      'ffn/gate': f'{feed}.wi_0.weight | {UP}',
      'ffn/down': f'{feed}.wo.weight | d f -> f d', 'ffn_norm/scale': f'{at}{last}.layer_norm.weight',
    })  # fmt: skip
    found += (
      Row(f'{under}ffn/up', f'{feed}.wi_1.weight', UP, needs=f'{under}ffn/gate'),
      Row(f'{under}ffn/up', f'{feed}.wi.weight', UP),
      Row(f'{side}/norm/scale', f'{side}.final_layer_norm.weight', SAME),
      Row(f'{side}/bias/table', f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight', 's h -> s h'),
    )  # fmt: skip
  return tuple(found)


T5 = Family(t5, _t5_rows(), '', ('.embed_tokens.weight', 'lm_head.weight'))
BUFFERS = ('.embed_tokens.weight', 'lm_head.weight', 'final_logits_bias')
FINAL = tuple(
  row for side in ('encoder', 'decoder') for row in norm(f'{side}/norm', f'{side}.layer_norm')
)
FAMILIES = dict(
  t5=T5,
  mt5=T5,
  bart=Family(bart, _bart_rows(), 'model.', BUFFERS),
  mbart=Family(mbart, (*_bart_rows(), *FINAL), 'model.', BUFFERS),
)
