"""Vectors of words from their characters: a convolution, highway layers, a projection (Kim et al. 2015,
arXiv:1508.06615; Jozefowicz et al. 2016, arXiv:1602.02410; the sizes and the order of things are ELMo's, Peters et al.
2018, arXiv:1802.05365, and its code's).

    embedding = functools.partial(characters.Characters, spelling=words.spelling)   # of data/words.py
    transformer.causal(vocab=words.size, embedding=embedding, head=heads.Untied, ...)

    c = table[characters]                                      # [letters, size]
    y = concat_w relu(max_i W_w . c[i : i + w] + b_w)          # one filter bank for every width w
    y = t * relu(W_H y + b_H) + (1 - t) * y,  t = sigmoid(W_T y + b_T)      # each highway
    x = W y + b

There is no row for a word, so words that no training text had have vectors too, and the head needs a table of its own.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import weights
from llm_jax.core.errors import UserError
from llm_jax.model import init, param
from llm_jax.model.recurrent import sequence

ELMO = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))


class Characters(nn.Module):
  """An embedding, to be used in the place of `heads.Embedding`.

  spelling: () -> int [ids, letters], the characters of every id of the vocabulary, for batches of ids. filters: (width,
  how many) of every bank. characters: rows of their table; size: of a row. highways: layers, 0 for none. gate: the
  first bias b_T; below 0 a highway begins by carrying most of what it reads (Srivastava et al. 2015,
  arXiv:1505.00387, section 2.1; ELMo has -2).
  """

  spelling: Callable[[], np.ndarray]
  filters: tuple = ELMO
  characters: int = 262
  size: int = 16
  highways: int = 2
  gate: float = -2.0

  @nn.compact
  def __call__(self, ids: jax.Array, rows: int, embed: int, dtype: Any) -> jax.Array:
    """ids: int [batch, t], or [batch, t, letters]: the characters of any words. Returns [batch, t, embed]."""
    del rows
    if ids.ndim == 2:
      ids = jnp.asarray(self.spelling())[ids]
    batch, t, letters = ids.shape
    widest = max(width for width, _ in self.filters)
    if letters < widest:
      raise UserError(
        f'words of {letters} characters are shorter than a filter of {widest}: spell them with letters={widest} or more'
      )
    axes, start = ('characters', 'rank'), sequence.uniform(1.0)
    table = param.weight(self, 'table', (self.characters, self.size), axes, start)
    x = weights.lookup(table, ids.reshape(batch, t * letters), dtype=dtype)
    x = x.reshape(batch * t, letters, self.size)
    x = jnp.concatenate([self._bank(x, *bank) for bank in self.filters], axis=-1)
    x = x.reshape(batch, t, -1)
    for number in range(self.highways):
      x = self._highway(x, f'highway_{number}')
    return self._linear(x, 'project', embed, 'od', 0.0)

  def _bank(self, x: jax.Array, width: int, count: int) -> jax.Array:
    """x: [words, letters, size] -> [words, count]."""
    shape, axes = (width, self.size, count), ('taps', 'rank', 'filters')
    w = sequence.vector(self, f'width_{width}', shape, axes, sequence.uniform(0.05))
    b = sequence.vector(self, f'width_{width}_bias', (count,), ('filters',), param.zeros)
    y = jax.lax.conv_general_dilated(
      x, w.astype(x.dtype), (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    return jax.nn.relu(y.max(1) + b.astype(x.dtype))

  def _highway(self, x: jax.Array, name: str) -> jax.Array:
    size = x.shape[-1]
    share = jax.nn.sigmoid(self._linear(x, f'{name}_gate', size, 'or', self.gate))
    return share * jax.nn.relu(self._linear(x, name, size, 'or', 0.0)) + (1 - share) * x

  def _linear(self, x: jax.Array, name: str, size: int, letters: str, bias: float) -> jax.Array:
    """W x + b with the axes of W named by `letters`."""
    shape, axes = (x.shape[-1], size), weights.axes_of(letters)
    w = param.weight(self, name, shape, axes, init.normal(shape[0] ** -0.5))
    b = param.weight(self, f'{name}_bias', (size,), axes[1:], param.constant(bias))
    y = weights.einsum(f'bt{letters[0]},{letters}->bt{letters[1]}', x, w)
    return weights.add(y, b, letters[1])

  @nn.nowrap
  def finish(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """Nothing more, once the positions are in."""
    del rng
    return x

  @nn.nowrap
  def flops(self, embed: int) -> int:
    """FLOPs of a word's products with weights."""
    letters = self.spelling().shape[1]
    banks = sum((letters - w + 1) * w * self.size * count for w, count in self.filters)
    total = sum(count for _, count in self.filters)
    return 2 * (banks + (2 * self.highways * total + embed) * total)
