"""When a training set will be as large as all usable public text: two exponentials, and the year in which they meet.

The simple extrapolation of "Will we run out of data?" (Villalobos et al. 2022, version 2 of 2024, arXiv:2211.04325):
the stock of text grows slowly, the largest training sets grew 2.4 times a year. Every number is known as a 95 %
interval; logarithms are taken to be normal, as in the paper, so the answer has an interval too. The paper mixes this
with a second projection, from the compute that there will be, which slows down after 2030: late years here are too
early.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_NORMAL = 1.959963984540054  # standard deviations, of the 95 % around a normal distribution's mean


class Text(NamedTuple):
  """95 % intervals. tokens: on the web in `year`. usable: the share that is good enough. epochs: what repetition
  is worth. growth: factor a year. used: tokens of the largest training sets in `year`. use_growth: factor a year."""

  year: float
  tokens: tuple[float, float]
  usable: tuple[float, float]
  epochs: tuple[float, float]
  growth: tuple[float, float]
  used: tuple[float, float]
  use_growth: tuple[float, float]


# Sections 2.2.1 (stock and its growth), 2.3.1 (quality), 2.3.2 (epochs), 2.4 (training sets: around 10T without an
# interval, 0.38 [0.27, 0.48] orders of magnitude a year from some 80 language models).
VILLALOBOS = Text(
  year=2024.0,
  tokens=(130e12, 2100e12),
  usable=(0.1, 0.4),
  epochs=(3.0, 5.0),
  growth=(1.0, 1.1),
  used=(10e12, 10e12),
  use_growth=(10**0.27, 10**0.48),
)


def middle(interval: tuple[float, float]) -> float:
  """The median of a number whose logarithm is normal: the geometric mean of the ends of its interval."""
  return float(np.sqrt(np.prod(interval)))


def draws(interval: tuple[float, float], count: int, rng: np.random.Generator) -> np.ndarray:
  """f64 [count]: numbers whose logarithm is normal, 95 % of them in the interval."""
  low, high = np.log(interval)
  return np.exp((low + high) / 2 + (high - low) / 2 / _NORMAL * rng.standard_normal(count))


def years(
  stock: ArrayLike, growth: ArrayLike, used: ArrayLike, use_growth: ArrayLike
) -> np.ndarray:
  """How long until used * use_growth^t = stock * growth^t: log(stock / used) / log(use_growth / growth).

  Infinite where the stock grows at least as fast as its use, negative where it is used up already.
  """
  gap = np.log(np.asarray(stock, np.float64) / used)
  rate = np.log(np.asarray(use_growth, np.float64) / growth)
  with np.errstate(divide='ignore'):
    return np.where(gap <= 0, gap / np.abs(rate), np.where(rate > 0, gap / np.abs(rate), np.inf))


def effective(text: Text) -> float:
  """The median stock in `text.year`: tokens x usable x epochs."""
  return middle(text.tokens) * middle(text.usable) * middle(text.epochs)


def exhausted(text: Text, *, overtraining: float = 1.0) -> float:
  """The year at the medians. overtraining: tokens per parameter over the optimum's; a compute then takes its root more
  tokens, because it is spent on fewer parameters (section 2.5)."""
  used = middle(text.used) * overtraining**0.5
  return text.year + float(
    years(effective(text), middle(text.growth), used, middle(text.use_growth))
  )


def simulate(text: Text, *, count: int = 20_000, seed: int = 0) -> np.ndarray:
  """f64 [count]: years, every number drawn from its interval."""
  rng = np.random.default_rng(seed)
  drawn = {name: draws(x, count, rng) for name, x in text._asdict().items() if name != 'year'}
  stock = drawn['tokens'] * drawn['usable'] * drawn['epochs']
  return text.year + years(stock, drawn['growth'], drawn['used'], drawn['use_growth'])
