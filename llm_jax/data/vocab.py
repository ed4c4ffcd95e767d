r"""Vocabularies: text to ids and back, exactly, without TensorFlow.

ids: 0 padding, 1 end of document, 2 unknown, then the pieces, then the mode tokens `[R] [S] [X]` (UL2; Tay et al. 2022,
arXiv:2205.05131), then the sentinels in descending order as in T5 and SeqIO, `<extra_id_0>` last (arXiv:1910.10683).

    pieces ... [R] [S] [X] <extra_id_99> ... <extra_id_1> <extra_id_0>

`size` counts all of them: it is the number of rows the model's table needs. A marker spelt out in a text becomes
its one id. Normalisation is `identity` unless asked otherwise, spaces and newlines are kept and unseen characters
fall back to bytes, so `decode(encode(s)) == s` for every string that UTF-8 can write.
"""

import copy
import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import cache

PAD, EOS, UNK = 0, 1, 2
MODES = ('[R]', '[S]', '[X]')
SPACE = '\u2581'  # how SentencePiece writes a space; a text's own U+2581 goes through its bytes
TEMPLATE = 'chat_template.jinja'
_MODEL, _SETTINGS = 'sentencepiece.model', 'vocab.json'


class Text(NamedTuple):
  """What a vocabulary is trained on. read(limit) gives about `limit` bytes of it, spread evenly, the same every
  time.
  """

  name: str
  fingerprint: str
  read: Callable[[int], Iterator[str]]


def text_of(documents: Sequence[str]) -> Text:
  """The `Text` of strings in memory."""
  key = hashlib.sha256('\0'.join(documents).encode()).hexdigest()
  return Text('documents', key, lambda limit: iter(documents))


