"""Blocks: mixers and a feed-forward put on the residual stream by a topology of `model/norms.py`.

    block(x [batch, t, embed], ctx, state) -> (x, state, aux)

`state` is a dict with one entry per mixer, or None.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.core import mesh
from llm_jax.model import dropout as dropout_lib
from llm_jax.model import norms
from llm_jax.model.attention import Context

OUTPUT = 'sublayer'  # the name of what the remat policy `names` saves


class Block(nn.Module):
  """One layer. `mixers` are (name, module factory) pairs, run in order, then the feed-forward if there is one."""

  mixers: tuple
  ffn: Callable | None
  norm: Callable
  residual: Callable
  dropout: float | Callable = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: dict | None = None
  ) -> tuple[jax.Array, dict | None, dict]:
    after, aux = {}, {}

    def mix(number: int, name: str, make: Callable) -> Callable:
      def run(y: jax.Array) -> jax.Array:
        told = _keyed(ctx, 2 * number)
        y, after[name] = make(name=name)(y, told, None if state is None else state[name])
        return self._finish(y, _keyed(ctx, 2 * number + 1))

      return run

    def feed(y: jax.Array) -> jax.Array:
      number = len(self.mixers)
      y, losses = self.ffn(name='ffn')(y, _keyed(ctx, 2 * number))
      aux.update(losses)
      return self._finish(y, _keyed(ctx, 2 * number + 1))

    sublayers = [(name, mix(i, name, make)) for i, (name, make) in enumerate(self.mixers)]
    if self.ffn is not None:
      sublayers.append(('ffn', feed))
    x = self.residual(x, sublayers, lambda name: self.norm(name=name))
    return mesh.shard(x, 'batch', 'length', 'embed'), None if state is None else after, aux

  @nn.nowrap
  def _finish(self, y: jax.Array, ctx: Context) -> jax.Array:
    rate = self.dropout
    if callable(rate):
      rate = 0.0 if ctx.rng is None else rate(ctx.height)
    return checkpoint_name(dropout_lib.dropout(y, rate, ctx.rng), OUTPUT)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> dict:
    """The state of an empty context, one entry per mixer."""
    return {name: make().initial(batch, length, embed, dtype) for name, make in self.mixers}

  @nn.nowrap
  def state_axes(self) -> dict:
    """Names of the axes of `initial`."""
    return {name: make().state_axes() for name, make in self.mixers}


def _keyed(ctx: Context, number: int) -> Context:
  """The context with a dropout key of its own for the place `number`."""
  return ctx if ctx.rng is None else ctx._replace(rng=jax.random.fold_in(ctx.rng, number))


def decoder(
  *,
  mixer: Callable,
  ffn: Callable,
  norm: Callable = norms.RMSNorm,
  residual: Callable = norms.pre,
  dropout: float | Callable = 0.0,
) -> Block:
  """Self-attention (or another mixer) and a feed-forward: the block of decoders and, under an open mask, of encoders.

  dropout: on the output of every sublayer; a number, or a function of the layer's height (`dropout.ramp`).
  """
  return Block((('mixer', mixer),), ffn, norm, residual, dropout)


def cross_decoder(
  *,
  mixer: Callable,
  cross: Callable,
  ffn: Callable,
  norm: Callable = norms.RMSNorm,
  residual: Callable = norms.pre,
  dropout: float | Callable = 0.0,
) -> Block:
  """Self-attention, attention to the encoder, feed-forward: the decoder block of an encoder-decoder."""
  return Block((('mixer', mixer), ('cross', cross)), ffn, norm, residual, dropout)


def mixers(
  *,
  mixer: Callable,
  channel: Callable | None = None,
  norm: Callable = norms.RMSNorm,
  residual: Callable = norms.pre,
  dropout: float | Callable = 0.0,
) -> Block:
  """A block without a feed-forward: the mixer does its work too (Mamba), or it is a mixer itself, `channel`, because it
  reads the token before (RWKV).
  """
  both = (('mixer', mixer), *((('channel', channel),) if channel is not None else ()))
  return Block(both, None, norm, residual, dropout)
