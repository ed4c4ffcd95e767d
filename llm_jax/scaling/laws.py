"""Scaling laws with their published constants, and what they say to do with a budget.

Numbers and numpy arrays in, float64 out; everything broadcasts. Losses are nats per token, compute is FLOP (never
PF-days: those are `count.PF_DAY` FLOP), N is parameters, D is tokens seen in training. What N counts is the paper's
choice: without embeddings for Kaplan, DeepSeek and Step Law, all of them for Chinchilla.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.model import count


class PowerLaw(NamedTuple):
  """y = coefficient * x ** exponent."""

  coefficient: float
  exponent: float


class Chinchilla(NamedTuple):
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, eq. 2)."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float


class Frontier(NamedTuple):
  """The best N and D for a training compute C: N = k C^a and D = k' C^b, the outcome of all three approaches."""

  parameters: PowerLaw
  tokens: PowerLaw


class Allocation(NamedTuple):
  """One way to spend a budget. flops: of training, and inference if asked for; epochs: tokens / unique."""

  parameters: float
  tokens: float
  loss: float
  flops: float
  epochs: float = 1.0


# As printed in the paper. The digits left out matter: at Gopher's 5.76e23 FLOP these give 32B parameters and 93 tokens
# per parameter where the paper's own curve, and Chinchilla itself, have 70B and 20. Never plan a run with them.
HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# Approach 3 fitted anew on the points of the paper's figure 4 (Besiroglu et al. 2024, arXiv:2404.10102, table 1).
BESIROGLU = Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
# Fresh data, exponents tied (Muennighoff et al. 2023, arXiv:2305.16264, appendix A): the base of `data_constrained`.
MUENNIGHOFF = Chinchilla(
  E=float(np.exp(0.6254804)),
  A=float(np.exp(6.255414)),
  B=float(np.exp(7.3049974)),
  alpha=0.3526596,
  beta=0.3526596,
)


def power(law: PowerLaw, x: ArrayLike) -> np.ndarray:
  """coefficient * x ** exponent."""
  return law.coefficient * _f64(x) ** law.exponent


def _f64(x: ArrayLike) -> np.ndarray:
  return np.asarray(x, np.float64)


# Kaplan et al. 2020, arXiv:2001.08361 (N without embeddings, compute at the critical batch)


def kaplan_parameters(parameters: ArrayLike) -> np.ndarray:
  """L(N) = (8.8e13 / N)^0.076 with enough data (eq. 1.1)."""
  return (8.8e13 / _f64(parameters)) ** 0.076


def kaplan_tokens(tokens: ArrayLike) -> np.ndarray:
  """L(D) = (5.4e13 / D)^0.095 of a large model stopped early (eq. 1.2)."""
  return (5.4e13 / _f64(tokens)) ** 0.095


def kaplan_compute(flops: ArrayLike) -> np.ndarray:
  """L(C) = (3.1e8 PF-days / C)^0.050 with the best model for each C, which is in FLOP (eq. 1.3)."""
  return (3.1e8 * count.PF_DAY / _f64(flops)) ** 0.050


