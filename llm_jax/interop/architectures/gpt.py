"""GPT, GPT-2 and the decoders with its plain feed-forward: learned positions, RoPE or ALiBi, biases."""

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import (
  JOINED,
  JOINED_BIAS,
  LAYER,
  OUT,
  PER_HEAD,
  PER_HEAD_BIAS,
  QKV,
  UP,
  Family,
  Row,
  ends,
  linear,
  mlp_rows,
  norm,
  split,
  without,
)
from llm_jax.model import heads, norms, positions


def gpt1(c: Settings) -> ConfigDict:
  """GPT (Radford et al. 2018): norms after the sublayers, none at the end; its `gelu` is the one by tanh."""
  settings.expect(c, afn='gelu')
  model = settings.decoder(
    c,
    mixer=settings.self_attention(c, bias=True, rotate=None),
    ffn=settings.mlp(c, 4 * settings.get(c, 'n_embd', 'hidden_size'), 'gelu_new'),
    norm=settings.layer_norm(c, 'layer_norm_epsilon'),
    residual=use(norms.post),
    positions=use(positions.Learned),
    length=settings.get(c, 'n_positions', 'max_position_embeddings'),
    head=settings.tied(c, True),
  )
  model.norm = None
  return model


def gpt2(c: Settings) -> ConfigDict:
  """GPT-2, and GPTBigCode (StarCoder, arXiv:2305.06161) with one group of keys."""
  settings.expect(
    c, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False
  )
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c, groups=1 if c.get('multi_query') else None, bias=True, rotate=None
    ),
    ffn=settings.mlp(
      c,
      c.get('n_inner') or 4 * settings.get(c, 'n_embd', 'hidden_size'),
      settings.get(c, 'activation_function'),
    ),
    norm=settings.layer_norm(c, 'layer_norm_epsilon'),
    positions=use(positions.Learned),
    length=settings.get(c, 'n_positions', 'max_position_embeddings'),
    head=settings.tied(c, True),
  )


def gpt_neo(c: Settings) -> ConfigDict:
  """GPT-Neo: every other layer a local band, logits not scaled."""
  kinds = settings.get(c, 'attention_layers', default=None)
  kinds = kinds or [k for names, n in settings.get(c, 'attention_types') for k in names * n]
  size = settings.get(c, 'window_size')

  def attend(kind: str) -> ConfigDict:
    window = size if kind == 'local' else None
    return settings.self_attention(
      c, bias=False, out_bias=True, rotate=None, scale=1.0, **settings.banded(window)
    )

  hidden = c.get('intermediate_size') or 4 * settings.get(c, 'hidden_size')
  return settings.decoder(
    c,
    kinds=kinds,
    mixer_of=attend,
    ffn=settings.mlp(c, hidden, settings.get(c, 'activation_function')),
    norm=settings.layer_norm(c, 'layer_norm_epsilon'),
    positions=use(positions.Learned),
    length=settings.get(c, 'max_position_embeddings'),
    head=settings.tied(c, True),
  )


def opt(c: Settings) -> ConfigDict:
  """OPT (arXiv:2205.01068); the 350M has its norms after the sublayers and a narrower table."""
  settings.expect(
    c, enable_bias=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True
  )
  before, width = c.get('do_layer_norm_before', True), settings.get(c, 'hidden_size')
  rank = settings.get(c, 'word_embed_proj_dim', default=width)
  model = settings.decoder(
    c,
    mixer=settings.self_attention(c, bias=True, rotate=None),
    ffn=settings.mlp(c, settings.get(c, 'ffn_dim'), settings.get(c, 'activation_function')),
    norm=settings.layer_norm(c),
    residual=use(norms.pre if before else norms.post),
    positions=use(positions.Learned),
    length=settings.get(c, 'max_position_embeddings'),
    embedding=use(heads.Embedding, rank=None if rank == width else rank),
    head=settings.tied(c, True),
  )
  if not before:
    model.norm = None
  return model


