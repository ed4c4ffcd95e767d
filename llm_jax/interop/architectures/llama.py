"""LLaMA and its descendants: pre-norm, RoPE, a gated feed-forward, no or few biases."""

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
)
from llm_jax.model import ffn, heads


def _gated(c: Settings, *, norm: ConfigDict, **mixer: Any) -> ConfigDict:
  """Pre-norm, RoPE, a gated feed-forward without biases."""
  settings.no_window(c)
  settings.expect(c, mlp_bias=False, use_parallel_residual=False, qk_layernorm=False)
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c,
      groups=c.get('num_key_value_heads'),
      head_dim=c.get('head_dim'),
      rotate=settings.rotation(c, fraction=c.get('partial_rotary_factor', 1.0)),
      **mixer,
    ),
    ffn=use(
      ffn.Gated,
      hidden=settings.get(c, 'intermediate_size'),
      activation=settings.activation(settings.get(c, 'hidden_act')),
    ),
    norm=norm,
    head=settings.tied(c, False),
  )


def llama(c: Settings) -> ConfigDict:
  """LLaMA 1 and 2 (arXiv:2302.13971, 2307.09288), Mistral 7B without a window, Phi-3."""
  return _gated(c, norm=settings.rms_norm(c), bias=c.get('attention_bias', False))


def qwen2(c: Settings) -> ConfigDict:
  """Qwen2 (arXiv:2407.10671): LLaMA with biases on queries, keys and values."""
  return _gated(c, norm=settings.rms_norm(c), bias=True, out_bias=False)


def gemma(c: Settings) -> ConfigDict:
  """Gemma 1 (arXiv:2403.08295): GeGLU, embeddings times sqrt(embed), tied."""
  c = dict(c, hidden_act=settings.get(c, 'hidden_activation', 'hidden_act'))
  model = _gated(c, norm=settings.rms_norm(c), bias=c.get('attention_bias', False))
  model.embedding, model.head = use(heads.Embedding, scaled=True), settings.tied(c, True)
  return model


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
  settings.no_window(c)
  bias = c.get('use_bias', True)
  return settings.decoder(
    c,
    mixer=settings.self_attention(
      c, groups=c.get('num_key_value_heads'), bias=bias, rotate=settings.rotation(c)
    ),
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
    *split('layers.*.self_attn.', 'q_proj', 'k_proj', 'v_proj', 'o_proj'),
    *linear('ffn/gate', 'layers.*.mlp.gate_proj', UP),
    *linear('ffn/up', 'layers.*.mlp.up_proj', UP),
    *linear('ffn/down', 'layers.*.mlp.down_proj', 'd f -> f d'),
  )


LLAMA = _llama_rows()
FAMILIES = dict(
  llama=Family(llama, LLAMA, 'model.'),
  mistral=Family(llama, LLAMA, 'model.'),
  qwen2=Family(qwen2, LLAMA, 'model.'),
  stablelm=Family(stablelm, LLAMA, 'model.'),
  gemma=Family(gemma, _llama_rows(add=1.0), 'model.'),
  phi3=Family(
    llama,
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
    starcoder2,
    (
      *(r for r in LLAMA if 'ffn/' not in r.ours),
      *mlp_rows('layers.*.mlp.c_fc', 'layers.*.mlp.c_proj'),
    ),
    'model.',
  ),
)
