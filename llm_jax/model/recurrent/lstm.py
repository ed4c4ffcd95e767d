"""The LSTM (Hochreiter & Schmidhuber 1997; with the forget gate of Gers et al. 2000): the RNN of language models
before attention (Mikolov et al. 2010; Jozefowicz et al. 2016, arXiv:1602.02410).

    i, f, o = sigmoid(x_t W + h_{t-1} U + b) each,  g = tanh(x_t W_g + h_{t-1} U_g + b_g)
    c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t),   y_t = h_t W_out

h_{t-1} goes through the gates' nonlinearities, so there is no parallel form: training too is one step after the other
(`lax.scan`), with all that depends on x alone computed before.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import weights
from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import sequence
from llm_jax.model.recurrent.sequence import State

GATES = ('input', 'forget', 'cell', 'output')  # PyTorch's order


class LSTM(nn.Module):
  """hidden: units, None = embed. forget: the first bias of the forget gate; 1 lets a cell keep what it has (Gers et al.
  2000; Jozefowicz et al. 2015). The other weights of the gates begin uniform within 1 / sqrt(hidden).
  """

  hidden: int | None = None
  forget: float = 1.0

  @nn.compact
  def __call__(
    self, x: jax.Array, ctx: Context, state: State | None = None
  ) -> tuple[jax.Array, State | None]:
    d, f = x.shape[-1], self.hidden or x.shape[-1]
    init = sequence.uniform(f**-0.5)
    inputs, recurrent = [], []
    for name in GATES:
      w = sequence.project(self, name, x, (f,), 'df', init)
      start = self.forget if name == 'forget' else 0.0
      bias = sequence.vector(self, f'{name}_bias', (f,), ('ffn',), param.constant(start))
      inputs.append(w.astype(jnp.float32) + bias)
      u = param.weight(self, f'{name}_hidden', (f, f), ('state', 'ffn'), init)
      recurrent.append(weights.ready(u, 'nf', x.dtype))
    kept = self._zeros(x.shape[0], f, x.dtype) if state is None else state
    gates, u = jnp.stack(inputs, axis=2), jnp.stack(recurrent, axis=1)
    kept, y = steps(gates, u, kept, sequence.starts(ctx), ctx.real)
    y = sequence.project(self, 'out', y, (d,), 'fd', 'ffn_out')
    return y, None if state is None else kept

  @nn.nowrap
  def _zeros(self, batch: int, f: int, dtype: Any) -> State:
    return dict(h=jnp.zeros((batch, f), dtype), c=jnp.zeros((batch, f), jnp.float32))

  @nn.nowrap
  def initial(self, batch: int, length: int, embed: int, dtype: Any) -> State:
    """{h: zeros [batch, hidden], c: f32 zeros [batch, hidden]}."""
    del length
    return self._zeros(batch, self.hidden or embed, dtype)

  @nn.nowrap
  def state_axes(self) -> dict[str, tuple]:
    """Names of the axes of `initial`."""
    return dict(h=('batch', 'ffn'), c=('batch', 'ffn'))


def steps(
  gates: jax.Array,
  u: jax.Array,
  state: State,
  first: jax.Array | None,
  real: jax.Array | None,
) -> tuple[State, jax.Array]:
  """(the state after, h of every token [batch, t, hidden]).

  gates: f32 [batch, t, 4, hidden], what of the four comes from the tokens. u: [hidden, 4, hidden]. first, real: bool
  [batch, t], where a state begins anew and where it moves; None for nowhere and everywhere.
  """
  first = jnp.zeros(gates.shape[:2], bool) if first is None else first
  real = jnp.ones(gates.shape[:2], bool) if real is None else real

  def step(state: State, told: tuple) -> tuple[State, jax.Array]:
    gates, first, real = told
    h, c = (jnp.where(first[:, None], 0, state[name]) for name in ('h', 'c'))
    z = gates + jnp.einsum('bn,nqf->bqf', h, u).astype(jnp.float32)
    i, f, g, o = (z[:, j] for j in range(len(GATES)))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(h.dtype)
    new = dict(h=h, c=c)
    return {n: jnp.where(real[:, None], new[n], state[n]) for n in new}, h

  over = (jnp.moveaxis(gates, 1, 0), first.T, real.T)
  state, y = jax.lax.scan(step, state, over)
  return state, jnp.moveaxis(y, 0, 1)
