"""LLaMA and its descendants: pre-norm, RoPE, a gated feed-forward, no or few biases."""

from collections.abc import Callable
from typing import Any

from llm_jax.core.config import ConfigDict, use
from llm_jax.interop import settings
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import (
  JOINED,
  LAYER,
  OUT,
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
from llm_jax.model import ffn, heads, norms, positions


def every(layer: int) -> bool:
  """A sliding window in every layer."""
  del layer
  return True


def _gated(
  c: Settings,
  *,
  norm: ConfigDict,
  slides: Callable[[int], bool] | None = None,
  residual: Callable = norms.pre,
  rotate: Callable = positions.rope,
  **mixer: Any,
) -> ConfigDict:
  """RoPE, a gated feed-forward without biases. slides: which layers a sliding window is for; None has none."""
  if slides is None:
    settings.no_window(c)
  settings.expect(c, mlp_bias=False, use_parallel_residual=False, qk_layernorm=False)

  def attend(window: int | None) -> ConfigDict:
    return settings.self_attention(
      c,
      groups=c.get('num_key_value_heads'),
      head_dim=c.get('head_dim'),
      rotate=settings.rotation(c, rotate, fraction=c.get('partial_rotary_factor', 1.0)),
      **settings.banded(window),
      **mixer,
    )

  return settings.decoder(
    c,
    kinds=settings.windows(c, slides or every),
    mixer_of=attend,
    ffn=use(
      ffn.Gated,
      hidden=settings.get(c, 'intermediate_size'),
      activation=settings.activation(settings.get(c, 'hidden_act', 'hidden_activation')),
    ),
    norm=norm,
    residual=use(residual),
    head=settings.tied(c, False),
  )


def llama(c: Settings) -> ConfigDict:
  """LLaMA (arXiv:2302.13971, 2307.09288, 2407.21783)."""
  return _gated(c, norm=settings.rms_norm(c), bias=c.get('attention_bias', False))


def mistral(c: Settings) -> ConfigDict:
  """Mistral 7B (arXiv:2310.06825), Phi-3 (arXiv:2404.14219): LLaMA with a sliding window in every layer."""
  return _gated(c, norm=settings.rms_norm(c), slides=every, bias=c.get('attention_bias', False))


def qwen2(c: Settings) -> ConfigDict:
  """Qwen2 (arXiv:2407.10671): LLaMA with biases on queries, keys and values."""
  first = c.get('max_window_layers', 28)
  return _gated(
    c, norm=settings.rms_norm(c), slides=lambda layer: layer >= first, bias=True, out_bias=False
  )


def qwen3(c: Settings) -> ConfigDict:
  """Qwen3 (arXiv:2505.09388): LLaMA with QK-norm."""
  first, norm = c.get('max_window_layers', 28), settings.rms_norm(c)
  bias = c.get('attention_bias', False)
  return _gated(c, norm=norm, slides=lambda layer: layer >= first, bias=bias, qk_norm=norm)


def gemma(c: Settings) -> ConfigDict:
  """Gemma 1 (arXiv:2403.08295): GeGLU, embeddings times sqrt(embed), tied."""
  c = dict(c, hidden_act=settings.get(c, 'hidden_activation', 'hidden_act'))
  model = _gated(c, norm=settings.rms_norm(c), bias=c.get('attention_bias', False))
  model.embedding, model.head = use(heads.Embedding, scaled=True), settings.tied(c, True)
  return model


def gemma2(c: Settings) -> ConfigDict:
  """Gemma 2 (arXiv:2408.00118): a norm on both sides of a sublayer, every other layer a window, soft-capped logits."""
  c = dict(c, hidden_act=settings.get(c, 'hidden_activation', 'hidden_act'))
  settings.expect(c, use_bidirectional_attention=False)
  model = _gated(
    c,
    norm=settings.rms_norm(c),
    slides=lambda layer: layer % 2 == 0,
    residual=norms.sandwich,
    bias=c.get('attention_bias', False),
    scale=settings.get(c, 'query_pre_attn_scalar') ** -0.5,
    cap=c.get('attn_logit_softcapping'),
  )
  head = settings.tied(c, True)
  head.cap = c.get('final_logit_softcapping')
  model.embedding, model.head = use(heads.Embedding, scaled=True), head
  return model


def glm(c: Settings, residual: Callable = norms.pre) -> ConfigDict:
  """GLM-4-9B (arXiv:2406.12793): half of each head rotated in neighbouring pairs, biases on queries, keys, values."""
  c = dict(c, partial_rotary_factor=c.get('partial_rotary_factor', 0.5))
  return _gated(
    c,
    norm=settings.rms_norm(c),
    rotate=positions.rope_interleaved,
    residual=residual,
    bias=settings.get(c, 'attention_bias'),
    out_bias=False,
  )


def glm4(c: Settings) -> ConfigDict:
  """GLM-4-0414: GLM-4 with a norm on both sides of a sublayer."""
  return glm(c, norms.sandwich)


def stablelm(c: Settings) -> ConfigDict:
  """StableLM 3B: LLaMA with LayerNorm and a quarter of each head rotated."""
  return _gated(
    c,
    norm=settings.layer_norm(c, 'layer_norm_eps'),
    bias=c.get('use_qkv_bias', False),
    out_bias=False,
  )


def starcoder2(c: Settings) -> ConfigDict:
  """StarCoder2 (arXiv:2402.19173): RoPE, grouped queries, LayerNorm, GELU, biases."""
  bias = c.get('use_bias', True)

  def attend(window: int | None) -> ConfigDict:
    return settings.self_attention(
      c,
      groups=c.get('num_key_value_heads'),
      bias=bias,
      rotate=settings.rotation(c),
      **settings.banded(window),
    )

  return settings.decoder(
    c,
    kinds=settings.windows(c, every),
    mixer_of=attend,
    ffn=settings.mlp(c, settings.get(c, 'intermediate_size'), settings.get(c, 'hidden_act'), bias),
    norm=settings.layer_norm(c, 'norm_epsilon'),
    head=settings.tied(c, True),
  )


def _llama_rows(add: float = 0.0) -> tuple[Row, ...]:
  """The names of LLaMA, which many keep."""
  return (
    *ends('embed_tokens', 'norm', add=add),
    *norm(f'{LAYER}mixer_norm', 'layers.*.input_layernorm', add=add),
    *norm(f'{LAYER}ffn_norm', 'layers.*.post_attention_layernorm', add=add),
    *norm(f'{LAYER}mixer/query_norm', 'layers.*.self_attn.q_norm'),
    *norm(f'{LAYER}mixer/key_norm', 'layers.*.self_attn.k_norm'),
    *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'o_proj'),
    *linear('ffn/gate', 'layers.*.mlp.gate_proj', UP),
    *linear('ffn/up', 'layers.*.mlp.up_proj', UP),
    *linear('ffn/down', 'layers.*.mlp.down_proj', 'd f -> f d'),
  )


