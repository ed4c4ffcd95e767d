"""A `config.json` read: its keys under their several names, and the parts of a model that many architectures share.

A setting that would change the numbers and that our model does not have is refused by its name.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.core.config import ConfigDict, use
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import (
  attention,
  block,
  extension,
  ffn,
  heads,
  kernels,
  norms,
  positions,
  transformer,
)

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
  """RoPE as a config says; transformers 5 keeps it in `rope_parameters`, older ones the scaling in `rope_scaling`."""
  told = dict(get(c, 'rope_parameters', 'rope_scaling', default={}))
  base = told.get('rope_theta', get(c, 'rope_theta', 'rotary_emb_base', default=10_000.0))
  fraction = told.get('partial_rotary_factor', fraction)
  return use(fn, base=float(base), fraction=float(fraction), scaling=_scaling(c, told))


def _scaling(c: Settings, told: dict) -> ConfigDict | None:
  """What a config says about frequencies for longer contexts."""
  kind = told.get('rope_type', told.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in SCALINGS:
    raise UserError(
      f'config.json has RoPE of type {kind!r}, which is not supported: {nearest(kind, SCALINGS)}'
    )
  length = get(c, 'max_position_embeddings')
  keys = ('original_max_position_embeddings',)
  original = get(told, *keys, default=get(c, *keys, default=length))
  factor = told.get('factor') or length / original
  return SCALINGS[kind](told, float(factor), original, length)


def _linear(told: dict, factor: float, original: int, length: int) -> ConfigDict:
  return use(extension.interpolation, factor=factor)


def _dynamic(told: dict, factor: float, original: int, length: int) -> ConfigDict:
  return use(extension.dynamic_ntk, factor=factor, original_length=length)


def _llama3(told: dict, factor: float, original: int, length: int) -> ConfigDict:
  turns = {n: float(get(told, f'{n}_freq_factor')) for n in ('low', 'high')}
  return use(extension.llama3, factor=factor, original_length=original, **turns)


def _yarn(told: dict, factor: float, original: int, length: int) -> ConfigDict:
  expect(told, truncate=True)
  attention, scales = told.get('attention_factor'), ('mscale', 'mscale_all_dim')
  if attention is None and all(told.get(name) for name in scales):
    up, down = (0.1 * told[name] * math.log(max(factor, 1.0)) + 1.0 for name in scales)
    attention = up / down
  turns = {n: float(told.get(f'beta_{n}') or d) for n, d in (('fast', 32), ('slow', 1))}
  return use(
    extension.yarn,
    factor=factor,
    original_length=original,
    attention=None if attention is None else float(attention),
    **turns,
  )


def _longrope(told: dict, factor: float, original: int, length: int) -> ConfigDict:
  attention = told.get('attention_factor')
  return use(
    extension.longrope,
    short=tuple(map(float, get(told, 'short_factor'))),
    long=tuple(map(float, get(told, 'long_factor'))),
    factor=factor,
    original_length=original,
    attention=None if attention is None else float(attention),
  )


# rope_type -> a function of (rope_parameters, factor, length of training, length of the config)
SCALINGS = dict(linear=_linear, dynamic=_dynamic, llama3=_llama3, yarn=_yarn, longrope=_longrope)


def window(c: Settings) -> int | None:
  """The sliding window, where there is one shorter than the context."""
  size = c.get('sliding_window')
  used = c.get('use_sliding_window', True) and size and size < get(c, 'max_position_embeddings')
  return size if used else None


def no_window(c: Settings) -> None:
  """Refuses a sliding window that is shorter than the context."""
  if window(c):
    raise UserError(
      f'config.json has sliding_window={window(c)}, which is not supported: only full attention is'
    )


def windows(c: Settings, slides: Callable[[int], bool]) -> list[int | None]:
  """The window of every layer, None for full attention. slides: which layers have one if there is no `layer_types`."""
  size, layers = window(c), get(c, 'num_hidden_layers')
  kinds = c.get('layer_types') or [
    'sliding_attention' if slides(i) else 'full_attention' for i in range(layers)
  ]
  for kind in kinds:
    if kind not in ('sliding_attention', 'full_attention'):
      raise UserError(f'config.json has a layer of type {kind!r}, which is not supported')
  return [size if kind == 'sliding_attention' else None for kind in kinds]


def banded(size: int | None) -> dict[str, Any]:
  """A sliding window of self-attention, computed in time linear in the length."""
  return {} if size is None else dict(window=size, kernel=use(kernels.banded))


def pattern(kinds: list, make: Callable[[Any], ConfigDict]) -> dict[str, Any]:
  """`layers` and `block` of a stack whose layers are of these kinds: the shortest pattern that repeats, or runs of
  equal layers, whichever names fewer blocks.
  """
  n = len(kinds)
  period = next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))
  runs = [(kind, len([*same])) for kind, same in itertools.groupby(kinds)]
  if period <= len(runs):
    blocks = tuple(make(kind) for kind in kinds[:period])
    return dict(layers=n, block=blocks if period > 1 else blocks[0])
  return dict(layers=tuple(n for _, n in runs), block=tuple(make(kind) for kind, _ in runs))


def layer_norm(c: Settings, *keys: str, bias: bool = True) -> ConfigDict:
  """LayerNorm with their eps."""
  return use(norms.LayerNorm, eps=float(get(c, *keys, default=1e-5)), bias=bias)


def rms_norm(c: Settings) -> ConfigDict:
  """RMSNorm with their eps."""
  return use(norms.RMSNorm, eps=float(get(c, 'rms_norm_eps')))


def tied(c: Settings, default: bool, bias: bool = False) -> ConfigDict:
  """The head: the embedding table, or a matrix of its own."""
  return use(heads.Tied) if c.get('tie_word_embeddings', default) else use(heads.Untied, bias=bias)


def decoder(c: Settings, **parts: Any) -> ConfigDict:
  """A causal decoder with the sizes of a config under their usual names. kinds: of the layers, where they
  differ (see `pattern`); mixer_of, block_of: the mixer, or the whole block, of a layer of a kind.
  """
  layer = {k: parts.pop(k) for k in ('mixer', 'ffn', 'norm', 'residual') if k in parts}
  kinds = parts.pop('kinds', None)
  if kinds is None:
    kinds = [None] * get(c, 'num_hidden_layers', 'n_layer', 'n_layers', 'num_layers')
  mixer_of = parts.pop('mixer_of', lambda kind: layer['mixer'])
  block_of = lambda kind: use(block.decoder, **layer | dict(mixer=mixer_of(kind)))
  make = parts.pop('block_of', block_of)
  return use(
    transformer.causal,
    **dict(
      vocab=get(c, 'vocab_size'),
      embed=get(c, 'hidden_size', 'n_embd', 'd_model'),
      norm=layer['norm'],
    )
    | pattern(kinds, make)
    | parts,
  )


def self_attention(c: Settings, **kw: Any) -> ConfigDict:
  """Self-attention with their number of heads."""
  return use(
    attention.SelfAttention,
    **dict(
      heads=get(c, 'num_attention_heads', 'n_head', 'n_heads', 'num_heads'),
      kernel=use(kernels.blocked),
    )
    | kw,
  )


def mlp(c: Settings, hidden: int, name: str, bias: bool = True) -> ConfigDict:
  """Two products and an activation, with biases."""
  return use(ffn.MLP, hidden=hidden, activation=activation(name), bias=bias)
