"""Texts with a class: which of several kinds of text a row is.

texts = tuple(use(pipeline.make, task=use(tasks.domain, name=name)) for name in ('books', 'stories'))
source = use(labels.kinds, sources=texts, batch=16, length=64)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError

Batch = dict[str, np.ndarray]


def kinds(
  model: Any, *, sources: tuple[Callable, ...], batch: int = 24, length: int = 64
) -> 'Kinds':
  """The rows of several sources one after the other; `label` int32 [batch] is the number of a row's source.

  sources: model -> source, made with `rows=batch.pad` or `batch.concatenate`: one text per row; their own batch (of all
  together: `batch`) and length are not used. `at` int32 [batch] is where the class is read: the last position that
  counts, of an encoder alone the first, for there every position has seen all.
  """
  if len(sources) < 2 or batch % len(sources):
    raise UserError(
      f'batch={batch} rows of {len(sources)} kinds: name two or more kinds, and a multiple of their number of rows'
    )
  sizes = dict(batch=batch // len(sources), length=length)
  return Kinds([source(model, **sizes) for source in sources], model.card.kind)


class Kinds:
  """Several sources as one, with labels."""

  def __init__(self, sources: list, kind: str):
    self.batch, self.length = sum(one.batch for one in sources), sources[0].length
    self.vocab, self._sources, self._kind = sources[0].vocab, sources, kind

  def __call__(self, state: Any = None) -> Batch:
    """The next rows of every source."""
    return self._joined([one(state) for one in self._sources])

  def once(self) -> Iterator[Batch]:
    """One pass, in order, until the first source ends: every batch has rows of all."""
    for found in zip(*(one.once() for one in self._sources), strict=False):
      yield self._joined(list(found))

  def state(self) -> dict[str, Any]:
    """Where the next batch starts."""
    return {str(i): one.state() for i, one in enumerate(self._sources)}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    for i, one in enumerate(self._sources):
      one.restore(state[str(i)])

  def skip(self, batches: int) -> None:
    """Leaves out the next batches."""
    for one in self._sources:
      one.skip(batches)

  def close(self) -> None:
    """Stops what runs in the background."""
    for one in self._sources:
      one.close()

  def _joined(self, found: list[Batch]) -> Batch:
    made = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    rows = [len(one['inputs']) for one in found]
    label = np.repeat(np.arange(len(found)), rows).astype(np.int32)
    there = made['weights'] > 0
    at = np.where(there, np.arange(there.shape[1]), 0).max(1).astype(np.int32)
    return dict(made, label=label, at=np.zeros_like(at) if self._kind == 'encoder' else at)
