"""Encoders: BERT."""

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import BIAS, ENCODER, IN, OUT, SAME, UP, Family, Row, linear, norm
from llm_jax.model import attention, block, classes, heads, init, norms, transformer


def bert(c: Settings) -> ConfigDict:
  """BERT for pre-training (arXiv:1810.04805): norms after the sublayers, a pooler, a guess at the next sentence."""
  settings.expect(
    c, position_embedding_type='absolute', is_decoder=False, add_cross_attention=False
  )
  norm, name = settings.layer_norm(c, 'layer_norm_eps'), settings.get(c, 'hidden_act')
  layer = use(
    block.decoder,
    mixer=use(
      attention.SelfAttention, heads=settings.get(c, 'num_attention_heads'), bias=True, rotate=None
    ),
    ffn=settings.mlp(c, settings.get(c, 'intermediate_size'), name),
    norm=norm,
    residual=use(norms.post),
  )
  encoder = use(
    transformer.encoder,
    vocab=settings.get(c, 'vocab_size'),
    embed=settings.get(c, 'hidden_size'),
    layers=settings.get(c, 'num_hidden_layers'),
    length=settings.get(c, 'max_position_embeddings'),
    block=layer,
    norm=None,
    stem=use(heads.Stem, norm=norm, types=settings.get(c, 'type_vocab_size')),
    head=use(heads.Masked, norm=norm, activation=settings.activation(name)),
    init=use(init.gpt2),
  )
  return use(classes.make, model=use(classes.make_pooled, model=encoder), count=2)


def _rows() -> tuple[Row, ...]:
  at, table = 'bert.encoder.layer.*.', 'bert.embeddings.'
  attends = f'{at}attention.self.'
  return (
    Row('embedding/table', f'{table}word_embeddings.weight', 'v d -> v d'),
    Row('encoder/stem/positions/table', f'{table}position_embeddings.weight', 't d -> t d'),
    Row('encoder/stem/types', f'{table}token_type_embeddings.weight', 't d -> t d'),
    *norm('encoder/stem/norm', f'{table}LayerNorm'),
    *linear('mixer/query', f'{attends}query', IN, BIAS, ENCODER),
    *linear('mixer/key', f'{attends}key', IN, BIAS, ENCODER),
    *linear('mixer/value', f'{attends}value', IN, BIAS, ENCODER),
    *linear('mixer/out', f'{at}attention.output.dense', OUT, SAME, ENCODER),
    *norm(f'{ENCODER}mixer_norm', f'{at}attention.output.LayerNorm'),
    *linear('ffn/up', f'{at}intermediate.dense', UP, under=ENCODER),
    *linear('ffn/down', f'{at}output.dense', 'd f -> f d', under=ENCODER),
    *norm(f'{ENCODER}ffn_norm', f'{at}output.LayerNorm'),
    Row('pooler/w', 'bert.pooler.dense.weight', 'r d -> d r'),
    Row('pooler/bias', 'bert.pooler.dense.bias', SAME),
    Row('head/inner', 'cls.predictions.transform.dense.weight', 'r d -> d r'),
    Row('head/inner_bias', 'cls.predictions.transform.dense.bias', SAME),
    *norm('head/norm', 'cls.predictions.transform.LayerNorm'),
    Row('head/bias', 'cls.predictions.bias', 'v -> v'),
    Row('classes/w', 'cls.seq_relationship.weight', 'c d -> d c'),
    Row('classes/bias', 'cls.seq_relationship.bias', 'c -> c'),
  )


IGNORED = ('embeddings.position_ids', 'cls.predictions.decoder.weight', 'cls.predictions.decoder.bias')  # fmt: skip
OLD = (('LayerNorm.gamma', 'LayerNorm.weight'), ('LayerNorm.beta', 'LayerNorm.bias'))
FAMILIES = dict(bert=Family(bert, _rows(), '', IGNORED, renamed=OLD))