class Vocabulary:
  """What all vocabularies share: the markers after the pieces.

  base: number of ids below the markers. modes: their spellings. extra_ids: number of sentinels. pad: id that is never
  generated, None for none. eos: ends a document. start: read before a document and before every prompt; None: nothing
  is, and where something has to be (in training, before an empty prompt) it is eos, the end of the document before.
  template: how a conversation is written (see data/templates.py), None for a model that has not learned one; turn: ends
  an answer.
  """

  pad: int | None
  unk: int | None
  start: int | None
  pad, eos, unk, start = PAD, EOS, UNK, PAD
  template: str | None = None
  file = _MODEL  # holds `_content()` in the folder of the vocabulary

  @property
  def turn(self) -> int:
    """The id that ends an answer."""
    return self.eos

  @property
  def first(self) -> int:
    """The id that a decoder reads before a document."""
    return self.eos if self.start is None else self.start

  def __init__(self, base: int, extra_ids: int, modes: Sequence[str]):
    self.base, self.extra_ids = base, extra_ids
    self.modes: dict[str, int] = {m: base + i for i, m in enumerate(modes)}
    self.size = base + len(modes) + extra_ids
    self.sentinels = np.arange(self.size - 1, self.size - 1 - extra_ids, -1, dtype=np.int32)
    self._markers = dict(
      self.modes, **{f'<extra_id_{i}>': int(s) for i, s in enumerate(self.sentinels)}
    )
    self._spelling = {i: m for m, i in self._markers.items()}
    self._starts = [*self.modes, '<extra_id_'] if self._markers else []  # a test before the regex
    self._pattern = re.compile('|'.join([*map(re.escape, self.modes), r'<extra_id_\d+>']))

  def encode(self, text: str) -> list[int]:
    """The ids of `text`, without end of document."""
    if not any(s in text for s in self._starts):
      return self._encode(text)
    ids, at = [], 0
    for found in self._pattern.finditer(text):
      if (marker := self._markers.get(found[0])) is not None:
        ids += [*self._encode(text[at : found.start()]), marker]
        at = found.end()
    return ids + self._encode(text[at:])

  def located(self, text: str) -> list[tuple[int, int, int]]:
    """(id, start, stop) of `encode(text)`: the id stands for these characters, one of several for part of one."""
    ids, raw = self.encode(text), text.encode()
    stops = np.cumsum(self.piece_bytes[ids]) if ids else np.zeros(0, np.int64)
    if len(raw) != (stops[-1] if ids else 0):
      raise UserError(
        'the pieces of this vocabulary do not join to the text, so nobody can say which character an id stands for: '
        "train it with normalization='identity'"
      )
    begins = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
    count = np.concatenate([[0], np.cumsum(begins)])  # characters that begin before each byte
    starts = np.concatenate([[0], stops[:-1]]) if ids else stops
    inside = ~np.append(begins, True)  # a piece that begins within a character stands for it too
    return list(
      zip(ids, (count[starts] - inside[starts]).tolist(), count[stops].tolist(), strict=True)
    )

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; padding and end of document give nothing, markers their spelling."""
    parts = []
    for is_marker, group in itertools.groupby(map(int, ids), key=lambda i: i >= self.base):
      run = list(group)
      parts.append(self._spell(run) if is_marker else self._decode(run))
    return ''.join(parts)

  def _spell(self, markers: list[int]) -> str:
    return ''.join(self._spelling.get(i, '\ufffd') for i in markers)

  @functools.cached_property
  def pieces(self) -> list[bytes]:
    """The bytes of text that each id stands for; over `encode(text)` they join to `text.encode()`.

    A marker stands for its spelling. Under a normalisation other than `identity` they join to the normalised text.
    """
    return self._base_pieces() + [self._spelling[i].encode() for i in range(self.base, self.size)]

  @functools.cached_property
  def piece_bytes(self) -> np.ndarray:
    """int32 [size]: the number of bytes in `pieces`."""
    return np.array([len(piece) for piece in self.pieces], np.int32)

  @property
  def controls(self) -> list[int]:
    """The ids that are no text: those of padding, ends and the like, and the markers."""
    return [*self._base_controls(), *range(self.base, self.size)]

  @property
  def text_bytes(self) -> np.ndarray:
    """`piece_bytes`, but 0 for markers: what of the text each id of a denoiser's targets stands for."""
    return np.where(np.arange(self.size) < self.base, self.piece_bytes, 0)

  def with_markers(self, extra_ids: int, modes: Sequence[str]) -> 'Vocabulary':
    """The same pieces and ids, followed by these markers."""
    raise UserError(
      f'a vocabulary of {type(self).__name__} has its markers from the start: train it with extra_ids and modes'
    )

  @property
  def fingerprint(self) -> str:
    """Changes when any id changes its meaning."""
    return hashlib.sha256(
      json.dumps(self._settings(), sort_keys=True).encode() + self._content()
    ).hexdigest()[:16]

  def save(self, folder: str) -> None:
    """Writes what `load(folder)` reads."""
    os.makedirs(folder, exist_ok=True)
    if self._content():
      with open(os.path.join(folder, self.file), 'wb') as f:
        f.write(self._content())
    with open(os.path.join(folder, _SETTINGS), 'w', encoding='utf-8') as f:
      json.dump(self._settings(), f, indent=1)
    path = os.path.join(folder, TEMPLATE)
    if self.template is not None:
      with open(path, 'w', encoding='utf-8') as f:
        f.write(self.template)
    elif os.path.exists(path):  # of what was trained here before
      os.remove(path)

  def taught(self, template: str | None) -> 'Vocabulary':
    """The same ids, for a model that has learned another chat template."""
    made = copy.copy(self)
    made.template = template
    return made

  def seqio(self) -> Any:
    """This vocabulary as a `seqio.Vocabulary` with the same ids. Imports TensorFlow."""
    from llm_jax.data import seqio_bridge

    return seqio_bridge.vocabulary(self)

  def _settings(self) -> dict:
    return dict(
      kind=type(self).__name__, extra_ids=self.extra_ids, modes=list(self.modes), size=self.size
    )

  def _content(self) -> bytes:
    return b''


