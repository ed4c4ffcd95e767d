"""Rotary positions for contexts longer than those of training.

Most methods rescale the frequencies theta_i = base^(-2i/n) and are told to a rotation:
`rope(..., scaling=partial(yarn, factor=4, original_length=4096))`. They have one signature:

    scaling(theta f64 [n/2], length int [batch or 1, 1, 1]) -> (theta', factor of the rotated queries and keys)

with `length` the largest position of the row plus one, which only `dynamic_ntk` and `longrope` look at. A larger `base`
is an argument of the rotation itself. `ReRoPE` bounds the distances instead. The methods are those of the survey's
section 5.1.4 (Zhao et al. 2023, arXiv:2303.18223).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.model import kernels
from llm_jax.model import positions as positions_lib
from llm_jax.model.masks import Mask

Scaled = tuple[Any, float]


def interpolation(theta: np.ndarray, length: jax.Array, *, factor: float) -> Scaled:
  """theta / factor: positions squeezed into the trained range (Chen et al. 2023, arXiv:2306.15595, eq. 4)."""
  del length
  return theta / factor, 1.0


def ntk(theta: np.ndarray, length: jax.Array, *, factor: float) -> Scaled:
  """The base times factor^(n/(n-2)): the slowest pair is interpolated by `factor`, the fastest stays.

  NTK-aware scaling (Peng et al. 2023, arXiv:2309.00071, section 3.1).
  """
  del length
  return theta * factor ** -_index(theta), 1.0


def dynamic_ntk(
  theta: np.ndarray, length: jax.Array, *, factor: float, original_length: int
) -> Scaled:
  """`ntk` by factor * length / original_length - (factor - 1) once the context is longer than that of training
  (arXiv:2309.00071, section 3.3; the formula is the one of transformers).

  Decoding keeps the keys as they were rotated when they were written, as transformers does.
  """
  grown = jnp.maximum(length, original_length) / original_length
  return theta * (factor * grown - (factor - 1)) ** -_index(theta), 1.0


def truncation(
  theta: np.ndarray, length: jax.Array, *, high: float, low: float, constant: float
) -> Scaled:
  """Basis truncation: theta from `high` on stays, up to `low` becomes 0, between them `constant`.

  In radians per position; to be trained with (Giraffe; Pal et al. 2023, arXiv:2308.10882).
  """
  del length
  if not low < high:
    raise UserError(f'truncation: low={low} must be below high={high}')
  return np.where(theta >= high, theta, np.where(theta <= low, 0.0, constant)), 1.0


def llama3(
  theta: np.ndarray,
  length: jax.Array,
  *,
  factor: float,
  original_length: int,
  low: float = 1.0,
  high: float = 4.0,
) -> Scaled:
  """NTK by parts, of LLaMA 3.1: the pairs that turn often stay, the slow ones are interpolated.

  Often is more than `high` times in the original length, slow less than `low` times; between them the two are mixed
  linearly in the number of turns (Peng et al. 2023, arXiv:2309.00071, section 3.2; the defaults are those of LLaMA 3.1,
  Grattafiori et al. 2024, arXiv:2407.21783).
  """
  del length
  turns = original_length * theta / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return theta * kept + theta / factor * (1 - kept), 1.0


def yarn(
  theta: np.ndarray,
  length: jax.Array,
  *,
  factor: float,
  original_length: int,
  fast: float = 32.0,
  slow: float = 1.0,
  attention: float | None = None,
) -> Scaled:
  """NTK by parts and a temperature: queries and keys are multiplied by 0.1 ln(factor) + 1 (Peng et al. 2023,
  arXiv:2309.00071, section 3.4).

  Pairs that turn more than `fast` times in the original length stay, those below `slow` turns are interpolated. Between
  them the paper mixes linearly in the number of turns, its code and transformers linearly in the number of the pair; so
  does this. attention: another multiplier.
  """
  del length
  if len(theta) < 2:
    raise UserError('yarn needs at least two pairs that rotate: use a larger head or fraction')
  pair = lambda turns: math.log(original_length / (2 * math.pi * turns)) / -math.log(theta[1])
  first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), 2 * len(theta) - 1)
  mixed = np.clip((np.arange(len(theta)) - first) / max(last - first, 1e-3), 0.0, 1.0)
  if attention is None:
    attention = 0.1 * math.log(max(factor, 1.0)) + 1.0
  return theta * (1 - mixed) + theta / factor * mixed, attention


def longrope(
  theta: np.ndarray,
  length: jax.Array,
  *,
  short: tuple,
  long: tuple,
  factor: float,
  original_length: int,
  attention: float | None = None,
) -> Scaled:
  """Each theta_i over its own number, found by search: `short` up to the original length, `long` beyond it.

  Queries and keys are multiplied by sqrt(1 + ln(factor) / ln(original_length)), or by `attention` (LongRoPE; Ding et
  al. 2024, arXiv:2402.13753).
  """
  if not len(short) == len(long) == len(theta):
    raise UserError(
      f'longrope: {len(theta)} pairs rotate, but there are {len(short)} short and {len(long)} long factors'
    )
  if attention is None:
    attention = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original_length))
  divisors = jnp.where(length > original_length, jnp.float32(long), jnp.float32(short))
  return theta / divisors, attention


def _index(theta: np.ndarray) -> np.ndarray:
  """2i / (n - 2): 0 for the fastest pair, 1 for the slowest."""
  return np.arange(len(theta)) / max(len(theta) - 1, 1)


class ReRoPE(nn.Module):
  """Distances up to `window` as in RoPE; beyond it they grow by `slope` each instead of 1, by 0 they stay at `window`
  (ReRoPE; with slope = 1/k leaky ReRoPE: Su 2023, kexue.fm/archives/9708; survey section 5.1.4).

      d -> d                             d <= window
      d -> window + slope (d - window)   d > window

  for `SelfAttention(rotate=None, relative=partial(ReRoPE, window=...))`. No training is needed when `window` is within
  the trained length. The far distances need rotations of their own, so the logits are computed twice. rotate: the
  rotation of training. Keys after the query keep their distance.
  """

  window: int
  slope: float = 0.0
  rotate: Callable = positions_lib.rope

  def __call__(
    self, q: jax.Array, k: jax.Array, positions: jax.Array, mask: Mask, embed: int, scale: float
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q: [batch, t, heads, head_dim], k: [batch, s, groups, head_dim], not rotated. Returns both rotated for the near
    distances, and what the logits of the far ones differ by: f32 [batch, heads, t, s]."""
    del embed
    keys = positions_lib.of_keys(positions, mask, k.shape[1])
    near = self.rotate(q, k, positions, keys)
    moved = self.window * (1 - self.slope) + self.slope * positions
    far = self.rotate(q, k, moved, self.slope * keys)
    is_far = positions[:, :, None] - keys[:, None, :] > self.window
    differ = scale * (kernels.products(*far) - kernels.products(*near))
    return *near, jnp.where(is_far[:, None], differ, 0.0)
