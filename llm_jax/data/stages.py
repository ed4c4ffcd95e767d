"""Data in stages: one source until a step, then the next (multi-stage instruction tuning, staged mixtures).

    use(stages.make, sources=(use(examples.make, task=tasks), use(examples.make, task=chat)), until=(200,), batch=8)

What a later stage repeats of an earlier one is among its own sets, with a rate of its own.
"""

import bisect
import itertools
from collections.abc import Iterator
from typing import Any

from llm_jax.core.errors import UserError
from llm_jax.data import pipeline


def make(
  model: Any,
  *,
  sources: tuple,
  until: tuple,
  batch: int = 8,
  length: int = 512,
  encoder_length: int | None = None,
) -> 'Stages':
  """Source i gives the batches before number until[i], the last all others.

  sources: as in `cli/train.py`, model -> source; batch, length and encoder_length are set for all of them.
  """
  if (
    len(until) != len(sources) - 1 or list(until) != sorted(set(until)) or min(until, default=1) < 1
  ):
    raise UserError(
      f'{len(sources)} sources need {len(sources) - 1} ascending steps between them, got until={until}'
    )
  sizes = dict(batch=batch, length=length, encoder_length=encoder_length)
  made = tuple(one(model, **sizes) for one in sources)
  if len({one.vocab.fingerprint for one in made}) > 1:
    raise UserError('the stages have different vocabularies: give all sources the same one')
  return Stages(made, tuple(until))


class Stages:
  """Sources that follow one another. See `pipeline.Source` for the methods."""

  def __init__(self, sources: tuple[pipeline.Source, ...], until: tuple[int, ...]):
    self.vocab, self.batch, self.length = (
      getattr(sources[-1], name) for name in ('vocab', 'batch', 'length')
    )
    self._sources, self._until, self._given = sources, until, 0

  def __call__(self, state: Any = None) -> pipeline.Batch:
    """This process' rows of the next global batch."""
    source = self._sources[bisect.bisect_right(self._until, self._given)]
    made = source(state)
    self._given += 1
    return made

  def state(self) -> dict[str, Any]:
    """Where the next batch starts, in every source."""
    return dict(batch=self._given, sources=[one.state() for one in self._sources])

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a `state()`."""
    if len(state.get('sources', ())) != len(self._sources):
      raise UserError(
        f'this is not the state of {len(self._sources)} stages: restore another checkpoint, or set as many sources'
      )
    for one, own in zip(self._sources, state['sources'], strict=True):
      one.restore(own)
    self._given = int(state['batch'])

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches."""
    at = [0, *self._until, self._given + batches]
    for one, (start, stop) in zip(self._sources, itertools.pairwise(at), strict=True):
      stop = min(stop, self._given + batches) if one is not self._sources[-1] else stop
      one.skip(max(0, stop - max(start, self._given)))
    self._given += batches

  def once(self) -> Iterator[pipeline.Batch]:
    """One pass over the data of the last stage."""
    return self._sources[-1].once()

  def close(self) -> None:
    """Stops the threads."""
    for one in self._sources:
      one.close()