def gpt_neox(c: Settings) -> ConfigDict:
  """GPT-NeoX-20B (arXiv:2204.06745) and Pythia: attention and feed-forward side by side, each with its norm."""
  side_by_side = c.get('use_parallel_residual', True)
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c,
      bias=c.get('attention_bias', True),
      rotate=settings.rotation(c, fraction=c.get('rotary_pct', 0.25)),
    ),
    ffn=settings.mlp(c, settings.get(c, 'intermediate_size'), settings.get(c, 'hidden_act')),
    norm=settings.layer_norm(c, 'layer_norm_eps'),
    residual=use(norms.parallel_norms if side_by_side else norms.pre),
    head=settings.tied(c, False),
  )


def gptj(c: Settings) -> ConfigDict:
  """GPT-J and CodeGen: side by side under one norm, neighbouring pairs rotated, biases in the feed-forward and head."""
  size = settings.get(c, 'n_embd', 'hidden_size') // settings.get(
    c, 'n_head', 'num_attention_heads'
  )
  fraction = (c.get('rotary_dim') or size) / size
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c, rotate=settings.rotation(c, positions.rope_interleaved, fraction)
    ),
    ffn=settings.mlp(
      c,
      c.get('n_inner') or 4 * settings.get(c, 'n_embd', 'hidden_size'),
      settings.get(c, 'activation_function'),
    ),
    norm=settings.layer_norm(c, 'layer_norm_epsilon'),
    residual=use(norms.parallel),
    head=settings.tied(c, False, bias=True),
  )


def phi(c: Settings) -> ConfigDict:
  """Phi-1, 1.5 and 2 (arXiv:2306.11644): side by side under one norm, part of each head rotated, biases everywhere."""
  settings.expect(c, qk_layernorm=False)
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c,
      groups=c.get('num_key_value_heads'),
      bias=True,
      rotate=settings.rotation(c, fraction=c.get('partial_rotary_factor', 0.5)),
    ),
    ffn=settings.mlp(c, settings.get(c, 'intermediate_size'), settings.get(c, 'hidden_act')),
    norm=settings.layer_norm(c, 'layer_norm_eps'),
    residual=use(norms.parallel),
    head=settings.tied(c, False, bias=True),
  )


def falcon(c: Settings) -> ConfigDict:
  """Falcon 7B and 40B (arXiv:2311.16867): side by side, RoPE; 7B: one group of keys, one norm; 40B: several, two."""
  settings.expect(c, alibi=False, parallel_attn=True)
  wide = c.get('new_decoder_architecture', False)
  if not wide:
    settings.expect(c, multi_query=True)
  groups = settings.get(c, 'num_kv_heads', 'num_attention_heads') if wide else 1
  two = wide and settings.get(c, 'num_ln_in_parallel_attn', default=2) == 2
  bias = c.get('bias', False)
  return settings.decoder(
    c,
    mixer=settings.self_attention(c, groups=groups, bias=bias, rotate=settings.rotation(c)),
    ffn=settings.mlp(
      c,
      c.get('ffn_hidden_size') or 4 * settings.get(c, 'hidden_size'),
      c.get('activation', 'gelu'),
      bias,
    ),
    norm=settings.layer_norm(c, 'layer_norm_epsilon'),
    residual=use(norms.parallel_norms if two else norms.parallel),
    head=settings.tied(c, True),
  )


def bloom(c: Settings) -> ConfigDict:
  """BLOOM (arXiv:2211.05100): ALiBi, a norm on the embedding, GELU by tanh."""
  settings.expect(c, apply_residual_connection_post_layernorm=False)
  norm = settings.layer_norm(c, 'layer_norm_epsilon')
  return settings.decoder(
    c,
    mixer=settings.self_attention(c, bias=True, rotate=None),
    ffn=settings.mlp(c, 4 * settings.get(c, 'hidden_size', 'n_embed'), 'gelu_pytorch_tanh'),
    norm=norm,
    bias=use(positions.Alibi),
    embedding=use(heads.Embedding, norm=norm),
    head=settings.tied(c, True),
  )


