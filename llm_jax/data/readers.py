"""Units and chunks: how a corpus is cut into the pieces that are shuffled, and how their ids are read.

A unit is what the shuffle moves: a piece of a document (or a window of the stream) found by number in O(1). A chunk is
what a denoiser gets. From a token map each unit is one chunk, whose length is known without reading it. On the fly
a unit is a piece of text, tokenised when its block comes up, that may give several chunks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import materialize


class Cut(NamedTuple):
  """raw: ids in a chunk at most, a document's end counted. windows: chunks ignore documents.

  jitter: long documents are cut elsewhere in every epoch, by an offset drawn from (seed, epoch, document).
  """

  raw: int
  windows: bool
  jitter: bool
  seed: int


class Chunks(NamedTuple):
  """sizes: int64 [n], ids without end of document. ends: bool [n], the document ends here.

  units: int64 [n], which of the units asked for it is from, ascending. get(i) -> ids int32 [sizes[i]].
  """

  sizes: np.ndarray
  ends: np.ndarray
  units: np.ndarray
  get: Callable[[int], np.ndarray]


class Reader(NamedTuple):
  """units: in one epoch. block: how many units make a good block to plan at a time.

  chunks(units, epochs) -> Chunks, in the order of the units.
  """

  units: int
  block: int
  chunks: Callable[[np.ndarray, np.ndarray], Chunks]


def mapped(corpus: Any, vocab: Any, split: str, cut: Cut) -> Reader:
  """Reads the corpus' token map, which is made on first use."""
  found = materialize.tokens(corpus, vocab, split)
  ids, offsets = found.tokens, found.documents
  sizes = np.array([offsets[-1]], np.int64) if cut.windows else np.diff(offsets)
  first, locate = pieces(sizes, cut)

  def chunks(units: np.ndarray, epochs: np.ndarray) -> Chunks:
    document, start, stop = locate(units, epochs)
    ends = (stop == sizes[document]) & (stop > start) & (not cut.windows)
    at, n = offsets[document] + start, stop - start - ends
    low, high = at.tolist(), (at + n).tolist()
    return Chunks(n, ends, np.arange(len(n)), lambda i: ids[low[i] : high[i]].astype(np.int32))

  return Reader(first, _block(cut, len(ids) / first), chunks)


def tokenized(corpus: Any, vocab: Any, split: str, cut: Cut) -> Reader:
  """Tokenises on the fly. Nothing is written, but every process tokenises every block, and skipping costs as much
  as reading.
  """
  documents = corpus.documents(split)
  if documents is None:
    raise UserError(
      f'{corpus.name} cannot be read at random: use read=readers.mapped, which stores its tokens once'
    )
  sizes = documents.sizes
  # A piece of text has room for several chunks, so that few tokens are lost to its ends.
  first, locate = pieces(
    sizes, cut._replace(raw=16 * cut.raw if documents.divisible else int(sizes.max()))
  )

  def chunks(units: np.ndarray, epochs: np.ndarray) -> Chunks:
    texts = []  # (ids, does the document end there, unit)
    for unit, (document, start, stop) in enumerate(
      zip(*(x.tolist() for x in locate(units, epochs)), strict=True)
    ):
      if ids := vocab.encode(documents.read(document, start, stop)):
        closed = bool(stop == sizes[document])
        texts.append((np.array(ids + [vocab.eos] * closed, np.int32), closed, unit))
    if cut.windows and texts:
      texts = [(np.concatenate([ids for ids, _, _ in texts]), False, 0)]
    spans = [
      (*text, s, min(s + cut.raw, len(text[0])))
      for text in texts
      for s in range(0, len(text[0]), cut.raw)
    ]
    ends = np.array([closed and stop == len(ids) for ids, closed, _, _, stop in spans], bool)
    n = np.array([stop - start for *_, start, stop in spans], np.int64) - ends
    from_unit = np.array([unit for _, _, unit, _, _ in spans], np.int64)
    if cut.windows:
      from_unit = np.arange(len(n)) * len(units) // max(len(n), 1)
    return Chunks(n, ends, from_unit, lambda i: spans[i][0][spans[i][3] : spans[i][3] + n[i]])

  return Reader(first, _block(cut, int(sizes.sum()) / first), chunks)


def pieces(sizes: np.ndarray, cut: Cut) -> tuple[int, Callable]:
  """How many pieces of at most `cut.raw` the documents have, and a function that locates them.

  locate(units, epochs) -> (document, start, stop), arrays like `units`. Without jitter document d has ceil(size / raw)
  pieces. With it a document longer than raw has ceil((size - 1) / raw) + 1, the first of them `offset` long, 1 <=
  offset <= raw, the last possibly empty; so the number of units is the same in every epoch and each token is in
  exactly one.
  """
  raw = cut.raw
  moved = (sizes > raw) & cut.jitter
  counts = np.where(moved, -(-(sizes - 1) // raw) + 1, -(-sizes // raw))
  ends = np.cumsum(counts)

  def locate(units: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    document = np.searchsorted(ends, units, side='right')
    k = units - (ends[document] - counts[document])
    offset = np.where(
      moved[document], 1 + hashed(cut.seed, epochs, document) % np.uint64(raw), raw
    ).astype(np.int64)
    stop = offset + k * raw
    size = sizes[document]
    return document, np.minimum(np.maximum(stop - raw, 0), size), np.minimum(stop, size)

  return int(ends[-1]), locate


def hashed(seed: int, *numbers: np.ndarray) -> np.ndarray:
  """uint64 that look random, one per element of `numbers` (SplitMix64; Steele et al. 2014)."""
  x = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
  with np.errstate(over='ignore'):
    for number in numbers:
      x = (x ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
      x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      x = x ^ (x >> np.uint64(31))
  return x


def _block(cut: Cut, per_unit: float) -> int:
  """Units for about 512 rows: packing leaves gaps only where a block ends."""
  return int(np.clip(512 * cut.raw / max(per_unit, 1), 16, 1 << 16))
