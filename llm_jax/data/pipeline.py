r"""The source of batches: shuffled, denoised, packed, split over processes, resumable from three integers.

The order of all units is fixed by the seed (grain's shuffle, repeat and mix: any position in O(1)) and taken in blocks.
Of a block first only lengths are known: one u per chunk, drawn from (seed, block), decides the lengths of inputs and
targets, and rows are planned from those. Global batch k is the next rows of that sequence; a process reads only the
tokens of its own share, with a generator per chunk keyed by (seed, block, chunk). So the global batches do not
depend on the number of processes, and {'block', 'row', 'batch'} say all there is to say about where training
stands.
"""

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import denoise, readers, tasks

Batch = dict[str, np.ndarray]
_PAGE = 256


class Block(NamedTuple):
  """A planned block. rows: how many; row(r) -> (slot, encoder slot, (inputs, targets)) of each example in row r."""

  rows: int
  row: Callable[[int], Iterator[tuple]]


def make(
  model: Any,
  *,
  task: Callable = tasks.tiny_shakespeare,
  split: str = 'train',
  batch: int = 32,
  length: int = 256,
  encoder_length: int | None = None,
  denoiser: Callable = denoise.causal,
  rows: Callable = batch_lib.pack,
  read: Callable = readers.mapped,
  shuffle: bool = True,
  jitter: bool = True,
  seed: int = 0,
  ramp: Callable | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> 'Source':
  """The source of `batch` global rows of `length` slots for a model.

  model: gives `card` (kind, vocab, length). encoder_length: slots of the encoder, default `length`. denoiser: from
  `data.denoise`. rows: `batch.pack`, `batch.concatenate` or `batch.pad`. read: `readers.mapped` (token maps) or
  `readers.tokenized` (on the fly). jitter: cut long documents elsewhere in every epoch. ramp: k -> (size, seen), the
  rows of batch k, at most `batch`, and of all before it: see `optim.batch_size`. process_index, process_count: default
  jax's. Raises `UserError` for whatever does not fit together, before anything is compiled.
  """
  index, count = processes(process_index, process_count)
  check_sizes(model.card, batch, length, encoder_length, count)
  made = task()
  if split not in made.corpora[0].splits:
    raise UserError(f'there is no split {split!r}; known: {", ".join(made.corpora[0].splits)}')
  check_vocab(model.card, made.vocab)
  noise, filler = denoiser(made.vocab), rows()
  layout = layout_of(model.card.kind, length, encoder_length, filler, made.vocab)
  cut = readers.Cut(
    _raw_length(noise, layout, made.vocab), filler.windows, jitter and shuffle, seed
  )
  opened = [read(corpus, made.vocab, split, cut) for corpus in made.corpora]
  still = cut._replace(jitter=False)
  in_order = functools.cache(
    lambda: [read(corpus, made.vocab, split, still) for corpus in made.corpora]
  )
  block = functools.partial(plan_block, denoiser=noise, layout=layout, plan=filler.plan, seed=seed)
  order = endless_order(opened, made.rates, seed, shuffle)
  return Source(
    made.vocab,
    batch,
    length,
    (index, count),
    ramp,
    functools.partial(fill, layout),
    lambda j: block(j, *order(j)),
    lambda: (block(j, *units) for j, units in enumerate(one_pass(in_order()))),
  )


class Source:
  """Gives batches. Owns the thread that prepares the next two.

  process: (index, count). write(rows, size) -> `size` rows as arrays, of which `rows` are given and the rest padding.
  block: j -> `Block`. one_pass: () -> all blocks once, in order. texts: of `length` each in a row, 2 in one of pairs.
  """

  def __init__(self, vocab, batch, length, process, ramp, write, block, one_pass, texts=1):
    self.vocab, self.batch, self.length, self.texts = vocab, batch, length, texts
    self._process, self._ramp, self._write = process, ramp, write
    self._block, self._one_pass = functools.lru_cache(maxsize=2)(block), one_pass
    self._state = dict(block=0, row=0, batch=0)
    self._worker: _Worker | None = None
    self._rows(0)  # a ramp that cannot work says so now

  def __call__(self, state: Any = None) -> Batch:
    """This process' rows of the next global batch: name -> [rows, length]. The training state is not looked at."""
    if self._worker is None:
      self._worker = _Worker(self._batches(dict(self._state)))
    made, self._state = self._worker.next()
    return made

  def state(self) -> dict[str, int]:
    """Where the next batch starts. Batches prepared ahead do not count."""
    return dict(self._state)

  def restore(self, state: dict[str, int]) -> None:
    """Goes on from a `state()`, also of a run with another number of processes."""
    missing = {'block', 'row', 'batch'} - set(state)
    if missing:
      raise UserError(
        f'this is not the state of a data pipeline ({", ".join(sorted(missing))} missing): restore another checkpoint'
      )
    self.close()
    self._state = {k: int(state[k]) for k in ('block', 'row', 'batch')}

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches without reading their tokens."""
    state = dict(self._state)
    first = state['batch']
    rows = (
      batches * self.batch
      if self._ramp is None
      else self._ramp(first + batches).seen - self._ramp(first).seen
    )
    state['row'] += rows
    while state['row'] >= (size := self._block(state['block']).rows):
      state['row'] -= size
      state['block'] += 1
    self.restore(dict(state, batch=state['batch'] + batches))

  def once(self) -> Iterator[Batch]:
    """One pass over the split in order, every token exactly once, the same every time; the last batch is padded
    with weight 0.
    """
    rows = ((block, r) for block in self._one_pass() for r in range(block.rows))
    while picked := list(itertools.islice(rows, self.batch)):
      yield self._fill(picked, self.batch)

  def close(self) -> None:
    """Stops the thread."""
    if self._worker is not None:
      self._worker.stop()
      self._worker = None

  def _batches(self, state: dict[str, int]) -> Iterator[tuple[Batch, dict[str, int]]]:
    j, r, k = state['block'], state['row'], state['batch']
    while True:
      size, picked = self._rows(k), []
      while len(picked) < size:
        block = self._block(j)
        take = range(r, min(block.rows, r + size - len(picked)))
        picked.extend((block, i) for i in take)
        r = max(take.stop, r)
        if r >= block.rows:
          j, r = j + 1, 0
      k += 1
      yield self._fill(picked, size), dict(block=j, row=r, batch=k)

  def _rows(self, k: int) -> int:
    if self._ramp is None:
      return self.batch
    size, count = self._ramp(k).size, self._process[1]
    if not 0 < size <= self.batch or size % count:
      raise UserError(
        f'the ramp gives {size} rows for batch {k}: it must be at most batch={self.batch} '
        f'and divide by {count} processes'
      )
    return size

  def _fill(self, picked: list[tuple[Block, int]], size: int) -> Batch:
    """This process' share of `size` global rows; rows beyond `picked` are padding."""
    index, count = self._process
    share = size // count
    own = picked[index * share : (index + 1) * share]
    return self._write([block.row(r) for block, r in own], share)


def fill(layout: batch_lib.Layout, rows: list[Iterator[tuple]], size: int) -> Batch:
  """`size` rows of texts; each of `rows` gives (slot, encoder slot, example)."""
  made = batch_lib.empty(layout, size)
  for row, examples in enumerate(rows):
    for number, (at, encoder_at, example) in enumerate(examples, 1):
      batch_lib.put(made, layout, row, number, at, encoder_at, example)
  return made


def plan_block(
  j: int,
  chunks: readers.Chunks,
  *,
  denoiser: denoise.Denoiser,
  layout: batch_lib.Layout,
  plan: Callable,
  seed: int,
) -> Block:
  """Lengths, rows and slots of the chunks of block j; no token of a map is read."""
  rng, at = _generator(seed, j)
  u = rng.random(len(chunks.sizes))
  slots, encoder_slots = batch_lib.slots(layout, *denoiser.lengths(chunks.sizes, chunks.ends, u))
  placed = plan(slots, encoder_slots, layout.length, layout.encoder_length)
  ends, u = chunks.ends.tolist(), u.tolist()

  def example(i: int) -> tuple:
    at(i + 1)
    return denoiser.apply(chunks.get(i), ends[i], u[i], rng)

  return block_of(placed, example)


def block_of(placed: batch_lib.Plan, example: Callable[[int], tuple]) -> Block:
  """The block in which example(i) lies where `placed` says."""
  members = np.lexsort((placed.at, placed.row))[int((placed.row < 0).sum()) :]
  starts = np.searchsorted(placed.row[members], np.arange(placed.rows + 1))
  slot = list(zip(placed.at.tolist(), placed.encoder_at.tolist(), strict=True))

  def row(r: int) -> Iterator[tuple]:
    for i in members[starts[r] : starts[r + 1]].tolist():
      yield *slot[i], example(i)

  return Block(placed.rows, row)


def endless_order(
  opened: list[readers.Reader], rates: tuple, seed: int, shuffle: bool
) -> Callable[[int], tuple]:
  """j -> (chunks of block j,): every epoch of a reader is a fresh permutation of its units, readers are mixed by
  `rates`.
  """
  import grain

  seeds = [(seed * 1009 + i) % (1 << 32) if shuffle else None for i in range(len(opened))]
  unit = lambda s, p: _page(opened[s].units, seeds[s], p // _PAGE)[p % _PAGE]
  far = 1 << 40
  mix = grain.MapDataset.mix(
    [grain.MapDataset.range(i * far, (i + 1) * far) for i in range(len(opened))], list(rates)
  )
  size = min(reader.block for reader in opened)

  def block(j: int) -> tuple:
    positions = range(j * size, (j + 1) * size)
    if len(opened) == 1:
      drawn = [(0, p) for p in positions]
    else:
      drawn = [divmod(mix[p], far) for p in positions]
    return (_gather(opened, [(s, p // opened[s].units, unit(s, p)) for s, p in drawn]),)

  return block


@functools.lru_cache(maxsize=256)
def _page(units: int, seed: int | None, page: int) -> list[int]:
  """Units at `_PAGE` positions of an endless order; kept, because drawing one costs 10 microseconds."""
  import grain

  order = grain.MapDataset.range(units)
  order = (order if seed is None else order.seed(seed).shuffle()).repeat()
  return [order[p] for p in range(page * _PAGE, (page + 1) * _PAGE)]


def one_pass(opened: list[readers.Reader]) -> Iterator[tuple]:
  """Blocks of all units of all readers in order, once."""
  for i, reader in enumerate(opened):
    for start in range(0, reader.units, reader.block):
      yield (
        _gather(
          opened, [(i, 0, unit) for unit in range(start, min(start + reader.block, reader.units))]
        ),
      )


def _gather(opened: list[readers.Reader], drawn: list[tuple[int, int, int]]) -> readers.Chunks:
  """The chunks of (reader, epoch, unit) triples, in their order."""
  source, epoch, unit = np.array(drawn, np.int64).reshape(-1, 3).T
  where = [np.flatnonzero(source == i) for i in range(len(opened))]
  parts = [reader.chunks(unit[w], epoch[w]) for reader, w in zip(opened, where, strict=True)]
  if len(parts) == 1:
    return parts[0]
  place = np.concatenate([w[part.units] for w, part in zip(where, parts, strict=True)])
  owner = np.concatenate([np.full(len(part.sizes), i) for i, part in enumerate(parts)])
  local = np.concatenate([np.arange(len(part.sizes)) for part in parts])
  order = np.argsort(place, kind='stable')
  owner, local = owner[order].tolist(), local[order].tolist()
  sizes, ends = (
    np.concatenate([getattr(part, f) for part in parts])[order] for f in ('sizes', 'ends')
  )
  return readers.Chunks(sizes, ends, place[order], lambda i: parts[owner[i]].get(local[i]))


def check_sizes(
  card: Any, batch: int, length: int, encoder_length: int | None, processes: int
) -> None:
  """Raises `UserError` for a batch or length that cannot work, with the number that can."""
  if batch < 1 or batch % processes:
    raise UserError(
      f'a batch of {batch} rows does not divide over {processes} processes: choose a multiple of {processes}'
    )
  for name, value in (('length', length), ('encoder_length', encoder_length)):
    if value is not None and value < 2:
      raise UserError(f'{name} must be at least 2, got {value}')
    if value is not None and card.length is not None and value > card.length:
      raise UserError(
        f"{name}={value} is longer than the {card.length} positions of the model: lower it or raise the model's table"
      )
  if encoder_length is not None and card.kind != 'encoder_decoder':
    raise UserError(
      f'encoder_length is set but the model is {card.kind}: only an encoder-decoder has an encoder'
    )


def check_vocab(card: Any, vocab: Any) -> None:
  """Raises `UserError` when the vocabulary has ids that the model's table has no row for."""
  if vocab.size > card.vocab:
    raise UserError(
      f'the vocabulary has {vocab.size} ids, the model {card.vocab} rows: '
      f'set model.vocab={vocab.size} or vocab.size={card.vocab}'
    )


def processes(index: int | None, count: int | None) -> tuple[int, int]:
  """(index, count) as given, else jax's."""
  if (index is None) != (count is None):
    raise UserError('set both process_index and process_count, or neither')
  if index is None:
    import jax

    index, count = jax.process_index(), jax.process_count()
  return index, count


def layout_of(
  kind: str, length: int, encoder_length: int | None, filler: batch_lib.Rows, vocab: Any
) -> batch_lib.Layout:
  """How the rows of a model of this kind are laid out."""
  encoder = kind == 'encoder_decoder'
  return batch_lib.Layout(
    kind,
    length,
    (encoder_length or length) if encoder else 0,
    encoder or not filler.windows,
    vocab.first,
    vocab.eos,
  )


def _raw_length(noise: denoise.Denoiser, layout: batch_lib.Layout, vocab: Any) -> int:
  if layout.kind == 'encoder_decoder':
    if not noise.longest(np.array([8]))[0].any():
      raise UserError(
        'causal language modelling gives the encoder nothing to read: use denoise.prefix_lm or span_corruption'
      )
    raw = denoise.raw_length(noise, inputs=layout.encoder_length, targets=layout.length)
  else:
    raw = denoise.raw_length(noise, total=layout.length)
  need, have = noise.sentinels(raw), len(vocab.sentinels)
  if need > have:
    raise UserError(
      f'the denoiser needs {need} sentinels for {raw} tokens and the vocabulary has {have}: set vocab.extra_ids={need}'
    )
  return raw


def _generator(seed: int, block: int) -> tuple[np.random.Generator, Callable[[int], None]]:
  """A generator keyed by (seed, block) and a function that moves it to its stream number `i` (Philox counts: no
  state).
  """
  bits = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, block])
  state = bits.state

  def at(i: int) -> None:
    state['state']['counter'][:] = (0, 0, i, 0)
    bits.state = state

  return np.random.Generator(bits), at


class _Worker:
  """Runs an iterator in a thread, two items ahead."""

  def __init__(self, items: Iterator):
    self._items, self._queue, self._stopped = items, queue.Queue(2), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True, name='llm_jax data')
    self._thread.start()

  def _run(self) -> None:
    try:
      for item in self._items:
        if not self._offer((item, None)):
          return
    except BaseException as e:  # whatever it is belongs to the caller of next()
      self._offer((None, e))

  def _offer(self, item: tuple) -> bool:
    while not self._stopped.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def next(self) -> Any:
    item, error = self._queue.get()
    if error is not None:
      self._queue.put((None, error))
      raise error
    return item

  def stop(self) -> None:
    self._stopped.set()
    while self._thread.is_alive():
      while not self._queue.empty():
        self._queue.get_nowait()
      self._thread.join(timeout=0.05)
