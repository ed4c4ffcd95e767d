"""S4 (Gu et al. 2021, arXiv:2111.00396), and S4D with a diagonal state matrix (Gu et al. 2022, arXiv:2206.11893)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llm_jax.model.attention import Context
from llm_jax.model.recurrent import dplr, sequence, ssm
from llm_jax.model.recurrent.sequence import State


class S4(nn.Module):
  """A state space for every channel, GELU, and a gated product that mixes the channels (S4, section 3.4).

  pairs: conjugate pairs of states of a channel. The state matrix starts as HiPPO-LegS, see model/recurrent/dplr.py.
  """

  pairs: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    system = dplr.declare(self, x.shape[-1], self.pairs)
    y, h = dplr.apply(system, x, ctx, None if state is None else state['h'])
    return _mixed(self, y, x.dtype), None if state is None else dict(h=h)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{h: f32 zeros [batch, embed, 2 pairs]}."""
    del length, dtype
    return dict(h=dplr.initial(batch, embed, self.pairs))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(h=('batch', 'embed', 'state'))


class S4D(nn.Module):
  """`S4` with a diagonal state matrix.

  pairs: conjugate pairs of states of a channel. rates: the initial state matrix: `ssm.legs`, `ssm.inverse`, `ssm.lin`.
  rule: of discretisation, `ssm.hold` or `ssm.bilinear`.
  """

  pairs: int = 32
  rates: Callable = ssm.legs
  rule: Callable = ssm.hold

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    made = ssm.declare(self, d, pairs=self.pairs, rates=self.rates, rule=self.rule, axis='embed')
    y, h = ssm.apply(made, x, ctx, None if state is None else state['h'])
    return _mixed(self, y, x.dtype), None if state is None else dict(h=h)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{h: f32 zeros [batch, embed, pairs, 2]}."""
    del length, dtype
    return dict(h=ssm.initial(batch, embed, self.pairs))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(h=('batch', 'embed', 'state', None))


def _mixed(module: nn.Module, y: jax.Array, dtype: Any) -> jax.Array:
  """GELU and the gated product over the channels."""
  y, width = jax.nn.gelu(y).astype(dtype), y.shape[-1:]
  value = sequence.project(module, 'value', y, width, 'df', 'ffn_in')
  gate = sequence.project(module, 'gate', y, width, 'df', 'ffn_in')
  return value * jax.nn.sigmoid(gate)
