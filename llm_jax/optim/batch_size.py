"""Batch sizes that grow during training, as exact functions of the batch's index (host integers, no arrays).

Every function returns `Size(size, seen)`: the size of batch `index` and what all batches before it held, in
one unit of your choice (sequences, or tokens when every size is a multiple of the sequence length). There are
only `(end - start) / multiple + 1` different sizes, hence as many compilations; none beyond the first when the extra
rows go to further microbatches of one size.

As published:

  GPT-3      32K to 3.2M tokens over 4-12B:      ramp(start=32_768, end=3_211_264, multiple=32_768, over=12 * 10**9)
  MT-NLG     32 to 1920 sequences over 12B:      ramp(start=32, end=1920, multiple=32, over=12 * 10**9 // 2048)
  GLM-130B   192 to 4224 over 2.5 % of samples:  ramp(start=192, end=4224, multiple=24, over=samples // 40)
  PaLM       512, 1024, 2048 from 0, 50k, 115k:  table(sizes=((0, 512), (50_000, 1024), (115_000, 2048)))
"""

import bisect
import functools
from typing import NamedTuple

from llm_jax.core.errors import UserError


class Size(NamedTuple):
  """size: of this batch; seen: the sum of the sizes of all batches before it."""

  size: int
  seen: int


class _Stage(NamedTuple):
  """Batches `first, first + 1, ...` of one size; `seen` before the first of them."""

  first: int
  size: int
  seen: int


def fixed(index: int, *, size: int) -> Size:
  """Always `size`."""
  return Size(size, index * size)


def ramp(index: int, *, start: int, end: int, over: int, multiple: int) -> Size:
  """From `start` to `end` in steps of `multiple`, linear in what has been seen, reaching `end` at `over`
  (Megatron-LM's rule)."""
  return _at(index, _ramp_stages(start, end, over, multiple))


def table(index: int, *, sizes: tuple) -> Size:
  """`sizes` ((first batch, size), ...), the first from batch 0."""
  return _at(index, _table_stages(tuple(tuple(s) for s in sizes)))


def _at(index: int, stages: tuple[_Stage, ...]) -> Size:
  if index < 0:
    raise ValueError(f'batches count from 0, got {index}')
  stage = stages[bisect.bisect_right(stages, index, key=lambda s: s.first) - 1]
  return Size(stage.size, stage.seen + (index - stage.first) * stage.size)


@functools.lru_cache(maxsize=64)
def _ramp_stages(start: int, end: int, over: int, multiple: int) -> tuple[_Stage, ...]:
  if not 0 < start <= end or multiple < 1 or over < 1:
    raise UserError(
      f'a batch ramp needs 0 < start <= end, multiple >= 1 and over >= 1, got {start=} {end=} {multiple=} {over=}'
    )
  if (end - start) % multiple:
    near = start + (end - start) // multiple * multiple
    raise UserError(
      f'the batch ramp from {start} to {end} does not divide into steps of {multiple}: set end={near}'
    )
  increments, first, seen, stages = (end - start) // multiple, 0, 0, []
  while True:
    done = min(increments, seen * increments // over)
    stages.append(_Stage(first, start + done * multiple, seen))
    if done == increments:
      return tuple(stages)
    threshold = -(
      -(done + 1) * over // increments
    )  # rounded up: the next size applies once this much has been seen
    batches = -(-(threshold - seen) // stages[-1].size)
    first, seen = first + batches, seen + batches * stages[-1].size


@functools.lru_cache(maxsize=64)
def _table_stages(sizes: tuple) -> tuple[_Stage, ...]:
  firsts = [s[0] for s in sizes]
  if not sizes or firsts[0] != 0 or sorted(set(firsts)) != firsts or any(s[1] < 1 for s in sizes):
    raise UserError(
      f'a batch-size table reads ((0, size), (later batch, size), ...) with rising batches, got {sizes}'
    )
  stages = [_Stage(0, sizes[0][1], 0)]
  for first, size in sizes[1:]:
    last = stages[-1]
    stages.append(_Stage(first, size, last.seen + (first - last.first) * last.size))
  return tuple(stages)
