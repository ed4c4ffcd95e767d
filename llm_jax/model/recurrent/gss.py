"""Gated state spaces (Mehta et al. 2022, arXiv:2206.13947).

    y = (gelu(x W_1) * (DSS(gelu(x W_2)) W_3)) W_4        (figure 1)

with the state space on fewer channels than the gate has.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llm_jax.model.attention import Context
from llm_jax.model.recurrent import sequence, ssm
from llm_jax.model.recurrent.sequence import State


class GatedStateSpace(nn.Module):
  """hidden: channels of the gate, None = 4 embed. narrow: of the state space, None = embed / 4. pairs, rates, rule: see
  `S4`."""

  hidden: int | None = None
  narrow: int | None = None
  pairs: int = 32
  rates: Callable = ssm.lin
  rule: Callable = ssm.hold

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    f, n = self.hidden or 4 * d, self.narrow or d // 4
    gate = jax.nn.gelu(sequence.project(self, 'gate', x, (f,), 'df', 'ffn_in'))
    u = jax.nn.gelu(sequence.project(self, 'narrow_in', x, (n,), 'dr', 'ffn_in'))
    made = ssm.declare(self, n, pairs=self.pairs, rates=self.rates, rule=self.rule, axis='rank')
    y, h = ssm.apply(made, u, ctx, None if state is None else state['h'])
    y = sequence.project(self, 'wide', y.astype(x.dtype), (f,), 'rf', 'ffn_in')
    y = sequence.project(self, 'out', gate * y, (d,), 'fd', 'ffn_out')
    return y, None if state is None else dict(h=h)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{h: f32 zeros [batch, narrow, pairs, 2]}."""
    del length, dtype
    return dict(h=ssm.initial(batch, self.narrow or embed // 4, self.pairs))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(h=('batch', 'rank', 'state', None))
