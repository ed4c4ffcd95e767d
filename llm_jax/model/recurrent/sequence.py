"""What the recurrent mixers share: where documents begin, short convolutions, and their weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh, weights
from llm_jax.model import param
from llm_jax.model.attention import Context

State = dict[str, jax.Array]


def segments(ctx: Context) -> jax.Array | None:
  """int [batch, t]: the document of every token, None where each row is one."""
  return None if ctx.mask.segments is None else ctx.mask.segments[0]


def starts(ctx: Context) -> jax.Array | None:
  """bool [batch, t]: whether a document begins at a token; None where each row is one. The first token begins none:
  nothing comes before it, or a state that it goes on from."""
  of = segments(ctx)
  if of is None:
    return None
  return jnp.pad(of[:, 1:] != of[:, :-1], ((0, 0), (1, 0)))


def wide(flags: jax.Array, like: jax.Array) -> jax.Array:
  """[batch, t] with axes of size 1 behind, to broadcast against `like`."""
  return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def past(
  x: jax.Array, steps: int, ctx: Context, state: jax.Array | None
) -> tuple[list[jax.Array], jax.Array | None]:
  """([x of `steps` tokens before, ..., of 1 token before, x itself], the state).

  x: [batch, t, f]. state: [batch, steps, f], the tokens before x, or None for zeros. Tokens of another document are
  zeros too.
  """
  t, of = x.shape[1], segments(ctx)
  if state is None:
    whole = jnp.pad(x, ((0, 0), (steps, 0), (0, 0)))
  else:
    whole = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  found = []
  for back in range(steps, -1, -1):
    y = whole[:, steps - back : steps - back + t]
    if back and of is not None:
      y = jnp.where(wide(jnp.pad(of, ((0, 0), (back, 0)))[:, :t] == of, y), y, 0)
    found.append(y)
  if state is None:
    return found, None
  return found, _last(whole, steps, ctx.real).astype(state.dtype)


def _last(whole: jax.Array, steps: int, real: jax.Array | None) -> jax.Array:
  """The last `steps` entries along axis 1 before the padding."""
  if real is None:
    return whole[:, whole.shape[1] - steps :]
  where = real.sum(1)[:, None] + jnp.arange(steps)
  return jnp.take_along_axis(whole, where[:, :, None], axis=1)


def short(
  module: nn.Module,
  name: str,
  x: jax.Array,
  axis: str,
  ctx: Context,
  state: jax.Array | None,
  *,
  taps: int,
  bias: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """A causal convolution over `taps` tokens of each channel by itself: y_t = sum_j w_j x_{t - taps + 1 + j} + bias.

  x: [batch, t, f], its last axis named `axis`. state: [batch, taps - 1, f] or None.
  """
  f = x.shape[-1]
  w = vector(module, name, (taps, f), ('taps', axis), uniform(taps**-0.5)).astype(x.dtype)
  found, state = past(x, taps - 1, ctx, state)
  y = sum(part * w[j] for j, part in enumerate(found))
  if bias:
    y = y + vector(module, f'{name}_bias', (f,), (axis,), param.zeros).astype(x.dtype)
  return y, state


def vector(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  init: str | param.Initializer,
) -> jax.Array:
  """A weight that multiplies elementwise, f32."""
  return mesh.gather(weights.dense(param.weight(module, name, shape, axes, init)), axes)


def project(
  module: nn.Module,
  name: str,
  x: jax.Array,
  sizes: tuple[int, ...],
  letters: str,
  init: str | param.Initializer,
  *,
  bias: bool = False,
) -> jax.Array:
  """x [batch, t, ...] times a weight; letters: of the weight's axes, such as 'df'. sizes: of the axes that come out."""
  into, out = letters[: len(letters) - len(sizes)], letters[len(letters) - len(sizes) :]
  shape = (*x.shape[2:], *sizes)
  w = param.weight(module, name, shape, weights.axes_of(letters), init)
  y = weights.einsum(f'bt{into},{letters}->bt{out}', x, w)
  if bias:
    b = param.weight(module, f'{name}_bias', shape[len(into) :], weights.axes_of(out), param.zeros)
    y = weights.add(y, b, out)
  return y


def uniform(bound: float) -> param.Initializer:
  """Uniform between -bound and bound."""
  return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def steps(low: float, high: float) -> param.Initializer:
  """Biases b with softplus(b) log-uniform between low and high: the step sizes of state space models (Gu & Dao 2023,
  arXiv:2312.00752, section 3.6)."""

  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    step = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))
    return step + jnp.log(-jnp.expm1(-step))

  return init
