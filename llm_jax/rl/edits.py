"""What a revision changed: which tokens it put in, and which it took out (FIGA)."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def credit(
  before: Sequence[int],
  after: Sequence[int],
  *,
  added: float = 1.0,
  removed: float = 0.5,
  kept: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
  """(f32 [len(after)], f32 [len(before)]): `added` where `after` has tokens of its own, else `kept`; `removed` where
  `before` has tokens of its own, else 0 (Guo et al. 2023, arXiv:2311.04072, equations 4 and 5)."""
  new = np.full(len(after), kept, np.float32)
  old = np.zeros(len(before), np.float32)
  matcher = difflib.SequenceMatcher(None, list(before), list(after), autojunk=False)
  for kind, a, b, c, d in matcher.get_opcodes():
    if kind != 'equal':
      old[a:b], new[c:d] = removed, added
  return new, old


def with_credit(
  model: Any,
  *,
  source: Callable,
  added: float = 1.0,
  removed: float = 0.5,
  kept: float = 0.0,
) -> 'Credited':
  """A source of pairs whose `chosen` is the revised and `rejected` the first answer, with `chosen/credit` and
  `rejected/credit` f32 [batch, length] for `objectives.feedback.figa`."""
  return Credited(source(model), dict(added=added, removed=removed, kept=kept))


class Credited:
  """The batches of `source` with credits."""

  def __init__(self, source: Any, settings: dict[str, float]):
    self.source, self._settings = source, settings

  def __getattr__(self, name: str) -> Any:
    return getattr(self.__dict__['source'], name)

  def __call__(self, state: Any = None) -> dict[str, Any]:
    return self._add(self.source(state))

  def once(self) -> Any:
    """One pass over the data."""
    return map(self._add, self.source.once())

  def _add(self, batch: dict[str, Any]) -> dict[str, Any]:
    sides = ('chosen', 'rejected')
    found = {name: np.zeros_like(batch[f'{name}/weights']) for name in sides}
    for row in range(len(batch['chosen/targets'])):
      where = {name: np.flatnonzero(batch[f'{name}/weights'][row]) for name in sides}
      ids = {name: batch[f'{name}/targets'][row][at].tolist() for name, at in where.items()}
      new, old = credit(ids['rejected'], ids['chosen'], **self._settings)
      found['chosen'][row, where['chosen']] = new
      found['rejected'][row, where['rejected']] = old
    return dict(batch, **{f'{name}/credit': x for name, x in found.items()})