class SentencePiece(Vocabulary):
  """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226) with markers after its pieces."""

  def __init__(self, model: bytes, *, extra_ids: int, modes: Sequence[str] = MODES):
    self.model = model
    self.processor = spm.SentencePieceProcessor(model_proto=model)
    ids = self.processor.pad_id(), self.processor.eos_id(), self.processor.unk_id()
    if ids != (PAD, EOS, UNK):
      raise UserError(
        f'this SentencePiece model has pad, eos, unk = {ids}, not (0, 1, 2): train one with vocab.sentencepiece'
      )
    super().__init__(self.processor.get_piece_size(), extra_ids, modes)
    bytes_of = [self.processor.piece_to_id(f'<0x{b:02X}>') for b in SPACE.encode()]
    self._space_bytes = bytes_of if all(self.processor.is_byte(i) for i in bytes_of) else None

  def _encode(self, text: str) -> list[int]:
    if SPACE not in text or self._space_bytes is None:
      return self.processor.encode(text)
    first, *rest = text.split(SPACE)
    ids = self.processor.encode(first)
    for part in rest:
      ids += self._space_bytes + self.processor.encode(part)
    return ids

  def _decode(self, ids: list[int]) -> str:
    return self.processor.decode(ids)

  def _base_pieces(self) -> list[bytes]:
    p, silent = self.processor, set(self._base_controls())
    return [b'' if i in silent else unescaped(p.id_to_piece(i)) for i in range(self.base)]

  def _base_controls(self) -> list[int]:
    p = self.processor
    return [i for i in range(self.base) if p.is_control(i) or p.is_unknown(i)]

  def _content(self) -> bytes:
    return self.model


class Bytes(Vocabulary):
  """The UTF-8 bytes themselves: id = byte + 3 (ByT5; Xue et al. 2021, arXiv:2105.13626)."""

  def __init__(self, *, extra_ids: int, modes: Sequence[str] = MODES):
    super().__init__(3 + 256, extra_ids, modes)

  def _encode(self, text: str) -> list[int]:
    return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

  def _decode(self, ids: list[int]) -> str:
    return bytes(i - 3 for i in ids if i >= 3).decode('utf-8', errors='replace')

  def _base_pieces(self) -> list[bytes]:
    return [b''] * 3 + [bytes([i]) for i in range(256)]

  def _base_controls(self) -> list[int]:
    return [PAD, EOS, UNK]


def unescaped(piece: str) -> bytes:
  """The text of a piece of SentencePiece's: `<0x41>` is a byte, U+2581 a space."""
  if len(piece) == 6 and piece.startswith('<0x'):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(SPACE, ' ').encode()


def bytes_(text: Text | None = None, *, extra_ids: int = 100, modes: tuple = MODES) -> Bytes:
  """The byte vocabulary: nothing to train, 259 ids and the markers."""
  del text
  return Bytes(extra_ids=extra_ids, modes=modes)


def sentencepiece(
  text: Text,
  *,
  size: int = 1024,
  model: str = 'bpe',
  extra_ids: int = 100,
  modes: tuple = MODES,
  symbols: tuple = ('\n',),
  normalization: str = 'identity',
  coverage: float = 1.0,
  sample: int = 10_000_000,
) -> SentencePiece:
  """A SentencePiece vocabulary trained on `text`, or the one trained before on the same text with the same settings.

  size: ids in all, markers included. model: 'bpe' or 'unigram'. symbols: strings that are always one piece.
  normalization: 'identity' (lossless) or 'nmt_nfkc'. coverage: fraction of the characters that get a piece of their
  own, the rest is spelt in bytes. sample: train on about this many bytes, spread over the text.
  Raises `UserError` when the text does not support `size` pieces, naming the largest it does.
  """
  for value, known in ((model, ('bpe', 'unigram')), (normalization, ('identity', 'nmt_nfkc'))):
    if value not in known:
      raise UserError(f'vocabulary setting {value!r} is unknown; {nearest(value, known)}')
  if not 0.98 <= coverage <= 1:
    raise UserError(f'coverage must be between 0.98 and 1, got {coverage}')
  settings = dict(
    vocab_size=size - extra_ids - len(modes),
    model_type=model,
    user_defined_symbols=list(symbols),
    normalization_rule_name=normalization,
    character_coverage=coverage,
  )
  markers = extra_ids + len(modes)
  if settings['vocab_size'] < 3 + 256 + len(symbols) + 1:
    need = 3 + 256 + len(symbols) + markers + 1
    raise UserError(
      f'a vocabulary of {size} is too small: 256 bytes, {markers} markers and {3 + len(symbols)} symbols need {need}'
    )
  key = json.dumps([text.fingerprint, settings, sample, spm.__version__], sort_keys=True)
  name = hashlib.sha256(key.encode()).hexdigest()[:16]

  def make(folder: str) -> None:
    SentencePiece(_train(text, settings, sample, markers), extra_ids=extra_ids, modes=modes).save(
      folder
    )

  with open(os.path.join(cache.once('vocab', name, make), _MODEL), 'rb') as f:
    return SentencePiece(f.read(), extra_ids=extra_ids, modes=modes)


