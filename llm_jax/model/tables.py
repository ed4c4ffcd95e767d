"""Two vectors for every word, which is all there is to word2vec and GloVe: parameters without a network.

The objectives in objectives/word_vectors.py read them; a word's `input` vector is what is kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from llm_jax.core.errors import UserError


class Tables(NamedTuple):
  """init(key) -> {input, output: f32 [vocab, embed]} and, with biases, {input_bias, output_bias: f32 [vocab]}. axes:
  the same tree of axis names. vocab: rows."""

  init: Callable[[jax.Array], dict[str, jax.Array]]
  axes: dict[str, tuple[str, ...]]
  vocab: int


def make(*, vocab: int, embed: int = 100, biases: bool = False, scale: float = 0.5) -> Tables:
  """Vectors that begin uniform within scale / embed. biases: GloVe's, which begin there too."""
  if vocab < 2 or embed < 1:
    raise UserError(f'vocab={vocab} and embed={embed}: choose at least 2 words of 1 number')
  axes: dict[str, Any] = dict(input=('vocab', 'embed'), output=('vocab', 'embed'))
  if biases:
    axes |= dict(input_bias=('vocab',), output_bias=('vocab',))
  sizes = dict(vocab=vocab, embed=embed)

  def init(key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, len(axes))
    bound = scale / embed
    return {
      name: jax.random.uniform(k, tuple(sizes[a] for a in axes[name]), minval=-bound, maxval=bound)
      for name, k in zip(axes, keys, strict=True)
    }

  return Tables(init, axes, vocab)
