"""H3: two state spaces around a product, so that tokens can be compared (Fu et al. 2022, arXiv:2212.14052).

    y = (q * SSM_diag(SSM_shift(k) * v)) W_o,   q, k, v = x W_q, x W_k, x W_v        (algorithm 1, heads of one channel)

The state of a shift SSM is the last tokens, so it is a convolution with as many free taps.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model.attention import Context
from llm_jax.model.recurrent import sequence, ssm
from llm_jax.model.recurrent.sequence import State


class H3(nn.Module):
  """hidden: channels, None = embed. taps: states of the shift SSM. pairs, rates, rule: of the diagonal one, as in
  `S4`."""

  hidden: int | None = None
  taps: int = 4
  pairs: int = 32
  rates: Callable = ssm.lin
  rule: Callable = ssm.hold

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    f, kept = self.hidden or x.shape[-1], {} if state is None else state
    q, k, v = (
      sequence.project(self, name, x, (f,), 'df', 'ffn_in') for name in ('query', 'key', 'value')
    )
    k, shift = sequence.short(
      self, 'shift', k, 'ffn', ctx, kept.get('shift'), taps=self.taps, bias=True
    )
    made = ssm.declare(self, f, pairs=self.pairs, rates=self.rates, rule=self.rule)
    y, h = ssm.apply(made, k * v, ctx, kept.get('h'))
    y = sequence.project(self, 'out', q * y.astype(q.dtype), (x.shape[-1],), 'fd', 'ffn_out')
    return y, None if state is None else dict(shift=shift, h=h)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{shift: zeros [batch, taps - 1, hidden], h: f32 zeros [batch, hidden, pairs, 2]}."""
    del length
    f = self.hidden or embed
    shift = jnp.zeros((batch, self.taps - 1, f), dtype)
    return dict(shift=shift, h=ssm.initial(batch, f, self.pairs))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(shift=('batch', 'taps', 'ffn'), h=('batch', 'ffn', 'state', None))
