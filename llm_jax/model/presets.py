"""Published models by name: `config('palm_540b')` is what a config's `model` may be, `ROWS` the tables it comes from.

    model = build(presets.config('llama_7b', vocab_multiple=128, dtype='bfloat16'))()

The tables in model/published/ are data: sizes, parts by import path, the published number of parameters and who says
so. Nothing of a model is imported before its config is asked for.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigDict, load, use
from llm_jax.core.errors import UserError, nearest
from llm_jax.model.published import google, gpt, llama
from llm_jax.model.published.row import Row

ROWS: dict[str, Row] = {**gpt.CARDS, **llama.CARDS, **google.CARDS}


def row(name: str) -> Row:
  """The row of a published model."""
  if name not in ROWS:
    raise UserError(f'no published model {name!r}; {nearest(name, ROWS)}')
  return ROWS[name]


def config(name: str, **changes: Any) -> ConfigDict:
  """The call that builds the published model `name`, with `changes` to what `assemble` is given."""
  return assemble(**{**row(name).sheet, **changes})


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
  head: Any = 'heads:Tied',
  init: Any = 'init:gpt2',
  kernel: Any = 'kernels:reference',
  **builder: Any,
) -> ConfigDict:
  """A `use(transformer.causal, ...)` (or prefix, encoder_decoder) in which all blocks are of one size.

  Parts (norm, residual, positions, rotate, bias, ..., kernel) are import paths below `llm_jax.model`, or dicts with
  that path as `fn`; None leaves them out. hidden: of the feed-forward. final_norm: whether the stacks end with a norm.
  relative: Transformer-XL positions. window: keys a query sees. experts: every `every`-th block has that many
  feed-forwards for each token to meet `top_k` of, `dense` are changes to the others. builder: more arguments of the
  builder, such as `dtype`, `runner` or `vocab_multiple`.
  """
  sizes = dict(heads=heads, groups=groups, head_dim=head_dim, bias=attention_bias, scale=scale)
  sizes['kernel'] = part(kernel)
  optional = dict(window=window, relative=part(relative))
  mixer = use(
    load('llm_jax.model.attention:SelfAttention'),
    rotate=part(rotate),
    **sizes,
    **{name: value for name, value in optional.items() if value is not None},
  )
  unit = dict(activation=activation, gated=gated, bias=ffn_bias)
  rest = dict(norm=part(norm), residual=part(residual))

  def block(fn: str, ffn: ConfigDict, **mixers: Any) -> ConfigDict:
    return use(load(f'llm_jax.model.block:{fn}'), mixer=mixer, ffn=ffn, **mixers, **rest)

  def blocks(fn: str, **mixers: Any) -> Any:
    if experts is None:
      return block(fn, _dense(hidden, **unit), **mixers)
    plain = block(fn, _dense(hidden, **{**unit, **(dense or {})}), **mixers)
    return (*(plain,) * (every - 1), block(fn, _routed(hidden, experts, top_k, **unit), **mixers))

  more = dict(builder)
  if kind == 'encoder_decoder':
    cross = use(load('llm_jax.model.attention:CrossAttention'), **sizes)
    more |= dict(encoder_layers=encoder_layers, encoder_block=blocks('decoder'))
    made = blocks('cross_decoder', cross=cross)
  else:
    made = blocks('decoder')
  if isinstance(made, tuple):  # a pattern is one segment
    layers, made = (layers,), (made,)
  return use(
    load(f'llm_jax.model.transformer:{kind}'),
    vocab=vocab,
    embed=embed,
    layers=layers,
    block=made,
    length=length,
    norm=part(norm) if final_norm else None,
    positions=part(positions),
    bias=part(bias),
    embedding=part(embedding),
    head=part(head),
    init=part(init),
    **more,
  )


def part(told: Any) -> Any:
  """What a table says of a part, 'norms:RMSNorm' or dict(fn='norms:RMSNorm', eps=1e-5), as a call."""
  if isinstance(told, ConfigDict) or told is None:
    return told
  told = dict(told) if isinstance(told, Mapping) else dict(fn=told)
  path = told.pop('fn')
  nested = {n: part(v) if isinstance(v, Mapping) else v for n, v in told.items()}
  return use(load(f'llm_jax.model.{path}'), **nested)


def _dense(hidden: int, *, activation: Any, gated: bool, bias: bool) -> ConfigDict:
  unit = load('llm_jax.model.ffn:Gated' if gated else 'llm_jax.model.ffn:MLP')
  return use(unit, hidden=hidden, activation=part(activation), bias=bias)


def _routed(
  hidden: int, experts: int, top_k: int, *, activation: Any, gated: bool, bias: bool
) -> ConfigDict:
  del bias  # experts have none
  return use(
    load('llm_jax.model.moe:MoE'),
    hidden=hidden,
    experts=experts,
    top_k=top_k,
    activation=part(activation),
    gated=gated,
  )