def kaplan_joint(parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
  """L(N, D) = [(6.4e13 / N)^(0.076 / 0.103) + 1.8e13 / D]^0.103: overfitting of N on D (eq. 1.5, table 2)."""
  inner = (6.4e13 / _f64(parameters)) ** (0.076 / 0.103) + 1.8e13 / _f64(tokens)
  return inner**0.103


def kaplan_steps(parameters: ArrayLike, steps: ArrayLike) -> np.ndarray:
  """L(N, S) = (6.5e13 / N)^0.077 + (2.1e3 / S)^0.76: S updates, batches far above the critical (eq. 1.6, table 3)."""
  return (6.5e13 / _f64(parameters)) ** 0.077 + (2.1e3 / _f64(steps)) ** 0.76


def kaplan_critical_batch(loss: ArrayLike) -> np.ndarray:
  """B_crit = 2e8 / L^(1 / 0.21) tokens: twice the fewest steps and twice the fewest tokens to this loss (eq. 1.4)."""
  return 2e8 * _f64(loss) ** (-1 / 0.21)


def kaplan_least_steps(steps: ArrayLike, batch: ArrayLike, loss: ArrayLike) -> np.ndarray:
  """S_min = S / (1 + B_crit / B): the updates that batches far above the critical would have needed (eq. 5.4)."""
  return _f64(steps) / (1 + kaplan_critical_batch(loss) / _f64(batch))


def kaplan_least_compute(flops: ArrayLike, batch: ArrayLike, loss: ArrayLike) -> np.ndarray:
  """C_min = C / (1 + B / B_crit): the FLOP that batches far below the critical would have needed (eq. 5.5)."""
  return _f64(flops) / (1 + _f64(batch) / kaplan_critical_batch(loss))


def kaplan_least_tokens(parameters: ArrayLike) -> np.ndarray:
  """D = 5e3 N^0.74: with fewer unique tokens a model of N overfits (eq. 4.4)."""
  return 5e3 * _f64(parameters) ** 0.74


# The best run for a compute in PF-days: N, critical batch in tokens, fewest steps and tokens of one epoch (table 6).
KAPLAN_BEST = dict(
  parameters=PowerLaw(1.3e9, 0.73),
  batch=PowerLaw(2.0e6, 0.24),
  steps=PowerLaw(5.4e3, 0.03),
  tokens=PowerLaw(2e10, 0.27),
)


def kaplan_optimum(flops: ArrayLike) -> dict[str, np.ndarray]:
  """`KAPLAN_BEST` at a compute in FLOP, the least for its loss; at the critical batch a run takes twice as much."""
  return {name: power(law, _f64(flops) / count.PF_DAY) for name, law in KAPLAN_BEST.items()}


# Chinchilla: Hoffmann et al. 2022, arXiv:2203.15556


def chinchilla(law: Chinchilla, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
  """The loss of N parameters after D tokens, in nats per token."""
  n, d = _f64(parameters), _f64(tokens)
  return law.E + law.A * n**-law.alpha + law.B * d**-law.beta


def frontier(law: Chinchilla) -> Frontier:
  """Where L is lowest under C = 6 N D (eq. 4): N = G (C / 6)^a, D = (C / 6)^b / G.

  G = (alpha A / (beta B))^(1 / (alpha + beta)), a = beta / (alpha + beta), b = alpha / (alpha + beta): what
  makes the loss fall faster gets the *smaller* share. The survey (arXiv:2303.18223, section 2.1) has a and b swapped.
  """
  total = law.alpha + law.beta
  g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
  a, b = law.beta / total, law.alpha / total
  return Frontier(PowerLaw(g * 6**-a, a), PowerLaw(6**-b / g, b))


def optimum(law: Chinchilla, flops: float) -> Allocation:
  """The parameters and tokens of the lowest loss for `flops` of training."""
  best = frontier(law)
  n, d = float(power(best.parameters, flops)), float(power(best.tokens, flops))
  return Allocation(n, d, float(chinchilla(law, n, d)), flops)


def fresh_parameters(law: Chinchilla, tokens: ArrayLike) -> np.ndarray:
  """The N for which D tokens are compute-optimal: the frontier read from its other side."""
  n, d = frontier(law)
  return power(n, (_f64(tokens) / d.coefficient) ** (1 / d.exponent))


def tokens_to_reach(law: Chinchilla, parameters: ArrayLike, loss: ArrayLike) -> np.ndarray:
  """D at which N parameters reach `loss`; UserError where more data cannot make up for so few parameters."""
  left = _f64(loss) - law.E - law.A * _f64(parameters) ** -law.alpha
  if np.any(left <= 0):
    raise UserError(
      f'no number of tokens takes these parameters to a loss of {loss}: with endless data the law says'
      f' {np.max(_f64(loss) - left)}; take more parameters or a higher loss'
    )
  return (law.B / left) ** (1 / law.beta)


def lifetime_optimum(law: Chinchilla, loss: float, inference_tokens: float) -> Allocation:
  """The cheapest way to serve `inference_tokens` at `loss`: the least 6 N D + 2 N D_inf with L(N, D) = loss.

  The more is served, the smaller the model and the longer its training: why LLaMA was trained past Chinchilla's
  optimum (Touvron et al. 2023, arXiv:2302.13971; Sardana et al. 2023, arXiv:2401.00448, eq. 3). The zero of
  D (1 - alpha A N^-alpha / (beta B D^-beta)) + D_inf / 3, which grows with N up to the optimum of training alone.
  """
  room = loss - law.E
  if room <= 0:
    raise UserError(f'a loss of {loss} is below the irreducible {law.E}: take a higher one')
  share = law.beta / (
    law.alpha + law.beta
  )  # of the reducible loss, at the optimum of training alone
  top = (law.A / (room * share)) ** (1 / law.alpha)
  least = (law.A / room) ** (1 / law.alpha)  # with endless data

  def slope(x: float) -> float:
    n = least * np.exp(x)
    d = float(tokens_to_reach(law, n, loss))
    ratio = law.alpha * law.A * n**-law.alpha / (law.beta * law.B * d**-law.beta)
    return (1 - ratio) + inference_tokens / (3 * d)

  highest = np.log(top / least)
  if inference_tokens == 0:
    x = highest
  else:
    lowest = highest
    while slope(lowest) > 0:
      lowest /= 2
    x = optimize.brentq(slope, lowest, highest, xtol=1e-14)
  n = least * np.exp(x)
  d = float(tokens_to_reach(law, n, loss))
  return Allocation(float(n), d, loss, float(6 * n * d + 2 * n * inference_tokens))


def budget_optimum(law: Chinchilla, flops: float, inference_tokens: float) -> Allocation:
  """The lowest loss when training and inference share a budget: 6 N D + 2 N D_inf = C. Numerical, to 1e-8."""
  limit = (
    np.log(flops / (2 * inference_tokens)) if inference_tokens else np.inf
  )  # of log N, where no training is left
  start = np.log(optimum(law, flops).parameters)

  def tokens(x: float) -> float:
    return (flops * np.exp(-x) - 2 * inference_tokens) / 6

  low, high = min(start, limit) - 40, min(start + 5, limit - 1e-9)
  x = _lowest(lambda x: float(chinchilla(law, np.exp(x), max(tokens(x), 1e-300))), low, high)
  n, d = float(np.exp(x)), float(tokens(x))
  return Allocation(n, d, float(chinchilla(law, n, d)), flops)


def _lowest(f: Callable[[float], float], low: float, high: float) -> float:
  """Where f is lowest between `low` and `high`: a grid, then Brent's method around its best point."""
  grid = np.linspace(low, high, 801)
  values = [f(x) for x in grid]
  i = int(np.argmin(values))
  bounds = grid[max(i - 1, 0)], grid[min(i + 1, 800)]
  return float(
    optimize.minimize_scalar(f, bounds=bounds, method='bounded', options=dict(xatol=1e-10)).x
  )


# Repeated data: Muennighoff et al. 2023, arXiv:2305.16264


class DataConstrained(NamedTuple):
  """A law for fresh data, and how many repetitions of tokens (R*_D) and of parameters (R*_N) are worth something."""

  fresh: Chinchilla = MUENNIGHOFF
  tokens: float = 15.387756
  parameters: float = 5.309743


def effective(total: ArrayLike, unique: ArrayLike, lifetime: float) -> np.ndarray:
  """U + U R* (1 - exp(-R / R*)) with R = total / U - 1: what `total` is worth of which `unique` are new (eq. 5, 6).

  Few repetitions count in full; endlessly many are worth 1 + R* epochs. 4 epochs of tokens count 93 %, 16 count 66 %.
  """
  total, unique = _f64(total), _f64(unique)
  unique = np.minimum(total, unique)
  return unique * (1 - lifetime * np.expm1(-(total / unique - 1) / lifetime))


def data_constrained(
  law: DataConstrained, parameters: ArrayLike, tokens: ArrayLike, unique: ArrayLike
) -> np.ndarray:
  """The loss of N parameters after D tokens of which `unique` are different: L(N', D').

  Parameters beyond `fresh_parameters(unique)` are in excess and count as repetitions do, with R*_N (eq. 6).
  """
  unique = np.minimum(_f64(unique), _f64(tokens))
  n = effective(parameters, fresh_parameters(law.fresh, unique), law.parameters)
  return chinchilla(law.fresh, n, effective(tokens, unique, law.tokens))


def data_constrained_optimum(law: DataConstrained, flops: float, unique: float) -> Allocation:
  """The lowest loss of `flops` of training when there are `unique` tokens: how large, and for how many epochs."""
  start = np.log(optimum(law.fresh, flops).parameters)

  def loss(x: float) -> float:
    n = np.exp(x)
    return float(data_constrained(law, n, flops / (6 * n), unique))

  n = float(np.exp(_lowest(loss, start - 10, start + 5)))
  d = flops / (6 * n)
  return Allocation(n, d, float(data_constrained(law, n, d, unique)), flops, max(1.0, d / unique))


# What more of everything cannot remove: Henighan et al. 2020, arXiv:2010.14701


class Offset(NamedTuple):
  """L(x) = irreducible + (scale / x)^exponent; the first is the entropy of the text, the second KL(text || model)."""

  irreducible: float
  scale: float
  exponent: float


def reducible(law: Offset, x: ArrayLike) -> np.ndarray:
  """(scale / x)^exponent: how far the model is from the text, in nats (eq. 1.1, 1.2)."""
  return (law.scale / _f64(x)) ** law.exponent


def offset(law: Offset, x: ArrayLike) -> np.ndarray:
  """The loss: irreducible and reducible part together."""
  return law.irreducible + reducible(law, x)


# Mixtures of experts: Clark et al. 2022, arXiv:2202.01169


class Routed(NamedTuple):
  """log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d: N parameters that a token meets, Ê saturated experts."""

  a: float
  b: float
  c: float
  d: float
  start: float
  limit: float


# 130B tokens, by kind of router (table 3).
SINKHORN_BASE = Routed(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)
REINFORCED = Routed(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982)
HASH = Routed(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741)


def saturated(law: Routed, experts: ArrayLike) -> np.ndarray:
  """1 / Ê = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max: E_start for one expert, E_max in the limit."""
  return 1 / (1 / (_f64(experts) - 1 + 1 / (1 / law.start - 1 / law.limit)) + 1 / law.limit)


def routed(law: Routed, parameters: ArrayLike, experts: ArrayLike) -> np.ndarray:
  """The loss of a model with E experts per layer of which a token meets one, N the parameters a token meets (eq. 1)."""
  n, e = np.log10(_f64(parameters)), np.log10(saturated(law, experts))
  return 10 ** (law.a * n + law.b * e + law.c * n * e + law.d)


def dense_equivalent(law: Routed, parameters: ArrayLike, experts: ArrayLike) -> np.ndarray:
  """The parameters of a dense model of the same loss: the effective parameter count (eq. 11)."""
  one = np.log10(law.start)
  log_loss = np.log10(routed(law, parameters, experts))
  return 10 ** ((log_loss - law.d - law.b * one) / (law.a + law.c * one))


# Fewer bits: Dettmers & Zettlemoyer 2022, arXiv:2212.09720; Kumar et al. 2024, arXiv:2411.04330


class Rounded(NamedTuple):
  """Loss added by rounding trained weights to P bits: C D^gamma_D / N^gamma_N exp(-P / gamma) (Kumar et al., eq. 2)."""

  scale: float
  tokens: float
  parameters: float
  bits: float


def rounding(law: Rounded, parameters: ArrayLike, tokens: ArrayLike, bits: ArrayLike) -> np.ndarray:
  """What rounding the weights of a trained model to `bits` adds to its loss: more, the longer it was trained."""
  n, d = _f64(parameters) ** -law.parameters, _f64(tokens) ** law.tokens
  return law.scale * n * d * np.exp(-_f64(bits) / law.bits)


def low_precision(
  parameters: ArrayLike, bits: ArrayLike, *, sensitivity: float = 2.6745
) -> np.ndarray:
  """N (1 - exp(-P / gamma)): what parameters count as that are *trained* in P bits (Kumar et al., eq. 3, table 2)."""
  return _f64(parameters) * -np.expm1(-_f64(bits) / sensitivity)


def best_bits(
  loss: Callable[[float, float], float], total_bits: float, choices: tuple = (3, 4, 8, 16)
) -> tuple[int, float]:
  """(bits, loss) of the lowest `loss(parameters, bits)` among models that take `total_bits` of memory.

  The question of k-bit inference: a model of 60B parameters in 4 bits takes as much as one of 30B in 8.
  """
  found = {k: float(loss(total_bits / k, k)) for k in choices}
  best = min(found, key=found.__getitem__)
  return best, found[best]


# From loss to tasks: Bhagia et al. 2024, arXiv:2412.04403; Gadre et al. 2024, arXiv:2403.08540


class Sigmoid(NamedTuple):
  """accuracy = low + (high - low) / (1 + exp(slope (loss - middle))): `low` is guessing, `high` the best there is."""

  low: float
  high: float
  slope: float
  middle: float


def accuracy(law: Sigmoid, loss: ArrayLike) -> np.ndarray:
  """The second step of two: task accuracy from the loss (or bits per byte) on the task's own answers (eq. 2)."""
  from scipy.special import expit

  return law.low + (law.high - law.low) * expit(law.slope * (law.middle - _f64(loss)))


class Decay(NamedTuple):
  """error = top - scale exp(-rate loss)."""

  top: float
  scale: float
  rate: float


def task_error(law: Decay, loss: ArrayLike) -> np.ndarray:
  """Average error over tasks from the loss on a reference text (Gadre et al., eq. 5)."""
  return law.top - law.scale * np.exp(-law.rate * _f64(loss))


# Batch size (tokens) and peak learning rate of Adam


def deepseek_batch(flops: ArrayLike) -> np.ndarray:
  """0.2920 C^0.3271 tokens, C without embeddings (DeepSeek LLM 2024, arXiv:2401.02954, eq. 1)."""
  return 0.2920 * _f64(flops) ** 0.3271


def deepseek_rate(flops: ArrayLike) -> np.ndarray:
  """0.3118 C^-0.1250 (DeepSeek LLM 2024, arXiv:2401.02954, eq. 1)."""
  return 0.3118 * _f64(flops) ** -0.1250


def step_batch(tokens: ArrayLike) -> np.ndarray:
  """0.58 D^0.571 tokens, whatever the model (Step Law: Li et al. 2025, arXiv:2503.04715, eq. 1)."""
  return 0.58 * _f64(tokens) ** 0.571


def step_rate(parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
  """1.79 N^-0.713 D^0.307, N without embeddings (Step Law: Li et al. 2025, arXiv:2503.04715, eq. 1)."""
  return 1.79 * _f64(parameters) ** -0.713 * _f64(tokens) ** 0.307


def kaplan_rate(parameters: ArrayLike) -> np.ndarray:
  """0.003239 - 0.0001395 ln N, for N up to 1e10 (Kaplan et al. 2020, arXiv:2001.08361, eq. D.1)."""
  return 0.003239 - 0.0001395 * np.log(_f64(parameters))
