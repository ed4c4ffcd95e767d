"""The recurrent mixers that transformers does not have, in PyTorch as their papers describe them: peers for mixers.py.

    mixer(w, y [batch, t, embed]) -> [batch, t, embed]

with `w` llm_jax's weights of one mixer by name. Retention steps through the tokens (eq. 6 of arXiv:2307.08621); the
state spaces and Hyena convolve by the FFT, as their authors do in training.
"""

import math
from typing import Any

import torch
from torch.nn import functional


def retention(w: dict[str, Any], y: Any) -> Any:
  """Multi-scale retention, one token after the other."""
  heads, size = w['query'].shape[1:]
  t = y.shape[1]
  gamma = (1 - 2.0 ** (-5 - torch.arange(heads)))[:, None, None]
  angle = torch.outer(torch.arange(t), 10_000.0 ** (-torch.arange(0, size, 2) / size))
  turn = torch.polar(torch.ones_like(angle), angle)[:, None]
  q, k, v, g = (torch.einsum('btd,dhk->bthk', y, w[n]) for n in ('query', 'key', 'value', 'gate'))
  q, k = (
    torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    for z in (q, k)
  )
  state, found = 0, []
  for j in range(t):
    state = gamma * state + k[:, j, :, :, None] * size**-0.5 * v[:, j, :, None]
    found.append(torch.einsum('bhk,bhkp->bhp', q[:, j], state))
  y = torch.stack(found, dim=1)
  y = functional.layer_norm(y, y.shape[-1:], eps=1e-5)
  return torch.einsum('bthp,hpd->btd', functional.silu(g) * y, w['out'])


def convolved(x: Any, kernel: Any) -> Any:
  """x [batch, t, f] and kernel [t, f]: the causal convolution by the FFT."""
  t = x.shape[1]
  z = torch.fft.rfft(x, 2 * t, dim=1) * torch.fft.rfft(kernel, 2 * t, dim=0)
  return torch.fft.irfft(z, 2 * t, dim=1)[:, :t]


def short(w: dict[str, Any], name: str, x: Any) -> Any:
  """A causal depthwise convolution with bias."""
  taps = w[name]
  x = functional.pad(x.transpose(1, 2), (len(taps) - 1, 0))
  return functional.conv1d(x, taps.T[:, None], w[f'{name}_bias'], groups=x.shape[1]).transpose(1, 2)


def diagonal(w: dict[str, Any], u: Any) -> Any:
  """S4D by zero-order hold (arXiv:2206.11893, section 3)."""
  a, dt = -torch.exp(w['log_rate']) + 1j * w['frequency'], torch.exp(w['log_step'])[:, None]
  read = 2 * (w['read_real'] + 1j * w['read_imag']) * torch.expm1(dt * a) / a
  powers = torch.exp(torch.arange(u.shape[1])[:, None, None] * (dt * a))
  kernel = torch.einsum('lfn,fn->lf', powers, read).real
  return convolved(u, kernel) + w['skip'] * u


def low_rank(w: dict[str, Any], u: Any) -> Any:
  """S4 by its generating function (arXiv:2111.00396, algorithm 1), all Cauchy products at once."""
  pick = lambda name: torch.complex(w[f'{name}_real'], w[f'{name}_imag'])
  low, into, read, t = pick('low'), pick('into'), pick('read'), u.shape[1]
  rates = torch.complex(-torch.exp(w['log_rate_real']), w['log_rate_imag'])
  dt = torch.exp(w['log_step'])
  both = lambda z: torch.cat([z, z.conj()], dim=-1)
  rates, low, into, read = map(both, (rates, low, into, read))
  half = dt[:, None, None] / 2 * (torch.diag_embed(rates) - low[:, :, None] * low.conj()[:, None])
  one = torch.eye(rates.shape[-1], dtype=rates.dtype)
  step = torch.linalg.solve(one - half, one + half)
  read = read - torch.einsum('fn,fnm->fm', read, torch.linalg.matrix_power(step, t))
  z = torch.exp(-2j * math.pi * torch.arange(t // 2 + 1) / t)
  far = (2 * (1 - z)) / dt[:, None]
  root = 1 / (far[..., None] - (1 + z)[:, None] * rates[:, None])
  cauchy = lambda v: torch.einsum('fzn,fn->fz', root, v)
  fix = cauchy(read * low) * cauchy(low.conj() * into)
  fix = (1 + z) * fix / (1 + (1 + z) * cauchy(low.conj() * low))
  kernel = torch.fft.irfft(2 * (cauchy(read * into) - fix), t).T
  return convolved(u, kernel) + w['skip'] * u


def mixed(w: dict[str, Any], y: Any) -> Any:
  """What follows S4's state spaces."""
  y = functional.gelu(y, approximate='tanh')
  return (y @ w['value']) * torch.sigmoid(y @ w['gate'])


def s4(w: dict[str, Any], y: Any) -> Any:
  """S4."""
  return mixed(w, low_rank(w, y))


def s4d(w: dict[str, Any], y: Any) -> Any:
  """S4D."""
  return mixed(w, diagonal(w, y))


def h3(w: dict[str, Any], y: Any) -> Any:
  """H3 (arXiv:2212.14052, algorithm 1)."""
  k = short(w, 'shift', y @ w['key'])
  return (y @ w['query'] * diagonal(w, k * (y @ w['value']))) @ w['out']


def gss(w: dict[str, Any], y: Any) -> Any:
  """A gated state space (arXiv:2206.13947, figure 1)."""
  gelu = lambda x: functional.gelu(x, approximate='tanh')
  return (gelu(y @ w['gate']) * (diagonal(w, gelu(y @ w['narrow_in'])) @ w['wide'])) @ w['out']


def hyena(w: dict[str, Any], y: Any, *, length: int = 256) -> Any:
  """Hyena of order 2 (arXiv:2302.10866, definition 3.1)."""
  d, time = y.shape[-1], torch.arange(y.shape[1])[:, None] / length
  angle = 2 * math.pi * time * torch.linspace(1e-4, 15, 16)
  h = torch.cat([time, torch.cos(angle), torch.sin(angle)], dim=1)
  for i in range(2):
    h = torch.sin(10 * (h @ w[f'filter_{i}'] + w[f'filter_{i}_bias']))
  window = 100.0 ** (-time / torch.linspace(0.3, 1.5, d))
  z = short(w, 'value_conv', y @ w['value'])
  for n in (1, 2):
    x = convolved(z, window * (h @ w[f'filter_out_{n}'])) + w[f'skip_{n}'] * z
    z = short(w, f'gate_{n}_conv', y @ w[f'gate_{n}']) * x
  return z @ w['out']
