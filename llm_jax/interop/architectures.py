"""The `config.json` of a Hugging Face checkpoint as the `model` of a config of ours, one function per architecture.

A setting that would change the numbers and that our model does not have is refused by its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.core.config import ConfigDict, use
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import attention, block, ffn, heads, init, norms, positions, transformer

Settings = Mapping[str, Any]  # a config.json

ACTIVATIONS = dict(
  relu=ffn.relu,
  gelu=ffn.gelu,
  gelu_new=ffn.gelu_tanh,
  gelu_fast=ffn.gelu_tanh,
  gelu_pytorch_tanh=ffn.gelu_tanh,
  silu=ffn.silu,
  swish=ffn.silu,
)


# --- reading a config.json ------------------------------------------------------------------------


def get(c: Settings, *keys: str, default: Any = UserError) -> Any:
  """The first of the keys that is there and not null."""
  for key in keys:
    if c.get(key) is not None:
      return c[key]
  if default is UserError:
    raise UserError(f'config.json has no {keys[0]!r}: {nearest(keys[0], c)}')
  return default


def expect(c: Settings, **wanted: Any) -> None:
  """Refuses a config with settings that would change the numbers and that our model does not have."""
  for key, value in wanted.items():
    found = c.get(key)
    if found is not None and found != value:
      raise UserError(
        f'config.json has {key}={found!r}, which is not supported: only {key}={value!r} is'
      )


def activation(name: str) -> ConfigDict:
  """Their name of an activation as ours."""
  if name not in ACTIVATIONS:
    raise UserError(f'config.json has the activation {name!r}: {nearest(name, ACTIVATIONS)}')
  return use(ACTIVATIONS[name])


def rotation(c: Settings, fn: Callable = positions.rope, fraction: float = 1.0) -> ConfigDict:
  """RoPE as a config says; transformers 5 keeps it in `rope_parameters`."""
  told = dict(get(c, 'rope_parameters', 'rope_scaling', default={}))
  kind = told.get('rope_type', told.get('type', 'default'))
  if kind != 'default':
    raise UserError(
      f'config.json has RoPE of type {kind!r}, which is not supported: only the default is'
    )
  base = told.get('rope_theta', get(c, 'rope_theta', 'rotary_emb_base', default=10_000.0))
  fraction = told.get('partial_rotary_factor', fraction)
  return use(fn, base=float(base), fraction=float(fraction))


def no_window(c: Settings) -> None:
  """Refuses a sliding window that is shorter than the context."""
  window = c.get('sliding_window')
  if c.get('use_sliding_window', True) and window and window < get(c, 'max_position_embeddings'):
    raise UserError(
      f'config.json has sliding_window={window}, which is not supported: only full attention is'
    )


def layer_norm(c: Settings, *keys: str, bias: bool = True) -> ConfigDict:
  """LayerNorm with their eps."""
  return use(norms.LayerNorm, eps=float(get(c, *keys, default=1e-5)), bias=bias)


def tied(c: Settings, default: bool, bias: bool = False) -> ConfigDict:
  """The head: the embedding table, or a matrix of its own."""
  return use(heads.Tied) if c.get('tie_word_embeddings', default) else use(heads.Untied, bias=bias)


def decoder(c: Settings, **parts: Any) -> ConfigDict:
  """A causal decoder with the sizes of a config under their usual names."""
  layer = {k: parts.pop(k) for k in ('mixer', 'ffn', 'norm', 'residual') if k in parts}
  return use(
    transformer.causal,
    **dict(
      vocab=get(c, 'vocab_size'),
      embed=get(c, 'hidden_size', 'n_embd', 'd_model'),
      layers=get(c, 'num_hidden_layers', 'n_layer', 'n_layers'),
      block=use(block.decoder, **layer),
      norm=layer['norm'],
    )
    | parts,
  )


def _attention(c: Settings, **kw: Any) -> ConfigDict:
  return use(
    attention.SelfAttention,
    **dict(heads=get(c, 'num_attention_heads', 'n_head', 'n_heads', 'num_heads')) | kw,
  )


# --- models ---------------------------------------------------------------------------------------


def _gated(c: Settings, *, norm: ConfigDict, **mixer: Any) -> ConfigDict:
  """Pre-norm, RoPE, a gated feed-forward without biases."""
  no_window(c)
  expect(c, mlp_bias=False, use_parallel_residual=False, qk_layernorm=False)
  return decoder(
    c,
    mixer=_attention(
      c,
      groups=c.get('num_key_value_heads'),
      head_dim=c.get('head_dim'),
      rotate=rotation(c, fraction=c.get('partial_rotary_factor', 1.0)),
      **mixer,
    ),
    ffn=use(
      ffn.Gated, hidden=get(c, 'intermediate_size'), activation=activation(get(c, 'hidden_act'))
    ),
    norm=norm,
    head=tied(c, False),
  )


def _rms(c: Settings) -> ConfigDict:
  return use(norms.RMSNorm, eps=float(get(c, 'rms_norm_eps')))


def llama(c: Settings) -> ConfigDict:
  """LLaMA 1 and 2 (arXiv:2302.13971, 2307.09288), Mistral 7B without a window, Phi-3."""
  return _gated(c, norm=_rms(c), bias=c.get('attention_bias', False))


def qwen2(c: Settings) -> ConfigDict:
  """Qwen2 (arXiv:2407.10671): LLaMA with biases on queries, keys and values."""
  return _gated(c, norm=_rms(c), bias=True, out_bias=False)


def gemma(c: Settings) -> ConfigDict:
  """Gemma 1 (arXiv:2403.08295): GeGLU, embeddings times sqrt(embed), tied."""
  c = dict(c, hidden_act=get(c, 'hidden_activation', 'hidden_act'))
  model = _gated(c, norm=_rms(c), bias=c.get('attention_bias', False))
  model.embedding, model.head = use(heads.Embedding, scaled=True), tied(c, True)
  return model


def stablelm(c: Settings) -> ConfigDict:
  """StableLM 3B: LLaMA with LayerNorm and a quarter of each head rotated."""
  return _gated(
    c,
    norm=layer_norm(c, 'layer_norm_eps'),
    bias=c.get('use_qkv_bias', False),
    out_bias=False,
  )


def starcoder2(c: Settings) -> ConfigDict:
  """StarCoder2 (arXiv:2402.19173): RoPE, grouped queries, LayerNorm, GELU, biases."""
  no_window(c)
  bias = c.get('use_bias', True)
  return decoder(
    c,
    mixer=_attention(c, groups=c.get('num_key_value_heads'), bias=bias, rotate=rotation(c)),
    ffn=_mlp(c, get(c, 'intermediate_size'), get(c, 'hidden_act'), bias),
    norm=layer_norm(c, 'norm_epsilon'),
    head=tied(c, True),
  )


def _mlp(c: Settings, hidden: int, name: str, bias: bool = True) -> ConfigDict:
  return use(ffn.MLP, hidden=hidden, activation=activation(name), bias=bias)


def gpt2(c: Settings) -> ConfigDict:
  """GPT-2, and GPTBigCode (StarCoder, arXiv:2305.06161) with one group of keys."""
  expect(
    c, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False
  )
  return decoder(
    c,
    mixer=_attention(c, groups=1 if c.get('multi_query') else None, bias=True, rotate=None),
    ffn=_mlp(
      c, c.get('n_inner') or 4 * get(c, 'n_embd', 'hidden_size'), get(c, 'activation_function')
    ),
    norm=layer_norm(c, 'layer_norm_epsilon'),
    positions=use(positions.Learned),
    length=get(c, 'n_positions', 'max_position_embeddings'),
    head=tied(c, True),
  )


def opt(c: Settings) -> ConfigDict:
  """OPT (arXiv:2205.01068), all sizes but 350M."""
  expect(
    c, do_layer_norm_before=True, word_embed_proj_dim=get(c, 'hidden_size'), enable_bias=True,
    _remove_final_layer_norm=False, layer_norm_elementwise_affine=True,
  )  # fmt: skip
  return decoder(
    c,
    mixer=_attention(c, bias=True, rotate=None),
    ffn=_mlp(c, get(c, 'ffn_dim'), get(c, 'activation_function')),
    norm=layer_norm(c),
    positions=use(positions.Learned),
    length=get(c, 'max_position_embeddings'),
    head=tied(c, True),
  )


def gpt_neox(c: Settings) -> ConfigDict:
  """GPT-NeoX-20B (arXiv:2204.06745) and Pythia: attention and feed-forward side by side, each with its norm."""
  side_by_side = c.get('use_parallel_residual', True)
  return decoder(
    c,
    mixer=_attention(
      c, bias=c.get('attention_bias', True), rotate=rotation(c, fraction=c.get('rotary_pct', 0.25))
    ),
    ffn=_mlp(c, get(c, 'intermediate_size'), get(c, 'hidden_act')),
    norm=layer_norm(c, 'layer_norm_eps'),
    residual=use(norms.parallel_norms if side_by_side else norms.pre),
    head=tied(c, False),
  )


def gptj(c: Settings) -> ConfigDict:
  """GPT-J and CodeGen: side by side under one norm, neighbouring pairs rotated, biases in the feed-forward and head."""
  size = get(c, 'n_embd', 'hidden_size') // get(c, 'n_head', 'num_attention_heads')
  fraction = (c.get('rotary_dim') or size) / size
  return decoder(
    c,
    mixer=_attention(c, rotate=rotation(c, positions.rope_interleaved, fraction)),
    ffn=_mlp(
      c, c.get('n_inner') or 4 * get(c, 'n_embd', 'hidden_size'), get(c, 'activation_function')
    ),
    norm=layer_norm(c, 'layer_norm_epsilon'),
    residual=use(norms.parallel),
    head=tied(c, False, bias=True),
  )


def phi(c: Settings) -> ConfigDict:
  """Phi-1, 1.5 and 2 (arXiv:2306.11644): side by side under one norm, part of each head rotated, biases everywhere."""
  expect(c, qk_layernorm=False)
  return decoder(
    c,
    mixer=_attention(
      c,
      groups=c.get('num_key_value_heads'),
      bias=True,
      rotate=rotation(c, fraction=c.get('partial_rotary_factor', 0.5)),
    ),
    ffn=_mlp(c, get(c, 'intermediate_size'), get(c, 'hidden_act')),
    norm=layer_norm(c, 'layer_norm_eps'),
    residual=use(norms.parallel),
    head=tied(c, False, bias=True),
  )


def falcon(c: Settings) -> ConfigDict:
  """Falcon 7B (arXiv:2311.16867): one group of keys, side by side under one norm, RoPE."""
  expect(c, new_decoder_architecture=False, alibi=False, parallel_attn=True, multi_query=True)
  bias = c.get('bias', False)
  return decoder(
    c,
    mixer=_attention(c, groups=1, bias=bias, rotate=rotation(c)),
    ffn=_mlp(
      c, c.get('ffn_hidden_size') or 4 * get(c, 'hidden_size'), c.get('activation', 'gelu'), bias
    ),
    norm=layer_norm(c, 'layer_norm_epsilon'),
    residual=use(norms.parallel),
    head=tied(c, True),
  )


def bloom(c: Settings) -> ConfigDict:
  """BLOOM (arXiv:2211.05100): ALiBi, a norm on the embedding, GELU by tanh."""
  expect(c, apply_residual_connection_post_layernorm=False)
  norm = layer_norm(c, 'layer_norm_epsilon')
  return decoder(
    c,
    mixer=_attention(c, bias=True, rotate=None),
    ffn=_mlp(c, 4 * get(c, 'hidden_size', 'n_embed'), 'gelu_pytorch_tanh'),
    norm=norm,
    bias=use(positions.Alibi),
    embedding=use(heads.Embedding, norm=norm),
    head=tied(c, True),
  )


def mpt(c: Settings) -> ConfigDict:
  """MPT: ALiBi, LayerNorm without bias, no biases."""
  told = get(c, 'attn_config')
  expect(
    told,
    alibi=True,
    qk_ln=False,
    clip_qkv=None,
    softmax_scale=None,
    attn_type='multihead_attention',
  )
  expect(c, no_bias=True, expansion_ratio=4)  # the reference has 4, whatever the config says
  return decoder(
    c,
    mixer=_attention(c, rotate=None),
    ffn=_mlp(c, 4 * get(c, 'd_model'), 'gelu', bias=False),
    norm=layer_norm(c, 'layer_norm_epsilon', bias=False),
    bias=use(positions.Alibi),
    head=tied(c, True),
  )


def t5(c: Settings) -> ConfigDict:
  """T5 1.0 and 1.1, Flan-T5, mT5 (arXiv:1910.10683, 2010.11934): unscaled attention, shared buckets."""
  gate, _, name = get(c, 'feed_forward_proj').rpartition('-')
  name = 'gelu_new' if (gate, name) == ('gated', 'gelu') else name
  attend = dict(heads=get(c, 'num_heads'), head_dim=get(c, 'd_kv'), scale=1.0)
  norm = use(norms.RMSNorm, eps=float(get(c, 'layer_norm_epsilon')))
  rest = dict(
    mixer=use(attention.SelfAttention, rotate=None, **attend),
    ffn=use(ffn.Gated if gate else ffn.MLP, hidden=get(c, 'd_ff'), activation=activation(name)),
    norm=norm,
  )
  head = use(heads.Untied)
  if c.get('tie_word_embeddings', True):
    head = use(heads.Tied, scaled=c.get('scale_decoder_outputs', True))
  return use(
    transformer.encoder_decoder,
    vocab=get(c, 'vocab_size'),
    embed=get(c, 'd_model'),
    layers=get(c, 'num_decoder_layers', 'num_layers'),
    encoder_layers=get(c, 'num_layers'),
    block=use(block.cross_decoder, cross=use(attention.CrossAttention, **attend), **rest),
    encoder_block=use(block.decoder, **rest),
    norm=norm,
    bias=use(
      positions.Buckets,
      buckets=get(c, 'relative_attention_num_buckets'),
      distance=get(c, 'relative_attention_max_distance', default=128),
    ),
    head=head,
    init=use(init.t5),
  )
