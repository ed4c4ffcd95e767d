"""Hyena: products and long convolutions in turn (Poli et al. 2023, arXiv:2302.10866).

    z_1 = v,  z_{n+1} = x_n * (h_n conv z_n + D_n z_n),  y = z_{order+1} W_o        (definition 3.1)

with v, x_n projections of the input after short convolutions, and filters h_n(t) = window(t) MLP(features of t) that
have no weights of their own (section 3.3). A filter is as long as the context and no recurrence makes it, so the state
is what the convolutions have read so far, a slot per position as for attention, and a step costs one product over the
slots.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model import attention, param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import convolution, sequence
from llm_jax.model.recurrent.sequence import State


class Hyena(nn.Module):
  """The operator of order `order`.

  order: number of products. taps: of the short convolutions. length: the context over which features and window run
  from 0 to 1 (longer ones go on beyond). width, depth: of the filters' MLP. bands: of sine and cosine features of
  position. frequency: of the sines that are its activations. fast, slow: the share of `length` after which the window
  of the first and of the last channel has fallen to 0.01.
  """

  order: int = 2
  taps: int = 3
  length: int = 1024
  width: int = 64
  depth: int = 2
  bands: int = 16
  frequency: float = 10.0
  fast: float = 0.3
  slow: float = 1.5

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d, kept, after, branches = x.shape[-1], {} if state is None else state, {}, []
    for name in self._branches():
      y = sequence.project(self, name, x, (d,), 'df', 'ffn_in')
      conv = f'{name}_conv'
      y, after[conv] = sequence.short(
        self, conv, y, 'ffn', ctx, kept.get(conv), taps=self.taps, bias=True
      )
      branches.append(y)
    z, *gates = branches
    slots = x.shape[1] if state is None else state['seen_1'].shape[1]
    for n, (gate, kernel) in enumerate(zip(gates, self._filters(slots, d), strict=True), 1):
      skip = sequence.vector(self, f'skip_{n}', (d,), ('ffn',), param.ones)
      wide = z.astype(jnp.float32)
      if state is None:
        y = convolution.long(wide, kernel, sequence.segments(ctx))
      else:
        new = attention.write({'': kept[f'seen_{n}']}, {'': z}, ctx.positions)['']
        after[f'seen_{n}'] = new
        y = _read(new.astype(jnp.float32), kernel, ctx.positions)
      z = gate * (y + skip * wide).astype(x.dtype)
    y = sequence.project(self, 'out', z, (d,), 'fd', 'ffn_out')
    return y, None if state is None else after

  @nn.nowrap
  def _branches(self) -> list[str]:
    return ['value', *(f'gate_{n}' for n in range(1, self.order + 1))]

  @nn.nowrap
  def _filters(self, t: int, d: int) -> list[jax.Array]:
    """f32 [t, d] for each product."""
    time = jnp.arange(t, dtype=jnp.float32)[:, None] / self.length
    angle = 2 * jnp.pi * time * jnp.linspace(1e-4, self.bands - 1, self.bands)
    h = jnp.concatenate([time, jnp.cos(angle), jnp.sin(angle)], axis=-1)
    for i in range(self.depth):
      shape = (h.shape[-1], self.width)
      init = sequence.uniform(shape[0] ** -0.5)
      w = sequence.vector(self, f'filter_{i}', shape, ('state', 'state'), init)
      b = sequence.vector(self, f'filter_{i}_bias', shape[1:], ('state',), init)
      h = jnp.sin(self.frequency * (h @ w + b))
    rates = jnp.log(100.0) / jnp.linspace(self.fast, self.slow, d)
    window, found = jnp.exp(-time * rates), []
    for n in range(1, self.order + 1):
      init = sequence.uniform(self.width**-0.5)
      w = sequence.vector(self, f'filter_out_{n}', (self.width, d), ('state', 'ffn'), init)
      found.append(window * (h @ w))
    return found

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{value_conv, gate_1_conv, ...: zeros [batch, taps - 1, embed], seen_1, ...: zeros [batch, length, embed]}."""
    shape = (batch, self.taps - 1, embed)
    convs = {f'{name}_conv': jnp.zeros(shape, dtype) for name in self._branches()}
    seen = {f'seen_{n}': jnp.zeros((batch, length, embed), dtype) for n in range(1, self.order + 1)}
    return convs | seen

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    convs = {f'{name}_conv': ('batch', 'taps', 'ffn') for name in self._branches()}
    return convs | {f'seen_{n}': ('batch', 'length', 'ffn') for n in range(1, self.order + 1)}


def _read(seen: jax.Array, kernel: jax.Array, positions: jax.Array) -> jax.Array:
  """The convolution of what was seen, f32 [batch, slots, f], at some positions [batch or 1, t]."""
  positions = jnp.broadcast_to(positions, (seen.shape[0], positions.shape[1]))
  if positions.shape[1] > 1:
    return jnp.take_along_axis(convolution.causal(seen, kernel), positions[:, :, None], axis=1)
  back = positions - jnp.arange(seen.shape[1])
  kernel = jnp.where((back >= 0)[:, :, None], kernel[jnp.maximum(back, 0)], 0)
  return jnp.einsum('bsf,bsf->bf', kernel, seen)[:, None]
