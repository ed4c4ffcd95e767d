"""Tokens on disk: a task run once, its ids in one memory map.

A map is a folder with `tokens.bin` (uint16, uint32 from 65,536 ids on), every document followed by its end (id 1);
`documents.bin` (int64, offsets of the documents and of the end); and `manifest.json`, written last, with counts and
checksums. Local files are tokenised as they are read; other sources (TFDS) run as SeqIO tasks, which import TensorFlow.
The ids are the same either way, and reading a map needs neither.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import cache, tasks

FORMAT = 1
_TOKENS, _DOCUMENTS, _MANIFEST = 'tokens.bin', 'documents.bin', 'manifest.json'
_CHECKED = 1 << 28  # bytes at each end of the tokens that the checksum covers


class Map(NamedTuple):
  """tokens: [n], a memory map. documents: offsets int64 [documents + 1]. manifest: as on disk."""

  tokens: np.ndarray
  documents: np.ndarray
  manifest: dict


def tokens(corpus: Any, vocab: Any, split: str) -> Map:
  """The map of one split of a corpus in a vocabulary, made first where it is not in the cache."""
  return read(
    cache.once(
      'tokens', folder_name(corpus, vocab, split), lambda tmp: run_task(tmp, corpus, vocab, split)
    ),
    vocab,
  )


def folder_name(corpus: Any, vocab: Any, split: str) -> str:
  """Where the map lies below the cache's `tokens` folder."""
  return f'{tasks.identity(corpus, vocab)}_{split}'


def run_task(folder: str, corpus: Any, vocab: Any, split: str) -> None:
  """Tokenises one split of a corpus into `folder`."""
  print(
    f'tokenising {corpus.name} ({split}), once: the result is kept in {cache.root()}',
    file=sys.stderr,
  )
  if corpus.documents(split) is None:
    documents = seqio_examples(corpus, vocab, split)
  else:
    texts = corpus.texts(split)
    documents = (np.array([*vocab.encode(text), vocab.eos], np.int32) for text in texts)
  write(folder, documents, corpus, vocab, split)


def seqio_examples(corpus: Any, vocab: Any, split: str) -> Iterator[np.ndarray]:
  """The ids of every document, its end included, from the SeqIO task of a corpus. Imports TensorFlow."""
  from llm_jax.data import seqio_bridge

  return seqio_bridge.examples(tasks.register_corpus(corpus, vocab), split)


def write(
  folder: str, documents: Iterable[np.ndarray], corpus: Any, vocab: Any, split: str
) -> None:
  """Writes a map of `documents`, each its ids with end of document, into an existing folder."""
  dtype = np.dtype(np.uint16 if vocab.size <= 1 << 16 else np.uint32)
  offsets, n_bytes = [0], 0
  with open(os.path.join(folder, _TOKENS), 'wb') as f:
    for ids in documents:
      if len(ids) < 2:
        continue  # nothing but its end
      f.write(ids.astype(dtype).tobytes())
      offsets.append(offsets[-1] + len(ids))
      n_bytes += int(vocab.piece_bytes[ids].sum())
  if len(offsets) == 1:
    raise UserError(
      f'the {split} split of {corpus.name} has no text: give it documents that are not empty'
    )
  np.array(offsets, np.int64).tofile(os.path.join(folder, _DOCUMENTS))
  manifest = dict(
    format=FORMAT,
    source=corpus.fingerprint,
    vocab=vocab.fingerprint,
    split=split,
    documents=len(offsets) - 1,
    tokens=offsets[-1],
    bytes=n_bytes,
    dtype=dtype.name,
    crc32=_checksum(folder),
  )
  with open(os.path.join(folder, _MANIFEST), 'w', encoding='utf-8') as f:
    json.dump(manifest, f, indent=1)


def read(folder: str, vocab: Any) -> Map:
  """Opens a map. Raises `UserError` when its files do not match its manifest, or it is of another vocabulary."""
  broken = f'the token map in {folder} is damaged ({{}}): delete that folder, it is made again'
  try:
    with open(os.path.join(folder, _MANIFEST), encoding='utf-8') as f:
      manifest = json.load(f)
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in (_TOKENS, _DOCUMENTS)]
    if manifest['format'] != FORMAT:
      raise UserError(
        f'the token map in {folder} has format {manifest["format"]}, not {FORMAT}: delete that folder'
      )
    dtype = np.dtype(manifest['dtype'])
    want = [manifest['tokens'] * dtype.itemsize, (manifest['documents'] + 1) * 8]
  except (OSError, ValueError, KeyError, TypeError) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(broken.format(f'{_MANIFEST}: {e}')) from e
  if sizes != want:
    raise UserError(broken.format(f'its files have {sizes} bytes, the manifest says {want}'))
  if _checksum(folder) != manifest['crc32']:
    raise UserError(broken.format('its checksum is wrong'))
  if manifest['vocab'] != vocab.fingerprint:
    raise UserError(
      f'the token map in {folder} was made with another vocabulary: delete that folder'
    )
  ids = np.asarray(
    np.memmap(os.path.join(folder, _TOKENS), dtype, 'r')
  )  # a plain view: slicing a memmap is slow
  return Map(ids, np.fromfile(os.path.join(folder, _DOCUMENTS), np.int64), manifest)


def _checksum(folder: str) -> int:
  with open(os.path.join(folder, _DOCUMENTS), 'rb') as f:
    crc = zlib.crc32(f.read())
  path = os.path.join(folder, _TOKENS)
  with open(path, 'rb') as f:
    crc = zlib.crc32(f.read(_CHECKED), crc)
    f.seek(max(os.path.getsize(path) - _CHECKED, f.tell()))
    return zlib.crc32(f.read(_CHECKED), crc)
