"""Local text as documents: which bytes of which file each one is, checked once, read at random. No TensorFlow.

A `Corpus` knows its splits; `documents(split)` is an index of byte spans, so a document or a piece of one is read
without touching the rest. Files ending in `.gz` are decompressed into memory, others are memory-mapped.
"""

import codecs
import functools
import glob
import gzip
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError, nearest

_CHUNK = 1 << 26


class Documents(NamedTuple):
  """The documents of one split, in order.

  sizes: int64 [n], bytes. read(i, start, stop) -> str: the bytes [start, stop) of document i, moved right to the next
  character boundaries so that neighbouring pieces meet exactly. divisible: whether pieces may be asked for.
  """

  sizes: np.ndarray
  read: Callable[[int, int, int], str]
  divisible: bool


class Corpus(NamedTuple):
  """A source of text. texts(split) iterates over whole documents; documents(split) is None without random access."""

  name: str
  fingerprint: str
  splits: tuple
  texts: Callable[[str], Iterator[str]]
  documents: Callable[[str], Documents | None]
  seqio_source: Callable[[], Any]
  key: str = 'text'  # where SeqIO's examples hold the text


def files(pattern: str | Sequence[str]) -> list[str]:
  """The files that a path, a glob or a tuple of them names, sorted within each. Raises `UserError` when one names
  none.
  """
  found = []
  for one in (pattern,) if isinstance(pattern, str) else pattern:
    one = os.path.expanduser(one)
    matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one] * os.path.exists(one)
    if not matches:
      folder = os.path.dirname(one) or '.'
      if not os.path.isdir(folder):
        raise UserError(f'no file {one!r}: the folder {folder!r} does not exist')
      raise UserError(
        f'no file {one!r}; {nearest(one, [os.path.join(os.path.dirname(one), f) for f in os.listdir(folder)])}'
      )
    for match in matches:
      if os.path.isdir(match):
        raise UserError(
          f'{match!r} is a folder: name its files, for instance {os.path.join(match, "*.txt")!r}'
        )
    found.extend(matches)
  if not found:
    raise UserError('no training files: set task.train to a path, a glob or a tuple of them')
  return found


def fingerprint(paths: Sequence[str], *settings: Any) -> str:
  """A hash of the files' content (of size, date and ends where a file is over 1 GiB) and of `settings`."""
  digest = hashlib.sha256(repr(settings).encode())
  for path in paths:
    size = os.path.getsize(path)
    digest.update(f'{size}'.encode())
    with open(path, 'rb') as f:
      if size > 1 << 30:
        digest.update(f'{os.path.getmtime(path)}'.encode() + f.read(1 << 20))
        f.seek(-(1 << 20), os.SEEK_END)
      while block := f.read(_CHUNK):
        digest.update(block)
  return digest.hexdigest()[:16]


@functools.cache
def content(path: str) -> bytes | mmap.mmap:
  """The bytes of a file as `load` gives them, kept open."""
  return load(path)


def load(path: str) -> bytes | mmap.mmap:
  """The bytes of a file, after checking that they are UTF-8 text.

  Raises `UserError` naming file and byte offset.
  """
  try:
    if path.endswith('.gz'):
      data = gzip.open(path).read()
    else:
      with open(path, 'rb') as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b''
  except PermissionError as e:
    raise UserError(f'cannot read {path}: permission denied; run chmod +r on it') from e
  except (OSError, EOFError) as e:
    raise UserError(
      f'cannot read {path} ({e}): the file is damaged or not what its name says; fetch it again'
    ) from e
  if data[:2] == b'\x1f\x8b':
    raise UserError(f'{path} is compressed by gzip but not named so: rename it to {path}.gz')
  zero = data[:4096].find(b'\0')
  if zero >= 0:
    raise UserError(f'{path} is a binary file (a zero byte at offset {zero}): pass UTF-8 text')
  decoder = codecs.getincrementaldecoder('utf-8')()
  for start in range(0, len(data), _CHUNK):
    pending = len(decoder.getstate()[0])
    try:
      decoder.decode(data[start : start + _CHUNK], final=start + _CHUNK >= len(data))
    except UnicodeDecodeError as e:
      at = start - pending + e.start
      raise UserError(
        f'{path} is not UTF-8: byte 0x{data[at]:02x} at offset {at}; '
        'convert it, for instance with iconv -f latin1 -t utf-8'
      ) from e
  return data


def whole_file(data: bytes) -> np.ndarray:
  """One document per file. Returns the spans [n, 2] of the documents in `data`."""
  return np.array([[0, len(data)]] if len(data) else [], np.int64).reshape(-1, 2)


