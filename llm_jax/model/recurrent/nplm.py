"""The neural probabilistic language model (Bengio et al. 2003, JMLR 3, section 2):

    logits = b + U tanh(d + H x) + W x,   x = the vectors of the last n - 1 tokens side by side      (eq. 1)

As a mixer it makes what the head multiplies: tanh(d + H x) U' + x W', so that U = head U' and W = head W', both of rank
embed at most. The rest of the model is `block.mixers(mixer=NPLM, residual=norms.plain)`, no final norm and
`heads.Untied(bias=True)`. In front of a document the vectors are 0. The state is the window.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model.attention import Context
from llm_jax.model.recurrent import sequence
from llm_jax.model.recurrent.sequence import State


class NPLM(nn.Module):
  """window: tokens that are read, n - 1. hidden: units of the tanh, None = embed. direct: whether there is W (the paper
  has models with and without)."""

  window: int = 5
  hidden: int | None = None
  direct: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d = x.shape[-1]
    kept = None if state is None else state['window']
    found, kept = sequence.past(x, self.window - 1, ctx, kept)
    near = jnp.concatenate(found, axis=-1)
    h = sequence.project(self, 'up', near, (self.hidden or d,), 'df', 'ffn_in', bias=True)
    y = sequence.project(self, 'down', jnp.tanh(h), (d,), 'fd', 'ffn_out')
    if self.direct:
      y = y + sequence.project(self, 'direct', near, (d,), 'fd', 'ffn_out')
    return y, None if state is None else dict(window=kept)

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{window: zeros [batch, window - 1, embed]}."""
    del length
    return dict(window=jnp.zeros((batch, self.window - 1, embed), dtype))

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(window=('batch', 'taps', 'embed'))
