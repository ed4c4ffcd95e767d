"""The two ends of the model: token ids to vectors, vectors to logits."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh, weights
from llm_jax.model import ffn, param
from llm_jax.model.dropout import dropout as drop
from llm_jax.model.positions import Learned


class Embedding(nn.Module):
  """A vector for every id.

  scaled: times sqrt(embed) (Vaswani et al. 2017, section 3.4). dropout: on the result, positions included. gradient:
  the share a of the gradient that reaches the table, e = a * e + (1 - a) * stop_gradient(e) (GLM-130B, Zeng et al.
  2022, arXiv:2210.02414, section 3.1: 0.1). norm: on the vectors, before positions are added (BLOOM, Le Scao et al.
  2022, arXiv:2211.05100, section 3.2.3). rank: width of the table, then projected to embed; None = embed (ALBERT, Lan
  et al. 2019, arXiv:1909.11942, section 3.1; OPT-350M). noise: alpha of NEFTune (Jain et al. 2023, arXiv:2310.05914):
  while there is a key, uniform noise in +-alpha / sqrt(t * embed) is added, t being the length of the row (5 to 15).
  """

  scaled: bool = False
  dropout: float = 0.0
  gradient: float = 1.0
  norm: Callable | None = None
  rank: int | None = None
  noise: float = 0.0

  @nn.compact
  def __call__(self, ids: jax.Array, rows: int, embed: int, dtype: Any) -> jax.Array:
    """ids: int [batch, t], rows: of the table. Returns [batch, t, embed]."""
    axes = ('vocab', 'embed' if self.rank is None else 'rank')
    table = param.weight(self, 'table', (rows, self.rank or embed), axes, 'embedding')
    x = weights.lookup(table, ids, dtype=dtype)
    if self.rank is not None:
      w = param.weight(self, 'project', (self.rank, embed), ('rank', 'embed'), 'head')
      x = weights.einsum('btr,rd->btd', x, w)
    if self.gradient != 1.0:
      x = self.gradient * x + (1 - self.gradient) * jax.lax.stop_gradient(x)
    x = x * jnp.asarray(embed**0.5, dtype) if self.scaled else x
    return x if self.norm is None else self.norm(name='norm')(x)

  @nn.nowrap
  def finish(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """Noise and dropout, once the positions are in."""
    if rng is not None and self.noise:
      size = self.noise / (x.shape[-2] * x.shape[-1]) ** 0.5
      like = jax.typeof(x).sharding if mesh.is_explicit() else None
      key = jax.random.fold_in(rng, 1)
      drawn = jax.random.uniform(key, x.shape, jnp.float32, -size, size, out_sharding=like)
      x = x + drawn.astype(x.dtype)
    return drop(x, self.dropout, rng)


class Stem(nn.Module):
  """The beginning of one stack, with weights that the other stack does not share: learned positions and a norm (BART,
  Lewis et al. 2019, arXiv:1910.13461; the layout is that of its code). types: rows of a table for what else is told of
  every token, such as which of two sentences it belongs to (BERT's segment embeddings, arXiv:1810.04805, figure 2).
  dropout: on the result.
  """

  norm: Callable
  dropout: float = 0.0
  types: int = 0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    length: int | None,
    rng: Any,
    types: jax.Array | None = None,
  ) -> jax.Array:
    """x: [batch, t, embed], positions: int [batch or 1, t], length: of the table, types: int [batch, t], None for
    zeros. Returns [batch, t, embed].
    """
    p = Learned(name='positions')(positions, x.shape[-1], length)
    x = x + p.astype(x.dtype)
    if self.types:
      table = param.weight(
        self, 'types', (self.types, x.shape[-1]), ('types', 'embed'), 'positions'
      )
      told = jnp.zeros(x.shape[:2], jnp.int32) if types is None else types
      x = x + weights.lookup(table, told, dtype=x.dtype)
    return drop(self.norm(name='norm')(x), self.dropout, rng)


class Tied(nn.Module):
  """Logits from the embedding table (Press & Wolf 2017, arXiv:1608.05859).

  scaled: x / sqrt(embed) first, for tables of N(0, 1) (T5, PaLM). multiplier: of the logits before the cap (muP:
  `widths.head_multiplier`). cap: cap * tanh(logits / cap) (Gemma 2). A table narrower than the model is met through a
  projection.
  """

  scaled: bool = False
  cap: float | None = None
  multiplier: float = 1.0

  reads = 'embedding'

  @nn.compact
  def __call__(self, x: jax.Array, rows: int, table: Any) -> jax.Array:
    """x: [batch, t, embed], table: [rows, embed or rank]. Returns f32 [batch, t, rows]."""
    if self.scaled:
      x = x * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
    if self.multiplier != 1.0:
      x = x * jnp.asarray(self.multiplier, x.dtype)
    if table.shape[-1] == x.shape[-1]:
      return soft_cap(weights.einsum('btd,vd->btv', x, table, dtype=jnp.float32), self.cap)
    shape = (x.shape[-1], table.shape[-1])
    x = weights.einsum(
      'btd,dr->btr', x, param.weight(self, 'project', shape, ('embed', 'rank'), 'head')
    )
    return soft_cap(weights.einsum('btr,vr->btv', x, table, dtype=jnp.float32), self.cap)


class Masked(nn.Module):
  """BERT's head: a layer of its own, a norm, then logits from the embedding table and a bias for every id (Devlin et
  al. 2018, arXiv:1810.04805, appendix A.2; the layout is that of its code).
  """

  norm: Callable
  activation: Callable = ffn.gelu

  reads = 'embedding'
  bias = True

  @nn.compact
  def __call__(self, x: jax.Array, rows: int, table: Any) -> jax.Array:
    """x: [batch, t, embed], table: [rows, embed]. Returns f32 [batch, t, rows]."""
    size = x.shape[-1]
    y = weights.einsum(
      'btd,dr->btr', x, param.weight(self, 'inner', (size, size), ('embed', 'rank'), 'ffn_in')
    )
    y = weights.add(y, param.weight(self, 'inner_bias', (size,), ('rank',), param.zeros), 'r')
    y = self.norm(name='norm')(self.activation(y))
    y = weights.einsum('btd,vd->btv', y, table, dtype=jnp.float32)
    return weights.add(y, param.weight(self, 'bias', (rows,), ('vocab',), param.zeros), 'v')


class Untied(nn.Module):
  """Logits from a matrix of their own. bias: added to them (GPT-J). cap: as in `Tied`."""

  bias: bool = False
  cap: float | None = None

  reads = 'head'

  @nn.compact
  def __call__(self, x: jax.Array, rows: int, table: Any) -> jax.Array:
    """x: [batch, t, embed]. Returns f32 [batch, t, rows]."""
    del table
    w = param.weight(self, 'w', (x.shape[-1], rows), ('embed', 'vocab'), 'head')
    y = weights.einsum('btd,dv->btv', x, w, dtype=jnp.float32)
    if self.bias:
      y = weights.add(y, param.weight(self, 'bias', (rows,), ('vocab',), param.zeros), 'v')
    return soft_cap(y, self.cap)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(logits / cap), or the logits as they are."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)