def lines(data: bytes) -> np.ndarray:
  """One document per line that is not empty, without its newline. Returns spans [n, 2]."""
  parts = (np.frombuffer(data[s : s + _CHUNK], np.uint8) for s in range(0, len(data), _CHUNK))
  marks = [np.flatnonzero(part == 0x0A) + i * _CHUNK for i, part in enumerate(parts)]
  return _between(np.concatenate([*marks, np.zeros(0, np.int64)]), 1, len(data))


def paragraphs(data: bytes) -> np.ndarray:
  """Documents separated by blank lines. Returns spans [n, 2]."""
  found, at = [], data.find(b'\n\n')
  while at >= 0:
    found.append(at)
    at = data.find(b'\n\n', at + 2)
  ends = np.array(found, np.int64)
  spans = _between(ends, 2, len(data))
  skip = np.array(
    [len(data[s : min(s + 64, e)]) - len(data[s : min(s + 64, e)].lstrip(b'\n')) for s, e in spans],
    np.int64,
  )
  spans[:, 0] = np.minimum(spans[:, 0] + skip, spans[:, 1])
  spans[:, 1] -= [data[e - 1 : e] == b'\n' and e > s for s, e in spans]
  return spans[spans[:, 1] > spans[:, 0]]


def _between(marks: np.ndarray, width: int, end: int) -> np.ndarray:
  spans = np.stack(
    [np.concatenate([[0], marks + width]), np.concatenate([marks, [end]])], 1
  ).astype(np.int64)
  return spans[spans[:, 1] > spans[:, 0]]


def text(
  name: str,
  train: Sequence[str],
  heldout: float | Sequence[str],
  cut: Callable[[bytes], np.ndarray],
) -> Corpus:
  """Plain text files. heldout: the fraction of the characters, at the end, that is the validation split, or its
  files.
  """
  paths, held = files(train), () if isinstance(heldout, float | int) else files(heldout)
  check_fraction(heldout)

  @functools.cache
  def spans() -> dict[str, np.ndarray]:
    found = _index(paths, cut)
    if held:
      return {'train': found, 'validation': _index(held, cut)}
    return dict(zip(('train', 'validation'), _cut_tail(found, paths, float(heldout)), strict=True))

  def documents(split: str) -> Documents:
    where = paths if split == 'train' or not held else held
    index = spans()[split]
    read = lambda i, start, stop: _slice(content(where[index[i, 0]]), *index[i, 1:], start, stop)
    return Documents(index[:, 2] - index[:, 1], read, True)

  key = fingerprint(
    [*paths, *held], 'text', getattr(cut, '__name__', str(cut)), heldout if not held else len(held)
  )
  return _corpus(name, key, documents)


def jsonl(name: str, train: Sequence[str], heldout: float | Sequence[str], key: str) -> Corpus:
  """JSON lines: one record each, its text under `key`. heldout: the last fraction of the records, or its files."""
  paths, held = files(train), () if isinstance(heldout, float | int) else files(heldout)
  check_fraction(heldout)

  @functools.cache
  def spans() -> dict[str, np.ndarray]:
    found = _index(paths, lines)
    if held:
      return {'train': found, 'validation': _index(held, lines)}
    n = min(max(int(len(found) * (1 - heldout)), 1), max(len(found) - 1, 1))
    return {'train': found[:n], 'validation': found[n:]}

  def documents(split: str) -> Documents:
    where = paths if split == 'train' or not held else held
    index = spans()[split]
    return Documents(
      index[:, 2] - index[:, 1],
      lambda i, start, stop: record(where[index[i, 0]], *index[i, 1:], key),
      False,
    )

  mark = fingerprint([*paths, *held], 'jsonl', key, heldout if not held else len(held))
  return _corpus(name, mark, documents)


def record(path: str, start: int, stop: int, key: str) -> str:
  """The text of one JSON record. Raises `UserError` naming the line."""
  data = content(path)
  line = lambda: data[:start].count(b'\n') + 1
  try:
    value = json.loads(data[start:stop])
  except json.JSONDecodeError as e:
    raise UserError(
      f'{path} line {line()} is not JSON ({e.msg}): correct or remove the line'
    ) from e
  if not isinstance(value, dict) or key not in value:
    known = value if isinstance(value, dict) else ()
    raise UserError(f'{path} line {line()} has no key {key!r}; {nearest(key, known)}; set task.key')
  if not isinstance(value[key], str):
    raise UserError(
      f'{path} line {line()}: {key!r} holds {type(value[key]).__name__}, not text; set task.key'
    )
  return value[key]


