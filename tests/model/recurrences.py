"""The recurrences of the papers in float64, one token after the other: what the recurrent mixers are held against.

mixer(the module's fields, its weights by name, x [t, embed]) -> y [t, embed]
"""

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def convolved(p, name, x):
  """y_t = sum_j w_j x_{t-taps+1+j} + bias."""
  w, y = p[name], np.zeros_like(x)
  for t in range(len(x)):
    for j in range(len(w)):
      if t - len(w) + 1 + j >= 0:
        y[t] += w[j] * x[t - len(w) + 1 + j]
  return y + p.get(f'{name}_bias', 0)


def mamba(m, p, x):
  u = silu(convolved(p, 'conv', x @ p['x'] + p['x_bias']))
  gate = x @ p['gate'] + p['gate_bias']
  dt = softplus(u @ p['rank'] @ p['step'] + p['step_bias'])
  b, c, rate = u @ p['b'], u @ p['c'], -np.exp(p['log_rate'])
  h, ys = np.zeros(rate.shape), []
  for t in range(len(x)):
    h = np.exp(dt[t][:, None] * rate) * h + (dt[t] * u[t])[:, None] * b[t]
    ys.append(h @ c[t] + p['skip'] * u[t])
  return (np.stack(ys) * silu(gate)) @ p['out'] + p['out_bias']


def mamba2(m, p, x):
  u, b, c = (silu(convolved(p, f'{n}_conv', x @ p[n] + p[f'{n}_bias'])) for n in 'xbc')
  dt = softplus(x @ p['dt'] + p['dt_bias'] + p['step_bias'])
  heads = dt.shape[1]
  h, ys = np.zeros((heads, m.state, m.head_dim)), []
  for t in range(len(x)):
    y = []
    for i in range(heads):
      group = i // (heads // m.groups)
      bt, ct = (z[t].reshape(m.groups, m.state)[group] for z in (b, c))
      ut = u[t].reshape(heads, m.head_dim)[i]
      h[i] = np.exp(-dt[t, i] * np.exp(p['log_rate'][i])) * h[i] + dt[t, i] * np.outer(bt, ut)
      y.append(ct @ h[i] + p['skip'][i] * ut)
    ys.append(np.concatenate(y))
  y = np.stack(ys) * silu(x @ p['gate'] + p['gate_bias'])
  groups = y.reshape(len(x), m.groups, -1)
  y = (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + m.eps)).reshape(y.shape)
  return (y * p['norm_scale']) @ p['out'] + p['out_bias']


def shifted(p, name, x):
  before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
  return p[f'{name}_mix'] * x + (1 - p[f'{name}_mix']) * before


def rwkv(m, p, x):
  k, v, r = (shifted(p, n, x) @ p[n] for n in ('key', 'value', 'receptance'))
  w, u, ys = np.exp(p['log_decay']), p['bonus'], []
  for t in range(len(x)):
    num, den = np.exp(u + k[t]) * v[t], np.exp(u + k[t])
    for i in range(t):
      e = np.exp(-(t - 1 - i) * w + k[i])
      num, den = num + e * v[i], den + e
    ys.append(num / den)
  return (sigmoid(r) * np.stack(ys)) @ p['out']


def rwkv_channel(m, p, x):
  r, k = (shifted(p, n, x) @ p[n] for n in ('receptance', 'key'))
  return sigmoid(r) * (np.maximum(k, 0) ** 2 @ p['value'])