def file(
  text: Text | None = None, *, path: str, extra_ids: int = 100, modes: tuple = MODES
) -> SentencePiece:
  """The SentencePiece model in the file `path`, for instance T5's, with markers after its pieces."""
  del text
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    known = [os.path.join(folder, f) for f in os.listdir(folder)] if os.path.isdir(folder) else []
    raise UserError(f'no SentencePiece model {path!r}; {nearest(path, known)}')
  with open(path, 'rb') as f:
    content = f.read()
  try:
    return SentencePiece(content, extra_ids=extra_ids, modes=modes)
  except RuntimeError as e:
    raise UserError(
      f'{path} is not a SentencePiece model: pass the .model file that spm_train wrote'
    ) from e


def of_run(
  text: Text | None = None, *, path: str, extra_ids: int = 0, modes: tuple = ()
) -> Vocabulary:
  """The vocabulary of the run in `path`, to train on with its weights, with markers after its ids where it has none.

  The ids it has keep their meaning; `train.grow.vocabulary` gives the weights the rows that the markers need.
  """
  del text
  found = load(os.path.join(os.path.expanduser(path), 'vocab'))
  if not extra_ids and not modes:
    return found
  if found.size > found.base:
    have = (found.extra_ids, tuple(found.modes))
    if have != (extra_ids, tuple(modes)):
      raise UserError(
        f'the vocabulary of {path} has {have[0]} sentinels and the modes {have[1]} already: set vocab.extra_ids=0 and '
        'vocab.modes=() to use it as it is'
      )
    return found
  return found.with_markers(extra_ids, modes)


def load(folder: str) -> Vocabulary:
  """The vocabulary that `save(folder)` wrote."""
  path = os.path.join(folder, _SETTINGS)
  if not os.path.isfile(path):
    raise UserError(
      f'no vocabulary in {folder} ({_SETTINGS} is missing): pass the folder that training wrote, WORKDIR/vocab'
    )
  with open(path, encoding='utf-8') as f:
    settings = json.load(f)
  markers = dict(extra_ids=settings['extra_ids'], modes=tuple(settings['modes']))
  if settings['kind'] == 'Tokenizer':
    from llm_jax.data import tokenizer  # the library is imported for those who use one

    return tokenizer.load(folder, settings)
  if settings['kind'] == 'Bytes':
    made = bytes_(**markers)
  else:
    made = file(path=os.path.join(folder, _MODEL), **markers)
  made.template = template_of(folder)
  return made


def template_of(folder: str) -> str | None:
  """The chat template in a folder, where there is one."""
  path = os.path.join(folder, TEMPLATE)
  if not os.path.isfile(path):
    return None
  try:
    with open(path, encoding='utf-8') as f:
      return f.read()
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8 text (byte {e.start}): write it again') from e


def _train(text: Text, settings: dict, sample: int, markers: int) -> bytes:
  lines = (
    line.replace(SPACE, ' ')
    for document in text.read(sample)
    for line in document.splitlines(keepends=True)
  )
  head = next((line for line in lines if line.strip()), None)
  if head is None:
    raise UserError(f'no text to train a vocabulary on in {text.name}: the corpus is empty')
  buffer = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain([head], lines),
      model_writer=buffer,
      byte_fallback=True,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      pad_id=PAD,
      eos_id=EOS,
      unk_id=UNK,
      bos_id=-1,
      max_sentence_length=1 << 30,
      num_threads=8,  # fixed: the unigram model's sums are split over the threads
      minloglevel=2,
      **settings,
    )
  except RuntimeError as e:
    raise UserError(_explain(str(e), settings['vocab_size'], markers, text.name)) from e
  return buffer.getvalue()


def _explain(message: str, pieces: int, markers: int, name: str) -> str:
  """SentencePiece's complaint as one line in terms of `size`."""
  largest = re.search(r'a value <= (\d+)', message)
  if largest:
    most = int(largest[1]) + markers
    return f'{name} supports a vocabulary of at most {most}, not {pieces + markers}: set size to that or less'
  smallest = re.search(r'smaller than required_chars\. \d+ vs (\d+)', message)
  if smallest:
    least = int(smallest[1]) + markers
    return f'{name} needs a vocabulary of at least {least}, not {pieces + markers}: raise size or lower coverage'
  return f'SentencePiece could not train on {name}: {" ".join(message.split())}'
