"""Initialisation recipes: the standard deviation of every weight by its role (OPT-019).

A recipe is `(role, shape, axes, embed, residuals) -> initialiser`, with `residuals` the number of residual additions in
the stack (2 per decoder block). All of them draw from a normal distribution; scales start at 1 and biases at 0.
Roles: embedding, positions, query, key, value, attention_out, ffn_in, ffn_out, router, head, buckets.
"""

import math
from collections.abc import Callable, Mapping

import jax

from llm_jax.core import widths
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import param

ROLES = (
  'embedding', 'positions', 'query', 'key', 'value', 'attention_out', 'ffn_in', 'ffn_out', 'router', 'head', 'buckets',
)  # fmt: skip


def normal(std: float) -> param.Initializer:
  """N(0, std^2) in float32."""
  return lambda key, shape: std * jax.random.normal(key, shape)


def gpt2(
  role: str, shape: tuple, axes: tuple, embed: int, residuals: int, *, std: float = 0.02
) -> param.Initializer:
  """0.02 everywhere, the projections back into the residual stream divided by the root of the number of residual
  additions (Radford et al. 2019, section 2.3)."""
  del shape, axes, embed
  return normal(std / residuals**0.5 if role in ('attention_out', 'ffn_out') else std)


def t5(
  role: str, shape: tuple, axes: tuple, embed: int, residuals: int, *, scale: float = 1.0
) -> param.Initializer:
  """1/sqrt(fan_in), with the missing 1/sqrt(head_dim) of the attention logits folded into the query weights and
  an embedding of N(0, 1) (Raffel et al. 2020, arXiv:1910.10683; the constants are those of the Mesh TensorFlow code).

  Use it with `SelfAttention(scale=1.0)` and, when the head is tied, `Tied(scaled=True)`. scale: of the variance of all
  but embeddings; mixtures of experts train more steadily with 0.1 (Fedus et al. 2021, arXiv:2101.03961, table 3).
  """
  del residuals
  if role == 'embedding':
    return normal(1.0)
  if role in ('buckets', 'positions'):
    return normal(embed**-0.5)
  head_dim = shape[axes.index('head_dim')] if role == 'query' else 1
  return normal(scale**0.5 * (param.fan_in(shape, axes) * head_dim) ** -0.5)


def palm(role: str, shape: tuple, axes: tuple, embed: int, residuals: int) -> param.Initializer:
  """1/sqrt(fan_in) and an embedding of N(0, 1), because embeddings are not normalised (Chowdhery et al. 2022,
  arXiv:2204.02311, section 5). Use it with `Tied(scaled=True)`."""
  del residuals
  if role == 'embedding':
    return normal(1.0)
  return normal(
    embed**-0.5 if role in ('buckets', 'positions') else param.fan_in(shape, axes) ** -0.5
  )


def deepnorm(
  role: str, shape: tuple, axes: tuple, embed: int, residuals: int, *, beta: float
) -> param.Initializer:
  """Xavier's sqrt(2 / (fan_in + fan_out)), times `beta` for values, the attention's output and the feed-forward (Wang
  et al. 2022, arXiv:2203.00555, figure 2). Use it with `norms.deepnorm`."""
  del residuals
  if role in ('embedding', 'positions', 'buckets'):
    return normal(0.02)
  inward = param.fan_in(shape, axes)
  outward = math.prod(n for n, a in zip(shape, axes, strict=True) if a not in ('layers', 'expert'))
  scale = beta if role in ('value', 'attention_out', 'ffn_in', 'ffn_out') else 1.0
  return normal(scale * (2 / (inward + outward // inward)) ** 0.5)


def mup(
  role: str,
  shape: tuple,
  axes: tuple,
  embed: int,
  residuals: int,
  *,
  base: Mapping[str, int],
  recipe: Callable = gpt2,
  zero: tuple = (),
) -> param.Initializer:
  """`recipe` in the base model, and what muP makes of it at another width: the standard deviation of hidden weights
  divided by the root of the ratio of their fan-ins, that of output weights by the ratio, others as they were (Yang et
  al. 2022, arXiv:2203.03466, table 3; the tied table of table 8 is an input weight).

  base: the sizes of the axes that grow, as in core/widths.py; with `layers` among them the recipe is that of the base
  depth too. zero: roles that begin at 0, `('query', 'head')` in the paper (appendix D.2). Use it with the same base in
  `chain.make(scaling=mup.adam(base=...))`, with `SelfAttention(scale=widths.attention_scale(...))`, and where the head
  is tied `Tied(multiplier=widths.head_multiplier(...))` without `scaled`.
  """
  for name in zero:
    if name not in ROLES:
      raise UserError(f'no role {name!r} of a weight to begin at zero; {nearest(name, ROLES)}')
  ratio = widths.ratios(axes, shape, base)
  if role in zero:
    return param.zeros
  small = widths.base_shape(axes, shape, base)
  draw = recipe(role, small, axes, base.get('embed', embed), residuals / ratio.depth)
  factor = ratio.inward ** (-1.0 if ratio.output else -0.5)
  return lambda key, shape: factor * draw(key, shape)
