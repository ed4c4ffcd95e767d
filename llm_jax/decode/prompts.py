"""Prompts on their way into a model and text on its way out: what decoding does on the host.

In training the decoder's inputs are the targets shifted right with id 0 in front, so position `p` holds the
token before target `p` and predicts target `p`. Decoding does the same: a prompt of `n` ids is fed as
`[0] + prompt` at positions 0..n, and the output of position `n` is the first new token. The model writes the keys
and values of position `p` into slot `p` of its state and a query sees the slots up to its own, so right-padded
prompts of unequal length need nothing else: what padding left in a slot is overwritten before anyone may see it. A
recurrent state cannot be overwritten, so `segments` say which tokens are padding. Imported models have another start
(`vocab.start`) or none: then the prompt stands at positions 0..n-1.

Causal models read the prompt left to right; prefix models see all of it from everywhere (`prefix` slots); of
encoder-decoder models it is the encoder's input, and the decoder starts from id 0 alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError

START = 0  # the decoder's first input, as in training with vocabularies of our own


class Laid(NamedTuple):
  """Prompts laid out for the prefill, all host arrays.

  batch: what `model.hidden` reads. last: int32 [rows], the position of each row's last token. slots: of the state.
  live: bool [rows], False for rows that fill up the mesh.
  """

  batch: dict[str, np.ndarray]
  last: np.ndarray
  slots: int
  live: np.ndarray

  @property
  def context(self) -> dict[str, np.ndarray]:
    """What every later call is told besides the token and its position."""
    return context(self.batch)


def context(batch: dict[str, Any]) -> dict[str, Any]:
  """Of a batch, what is no token and no token's place: the prefix slots or the encoder's arrays."""
  return {k: v for k, v in batch.items() if k not in ('inputs', 'positions', 'segments')}


def lay(
  model: Any, prompts: Any, lengths: Any, max_new: int, start: int | None = START, spare: int = 0
) -> Laid:
  """Checks prompts and lays them out. prompts: int32 [batch, length], right-padded; lengths: int32 [batch].

  start: id in front of every prompt, None for nothing. spare: slots more than prompt and answer need. Raises
  `UserError` for prompts that do not fit.
  """
  prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
  _check(model, prompts, lengths, max_new, start)
  live = fill(np.ones(len(prompts), bool))
  prompts, lengths = fill(prompts), fill(lengths)
  width = int(min(prompts.shape[1], room(model, start)))
  prompts = prompts[:, :width]  # what is cut is padding: `_check` saw to that
  real, zeros = np.arange(width) < lengths[:, None], np.zeros_like(lengths)
  inputs, last = np.where(real, prompts, 0), np.maximum(lengths - 1, 0)
  if start is not None:
    inputs, last = np.concatenate([zeros[:, None] + start, inputs], axis=1), lengths
  batch = dict(inputs=inputs, positions=_count(inputs))
  batch['segments'] = (batch['positions'] <= last[:, None]).astype(np.int32)
  slots = int(min(width + max_new + spare, limit(model)))
  if model.card.kind == 'prefix':
    batch['prefix'] = np.arange(slots) <= last[:, None]
  if model.card.kind != 'encoder_decoder':
    return Laid(batch, last, slots, live)
  batch = dict(inputs=inputs[:, :1], positions=zeros[:, None])
  encoder = dict(inputs=inputs[:, 1:], positions=_count(prompts), segments=real.astype(np.int32))
  batch |= {f'encoder/{name}': x for name, x in encoder.items()}
  return Laid(batch, zeros, int(min(max_new + spare, limit(model))), live)


class Rules(NamedTuple):
  """What the user rules out and where a text ends, as the compiled code takes it.

  ends: int32 [n], the ids that end a text, -1 for none. allowed: bool, bias: f32, [rows of the table] or None. banned:
  see `logits.processors`.
  """

  ends: np.ndarray
  allowed: np.ndarray | None
  bias: np.ndarray | None
  banned: tuple[tuple[int, ...], ...]


def rules(model: Any, eos: Any, allowed: Any, bias: Any, banned: Sequence[Sequence[int]]) -> Rules:
  """The arguments of `generate.generate` with these names."""
  ends = np.atleast_1d(np.asarray(-1 if eos is None else eos, np.int32))
  if bias is not None:
    bias = np.pad(np.asarray(bias, np.float32), (0, model.card.rows - model.card.vocab))
  banned = tuple(tuple(map(int, ids)) for ids in banned)
  return Rules(ends, permitted(model, allowed), bias, banned)


def row_keys(key: jax.Array, rows: Any, count: int, total: int) -> jax.Array:
  """The key of each of `total` rows, of which `count` are real: of its number in `rows`, default 0, 1, ..."""
  numbers = np.zeros(total, np.int64)
  numbers[:count] = np.arange(count) if rows is None else rows
  return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers.astype(np.uint32))


def check_alike(model: Any, other: Any, name: str) -> None:
  """Raises `UserError` unless the `other` model, called `name`, reads and writes the same tokens in the same way."""
  own, theirs = model.card, other.card
  if (own.kind, own.vocab, own.rows) != (theirs.kind, theirs.vocab, theirs.rows):
    sizes = f'{theirs.kind} with {theirs.rows} logits, the model {own.kind} with {own.rows}'
    raise UserError(f'the {name} is {sizes}: choose one of the same kind and vocabulary')


def permitted(model: Any, allowed: Any) -> np.ndarray | None:
  """`allowed` (bool, [vocab] or one row of it for each row of the batch) with the rows that round up the table ruled
  out. Raises `UserError` for another shape."""
  if allowed is None:
    return None
  allowed = np.asarray(allowed, bool)
  if allowed.shape[-1:] != (model.card.vocab,) or allowed.ndim > 2:
    raise UserError(
      f'allowed must have one entry for each of the {model.card.vocab} ids, got shape {allowed.shape}'
    )
  if allowed.ndim == 2:
    allowed = ~fill(~allowed)
  beyond = (0, model.card.rows - model.card.vocab)
  return np.pad(allowed, ((0, 0), beyond)[-allowed.ndim :])


def guided(model: Any, guides: Sequence[Any], allowed: Any) -> np.ndarray:
  """bool [rows, vocab]: what each guide (decode/constrain.py) and `allowed` let its row draw next."""
  found = np.zeros((len(guides), model.card.vocab), bool)
  for row, guide in zip(found, guides, strict=True):
    may = guide.allowed()
    row[: len(may)] = may
  return found if allowed is None else found & allowed


def drawable(model: Any, vocab: Any) -> np.ndarray:
  """bool [vocab]: the ids that stand for something: not the padding, nor those beyond the vocabulary."""
  ids = np.arange(model.card.vocab)
  return (ids < vocab.size) & (True if vocab.pad is None else ids != vocab.pad)


def _check(
  model: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  max_new: int,
  start: int | None,
) -> None:
  card = model.card
  if max_new < 1:
    raise UserError(f'max_new must be at least 1, got {max_new}')
  if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not len(prompts):
    shapes = f'{prompts.shape} and {lengths.shape}'
    raise UserError(f'prompts must be [batch, length] and lengths [batch], got shapes {shapes}')
  if lengths.min() < 0 or lengths.max() > prompts.shape[1]:
    found = f'got {lengths.min()} to {lengths.max()}'
    raise UserError(
      f'lengths must be between 0 and the width of the prompts, {prompts.shape[1]}; {found}'
    )
  if start is None and (card.kind == 'encoder_decoder' or not lengths.min()):
    raise UserError('without a start token every prompt needs one of its own: name the id as start')
  most = room(model, start)
  if lengths.max() > most:
    raise UserError(
      f'the prompt has {lengths.max()} tokens, the model reads at most {most} (its context is {card.length}): '
      'shorten the prompt or train with a longer context'
    )


def _count(x: np.ndarray) -> np.ndarray:
  return np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape)


def room(model: Any, start: int | None = START) -> float:
  """The longest prompt the model takes, in tokens: one position of a decoder's context is the start token's."""
  if model.card.length is None:
    return math.inf
  return model.card.length - (start is not None and model.card.kind != 'encoder_decoder')


def limit(model: Any) -> float:
  """The number of positions that the model can represent: the rows of a learned table, else no bound."""
  learned = 'Learned' in model.card.positions.split('+')
  return model.card.length if learned and model.card.length else math.inf


def fill(x: np.ndarray) -> np.ndarray:
  """Rows of zeros (dead from the start: `live` is one of the arrays) until the batch divides over the mesh."""
  return np.concatenate([x, np.zeros((-len(x) % mesh.batch_ways(), *x.shape[1:]), x.dtype)])


def encode(model: Any, vocab: Any, prompt: str) -> list[int]:
  """The prompt's ids as in training: an encoder's input ends with eos where it holds sentinels (span corruption's
  inputs do, those of prefix LM do not), and is eos alone where there is no text. So is a prompt without start and
  text."""
  check_vocab(model, vocab)
  ids = list(vocab.encode(prompt))
  if model.card.kind != 'encoder_decoder':
    return ids if ids or vocab.start is not None else [vocab.eos]
  return encoded(vocab, ids)


def encoded(vocab: Any, ids: Sequence[int]) -> list[int]:
  """What an encoder reads of a text's ids."""
  sentinels = set(map(int, vocab.sentinels))
  return [*ids, vocab.eos] if not ids or sentinels.intersection(ids) else list(ids)


