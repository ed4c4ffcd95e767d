"""T5 and its descendants: encoder-decoders with relative buckets."""

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import (
  ENCODER,
  IN,
  LAYER,
  OUT,
  SAME,
  UP,
  Family,
  Row,
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
FAMILIES = dict(t5=T5, mt5=T5)