def mpt(c: Settings) -> ConfigDict:
  """MPT: ALiBi, LayerNorm without bias, no biases."""
  told = settings.get(c, 'attn_config')
  settings.expect(
    told,
    alibi=True,
    qk_ln=False,
    clip_qkv=None,
    softmax_scale=None,
    attn_type='multihead_attention',
  )
  settings.expect(
    c, no_bias=True, expansion_ratio=4
  )  # the reference has 4, whatever the config says
  return settings.decoder(
    c,
    mixer=settings.self_attention(c, rotate=None),
    ffn=settings.mlp(c, 4 * settings.get(c, 'd_model'), 'gelu', bias=False),
    norm=settings.layer_norm(c, 'layer_norm_epsilon', bias=False),
    bias=use(positions.Alibi),
    head=settings.tied(c, True),
  )


def _gpt2_rows(
  qkv: str,
  up: str,
  down: str,
  out: str,
  qkv_bias: str = JOINED_BIAS,
  tables: tuple[str, str] = ('wte', 'wpe'),
) -> tuple[Row, ...]:
  """The names of GPT-2. tables: those of the embedding and of the positions."""
  return (
    *ends(tables[0], 'ln_f'),
    Row('positions/table', f'{tables[1]}.weight', 't d -> t d'),
    *norm(f'{LAYER}mixer_norm', 'h.*.ln_1'),
    *norm(f'{LAYER}ffn_norm', 'h.*.ln_2'),
    *linear(QKV, 'h.*.attn.c_attn', qkv, qkv_bias),
    *linear('mixer/out', 'h.*.attn.c_proj', out),
    *linear('ffn/up', 'h.*.mlp.c_fc', up),
    *linear('ffn/down', 'h.*.mlp.c_proj', down),
  )


BLOCK_NORMS = (
  *norm(f'{LAYER}mixer_norm', 'layers.*.input_layernorm'),
  *norm(f'{LAYER}ffn_norm', 'layers.*.post_attention_layernorm'),
)
MASKS = ('.attn.bias', '.masked_bias', '.attn.causal_mask', '.attention.bias')
BUFFERS = ('rotary_emb.inv_freq', 'lm_head.weight', 'embed_out.weight', *MASKS)

