"""Feed-forward sublayers: `(x, ctx) -> (y, aux)`, with `aux` a dict of losses (empty for dense layers).

A loss is f32 [batch]: its mean over the real tokens of each row, so that an objective can weigh it like the row. Names
that begin with `seen/` are reported and not minimised. The context carries the dropout key and what routing needs.

| unit | `Gated(activation=...)` |
|---|---|
| SwiGLU | `silu` |
| GeGLU | `gelu` or `gelu_tanh` |
| ReGLU | `relu` |
| GLU | `sigmoid` |
| bilinear | `identity` |

Activations are recomputed in the backward pass: it is cheaper to evaluate them again than to store and load them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax

from llm_jax.core import weights
from llm_jax.model import param
from llm_jax.model.dropout import dropout


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0)."""
  return jax.nn.relu(x)


def gelu(x: jax.Array) -> jax.Array:
  """x/2 * (1 + erf(x / sqrt 2)) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the approximation of GPT-2 and BLOOM."""
  return jax.nn.gelu(x, approximate=True)


def silu(x: jax.Array) -> jax.Array:
  """x * sigmoid(x), also called Swish (Ramachandran et al. 2017, arXiv:1710.05941)."""
  return jax.nn.silu(x)


def sigmoid(x: jax.Array) -> jax.Array:
  """1 / (1 + exp(-x)), the gate of the original GLU."""
  return jax.nn.sigmoid(x)


def identity(x: jax.Array) -> jax.Array:
  """x, which makes `Gated` bilinear."""
  return x


def llama_hidden(embed: int) -> int:
  """8d/3 rounded up to a multiple of 256: three matrices for the price of two of width 4d (LLaMA)."""
  return 256 * -(-8 * embed // (3 * 256))


def _up(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  shape = (x.shape[-1], module.hidden)
  y = weights.einsum(
    'btd,df->btf', x, param.weight(module, name, shape, ('embed', 'ffn'), 'ffn_in')
  )
  if module.bias:
    y = weights.add(y, param.weight(module, f'{name}_bias', shape[1:], ('ffn',), param.zeros), 'f')
  return y


def _down(module: nn.Module, h: jax.Array, embed: int, rng: jax.Array | None) -> jax.Array:
  h = dropout(h, module.dropout, rng)
  y = weights.einsum(
    'btf,fd->btd',
    h,
    param.weight(module, 'down', (module.hidden, embed), ('ffn', 'embed'), 'ffn_out'),
  )
  if module.bias:
    y = weights.add(y, param.weight(module, 'down_bias', (embed,), ('embed',), param.zeros), 'd')
  return y


class MLP(nn.Module):
  """activation(x W_up) W_down (Vaswani et al. 2017, arXiv:1706.03762, eq. 2)."""

  inward: ClassVar[tuple[str, ...]] = ('up',)
  hidden: int
  activation: Callable = gelu
  bias: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    h = self.unit(*(_up(self, name, x) for name in self.inward))
    return _down(self, h, x.shape[-1], ctx.rng), {}

  @nn.nowrap
  def unit(self, up: jax.Array) -> jax.Array:
    """What the products `inward` become."""
    return jax.checkpoint(self.activation)(up)


class Gated(nn.Module):
  """(activation(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

  inward: ClassVar[tuple[str, ...]] = ('gate', 'up')
  hidden: int
  activation: Callable = silu
  bias: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    h = self.unit(*(_up(self, name, x) for name in self.inward))
    return _down(self, h, x.shape[-1], ctx.rng), {}

  @nn.nowrap
  def unit(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    """What the products `inward` become."""
    return jax.checkpoint(lambda gate, up: self.activation(gate) * up)(gate, up)
