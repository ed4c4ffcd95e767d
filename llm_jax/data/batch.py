r"""The batch: what every array in it means, how examples become rows, and how rows are filled.

    name               shape                       meaning
    inputs             [batch, length] int32       what the decoder reads: targets shifted right, per segment
    targets            [batch, length] int32       what it predicts: inputs then targets of the example; 0 = padding
    weights            [batch, length] float32     1 where the prediction counts: on the example's targets
    positions          [batch, length] int32       0, 1, 2 ... restarting in every segment
    segments           [batch, length] int32       1, 2 ... per example in the row; 0 = padding
    prefix             [batch, length] bool        keys that every query of the segment may see: positions 0 .. P, where
                                                   P = length of the example's inputs (position 0 holds the start)
    branches           [batch, length] int32       of comparisons that read their prompt once (data/branches.py): 0 the
                                                   prompt, 1 and 2 the answers, which do not see one another
    encoder/inputs     [batch, encoder] int32      encoder-decoder models only; then the decoder holds targets alone
    encoder/positions, encoder/segments            as above; decoder segment k looks at encoder segment k
    types              [batch, length] int32       an encoder alone: 0 in the first sentence, 1 in the second
    order              [batch, length] int32       likewise: places in a factorisation order (data/permuted.py)
    label, at          [batch] int32               the class of a row and where it is read (data/labels.py)

`positions` and `segments` are absent where each row is one segment that starts at 0 (`concatenate`, no encoder),
`prefix` is absent unless the model is a prefix decoder. The inputs of an encoder alone are its targets, not shifted,
until `data/masked.py` hides some. What is absent never changes from batch to batch. Ids of our own vocabularies: 0
padding and first, 1 end of document; imported ones have theirs.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
  """inputs, targets: int32 ids, what is given and what is predicted. weights: f32 like targets, None for ones. first:
  the id that a decoder reads before it, None for the layout's."""

  inputs: np.ndarray
  targets: np.ndarray
  weights: np.ndarray | None = None
  first: int | None = None


class Layout(NamedTuple):
  """kind: 'causal', 'prefix', 'encoder' or 'encoder_decoder'. segments: whether positions and segments are emitted.
  first: the id that a decoder reads before an example. eos: ends a document."""

  kind: str
  length: int
  encoder_length: int
  segments: bool
  first: int = 0
  eos: int = 1


class Plan(NamedTuple):
  """Where each example goes: its row (-1: none), its first slot in the decoder and in the encoder. rows: how many."""

  row: np.ndarray
  at: np.ndarray
  encoder_at: np.ndarray
  rows: int


class Rows(NamedTuple):
  """A way to fill rows. windows: examples are windows of the stream of all documents, else pieces of single documents.

  plan(slots, encoder_slots, length, encoder_length) -> Plan, for examples that need these numbers of slots.
  """

  windows: bool
  plan: Callable[[np.ndarray, np.ndarray, int, int], Plan]


def concatenate() -> Rows:
  """One window of the stream per row, ignoring where documents begin and end (nanoGPT, GPT-2); no segments."""

  def plan(slots, encoder_slots, length, encoder_length):
    used = slots > 0
    zero = np.zeros(len(slots), np.int64)
    return Plan(np.where(used, np.cumsum(used) - 1, -1), zero, zero, int(used.sum()))

  return Rows(True, plan)


def pack() -> Rows:
  """Pieces of documents, several to a row, by best fit; segments keep them apart."""
  return Rows(False, best_fit)


def pad() -> Rows:
  """One piece of a document per row, padded."""
  return Rows(False, concatenate().plan)


