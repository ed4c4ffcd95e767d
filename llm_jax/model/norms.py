"""Normalisations, and the residual topologies that say where they sit (survey Table 6).

A topology is `(x, sublayers, norm) -> x`: `sublayers` are (name, function) pairs, and `norm(name)` makes the
normalisation of that name.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import weights
from llm_jax.model import param

Sublayers = Sequence[tuple[str, Callable[[jax.Array], jax.Array]]]


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, statistics in f32 (Ba et al. 2016,
  arXiv:1607.06450).
  """

  eps: float = 1e-5
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    y = y * weights.dense(param.weight(self, 'scale', x.shape[-1:], ('norm',), param.ones))
    if self.bias:
      y = y + weights.dense(param.weight(self, 'bias', x.shape[-1:], ('norm',), param.zeros))
    return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in f32 (Zhang & Sennrich 2019, arXiv:1910.07467,
  eq. 4).
  """

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (
      y * weights.dense(param.weight(self, 'scale', x.shape[-1:], ('norm',), param.ones))
    ).astype(x.dtype)


def plain(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """sublayer(x): no residual stream and no norm, as networks were before them; build the model with `norm=None`."""
  del norm
  for _, sublayer in sublayers:
    x = sublayer(x)
  return x


def pre(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """x + sublayer(norm(x)); the stack ends with one more norm (Xiong et al. 2020, arXiv:2002.04745)."""
  for name, sublayer in sublayers:
    x = x + sublayer(norm(f'{name}_norm')(x))
  return x


def scaled(x: jax.Array, sublayers: Sublayers, norm: Callable, *, multiplier: float) -> jax.Array:
  """x + multiplier * sublayer(norm(x)): `pre` with residual branches that shrink with depth, so that what one learning
  rate does stays the same (Depth-muP, Yang et al. 2023, arXiv:2310.02244, eq. 1; `widths.residual_multiplier`)."""
  for name, sublayer in sublayers:
    x = x + jnp.asarray(multiplier, x.dtype) * sublayer(norm(f'{name}_norm')(x))
  return x


def post(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """norm(x + sublayer(x)) (Vaswani et al. 2017, arXiv:1706.03762); build the model with `norm=None`."""
  for name, sublayer in sublayers:
    x = norm(f'{name}_norm')(x + sublayer(x))
  return x


def deepnorm(x: jax.Array, sublayers: Sublayers, norm: Callable, *, alpha: float) -> jax.Array:
  """norm(alpha * x + sublayer(x)) (Wang et al. 2022, arXiv:2203.00555, section 3.2); build the model with `norm=None`.

  alpha: (2 layers)^(1/4) for a decoder, with `init.deepnorm(beta=(8 layers)^(-1/4))`; GLM-130B (arXiv:2210.02414,
  section 2.2) takes (2 layers)^(1/2) and beta=(2 layers)^(-1/2).
  """
  for name, sublayer in sublayers:
    x = norm(f'{name}_norm')(alpha * x + sublayer(x))
  return x


def sandwich(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """x + norm(sublayer(norm(x))) (Ding et al. 2021, arXiv:2105.13290)."""
  for name, sublayer in sublayers:
    x = x + norm(f'{name}_out_norm')(sublayer(norm(f'{name}_norm')(x)))
  return x


def parallel(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """x + attention(norm(x)) + ffn(norm(x)) with one norm (GPT-J; PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section
  2).
  """
  y = norm('norm')(x)
  return x + sum(sublayer(y) for _, sublayer in sublayers)


def parallel_norms(x: jax.Array, sublayers: Sublayers, norm: Callable) -> jax.Array:
  """x + attention(norm(x)) + ffn(norm'(x)), a norm for each (GPT-NeoX-20B, Black et al. 2022, arXiv:2204.06745,
  section 2.1).
  """
  return x + sum(sublayer(norm(f'{name}_norm')(x)) for name, sublayer in sublayers)


# How many norms each topology makes for a block with so many sublayers.
NORMS = dict(
  plain=lambda n: 0,
  pre=lambda n: n,
  scaled=lambda n: n,
  post=lambda n: n,
  deepnorm=lambda n: n,
  sandwich=lambda n: 2 * n,
  parallel=lambda n: 1,
  parallel_norms=lambda n: n,
)
