"""Weights in few bits, rounded to nearest in blocks, and how many bits they take with their scales.

The integer type of Dettmers and Zettlemoyer 2022 (arXiv:2212.09720): 64 neighbouring numbers share a scale, their
largest magnitude, so that an outlier costs only its block; what is stored of a number is one of 2^bits - 1 levels at
equal distances, zero in the middle. The scale is a 16-bit float: a quarter of a bit for each number.
"""

from typing import Any

import jax
import numpy as np

from llm_jax.core import tree
from llm_jax.optim import chain

BLOCK = 64
HALF = 16  # bits of a scale, and of what is not rounded


def rounded(x: np.ndarray, bits: int, *, block: int = BLOCK) -> np.ndarray:
  """f32 like x: the nearest of scale * l / top with whole |l| <= top = 2^(bits - 1) - 1, block by block in C order.

  16 bits are a 16-bit float instead, without blocks.
  """
  if bits == HALF:
    return x.astype(np.float16).astype(np.float32)
  top = 2 ** (bits - 1) - 1
  flat = np.pad(x.ravel(), (0, -x.size % block)).reshape(-1, block).astype(np.float32)
  scale = np.abs(flat).max(1, keepdims=True).astype(np.float16).astype(np.float32)
  unit = np.where(scale > 0, scale, 1) / top
  levels = np.clip(np.rint(flat / unit), -top, top)
  return (levels * unit).ravel()[: x.size].reshape(x.shape)


def stored(numbers: int, bits: int, *, block: int = BLOCK) -> int:
  """The bits of a tensor, scales counted."""
  return numbers * bits + (0 if bits == HALF else HALF * -(-numbers // block))


def quantised(params: Any, axes: Any, bits: int) -> tuple[Any, int]:
  """(Parameters with every matrix rounded, the table of tokens too, and the bits of all); vectors stay in 16 bits.

  axes: names like params, of `Model.axes`.
  """
  names = tree.flatten(axes, is_leaf=tree.is_names)
  of = {path: bits if chain.matrices(axes) else HALF for path, axes in names.items()}
  made = tree.map_paths(lambda path, x: rounded(np.asarray(x), of[path]), params)
  sizes = tree.flatten(jax.tree.map(np.size, params))
  return made, sum(stored(int(n), of[path]) for path, n in sizes.items())