def _sandwich_rows(
  table: tuple[Row, ...], mixer: str, before: str, ffn: str, **kw: Any
) -> tuple[Row, ...]:
  """The same with four norms: the second, third and fourth under these names."""
  return (
    *without(table, 'ffn_norm'),
    *norm(f'{LAYER}mixer_out_norm', f'layers.*.{mixer}', **kw),
    *norm(f'{LAYER}ffn_norm', f'layers.*.{before}', **kw),
    *norm(f'{LAYER}ffn_out_norm', f'layers.*.{ffn}', **kw),
  )


LLAMA, GEMMA = _llama_rows(), _llama_rows(add=1.0)
# the two halves of the gated unit in one tensor
GLM = (
  *without(LLAMA, 'ffn/'),
  *linear('ffn/gate ffn/up', 'layers.*.mlp.gate_up_proj', 'n d -> d n', 'n -> n'),
  *linear('ffn/down', 'layers.*.mlp.down_proj', 'd f -> f d'),
)
PHI3 = (
  *without(GLM, 'mixer/'),
  Row(tuple(LAYER + name for name in QKV.split()), 'layers.*.self_attn.qkv_proj.weight', JOINED),
  *linear('mixer/out', 'layers.*.self_attn.o_proj', OUT),
)
STARCODER2 = (
  *without(LLAMA, 'ffn/'),
  *mlp_rows('layers.*.mlp.c_fc', 'layers.*.mlp.c_proj'),
)
GEMMA2 = _sandwich_rows(
  GEMMA,
  'post_attention_layernorm',
  'pre_feedforward_layernorm',
  'post_feedforward_layernorm',
  add=1.0,
)
GLM4 = _sandwich_rows(
  GLM, 'post_self_attn_layernorm', 'post_attention_layernorm', 'post_mlp_layernorm'
)

FAMILIES = dict(
  llama=Family(llama, LLAMA, 'model.'),
  mistral=Family(mistral, LLAMA, 'model.'),
  qwen2=Family(qwen2, LLAMA, 'model.'),
  qwen3=Family(qwen3, LLAMA, 'model.'),
  stablelm=Family(stablelm, LLAMA, 'model.'),
  gemma=Family(gemma, GEMMA, 'model.'),
  gemma2=Family(gemma2, GEMMA2, 'model.'),
  glm=Family(glm, GLM, 'model.'),
  glm4=Family(glm4, GLM4, 'model.'),
  phi3=Family(mistral, PHI3, 'model.'),
  starcoder2=Family(starcoder2, STARCODER2, 'model.'),
)