def check_fraction(heldout: float | Sequence[str]) -> None:
  """Raises `UserError` for a fraction that leaves one of the splits empty."""
  if isinstance(heldout, float | int) and not 0 < heldout < 1:
    raise UserError(
      f'heldout must be files or a fraction between 0 and 1, got {heldout}: set for instance task.heldout=0.1'
    )


def sample(corpus: Corpus, limit: int) -> Iterator[str]:
  """About `limit` bytes of the training split: pieces of at most 64 kB at equal distances, the same every time."""
  documents = corpus.documents('train')
  if documents is None:
    for one in corpus.texts('train'):
      yield one
      limit -= len(one)
      if limit <= 0:
        return
    return
  total = int(documents.sizes.sum())
  if not documents.divisible or total <= limit:
    keep = min(1.0, limit / max(total, 1))
    chosen = np.flatnonzero(np.diff(np.floor(np.arange(len(documents.sizes) + 1) * keep)))
    for i in chosen if keep < 1 else range(len(documents.sizes)):
      yield documents.read(int(i), 0, int(documents.sizes[i]))
    return
  ends = np.cumsum(documents.sizes)
  for at in np.linspace(0, total, limit >> 16, endpoint=False).astype(np.int64):
    i = int(np.searchsorted(ends, at, side='right'))
    start = int(at - (ends[i] - documents.sizes[i]))
    yield documents.read(i, start, min(start + (1 << 16), int(documents.sizes[i])))


def _corpus(name: str, key: str, documents: Callable[[str], Documents]) -> Corpus:
  checked = functools.cache(lambda split: _checked(name, split, documents(split)))

  def texts(split: str) -> Iterator[str]:
    found = checked(split)
    for i, size in enumerate(found.sizes):
      yield found.read(i, 0, int(size))

  def seqio_source() -> Any:
    from llm_jax.data import seqio_bridge

    return seqio_bridge.text_source(texts, ('train', 'validation'))

  return Corpus(name, key, ('train', 'validation'), texts, checked, seqio_source)


def _checked(name: str, split: str, found: Documents) -> Documents:
  if not len(found.sizes):
    remedy = (
      'give it files with text' if split == 'train' else 'raise task.heldout or give it files'
    )
    raise UserError(f'the {split} split of {name} is empty: {remedy}')
  return found


def _index(paths: Sequence[str], cut: Callable[[bytes], np.ndarray]) -> np.ndarray:
  """Spans [n, 3] of (file, start, stop)."""
  parts = []
  for i, path in enumerate(paths):
    spans = cut(content(path))
    parts.append(np.concatenate([np.full((len(spans), 1), i), spans], 1))
  return np.concatenate(parts).astype(np.int64)


def _cut_tail(
  spans: np.ndarray, paths: Sequence[str], fraction: float
) -> tuple[np.ndarray, np.ndarray]:
  """The documents of the first `1 - fraction` of the characters and of the rest; one across the border is cut there."""
  characters = np.array([_characters(content(paths[f]), s, e) for f, s, e in spans], np.int64)
  border = int(characters.sum() * (1 - fraction))
  ends = np.cumsum(characters)
  i = int(np.searchsorted(ends, border, side='right'))
  if i >= len(spans):
    return spans, spans[:0]
  f, start, stop = spans[i]
  cut = start + _byte_of(content(paths[f]), start, stop, border - int(ends[i] - characters[i]))
  head = np.concatenate([spans[:i], [[f, start, cut]]])
  tail = np.concatenate([[[f, cut, stop]], spans[i + 1 :]])
  return head[head[:, 2] > head[:, 1]], tail[tail[:, 2] > tail[:, 1]]


def _starts(data: bytes, start: int, stop: int) -> np.ndarray:
  return (np.frombuffer(data[start:stop], np.uint8) & 0xC0) != 0x80


def _characters(data: bytes, start: int, stop: int) -> int:
  return sum(int(_starts(data, s, min(s + _CHUNK, stop)).sum()) for s in range(start, stop, _CHUNK))


def _byte_of(data: bytes, start: int, stop: int, characters: int) -> int:
  """The byte offset from `start` of the character with this number."""
  for s in range(start, stop, _CHUNK):
    here = np.flatnonzero(_starts(data, s, min(s + _CHUNK, stop)))
    if characters < len(here):
      return s - start + int(here[characters])
    characters -= len(here)
  return stop - start


def _slice(data: bytes, low: int, high: int, start: int, stop: int) -> str:
  """The text of [low + start, low + stop), both ends moved right to a character boundary inside [low, high]."""
  ends = []
  for at in (low + start, low + stop):
    while at < high and data[at] & 0xC0 == 0x80:
      at += 1
    ends.append(min(at, high))
  return data[ends[0] : ends[1]].decode()
