"""Texts with a class: which of several kinds of text a row is.

texts = tuple(use(pipeline.make, task=use(tasks.domain, name=name)) for name in ('books', 'stories'))
source = use(labels.kinds, sources=texts, batch=16, length=64)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import domains


def kinds(
  model: Any, *, sources: tuple[Callable, ...], batch: int = 24, length: int = 64
) -> 'Kinds':
  """As many rows of every kind in each batch; `label` int32 [batch] is the number of a row's source.

  sources: model -> source, made with `rows=batch.pad` or `batch.concatenate`: one text per row; their own batch (of all
  together: `batch`) and length are not used. `at` int32 [batch] is where the class is read: the last position that
  counts, of an encoder alone the first, for there every position has seen all.
  """
  if len(sources) < 2:
    raise UserError(f'{len(sources)} kind of text is no choice: give two or more sources')
  made = domains.beside(model, sources, batch, length)
  return Kinds(made, batch, length, model.card.kind)


class Kinds(domains.Domains):
  """Domains as classes."""

  def __init__(self, sources: tuple, batch: int, length: int, kind: str):
    super().__init__(sources, batch, length)
    self._kind = kind

  def once(self) -> Iterator[domains.Batch]:
    """One pass, in order, until the first source ends: every batch has rows of all."""
    return map(self._joined, zip(*(one.once() for one in self._sources), strict=False))

  def _joined(self, found: Iterable[domains.Batch]) -> domains.Batch:
    made = super()._joined(found)
    label, there = made.pop('domain'), made['weights'] > 0
    at = np.where(there, np.arange(there.shape[1]), 0).max(1).astype(np.int32)
    return dict(made, label=label, at=np.zeros_like(at) if self._kind == 'encoder' else at)
