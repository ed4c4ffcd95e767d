"""Sources side by side: every batch has as many rows of each, and says of which one a row is.

texts = tuple(use(pipeline.make, task=use(tasks.domain, name=name)) for name in ('books', 'stories'))
source = use(domains.make, sources=texts, batch=24, length=256)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError

Batch = dict[str, np.ndarray]


def make(
  model: Any,
  *,
  sources: tuple[Callable, ...],
  batch: int = 24,
  length: int = 256,
  encoder_length: int | None = None,
) -> 'Domains':
  """As many rows of every domain in each batch, and which: `domain` int32 [batch], numbers of `sources`.

  sources: as in `cli/train.py`, model -> source, one per domain; batch (of all together), length and encoder_length
  are set for them.
  """
  return Domains(beside(model, sources, batch, length, encoder_length), batch, length)


def beside(
  model: Any,
  sources: tuple[Callable, ...],
  batch: int,
  length: int,
  encoder_length: int | None = None,
) -> tuple:
  """The sources themselves, made for as many rows each."""
  if not sources or batch % len(sources):
    raise UserError(
      f'{batch} rows do not divide over {len(sources)} domains: choose a multiple of it as batch'
    )
  sizes = dict(batch=batch // len(sources), length=length, encoder_length=encoder_length)
  made = tuple(one(model, **sizes) for one in sources)
  if len({one.vocab.fingerprint for one in made}) > 1:
    raise UserError('the domains have different vocabularies: give all sources the same one')
  return made


class Domains:
  """Sources side by side. See `pipeline.Source` for the methods."""

  def __init__(self, sources: tuple, batch: int, length: int):
    self.count, self.batch, self.length = len(sources), batch, length
    self.vocab, self._sources = sources[0].vocab, sources

  def __call__(self, state: Any = None) -> Batch:
    """This process' rows of the next global batch, domain by domain."""
    return self._joined(one(state) for one in self._sources)

  def state(self) -> dict[str, Any]:
    """Where the next batch starts, in every domain."""
    return dict(domains=[one.state() for one in self._sources])

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    if len(state.get('domains', ())) != self.count:
      raise UserError(
        f'this is not the state of {self.count} domains: restore another checkpoint, or set as many sources'
      )
    for one, own in zip(self._sources, state['domains'], strict=True):
      one.restore(own)

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches."""
    for one in self._sources:
      one.skip(batches)

  def once(self) -> Iterator[Batch]:
    """One pass over one domain after the other."""
    for i, one in enumerate(self._sources):
      yield from (_marked(batch, i) for batch in one.once())

  def close(self) -> None:
    """Stops what runs in the background."""
    for one in self._sources:
      one.close()

  def _joined(self, found: Iterable[Batch]) -> Batch:
    parts = [_marked(batch, i) for i, batch in enumerate(found)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _marked(batch: Batch, domain: int) -> Batch:
  return batch | dict(domain=np.full(len(batch['inputs']), domain, np.int32))