CONV1D = ('d (n k) -> d n k', 'd f -> d f', 'f d -> f d', '(h k) d -> h k d')
FIRST = {'openai-gpt': Family(
  gpt1, _gpt2_rows(*CONV1D, tables=('tokens_embed', 'positions_embed')), 'transformer.', BUFFERS
)}  # fmt: skip
FAMILIES = FIRST | dict(
  gpt2=Family(gpt2, _gpt2_rows(*CONV1D), 'transformer.', BUFFERS),
  gpt_bigcode=Family(gpt2, _gpt2_rows(JOINED, UP, 'd f -> f d', OUT), 'transformer.', BUFFERS),
  gpt_neo=Family(
    gpt_neo,
    (
      *without(_gpt2_rows(JOINED, UP, 'd f -> f d', OUT), 'mixer/'),
      *split('h.*.attn.attention.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
    ),
    'transformer.',
    ('.attn.attention.bias', '.masked_bias', 'lm_head.weight'),
  ),
  opt=Family(
    opt,
    (
      Row('embedding/project', 'project_in.weight', 'd r -> r d'),
      Row('head/project', 'project_out.weight', 'r d -> d r'),
      *ends('embed_tokens', 'final_layer_norm'),
      Row('positions/table', 'embed_positions.weight', 't d -> t d', skip=2),
      *norm(f'{LAYER}mixer_norm', 'layers.*.self_attn_layer_norm'),
      *norm(f'{LAYER}ffn_norm', 'layers.*.final_layer_norm'),
      *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
      *mlp_rows('layers.*.fc1', 'layers.*.fc2'),
    ),
    'model.decoder.',
  ),
  gpt_neox=Family(
    gpt_neox,
    (
      *ends('embed_in', 'final_layer_norm', 'embed_out'),
      *BLOCK_NORMS,
      *linear(QKV, 'layers.*.attention.query_key_value', PER_HEAD, PER_HEAD_BIAS),
      *linear('mixer/out', 'layers.*.attention.dense', OUT),
      *mlp_rows('layers.*.mlp.dense_h_to_4h', 'layers.*.mlp.dense_4h_to_h'),
    ),
    'gpt_neox.',
    BUFFERS,
  ),
  gptj=Family(
    gptj,
    (
      *ends('wte', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.ln_1'),
      *split('h.*.attn.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
      *mlp_rows('h.*.mlp.fc_in', 'h.*.mlp.fc_out'),
    ),
    'transformer.',
    BUFFERS,
  ),
  codegen=Family(
    gptj,
    (
      *ends('wte', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.ln_1'),
      # cut in four for as many TPU cores; in each part queries, values, keys
      *linear(
        'mixer/query mixer/value mixer/key', 'h.*.attn.qkv_proj', '(m p h k) d -> p d (m h) k'
      ),
      *linear('mixer/out', 'h.*.attn.out_proj', OUT),
      *mlp_rows('h.*.mlp.fc_in', 'h.*.mlp.fc_out'),
    ),
    'transformer.',
    BUFFERS,
    dict(m=4),
  ),
  phi=Family(
    phi,
    (
      *ends('embed_tokens', 'final_layernorm'),
      *norm(f'{LAYER}norm', 'layers.*.input_layernorm'),
      *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'dense'),
      *mlp_rows('layers.*.mlp.fc1', 'layers.*.mlp.fc2'),
    ),
    'model.',
  ),
  falcon=Family(
    falcon,
    (
      *ends('word_embeddings', 'ln_f'),
      *norm(f'{LAYER}norm', 'h.*.input_layernorm'),
      *norm(f'{LAYER}mixer_norm', 'h.*.ln_attn'),
      *norm(f'{LAYER}ffn_norm', 'h.*.ln_mlp'),
      # group by group: its queries, its key, its value
      *linear(
        QKV,
        'h.*.self_attention.query_key_value',
        '(g n k) d -> d (g n) k',
        '(g n k) -> (g n) k',
      ),
      *linear('mixer/out', 'h.*.self_attention.dense', OUT),
      *mlp_rows('h.*.mlp.dense_h_to_4h', 'h.*.mlp.dense_4h_to_h'),
    ),
    'transformer.',
  ),
  bloom=Family(
    bloom,
    (
      *ends('word_embeddings', 'ln_f'),
      *norm('embedding/norm', 'word_embeddings_layernorm'),
      *norm(f'{LAYER}mixer_norm', 'h.*.input_layernorm'),
      *norm(f'{LAYER}ffn_norm', 'h.*.post_attention_layernorm'),
      *linear(QKV, 'h.*.self_attention.query_key_value', PER_HEAD, PER_HEAD_BIAS),
      *linear('mixer/out', 'h.*.self_attention.dense', OUT),
      *mlp_rows('h.*.mlp.dense_h_to_4h', 'h.*.mlp.dense_4h_to_h'),
    ),
    'transformer.',
  ),
  mpt=Family(
    mpt,
    (
      *ends('wte', 'norm_f'),
      *norm(f'{LAYER}mixer_norm', 'blocks.*.norm_1'),
      *norm(f'{LAYER}ffn_norm', 'blocks.*.norm_2'),
      *linear(QKV, 'blocks.*.attn.Wqkv', JOINED),
      *linear('mixer/out', 'blocks.*.attn.out_proj', OUT),
      *mlp_rows('blocks.*.ffn.up_proj', 'blocks.*.ffn.down_proj'),
    ),
    'transformer.',
  ),
)
