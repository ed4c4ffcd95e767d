"""Linear state spaces with fixed coefficients, one for each channel:

    x' = A x + B u,  y = C x + D u

discretised to x_t = Abar x_{t-1} + Bbar u_t, y_t = C x_t + D u_t, which is a convolution of u with C Abar^l Bbar (Gu et
al. 2021, arXiv:2111.00396, eq. 2 to 5). A is diagonal and complex, of conjugate pairs, so that y is twice the real
part over one of each (Gupta et al. 2022, arXiv:2203.14343, DSS; Gu et al. 2022, arXiv:2206.11893, S4D).
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model import param
from llm_jax.model.attention import Context
from llm_jax.model.recurrent import convolution, scan, sequence


def hippo_matrix(n: int) -> np.ndarray:
  """A [n, n] of HiPPO-LegS (Gu et al. 2020, arXiv:2008.07669, eq. 4; S4, eq. 2)."""
  i = np.arange(n)
  root = np.sqrt(2 * i + 1.0)
  return -np.tril(np.outer(root, root), -1) - np.diag(i + 1.0)


def legs(pairs: int) -> np.ndarray:
  """The eigenvalues with positive imaginary part of the normal matrix that HiPPO-LegS is less one of rank 1 (S4,
  theorem 1): S4D-LegS (arXiv:2206.11893, section 4.2)."""
  a = hippo_matrix(2 * pairs)
  p = np.sqrt(np.arange(2 * pairs) + 0.5)
  skew = a + np.outer(p, p) + 0.5 * np.eye(2 * pairs)
  imaginary = np.linalg.eigvalsh(-1j * skew)
  return -0.5 + 1j * imaginary[imaginary > 0]


def inverse(pairs: int) -> np.ndarray:
  """-1/2 + i N/pi (N / (2n+1) - 1) with N = 2 pairs (S4D-Inv, eq. 8)."""
  n = 2 * pairs
  return -0.5 + 1j * n / np.pi * (n / (2 * np.arange(pairs) + 1) - 1)


def lin(pairs: int) -> np.ndarray:
  """-1/2 + i pi n (S4D-Lin, eq. 9)."""
  return -0.5 + 1j * np.pi * np.arange(pairs)


def hold(rates: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(Abar, Bbar / B) by zero-order hold: exp(dt A), (exp(dt A) - 1) / A."""
  return jnp.exp(dt * rates), jnp.expm1(dt * rates) / rates


def bilinear(rates: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(Abar, Bbar / B) by Tustin's rule: (1 + dt A / 2) / (1 - dt A / 2), dt / (1 - dt A / 2) (S4, eq. 3)."""
  below = 1 - dt * rates / 2
  return (1 + dt * rates / 2) / below, dt / below


class Discrete(NamedTuple):
  """decay: complex [f, n], Abar. read: complex [f, n], 2 C Bbar, with B moved into C. skip: f32 [f], D."""

  decay: jax.Array
  read: jax.Array
  skip: jax.Array


def declare(
  module: nn.Module, f: int, *, pairs: int, rates: Callable, rule: Callable, axis: str = 'ffn'
) -> Discrete:
  """The weights of `f` channels with `pairs` conjugate pairs of states each, discretised by `rule`.

  rates: pairs -> the initial diagonal of A. Declares log_step [f], log_rate and frequency [f, pairs] (A =
  -exp(log_rate) + i frequency), read_real and read_imag [f, pairs], skip [f].
  """
  start, names = rates(pairs), (axis, 'state')
  fill = lambda values: lambda key, shape: jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape)
  real, imag = (fill(x) for x in (np.log(-start.real), start.imag))
  part = lambda key, shape: 0.5**0.5 * jax.random.normal(key, shape)
  log_rate, frequency, c_real, c_imag = (
    sequence.vector(module, name, (f, pairs), names, init)
    for name, init in (
      ('log_rate', real), ('frequency', imag), ('read_real', part), ('read_imag', part),
    )
  )  # fmt: skip
  dt = jnp.exp(sequence.vector(module, 'log_step', (f,), (axis,), log_steps))[:, None]
  decay, scale = rule(-jnp.exp(log_rate) + 1j * frequency, dt)
  skip = sequence.vector(module, 'skip', (f,), (axis,), param.ones)
  return Discrete(decay, 2 * (c_real + 1j * c_imag) * scale, skip)


def log_steps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log dt with dt log-uniform between 0.001 and 0.1."""
  return jax.random.uniform(key, shape, minval=np.log(1e-3), maxval=np.log(1e-1))


def kernel(ssm: Discrete, t: int) -> jax.Array:
  """f32 [t, f]: C Abar^l Bbar for l < t."""
  log = jnp.log(ssm.decay)
  powers = jnp.exp(jnp.arange(t)[:, None, None] * log)
  return jnp.einsum('lfn,fn->lf', powers, ssm.read).real


def apply(
  ssm: Discrete, u: jax.Array, ctx: Context, state: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """(y f32 [batch, t, f], the state). u: [batch, t, f]; state: f32 [batch, f, pairs, 2] (real, imaginary), or None:
  then by the convolution."""
  u = u.astype(jnp.float32)
  if state is None:
    y = convolution.long(u, kernel(ssm, u.shape[1]), sequence.segments(ctx))
    return y + ssm.skip * u, None
  decay = jnp.broadcast_to(ssm.decay, (*u.shape, ssm.decay.shape[-1]))
  new = jnp.broadcast_to(u[..., None], decay.shape).astype(decay.dtype)
  if ctx.real is not None:
    real = sequence.wide(ctx.real, decay)
    decay, new = jnp.where(real, decay, 1), jnp.where(real, new, 0)
  new = new.at[:, 0].add(decay[:, 0] * jax.lax.complex(state[..., 0], state[..., 1]))
  x = scan.linear(decay, new)
  y = jnp.einsum('btfn,fn->btf', x, ssm.read).real + ssm.skip * u
  return y, jnp.stack([x[:, -1].real, x[:, -1].imag], axis=-1)


def initial(batch: int, f: int, pairs: int) -> jax.Array:
  """The state of an empty context."""
  return jnp.zeros((batch, f, pairs, 2), jnp.float32)