def retention(m, p, x):
  d = p['query'].shape[-1]
  q, k, v, g = (np.einsum('td,dhk->thk', x, p[n]) for n in ('query', 'key', 'value', 'gate'))
  turn = np.exp(1j * np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(0, d, 2) / d)))[:, None]
  q, k = ((z[..., ::2] + 1j * z[..., 1::2]) * turn for z in (q, k))
  ys = np.zeros(v.shape)
  for i in range(m.heads):
    gamma, s = 1 - 2.0 ** (-5 - i), np.zeros((d // 2, v.shape[-1]), complex)
    for t in range(len(x)):
      s = gamma * s + np.outer(k[t, i].conj(), v[t, i]) / np.sqrt(d)
      ys[t, i] = (q[t, i] @ s).real
  ys = (ys - ys.mean(-1, keepdims=True)) / np.sqrt(ys.var(-1, keepdims=True) + m.eps)
  return np.einsum('thk,hkd->td', silu(g) * ys, p['out'])


def states(m, p, u):
  """x' = A x + B u, y = 2 Re(C x) + D u, discretised by hand for every state."""
  a, dt = -np.exp(p['log_rate']) + 1j * p['frequency'], np.exp(p['log_step'])[:, None]
  if m.rule.__name__ == 'hold':
    decay, scale = np.exp(dt * a), (np.exp(dt * a) - 1) / a
  else:
    decay, scale = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
  x, ys = np.zeros(a.shape, complex), []
  for t in range(len(u)):
    x = decay * x + scale * u[t][:, None]
    ys.append(2 * ((p['read_real'] + 1j * p['read_imag']) * x).sum(1).real + p['skip'] * u[t])
  return np.stack(ys)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def s4d(m, p, x):
  y = gelu(states(m, p, x))
  return (y @ p['value']) * sigmoid(y @ p['gate'])


s4d_bilinear = s4d


def s4(m, p, x):
  """The whole matrix of both states of every pair, x_t = (1 - dt A / 2)^-1 ((1 + dt A / 2) x_{t-1} + dt B u_t)."""
  number = lambda name: p[f'{name}_real'] + 1j * p[f'{name}_imag']
  rates = -np.exp(p['log_rate_real']) + 1j * p['log_rate_imag']
  parts = (rates, number('low'), number('into'), number('read'))
  rates, low, into, read = (np.concatenate([z, z.conj()], -1) for z in parts)
  y, one = np.zeros_like(x), np.eye(rates.shape[-1])
  for f in range(x.shape[1]):
    half = np.exp(p['log_step'][f]) / 2 * (np.diag(rates[f]) - np.outer(low[f], low[f].conj()))
    h = np.zeros(len(one), complex)
    for t in range(len(x)):
      new = (one + half) @ h + np.exp(p['log_step'][f]) * into[f] * x[t, f]
      h = np.linalg.solve(one - half, new)
      y[t, f] = (read[f] @ h).real + p['skip'][f] * x[t, f]
  y = gelu(y)
  return (y @ p['value']) * sigmoid(y @ p['gate'])


def h3(m, p, x):
  k = convolved(p, 'shift', x @ p['key'])
  return (x @ p['query'] * states(m, p, k * (x @ p['value']))) @ p['out']


def gss(m, p, x):
  y = states(m, p, gelu(x @ p['narrow_in'])) @ p['wide']
  return (gelu(x @ p['gate']) * y) @ p['out']


def hyena(m, p, x):
  t, d = x.shape
  time = np.arange(t)[:, None] / m.length
  angle = 2 * np.pi * time * np.linspace(1e-4, m.bands - 1, m.bands)
  h = np.concatenate([time, np.cos(angle), np.sin(angle)], axis=1)
  for i in range(m.depth):
    h = np.sin(m.frequency * (h @ p[f'filter_{i}'] + p[f'filter_{i}_bias']))
  window = 100.0 ** (-time / np.linspace(m.fast, m.slow, d))
  z = convolved(p, 'value_conv', x @ p['value'])
  for n in range(1, m.order + 1):
    kernel = window * (h @ p[f'filter_out_{n}'])
    y = np.stack([np.convolve(kernel[:, i], z[:, i])[:t] for i in range(d)], axis=1)
    y = y + p[f'skip_{n}'] * z
    z = convolved(p, f'gate_{n}_conv', x @ p[f'gate_{n}']) * y
  return z @ p['out']


def lstm(m, p, x):
  h = c = np.zeros(p['out'].shape[0])
  ys = []
  for row in x:
    i, f, g, o = (
      row @ p[n] + h @ p[f'{n}_hidden'] + p[f'{n}_bias']
      for n in ('input', 'forget', 'cell', 'output')
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    ys.append(h)
  return np.stack(ys) @ p['out']


def nplm(m, p, x):
  ys = []
  for t in range(len(x)):
    near = [x[s] if s >= 0 else np.zeros(x.shape[1]) for s in range(t - m.window + 1, t + 1)]
    near = np.concatenate(near)
    ys.append(np.tanh(near @ p['up'] + p['up_bias']) @ p['down'] + near @ p['direct'])
  return np.stack(ys)
