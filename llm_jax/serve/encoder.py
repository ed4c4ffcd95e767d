"""The encoder's side of the engine: each input is read once, and what cross-attention reads of it lies in pages.

These are pages of pools of their own, as many as the decoder has. A request takes all it needs when it is let in and
gives them back when it goes; they are never written again, so whoever has the same input shares them, and with a prefix
cache they stay until others need the room. Inputs are kept as wholes: what an encoder makes of a token depends on all.
"""

import functools
from collections.abc import Sequence as Several
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree, weights
from llm_jax.model import paged
from llm_jax.serve.pages import Pages
from llm_jax.serve.sequence import Sequence

ONE = {'encoder/inputs': np.zeros((1, 1), np.int32)}  # the smallest input, to ask for shapes with


class Inputs:
  """Whose input lies where. Of a model without an encoder nobody has one, and there are no pages.

  keep: whether inputs stay when nobody has them any more.
  """

  def __init__(self, device: Any, keep: bool):
    self._device, self._keep = device, keep
    self.pages = Pages(device.sizes.pages if device.reading.encodes else 0)

  def admit(self, one: Sequence) -> bool:
    """Gives a request the pages of its input; False while there are too few."""
    ids = one.request.encoded
    one.encoded = self.pages.find(ids, len(ids)) if ids else []
    if one.encoded:
      return True
    need = -(-len(ids) // self._device.sizes.page)
    if self.pages.free + self.pages.cached < need:
      return False
    one.encoded = [self.pages.take() for _ in range(need)]
    one.unread = need > 0
    return True

  def read(self, one: Sequence) -> None:
    """Runs the encoder, unless that was done."""
    if not one.unread:
      return
    ids, one.unread = one.request.encoded, False
    self._device.encode(ids, self.table([one], 1))
    if self._keep:
      self.pages.keep(ids, one.encoded)

  def leave(self, one: Sequence) -> None:
    """Takes the pages back."""
    self.pages.drop(one.encoded)
    one.encoded, one.unread = [], False

  def told(self, several: Several[Sequence], rows: int) -> dict[str, np.ndarray]:
    """What the decoder is told of the inputs of its rows, which may be more than there are requests."""
    if not self.pages.total:
      return {}
    lengths = np.zeros(rows, np.int32)
    lengths[: len(several)] = [len(one.request.encoded) for one in several]
    return {'encoder/pages': self.table(several, rows), 'encoder/lengths': lengths}

  def table(self, several: Several[Sequence], rows: int) -> np.ndarray:
    """int32 [rows, n]: the pages of their inputs, -1 for none."""
    widest = self._device.reading.encodes[-1]
    table = np.full((rows, -(-widest // self._device.sizes.page)), -1, np.int32)
    for row, one in zip(table, several, strict=False):
      row[: len(one.encoded)] = one.encoded
    return table


def holds(path: str) -> bool:
  """Whether a state is cross-attention's."""
  return '/cross/' in path


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def encode(
  f: Any, params: Any, states: Any, ids: jax.Array, count: jax.Array, table: jax.Array
) -> Any:
  """The states with the keys and values of an input written to its pages.

  f: has the model's `states`, and `settle`. ids: int32 [1, width], `count` of them real. table: int32 [1, n].
  """
  at = jnp.arange(ids.shape[1])[None]
  real = at < count
  batch = dict(inputs=jnp.zeros((1, 1), jnp.int32))
  batch |= {
    'encoder/inputs': ids,
    'encoder/positions': at,
    'encoder/segments': real.astype('int32'),
  }
  made = tree.flatten(f.states(params, batch, 1))

  def put(path: str, pool: Any) -> Any:
    if not holds(path):
      return pool
    new = jnp.swapaxes(made[path][0], 1, 2)  # [1, width, groups, head_dim]
    old = jax.tree.map(lambda x: x[0], pool)
    pool = paged.write(dict(x=old), dict(x=new), table, at, real)['x']
    return jax.tree.map(lambda x: x[None], pool)

  whole = lambda x: isinstance(x, weights.Quantized)
  return f.settle(tree.map_paths(put, states, is_leaf=whole))
