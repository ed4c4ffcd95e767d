"""Published models by name: `config('palm_540b')` is what a config's `model` may be, `ROWS` the tables it comes from.

    model = build(presets.config('llama_7b', vocab_multiple=128, dtype='bfloat16'))()

The tables in model/published/ are data: sizes, parts by import path, the published number of parameters and who says
so. Nothing of a model is imported before its config is asked for.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigDict, load, use
from llm_jax.core.errors import UserError, nearest
from llm_jax.model.published import google, gpt, llama, recurrent
from llm_jax.model.published.row import Row

ROWS: dict[str, Row] = {
  **gpt.CARDS,
  **llama.CARDS,
  **google.CARDS,
  **recurrent.CARDS,
}


def row(name: str) -> Row:
  """The row of a published model."""
  if name not in ROWS:
    raise UserError(f'no published model {name!r}; {nearest(name, ROWS)}')
  return ROWS[name]


def config(name: str, **changes: Any) -> ConfigDict:
  """The call that builds the published model `name`, with `changes` to what `assemble` is given."""
  sheet = {**row(name).sheet, **changes}
  count = sheet.pop('classes', None)
  made = without_attention(**sheet) if 'mixer' in sheet else assemble(**sheet)
  if count is None:
    return made
  from llm_jax.model import classes

  return use(classes.make, model=use(classes.make_pooled, model=made), count=count)


def assemble(
  *,
  kind: str = 'causal',
  vocab: int,
  embed: int,
  layers: int,
  heads: int,
  hidden: int,
  encoder_layers: int | None = None,
  groups: int | None = None,
  head_dim: int | None = None,
  length: int | None = None,
  norm: Any = 'norms:RMSNorm',
  residual: Any = 'norms:pre',
  final_norm: bool = True,
  positions: Any = None,
  rotate: Any = None,
  bias: Any = None,
  relative: Any = None,
  window: int | None = None,
  scale: float | None = None,
  attention_bias: bool = False,
  activation: Any = 'ffn:gelu',
  gated: bool = False,
  ffn_bias: bool = False,
  experts: int | None = None,
  top_k: int = 2,
  every: int = 1,
  dense: Mapping[str, Any] | None = None,
  embedding: Any = 'heads:Embedding',
  stem: Any = None,
  head: Any = 'heads:Tied',
  init: Any = 'init:gpt2',
  kernel: Any = 'kernels:reference',
  **builder: Any,
) -> ConfigDict:
  """A `use(transformer.causal, ...)` (or prefix, encoder, encoder_decoder) in which all blocks are of one size.

  Parts (norm, residual, positions, rotate, bias, ..., kernel) are import paths below `llm_jax.model`, or dicts with
  that path as `fn`; None leaves them out. hidden: of the feed-forward. final_norm: whether the stacks end with a norm.
  relative: Transformer-XL positions. window: keys a query sees. experts: every `every`-th block has that many
  feed-forwards for each token to meet `top_k` of, `dense` are changes to the others. builder: more arguments of the
  builder, such as `dtype`, `runner` or `vocab_multiple`.
  """
  attend = dict(heads=heads, groups=groups, head_dim=head_dim, bias=attention_bias, scale=scale)
  attend['kernel'] = part(kernel)
  extra = dict(window=window, relative=part(relative))
  mixers = dict(
    mixer=use(
      load('llm_jax.model.attention:SelfAttention'),
      rotate=part(rotate),
      **attend,
      **{name: value for name, value in extra.items() if value is not None},
    )
  )
  unit = dict(hidden=hidden, activation=activation, gated=gated, bias=ffn_bias)
  units = _units(unit, experts, top_k, every, {**unit, **(dense or {})})
  rest = dict(norm=part(norm), residual=part(residual))
  if kind == 'encoder_decoder':
    encoder = _pattern('decoder', units, **mixers, **rest)
    builder |= dict(encoder_layers=encoder_layers, encoder_block=encoder)
    mixers['cross'] = use(load('llm_jax.model.attention:CrossAttention'), **attend)
  builder |= {} if stem is None else dict(stem=part(stem))
  block = 'cross_decoder' if 'cross' in mixers else 'decoder'
  return use(
    load(f'llm_jax.model.transformer:{kind}'),
    vocab=vocab,
    embed=embed,
    layers=layers,
    block=_pattern(block, units, **mixers, **rest),
    length=length,
    norm=part(norm) if final_norm else None,
    positions=part(positions),
    bias=part(bias),
    embedding=part(embedding),
    head=part(head),
    init=part(init),
    **builder,
  )


def without_attention(
  *,
  vocab: int,
  embed: int,
  layers: int,
  mixer: Any,
  channel: Any = None,
  length: int | None = None,
  norm: Any = 'norms:RMSNorm',
  embedding: Any = 'heads:Embedding',
  head: Any = 'heads:Tied',
  init: Any = 'init:gpt2',
  **builder: Any,
) -> ConfigDict:
  """A `use(transformer.causal, ...)` of blocks of one mixer, or of two where RWKV's `channel` takes the place of the
  feed-forward; parts and `builder` as in `assemble`."""
  mixers = dict(mixer=part(mixer), channel=part(channel))
  return use(
    load('llm_jax.model.transformer:causal'),
    vocab=vocab,
    embed=embed,
    layers=layers,
    block=use(load('llm_jax.model.block:mixers'), **mixers, norm=part(norm)),
    length=length,
    norm=part(norm),
    embedding=part(embedding),
    head=part(head),
    init=part(init),
    **builder,
  )


def _pattern(block: str, units: tuple, **rest: Any) -> Any:
  """The block of a builder, or the pattern of blocks that repeats the feed-forwards `units`."""
  made = tuple(use(load(f'llm_jax.model.block:{block}'), ffn=unit, **rest) for unit in units)
  return made if len(made) > 1 else made[0]


def _units(
  unit: Mapping[str, Any], experts: int | None, top_k: int, every: int, dense: Mapping[str, Any]
) -> tuple[ConfigDict, ...]:
  """The feed-forwards that the layers repeat."""
  if experts is None:
    return (_dense(**unit),)
  moe = load('llm_jax.model.moe:MoE')
  routed = use(moe, experts=experts, expert=_dense(**unit), top_k=top_k)
  return (*(_dense(**dense),) * (every - 1), routed)


def _dense(*, hidden: int, activation: Any, gated: bool, bias: bool) -> ConfigDict:
  unit = load('llm_jax.model.ffn:Gated' if gated else 'llm_jax.model.ffn:MLP')
  return use(unit, hidden=hidden, activation=part(activation), bias=bias)


def part(told: Any) -> Any:
  """What a table says of a part, 'norms:RMSNorm' or dict(fn='norms:RMSNorm', eps=1e-5), as a call."""
  if isinstance(told, ConfigDict) or told is None:
    return told
  told = dict(told) if isinstance(told, Mapping) else dict(fn=told)
  path = told.pop('fn')
  nested = {n: part(v) if isinstance(v, Mapping) else v for n, v in told.items()}
  return use(load(f'llm_jax.model.{path}'), **nested)
