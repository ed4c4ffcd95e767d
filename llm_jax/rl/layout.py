"""How a round lies in arrays: prompts with their answers as rows, no longer than needed, and as they are learned from.

Rows are laid out by `lay` and cut by `fit` to one of a few lengths, so that few shapes are compiled. A minibatch of
them is either `whole`, or `shared`: the answers alone, `inputs [batch, answer]`, behind prompts that stand once for all
answers of their group, `prompt/inputs [batch / group, prompt]`. The second is read as in decoding, the prompt into a
state and the answers behind it (`sequence.hidden`): of a group of 8 the prompt is read once and not eight times, and
there are logits where there is an answer and nowhere else. What is learned is the same, but for the order in which f32
adds up.
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError

Arrays = dict[str, np.ndarray]

STEP = 16  # tokens: no two lengths are nearer to one another


def lay(
  model: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  tokens: np.ndarray,
  ends: np.ndarray,
  start: int | None,
) -> Arrays:
  """Prompts and answers as the rows that decoding reads them as, shifted: see the top of data/batch.py.

  prompts: int32 [n, width], lengths: [n]; tokens: int32 [n, max_new], ends: [n]; right-padded. start: id in front, None
  for none; then the first token of a prompt is no target.
  """
  n, length = len(prompts), prompts.shape[1] + tokens.shape[1]
  whole = np.zeros((n, length), np.int32)
  whole[:, : prompts.shape[1]] = prompts
  at = lengths[:, None] + np.arange(tokens.shape[1])
  whole[np.arange(n)[:, None], at] = tokens
  place = np.arange(length)
  whole = np.where(place < (lengths + ends)[:, None], whole, 0).astype(np.int32)
  counts = (place >= lengths[:, None]) & (place < (lengths + ends)[:, None])
  if start is None:
    inputs, targets, counts = whole[:, :-1], whole[:, 1:], counts[:, 1:]
  else:
    inputs, targets = np.concatenate([np.full((n, 1), start, np.int32), whole[:, :-1]], 1), whole
  positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
  used = (lengths + ends - (start is None))[:, None]
  made = dict(inputs=inputs, targets=targets, weights=counts.astype(np.float32))
  made |= dict(positions=positions, segments=(positions < used).astype(np.int32))
  if model.card.kind == 'prefix':
    made['prefix'] = positions <= (lengths - (start is None))[:, None]
  return made


# --- lengths ------------------------------------------------------------------------------------------


def width(need: int, most: int, count: int) -> int:
  """The least of `count` evenly spaced lengths up to `most` that holds `need` tokens."""
  step = max(STEP, -(-most // count))
  return min(most, -(-max(int(need), 1) // step) * step)


def fit(rows: Arrays, length: int) -> Arrays:
  """Rows of another length: padding is cut off or added behind. Arrays [n] stay as they are."""

  def one(name: str, x: np.ndarray) -> np.ndarray:
    if x.ndim < 2 or x.shape[1] == length:
      return x
    if name == 'positions':
      return np.broadcast_to(np.arange(length, dtype=x.dtype), (len(x), length))
    return np.pad(x[:, :length], ((0, 0), (0, max(length - x.shape[1], 0))))

  return {name: one(name, x) for name, x in rows.items()}


def used(rows: Arrays) -> int:
  """The length of the longest row without its padding."""
  return int(rows['segments'].sum(1).max())


def first(rows: Arrays) -> np.ndarray:
  """Where the answers begin: [n], the position whose target is the first token."""
  return np.argmax(rows['weights'] > 0, axis=1)


def behind(values: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
  """[n, answer] of the answers' tokens as [n, length], from the positions `start` [n] on; 0 elsewhere."""
  at = start[:, None] + np.arange(values.shape[1])
  found = np.zeros((len(values), length + values.shape[1]), values.dtype)
  np.put_along_axis(found, at, values, axis=1)
  return found[:, :length]


# --- what is learned from -----------------------------------------------------------------------------


class Shape(NamedTuple):
  """Of the batches of a round. group: answers to a prompt; prompt, answer: tokens, what the longest of them need."""

  group: int
  prompt: int
  answer: int


class Layout(NamedTuple):
  """cut(rows, shape) -> a batch of these rows. back(values, rows) -> what was found for each target of a batch, [n,
  ...], as [n, length] of the rows. grouped: rows have to come with all others of their group."""

  cut: Callable[[Arrays, Shape], Arrays]
  back: Callable[[np.ndarray, Arrays], np.ndarray]
  grouped: bool


def shape(rows: Arrays, group: int, prompt: int, answer: int, count: int) -> Shape:
  """The shape of a round with these rows. prompt, answer: the most tokens that there can be; count: see `width`."""
  start, size = first(rows).max(), rows['weights'].sum(1).max()
  return Shape(group, width(int(start), prompt, count), width(int(size), answer, count))


def whole() -> Layout:
  """Rows as they are."""
  return Layout(lambda rows, shape: rows, lambda values, rows: values, False)


def shared() -> Layout:
  """Answers behind prompts that are read once."""
  return Layout(_answers, lambda values, rows: behind(values, first(rows), _length(rows)), True)


def _length(rows: Arrays) -> int:
  return rows['inputs'].shape[1]


def _answers(rows: Arrays, shape: Shape) -> Arrays:
  """A batch of `shared`: every array [n, length] as [n, answer], and `prompt/...` [n / group, prompt]."""
  if 'prefix' in rows:
    raise UserError('layout.shared is for causal decoders: give a prefix decoder layout.whole')
  start, index = first(rows), rows['index']
  groups = index.reshape(-1, shape.group)
  if (groups != groups[:, :1]).any():
    raise UserError(
      'layout.shared needs the answers of a group side by side: keep all of them, or use layout.whole'
    )
  at = start[:, None] + np.arange(shape.answer)
  pick = lambda x: np.take_along_axis(
    np.pad(x, ((0, 0), (0, max(0, at.max() + 1 - x.shape[1])))), at, axis=1
  )
  made = {name: pick(x) if x.ndim == 2 else x for name, x in rows.items()}
  made['positions'] = at.astype(np.int32)
  before = fit({'inputs': rows['inputs'][:: shape.group]}, shape.prompt)['inputs']
  place = np.broadcast_to(np.arange(shape.prompt, dtype=np.int32), before.shape)
  real = place < start[:: shape.group, None]
  made['prompt/inputs'] = np.where(real, before, 0).astype(np.int32)
  return made | {'prompt/positions': place, 'prompt/segments': real.astype(np.int32)}


# --- as JSON ------------------------------------------------------------------------------------------


def pack(arrays: Arrays) -> dict[str, list]:
  """Arrays as JSON: name -> [dtype, shape, base64 of what zlib makes of the bytes]."""
  text = lambda x: base64.b64encode(zlib.compress(np.ascontiguousarray(x).tobytes(), 1)).decode()
  return {name: [x.dtype.str, list(x.shape), text(x)] for name, x in arrays.items()}


def unpack(packed: Mapping[str, Sequence]) -> Arrays:
  """Undoes `pack`, bit by bit."""
  read = lambda d, text: np.frombuffer(zlib.decompress(base64.b64decode(text)), d)
  return {name: read(d, text).reshape(shape).copy() for name, (d, shape, text) in packed.items()}