def check_vocab(model: Any, vocab: Any) -> None:
  """Raises `UserError` for a vocabulary with ids that the model does not have."""
  if vocab.size > model.card.vocab:
    raise UserError(
      f'the vocabulary has {vocab.size} ids, the model {model.card.vocab}: use the one it was trained with'
    )


def pad(model: Any, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded to a power of two of at least 16, or to the model's room where that is less."""
  longest = max(map(len, ids))
  width = int(max(longest, min(room(model), 1 << max(4, (longest - 1).bit_length()))))
  padded = np.zeros((len(ids), width), np.int32)
  for row, own in zip(padded, ids, strict=True):
    row[: len(own)] = own
  return padded, np.array([len(own) for own in ids], np.int32)


def shown(model: Any, prompt: list[int]) -> list[int]:
  """What stands before the first new token in the text: the prompt, or nothing when the prompt is an encoder's."""
  return [] if model.card.kind == 'encoder_decoder' else prompt


def pieces(
  vocab: Any, before: list[int], tokens: Any, end_id: int, stop: Sequence[str] = ()
) -> Iterator[str]:
  """The text that follows `before`, piece by piece; tokens: arrays of new ids in order, `end_id` is not shown.

  Ends in front of the first string of `stop`.
  """
  writer = Writer(vocab, before, stop)
  for some in tokens:
    piece = writer.add([int(i) for i in np.ravel(some) if i != end_id])
    if piece:
      yield piece
    if writer.stopped is not None:
      return
  rest = writer.end()
  if rest:
    yield rest


class Writer:
  """Turns ids into text as they come. What may still change is held back: bytes of a character whose last ones are to
  come, and the beginning of what may become a stop string.

  `stopped` is the stop string that ended the text, None before. `text` is all that was given out.
  """

  def __init__(self, vocab: Any, before: Sequence[int] = (), stop: Sequence[str] = ()):
    self._vocab, self._ids, self._stop = vocab, list(before), [s for s in stop if s]
    self._from = (
      0  # where decoding starts: a piece's text depends on its neighbours, not on the distant past
    )
    self._shown = len(vocab.decode(self._ids))  # characters decoded from there and taken over
    self._pending, self.text, self.stopped = '', '', None

  @property
  def decoded(self) -> int:
    """Characters of the new text so far, those that are held back for a stop string included."""
    return len(self.text) + len(self._pending)

  def add(self, ids: Sequence[int]) -> str:
    """The text that is certain once `ids` have come."""
    self._ids += ids
    decoded = self._vocab.decode(self._ids[self._from :])
    end = len(decoded)
    while end > self._shown and len(decoded) - end < 3 and decoded[end - 1] == '\ufffd':
      end -= 1
    new, self._shown = decoded[self._shown : end], max(end, self._shown)
    if end == len(decoded) and len(self._ids) - self._from > _FAR:
      self._from = len(self._ids) - _NEAR
      self._shown = len(self._vocab.decode(self._ids[self._from :]))
    return self._give(new, last=False)

  def end(self) -> str:
    """What was held back, once no more ids come."""
    rest = self._vocab.decode(self._ids[self._from :])[self._shown :]
    self._shown += len(rest)
    return self._give(rest, last=True)

  def _give(self, new: str, last: bool) -> str:
    if self.stopped is not None:
      return ''
    self._pending += new
    found = [(at, s) for s in self._stop if (at := self._pending.find(s)) >= 0]
    if found:
      cut, self.stopped = min(found)
    else:
      cut = len(self._pending) - (0 if last else self._unsure())
    piece, self._pending = self._pending[:cut], self._pending[cut:]
    self.text += piece
    return piece

  def _unsure(self) -> int:
    """The length of the longest end of the pending text that begins a stop string."""
    ends = (n for s in self._stop for n in range(1, len(s)) if self._pending.endswith(s[:n]))
    return max(ends, default=0)


_FAR, _NEAR = 64, 16  # ids decoded anew with every piece, at most and at least
