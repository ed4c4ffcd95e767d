"""The architectures of Hugging Face checkpoints as data: a config read as ours, and a table of tensors.

A `Family` is found by the `model_type` of a `config.json`. Its rows say where each tensor goes:

    Row('decoder/layers/block_0/mixer/query', 'layers.*.self_attn.q_proj.weight', '(h k) d -> d h k')

`*` is the number of the layer. The pattern is einops', from theirs to ours; read backwards it exports. Where one of
their tensors holds several of ours, `ours` names them all: the pattern then ends in their shape, put end to end on the
axis `n`, or one after the other on a leading axis `p`. A row does not apply to a model without its paths (no bias, tied
head); where several rows fill a path, the first that applies does. Letters as in `core/weights.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llm_jax.core.config import ConfigDict
from llm_jax.core.errors import UserError, nearest
from llm_jax.interop import architectures as arch
from llm_jax.interop.architectures import Settings


class Row(NamedTuple):
  """ours: path or paths in the parameters. theirs: name of the tensor, without the family's prefix.

  add: what is added to theirs (Gemma stores the scales of its norms less one). skip: rows of theirs before the first of
  ours (OPT's position table begins with two that padding uses); zeros when exported. needs: a path that the model must
  have too.
  """

  ours: str | tuple[str, ...]
  theirs: str
  pattern: str
  add: float = 0.0
  skip: int = 0
  needs: str | None = None


class Family(NamedTuple):
  """model: config.json -> `use` of a builder of model/transformer.py. rows: see above. prefix: of their names, absent
  from checkpoints of the bare model. ignored: endings of names that hold nothing of ours. sizes: letters of the
  patterns that are nobody's size.
  """

  model: Callable[[Settings], ConfigDict]
  rows: tuple[Row, ...]
  prefix: str
  ignored: tuple[str, ...] = ('rotary_emb.inv_freq', 'lm_head.weight')
  sizes: Mapping[str, int] = {}


LAYER, ENCODER = 'decoder/layers/block_0/', 'encoder/layers/block_0/'


# --- tensors --------------------------------------------------------------------------------------

# The shape of a projection in PyTorch's Linear (out, in), and in GPT-2's Conv1D (in, out).
IN, OUT, UP = '(h k) d -> d h k', 'd (h k) -> h k d', 'f d -> d f'
BIAS, SAME = '(h k) -> h k', 'd -> d'


def rows(under: str, table: Mapping[str, str], **kw: Any) -> tuple[Row, ...]:
  """Rows `ours: 'theirs | pattern'` below a path of ours; a pattern left out is that of a vector."""
  found = []
  for ours, told in table.items():
    theirs, _, pattern = told.partition(' | ')
    names = tuple(under + name for name in ours.split())
    found.append(Row(names if len(names) > 1 else names[0], theirs, pattern or SAME, **kw))
  return tuple(found)


def norm(ours: str, theirs: str, **kw: Any) -> tuple[Row, ...]:
  """Scale and bias of a norm."""
  return (
    Row(f'{ours}/scale', f'{theirs}.weight', SAME, **kw),
    Row(f'{ours}/bias', f'{theirs}.bias', SAME),
  )


def linear(ours: str, theirs: str, pattern: str, bias: str = SAME) -> tuple[Row, ...]:
  """A projection and its bias. ours: one path, or several separated by spaces."""
  names = tuple(LAYER + name for name in ours.split())
  biases = tuple(f'{name}_bias' for name in names)
  one = len(names) == 1
  return (
    Row(names[0] if one else names, f'{theirs}.weight', pattern),
    Row(biases[0] if one else biases, f'{theirs}.bias', bias),
  )


def ends(embedding: str, final: str, head: str = 'lm_head', **kw: Any) -> tuple[Row, ...]:
  """Embedding, final norm, head."""
  return (
    Row('embedding/table', f'{embedding}.weight', 'v d -> v d'),
    *norm('decoder/norm', final, **kw),
    Row('head/w', f'{head}.weight', 'v d -> d v'),
    Row('head/bias', f'{head}.bias', 'v -> v'),
  )


def split(attn: str, q: str, k: str, v: str, out: str) -> tuple[Row, ...]:
  """Attention with a tensor for each projection."""
  return (
    *linear('mixer/query', attn + q, IN, BIAS),
    *linear('mixer/key', attn + k, IN, BIAS),
    *linear('mixer/value', attn + v, IN, BIAS),
    *linear('mixer/out', attn + out, OUT),
  )


QKV = 'mixer/query mixer/key mixer/value'
# All queries, then all keys, then all values; and query, key, value of one head after another.
JOINED, JOINED_BIAS = '(n k) d -> d n k', '(n k) -> n k'
PER_HEAD, PER_HEAD_BIAS = '(h p k) d -> p d h k', '(h p k) -> p h k'


def _llama_rows(add: float = 0.0) -> tuple[Row, ...]:
  """The names of LLaMA, which many keep."""
  return (
    *ends('embed_tokens', 'norm', add=add),
    *norm(f'{LAYER}mixer_norm', 'layers.*.input_layernorm', add=add),
    *norm(f'{LAYER}ffn_norm', 'layers.*.post_attention_layernorm', add=add),
    *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'o_proj'),
    *linear('ffn/gate', 'layers.*.mlp.gate_proj', UP),
    *linear('ffn/up', 'layers.*.mlp.up_proj', UP),
    *linear('ffn/down', 'layers.*.mlp.down_proj', 'd f -> f d'),
  )


def _gpt2_rows(
  qkv: str, up: str, down: str, out: str, qkv_bias: str = JOINED_BIAS
) -> tuple[Row, ...]:
  """The names of GPT-2."""
  return (
    *ends('wte', 'ln_f'),
    Row('positions/table', 'wpe.weight', 't d -> t d'),
    *norm(f'{LAYER}mixer_norm', 'h.*.ln_1'),
    *norm(f'{LAYER}ffn_norm', 'h.*.ln_2'),
    *linear(QKV, 'h.*.attn.c_attn', qkv, qkv_bias),
    *linear('mixer/out', 'h.*.attn.c_proj', out),
    *linear('ffn/up', 'h.*.mlp.c_fc', up),
    *linear('ffn/down', 'h.*.mlp.c_proj', down),
  )


def _mlp_rows(up: str, down: str) -> tuple[Row, ...]:
  return (*linear('ffn/up', up, UP), *linear('ffn/down', down, 'd f -> f d'))


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


BLOCK_NORMS = (
  *norm(f'{LAYER}mixer_norm', 'layers.*.input_layernorm'),
  *norm(f'{LAYER}ffn_norm', 'layers.*.post_attention_layernorm'),
)
MASKS = ('.attn.bias', '.masked_bias', '.attn.causal_mask', '.attention.bias')
BUFFERS = ('rotary_emb.inv_freq', 'lm_head.weight', 'embed_out.weight', *MASKS)

LLAMA = _llama_rows()
FAMILIES: dict[str, Family] = dict(
  llama=Family(arch.llama, LLAMA, 'model.'),
  mistral=Family(arch.llama, LLAMA, 'model.'),
  qwen2=Family(arch.qwen2, LLAMA, 'model.'),
  stablelm=Family(arch.stablelm, LLAMA, 'model.'),
  gemma=Family(arch.gemma, _llama_rows(add=1.0), 'model.'),
  phi3=Family(
    arch.llama,
    (
      *(r for r in LLAMA if 'mixer/' not in r.ours and 'ffn/' not in r.ours),
      Row(
        tuple(LAYER + name for name in QKV.split()), 'layers.*.self_attn.qkv_proj.weight', JOINED
      ),
      *linear('mixer/out', 'layers.*.self_attn.o_proj', OUT),
      *linear('ffn/gate ffn/up', 'layers.*.mlp.gate_up_proj', 'n d -> d n', 'n -> n'),
      *linear('ffn/down', 'layers.*.mlp.down_proj', 'd f -> f d'),
    ),
    'model.',
  ),
  starcoder2=Family(
    arch.starcoder2,
    (
      *(r for r in LLAMA if 'ffn/' not in r.ours),
      *_mlp_rows('layers.*.mlp.c_fc', 'layers.*.mlp.c_proj'),
    ),
    'model.',
  ),
  gpt2=Family(
    arch.gpt2,
    _gpt2_rows('d (n k) -> d n k', 'd f -> d f', 'f d -> f d', '(h k) d -> h k d'),
    'transformer.',
    BUFFERS,
  ),
  gpt_bigcode=Family(arch.gpt2, _gpt2_rows(JOINED, UP, 'd f -> f d', OUT), 'transformer.', BUFFERS),
  opt=Family(
    arch.opt,
    (
      *ends('embed_tokens', 'final_layer_norm'),
      Row('positions/table', 'embed_positions.weight', 't d -> t d', skip=2),
      *norm(f'{LAYER}mixer_norm', 'layers.*.self_attn_layer_norm'),
      *norm(f'{LAYER}ffn_norm', 'layers.*.final_layer_norm'),
      *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
      *_mlp_rows('layers.*.fc1', 'layers.*.fc2'),
    ),
    'model.decoder.',
  ),
  gpt_neox=Family(
    arch.gpt_neox,
    (
      *ends('embed_in', 'final_layer_norm', 'embed_out'),
      *BLOCK_NORMS,
      *linear(QKV, 'layers.*.attention.query_key_value', PER_HEAD, PER_HEAD_BIAS),
      *linear('mixer/out', 'layers.*.attention.dense', OUT),
      *_mlp_rows('layers.*.mlp.dense_h_to_4h', 'layers.*.mlp.dense_4h_to_h'),
    ),
    'gpt_neox.',
    BUFFERS,
  ),
  gptj=Family(
    arch.gptj,
    (
      *ends('wte', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.ln_1'),
      *split('h.*.attn.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
      *_mlp_rows('h.*.mlp.fc_in', 'h.*.mlp.fc_out'),
    ),
    'transformer.',
    BUFFERS,
  ),
  codegen=Family(
    arch.gptj,
    (
      *ends('wte', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.ln_1'),
      # cut in four for as many TPU cores; in each part queries, values, keys
      *linear(
        'mixer/query mixer/value mixer/key', 'h.*.attn.qkv_proj', '(m p h k) d -> p d (m h) k'
      ),
      *linear('mixer/out', 'h.*.attn.out_proj', OUT),
      *_mlp_rows('h.*.mlp.fc_in', 'h.*.mlp.fc_out'),
    ),
    'transformer.',
    BUFFERS,
    dict(m=4),
  ),
  phi=Family(
    arch.phi,
    (
      *ends('embed_tokens', 'final_layernorm'),
      *norm(f'{LAYER}norm', 'layers.*.input_layernorm'),
      *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'dense'),
      *_mlp_rows('layers.*.mlp.fc1', 'layers.*.mlp.fc2'),
    ),
    'model.',
  ),
  falcon=Family(
    arch.falcon,
    (
      *ends('word_embeddings', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.input_layernorm'),
      *linear(QKV, 'h.*.self_attention.query_key_value', JOINED, JOINED_BIAS),
      *linear('mixer/out', 'h.*.self_attention.dense', OUT),
      *_mlp_rows('h.*.mlp.dense_h_to_4h', 'h.*.mlp.dense_4h_to_h'),
    ),
    'transformer.',
  ),
  bloom=Family(
    arch.bloom,
    (
      *ends('word_embeddings', 'ln_f'),
      *norm('embedding/norm', 'word_embeddings_layernorm'),
      *norm(f'{LAYER}mixer_norm', 'h.*.input_layernorm'),
      *norm(f'{LAYER}ffn_norm', 'h.*.post_attention_layernorm'),
      *linear(QKV, 'h.*.self_attention.query_key_value', PER_HEAD, PER_HEAD_BIAS),
      *linear('mixer/out', 'h.*.self_attention.dense', OUT),
      *_mlp_rows('h.*.mlp.dense_h_to_4h', 'h.*.mlp.dense_4h_to_h'),
    ),
    'transformer.',
  ),
  mpt=Family(
    arch.mpt,
    (
      *ends('wte', 'norm_f'),
      *norm(f'{LAYER}mixer_norm', 'blocks.*.norm_1'),
      *norm(f'{LAYER}ffn_norm', 'blocks.*.norm_2'),
      *linear(QKV, 'blocks.*.attn.Wqkv', JOINED),
      *linear('mixer/out', 'blocks.*.attn.out_proj', OUT),
      *_mlp_rows('blocks.*.ffn.up_proj', 'blocks.*.ffn.down_proj'),
    ),
    'transformer.',
  ),
)
T5 = Family(arch.t5, _t5_rows(), '', ('.embed_tokens.weight', 'lm_head.weight'))
FAMILIES.update(t5=T5, mt5=T5)


def family(settings: Settings) -> Family:
  """The family of a config.json. Raises `UserError` naming the nearest that there is."""
  name = arch.get(settings, 'model_type')
  if name not in FAMILIES:
    raise UserError(f'the architecture {name!r} is not supported: {nearest(name, FAMILIES)}')
  return FAMILIES[name]
