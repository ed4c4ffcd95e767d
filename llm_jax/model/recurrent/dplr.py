"""State spaces with HiPPO's whole matrix, diagonal plus low rank (S4; Gu et al. 2021, arXiv:2111.00396, section 3).

    x' = (Lambda - P P*) x + B u,  y = C x + D u

in the basis where HiPPO-LegS less one of rank 1 is diagonal (theorem 1). The states are conjugate pairs and one of each
is kept, so C x is twice a real part, and so is P* x. Discretised by Tustin's rule (eq. 3). Training convolves: the
kernel is the inverse FFT of its generating function at the roots of unity, four Cauchy products and a correction of
rank 1 (algorithm 1). Decoding steps with the discretised matrix written out in real numbers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import convolution, sequence, ssm


class System(NamedTuple):
  """rates, low, into, read: complex [f, n], Lambda, P, B and C. step: f32 [f]. skip: f32 [f], D."""

  rates: jax.Array
  low: jax.Array
  into: jax.Array
  read: jax.Array
  step: jax.Array
  skip: jax.Array


def legs(pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(Lambda, P, B), complex [pairs], of HiPPO-LegS: one of each conjugate pair."""
  n = np.arange(2 * pairs)
  p = np.sqrt(n + 0.5)
  skew = ssm.hippo_matrix(2 * pairs) + np.outer(p, p) + 0.5 * np.eye(2 * pairs)
  frequency, basis = np.linalg.eigh(-1j * skew)
  half = basis[:, frequency > 0].conj().T
  return -0.5 + 1j * frequency[frequency > 0], half @ p, half @ np.sqrt(2 * n + 1.0)


def declare(module: nn.Module, f: int, pairs: int) -> System:
  """The weights of `f` channels with `pairs` pairs of states each."""
  rates, low, into = legs(pairs)
  fill = lambda values: lambda key, shape: jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape)
  drawn = lambda key, shape: 0.5**0.5 * jax.random.normal(key, shape)

  def number(name: str, real, imag) -> jax.Array:
    parts = (
      sequence.vector(module, f'{name}_{part}', (f, pairs), ('embed', 'state'), init)
      for part, init in (('real', real), ('imag', imag))
    )
    return jax.lax.complex(*parts)

  diagonal = number('log_rate', fill(np.log(-rates.real)), fill(rates.imag))
  return System(
    jax.lax.complex(-jnp.exp(diagonal.real), diagonal.imag),
    number('low', fill(low.real), fill(low.imag)),
    number('into', fill(into.real), fill(into.imag)),
    number('read', drawn, drawn),
    jnp.exp(sequence.vector(module, 'log_step', (f,), ('embed',), ssm.log_steps)),
    sequence.vector(module, 'skip', (f,), ('embed',), param.ones),
  )


def discrete(system: System) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(Abar f32 [f, 2n, 2n], Bbar [f, 2n], C [f, 2n]) on the real and imaginary parts of the states.

  The inverse in Tustin's rule is that of a diagonal plus rank 1 (Sherman and Morrison): no factorisation.
  """
  both = lambda z: jnp.concatenate([z.real, z.imag], axis=-1)
  step = system.step[:, None]
  inverse = 1 / (1 - step / 2 * system.rates)
  low, back = both(system.low), both(inverse * system.low)
  gain = step / (1 + step * jnp.sum(low * back, axis=-1, keepdims=True))
  fix = lambda v: v - (gain * back)[..., None] * jnp.einsum('fn,fnm->fm', low, v)[:, None]
  ratio = (1 + step / 2 * system.rates) * inverse
  diagonal = lambda x: x[..., None] * jnp.eye(x.shape[-1])
  real, imag = diagonal(ratio.real), diagonal(ratio.imag)
  rows = jnp.concatenate([real, -imag], -1), jnp.concatenate([imag, real], -1)
  decay = fix(jnp.concatenate(rows, axis=-2) - (step * back)[..., None] * low[:, None, :])
  into = fix(both(step * inverse * system.into)[..., None])[..., 0]
  return decay, into, 2 * both(system.read.conj())


def kernel(system: System, t: int) -> jax.Array:
  """f32 [t, f]: C Abar^l Bbar for l < t."""
  decay, _, read = discrete(system)
  cut = read - jnp.einsum('fn,fnm->fm', read, jnp.linalg.matrix_power(decay, t))
  real, imag = jnp.split(cut / 2, 2, axis=-1)
  # one channel after the other, made again in the backward pass: the Cauchy products hold n * t numbers each
  one = jax.checkpoint(lambda s: _kernel(s, t))
  return jax.lax.map(one, system._replace(read=jax.lax.complex(real, -imag)), batch_size=16).T


def _kernel(system: System, t: int) -> jax.Array:
  """f32 [t] of one channel, whose `read` is C (1 - Abar^t): the lemma C.3 that turns t powers into one inverse."""
  z = np.exp(-2j * np.pi * np.arange(t // 2 + 1) / t).astype(np.complex64)
  far = (2 * (1 - z)) / system.step
  root = 1 / (far[:, None] - (1 + z)[:, None] * system.rates)
  paired = 1 / (far[:, None] - (1 + z)[:, None] * system.rates.conj())
  cauchy = lambda v: root @ v + paired @ v.conj()
  back = system.low.conj()
  correction = cauchy(system.read * system.low) * cauchy(back * system.into)
  correction = (1 + z) * correction / (1 + (1 + z) * cauchy(back * system.low))
  return jnp.fft.irfft(2 * (cauchy(system.read * system.into) - correction), t)


def apply(
  system: System, u: jax.Array, ctx: Context, state: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """(y f32 [batch, t, f], the state). u: [batch, t, f]; state: f32 [batch, f, 2n], or None: then by the convolution."""
  u = u.astype(jnp.float32)
  if state is None:
    y = convolution.long(u, kernel(system, u.shape[1]), sequence.segments(ctx))
    return y + system.skip * u, None
  decay, into, read = discrete(system)
  real = jnp.ones(u.shape[:2], bool) if ctx.real is None else ctx.real

  def step(x: jax.Array, told: tuple) -> tuple[jax.Array, jax.Array]:
    u, real = told
    new = jnp.einsum('bfn,fmn->bfm', x, decay) + into * u[..., None]
    x = jnp.where(real[:, None, None], new, x)
    return x, jnp.einsum('bfn,fn->bf', x, read)

  state, y = jax.lax.scan(step, state, (jnp.swapaxes(u, 0, 1), real.T))
  return jnp.swapaxes(y, 0, 1) + system.skip * u, state


def initial(batch: int, f: int, pairs: int) -> jax.Array:
  """The state of an empty context."""
  return jnp.zeros((batch, f, 2 * pairs), jnp.float32)