def best_fit(
  slots: np.ndarray, encoder_slots: np.ndarray, length: int, encoder_length: int
) -> Plan:
  """Best-fit decreasing: the largest example first, each into the fullest row with room for it.

  Never more than 11/9 of the fewest rows possible, plus 6/9 (Dosa and Sgall 2014), without an
  encoder; with one, a row must have room in both. The rows are then put in an arbitrary fixed
  order, for they were opened in order of size.
  """
  size = np.maximum(slots / length, encoder_slots / max(encoder_length, 1))
  row, at, encoder_at = (np.full(len(slots), -1, np.int64) for _ in range(3))
  needs, encoder_needs = slots.tolist(), encoder_slots.tolist()
  rooms: list[tuple[int, int]] = []  # (free slots, row), sorted
  encoder_used: list[int] = []
  for i in np.argsort(-size, kind='stable')[: int((slots > 0).sum())].tolist():
    need, encoder_most = needs[i], encoder_length - encoder_needs[i]
    k = bisect.bisect_left(rooms, (need, -1))
    while k < len(rooms) and encoder_used[rooms[k][1]] > encoder_most:
      k += 1
    if k < len(rooms):
      room, r = rooms.pop(k)
    else:
      room, r = length, len(encoder_used)
      encoder_used.append(0)
    row[i], at[i], encoder_at[i] = r, length - room, encoder_used[r]
    encoder_used[r] += encoder_needs[i]
    if room > need:
      bisect.insort(rooms, (room - need, r))
  rows = len(encoder_used)
  order = np.random.default_rng(rows).permutation(rows)
  return Plan(np.where(row < 0, -1, order[row]) if rows else row, at, encoder_at, rows)


def slots(layout: Layout, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(decoder, encoder) slots for examples with these lengths of inputs and targets."""
  if layout.kind == 'encoder_decoder':
    return targets, np.where(targets > 0, np.maximum(inputs, 1), 0)
  return inputs + targets, np.zeros_like(inputs)


def empty(layout: Layout, rows: int) -> dict[str, np.ndarray]:
  """Arrays for `rows` rows of padding."""
  shape = (rows, layout.length)
  batch = dict(
    inputs=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    weights=np.zeros(shape, np.float32),
  )
  if layout.segments:
    batch.update(positions=np.zeros(shape, np.int32), segments=np.zeros(shape, np.int32))
  if layout.kind == 'prefix':
    batch['prefix'] = np.zeros(shape, bool)
  if layout.kind == 'encoder_decoder':
    for name in ('inputs', 'positions', 'segments'):
      batch[f'encoder/{name}'] = np.zeros((rows, layout.encoder_length), np.int32)
  return batch


def put(
  batch: dict[str, np.ndarray],
  layout: Layout,
  row: int,
  segment: int,
  at: int,
  encoder_at: int,
  example: tuple,
) -> None:
  """Writes an `Example`, or its first fields, into a row, in place, as its segment number `segment` (from 1)."""
  inputs, targets, weights, first = Example(*example)
  start, given = at, 0
  if layout.kind == 'encoder_decoder':
    if not len(inputs):  # an encoder must have something to look at
      inputs = np.array([layout.eos], np.int32)
    span = slice(encoder_at, encoder_at + len(inputs))
    batch['encoder/inputs'][row, span] = inputs
    batch['encoder/positions'][row, span] = _arange(len(inputs))
    batch['encoder/segments'][row, span] = segment
  elif len(inputs):
    given = len(inputs)
    batch['targets'][row, start : start + given] = inputs
  end = start + given + len(targets)
  batch['targets'][row, start + given : end] = targets
  if layout.kind == 'encoder':
    batch['inputs'][row, start:end] = batch['targets'][row, start:end]
  else:
    batch['inputs'][row, start] = layout.first if first is None else first
    batch['inputs'][row, start + 1 : end] = batch['targets'][row, start : end - 1]
  batch['weights'][row, start + given : end] = 1 if weights is None else weights
  if layout.segments:
    batch['positions'][row, start:end] = _arange(end - start)
    batch['segments'][row, start:end] = segment
  if layout.kind == 'prefix':
    batch['prefix'][row, start : start + given + 1] = True


_COUNT = np.arange(1 << 16, dtype=np.int32)


def _arange(n: int) -> np.ndarray:
  return _COUNT[:n] if n <= len(_COUNT) else np.arange(n, dtype=np.int32)
