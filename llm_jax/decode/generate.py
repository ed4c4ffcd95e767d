"""Token by token: one forward over the prompts (prefill), then a `lax.while_loop` around a one-token forward.

In training the decoder's inputs are the targets shifted right with id 0 in front, so position `p` holds the
token before target `p` and predicts target `p`. Decoding does the same: a prompt of `n` ids is fed as
`[0] + prompt` at positions 0..n, and the output of position `n` is the first new token. The model writes the keys
and values of position `p` into slot `p` of its state and a query sees the slots up to its own, so right-padded
prompts of unequal length need nothing else: what padding left in a slot is overwritten before anyone may see it. A
recurrent state cannot be overwritten, so the prefill's `segments` say which tokens are padding. Imported models have
another start (`vocab.start`) or none: then the prompt stands at positions 0..n-1.

Causal models read the prompt left to right; prefix models see all of it from everywhere (`prefix` slots); of
encoder-decoder models it is the encoder's input, and the decoder starts from id 0 alone.

Row `i` draws its token number `j` with `fold_in(fold_in(key, rows[i]), j)`: what a row says depends neither on
its neighbours nor on the size of the batch.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import logits as logits_lib

START = 0  # the decoder's first input, as in training with vocabularies of our own


class Output(NamedTuple):
  """tokens: int32 [batch, max_new], 0 after the end; lengths: int32 [batch], the end-of-text token counted;
  logp: f32 [batch, max_new], log-probability (nats) of each token under the model itself, before temperature, top-k,
  top-p and bans; 0 after the end."""

  tokens: jax.Array
  lengths: jax.Array
  logp: jax.Array


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes."""

  hidden: Callable
  logits: Callable
  states: Callable
  sample: tuple  # the settings of `logits.sample`, as pairs
  slots: int
  max_new: int
  rules: Hashable  # for the mesh, in force while tracing


class _Carry(NamedTuple):
  """One decoding in progress. `token` [batch] was drawn last, `position` [batch] is where it will be fed."""

  made: jax.Array  # [] tokens drawn so far
  token: jax.Array
  position: jax.Array
  done: jax.Array
  states: Any
  out: Output


class _Fixed(NamedTuple):
  """What the loop reads and never changes. eos: [] -1 for none; context: the prefix slots or the encoder's arrays."""

  keys: jax.Array
  eos: jax.Array
  allowed: jax.Array | None
  context: dict[str, jax.Array]


def generate(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  max_new: int = 100,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos: int | None = 1,
  start: int | None = START,
  allowed: Any = None,
  rows: Any = None,
) -> Output:
  """Continues every prompt until it has drawn `eos` (None: never), `max_new` tokens, or filled the position table.

  prompts: int32 [batch, length], right-padded; lengths: int32 [batch], 0 starts a new document. Both host arrays, the
  same on every process. start: id in front of every prompt; None: nothing, and no prompt may be empty. temperature,
  top_k, top_p, allowed ([vocab] bool): see `logits.sample`; temperature 0 is greedy. rows: int32 [batch], the
  numbers that individualise the rows' random keys (default 0, 1, ...).

  A model with learned positions stops where their table ends (`lengths` tells); others go on past the length they
  were trained with. Raises `UserError` for a prompt that does not fit the model's context (`card.length`, start token
  included). Compiled once per shape and setting; inside `jax.set_mesh` the rows are spread over the batch axes.
  """
  settings = dict(max_new=max_new, temperature=temperature, top_k=top_k, top_p=top_p)
  settings |= dict(eos=eos, start=start, allowed=allowed, rows=rows)
  static, fixed, carry = _start(model, params, prompts, lengths, key, **settings)
  out = _advance(static, params, fixed, carry, np.int32(max_new)).out
  batch = np.shape(prompts)[0]
  return out if out.tokens.shape[0] == batch else jax.tree.map(lambda x: x[:batch], out)


def stream(
  model: Any, params: Any, prompts: Any, lengths: Any, key: jax.Array, **settings: Any
) -> Iterator[np.ndarray]:
  """The columns of `generate`'s tokens, int32 [batch] each, as they are drawn; same arguments, same tokens.

  A row that has ended yields 0. The prompts are read, and wrong arguments raise, before this returns.
  """
  static, fixed, carry = _start(model, params, prompts, lengths, key, **settings)

  def columns(carry: _Carry) -> Iterator[np.ndarray]:
    for step in range(1, static.max_new + 1):
      yield np.array(carry.token)[: np.shape(prompts)[0]]
      if step == static.max_new or np.all(carry.done):
        return
      carry = _advance(static, params, fixed, carry, np.int32(step + 1))

  return columns(carry)


def text(
  model: Any,
  params: Any,
  vocab: Any,
  prompts: Sequence[str],
  key: jax.Array,
  *,
  max_new: int = 100,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  batch: int = 64,
) -> list[str]:
  """The continuation of each prompt (without the prompt), decoded `batch` rows at a time.

  Prompts are padded to the next power of two, so that few shapes are compiled. Padding and ids beyond the vocabulary
  (a table rounded up for the mesh) are never drawn.
  """
  settings = dict(max_new=max_new, temperature=temperature, top_k=top_k, top_p=top_p, eos=vocab.eos)
  settings |= dict(start=vocab.start, allowed=_allowed(model, vocab))
  ids = [_encode(model, vocab, prompt) for prompt in prompts]
  found: list[str] = []
  for first in range(0, len(ids), batch):
    some = ids[first : first + batch]
    rows = first + np.arange(len(some))
    tokens, lengths, _ = generate(model, params, *_pad(model, some), key, rows=rows, **settings)
    for prompt, row, length in zip(some, np.asarray(tokens), np.asarray(lengths), strict=True):
      found.append(''.join(_pieces(vocab, _shown(model, prompt), [row[:length]], vocab.eos)))
  return found


def stream_text(
  model: Any, params: Any, vocab: Any, prompt: str, key: jax.Array, **settings: Any
) -> Iterator[str]:
  """The text that `text(..., [prompt], key)` returns, in pieces as they come; a character is never cut in two.

  settings: those of `text`.
  """
  ids = _encode(model, vocab, prompt)
  settings = dict(settings, eos=vocab.eos, start=vocab.start, allowed=_allowed(model, vocab))
  columns = stream(model, params, *_pad(model, [ids]), key, **settings)
  return _pieces(vocab, _shown(model, ids), columns, vocab.eos)


def stream_answer(
  model: Any, params: Any, vocab: Any, conversation: str, key: jax.Array, **settings: Any
) -> Iterator[str]:
  """The answer to a conversation written as the model's chat template writes it (data/chat.py), in pieces.

  The template writes the start itself, and the answer ends with the token that ends a turn. settings: those of `text`.
  """
  ids = _encode(model, vocab, conversation)
  settings = dict(settings, eos=vocab.turn, start=None, allowed=_allowed(model, vocab))
  columns = stream(model, params, *_pad(model, [ids]), key, **settings)
  return _pieces(vocab, [], columns, vocab.turn)


def limit(model: Any) -> float:
  """The number of positions that the model can represent: the rows of a learned table, else no bound."""
  learned = 'Learned' in model.card.positions.split('+')
  return model.card.length if learned and model.card.length else math.inf


# --- the compiled part --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
  static: _Static, params: Any, batch: dict, last: jax.Array, live: jax.Array, fixed: _Fixed
) -> _Carry:
  """Reads the prompts and draws the first token of each row. last: [batch] position of the last prompt token."""
  states = static.states(params, batch, static.slots)
  rows = last.shape[0]
  out = Output(
    jnp.zeros((rows, static.max_new), jnp.int32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros((rows, static.max_new), jnp.float32),
  )
  carry = _Carry(jnp.int32(0), jnp.zeros(rows, jnp.int32), last, ~live, states, out)
  hidden = static.hidden(params, batch, states=states)
  x = jnp.take_along_axis(hidden.x, last[:, None, None], axis=1)  # only these need logits
  return _draw(static, params, fixed, carry, x, hidden.states)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(
  static: _Static, params: Any, fixed: _Fixed, carry: _Carry, until: jax.Array
) -> _Carry:
  """Goes on until `until` tokens are drawn or every row has ended."""

  def go_on(carry: _Carry) -> jax.Array:
    return (carry.made < until) & ~carry.done.all()

  def step(carry: _Carry) -> _Carry:
    batch = dict(fixed.context, inputs=carry.token[:, None], positions=carry.position[:, None])
    hidden = static.hidden(params, batch, states=carry.states)
    return _draw(static, params, fixed, carry, hidden.x, hidden.states)

  carry = jax.lax.while_loop(go_on, step, carry)
  return carry._replace(out=jax.tree.map(_whole, carry.out))


def _draw(
  static: _Static, params: Any, fixed: _Fixed, carry: _Carry, x: jax.Array, states: Any
) -> _Carry:
  """Draws one token per row from the model's output `x` [batch, 1, embed] at `carry.position`."""
  logits = static.logits(params, x)[:, 0].astype(jnp.float32)
  keys = jax.vmap(jax.random.fold_in, (0, None))(fixed.keys, carry.made)
  token = logits_lib.sample(logits, keys, allowed=fixed.allowed, **dict(static.sample))
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
  token, logp = jnp.where(carry.done, 0, token), jnp.where(carry.done, 0.0, logp)
  out = Output(
    jax.lax.dynamic_update_slice(carry.out.tokens, token[:, None], (0, carry.made)),
    carry.out.lengths + ~carry.done,
    jax.lax.dynamic_update_slice(carry.out.logp, logp[:, None], (0, carry.made)),
  )
  position = carry.position + 1
  done = carry.done | (position >= static.slots)  # no slot left to feed the token to
  done |= token == fixed.eos
  position = jnp.minimum(position, static.slots - 1)
  return _Carry(carry.made + 1, _whole(token), position, _whole(done), states, out)


def _whole(x: jax.Array) -> jax.Array:
  """Every device holds all of `x`: small, and the host of each process reads it."""
  return mesh.constrain(x, jax.sharding.PartitionSpec())


# --- the host's part ----------------------------------------------------------------------------------


def _start(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  max_new: int = 100,
  eos: int | None = 1,
  start: int | None = START,
  allowed: Any = None,
  rows: Any = None,
  **sample: float,
) -> tuple[_Static, _Fixed, _Carry]:
  """Checks the arguments, lays out the batch and runs the prefill."""
  sample = dict(temperature=1.0, top_k=0, top_p=1.0) | sample
  logits_lib.check(**sample)
  prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
  _check(model, prompts, lengths, max_new, start, allowed)
  if allowed is not None:  # nor is any of the rows that round up the table
    beyond = np.zeros(model.card.rows - model.card.vocab, bool)
    allowed = np.concatenate([np.asarray(allowed, bool), beyond])
  rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
  live = np.ones(len(prompts), bool)
  prompts, lengths, rows, live = (_fill(x) for x in (prompts, lengths, rows, live))
  batch, last, slots = _layout(model, prompts, lengths, max_new, start)
  context = {k: v for k, v in batch.items() if k not in ('inputs', 'positions', 'segments')}
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  fixed = _Fixed(keys, np.int32(-1 if eos is None else eos), allowed, context)
  functions = model.hidden, model.logits, model.states
  static = _Static(*functions, tuple(sample.items()), slots, max_new, mesh.context())
  return static, fixed, _prefill(static, params, batch, last, live, fixed)


def _layout(
  model: Any, prompts: np.ndarray, lengths: np.ndarray, max_new: int, start: int | None = START
) -> tuple:
  """(the prefill's batch, position of each row's last token [batch], slots in the state)."""
  width = int(min(prompts.shape[1], _room(model, start)))
  prompts = prompts[:, :width]  # what is cut is padding: `_check` saw to that
  real, zeros = np.arange(width) < lengths[:, None], np.zeros_like(lengths)
  inputs, last = np.where(real, prompts, 0), np.maximum(lengths - 1, 0)
  if start is not None:
    inputs, last = np.concatenate([zeros[:, None] + start, inputs], axis=1), lengths
  batch = dict(inputs=inputs, positions=_count(inputs))
  batch['segments'] = (batch['positions'] <= last[:, None]).astype(np.int32)
  slots = int(min(width + max_new, limit(model)))
  if model.card.kind == 'prefix':
    batch['prefix'] = np.arange(slots) <= last[:, None]
  if model.card.kind != 'encoder_decoder':
    return batch, last, slots
  batch = dict(inputs=inputs[:, :1], positions=zeros[:, None])
  encoder = dict(inputs=inputs[:, 1:], positions=_count(prompts), segments=real.astype(np.int32))
  batch |= {f'encoder/{name}': x for name, x in encoder.items()}
  return batch, zeros, int(min(max_new, limit(model)))


def _count(x: np.ndarray) -> np.ndarray:
  return np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape)


def _check(
  model: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  max_new: int,
  start: int | None,
  allowed: Any,
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
  if allowed is not None and np.shape(allowed) != (card.vocab,):
    raise UserError(
      f'allowed must have one entry for each of the {card.vocab} ids, got shape {np.shape(allowed)}'
    )
  if start is None and (card.kind == 'encoder_decoder' or not lengths.min()):
    raise UserError('without a start token every prompt needs one of its own: name the id as start')
  room = _room(model, start)
  if lengths.max() > room:
    raise UserError(
      f'the prompt has {lengths.max()} tokens, the model reads at most {room} (its context is {card.length}): '
      'shorten the prompt or train with a longer context'
    )


def _room(model: Any, start: int | None = START) -> float:
  """The longest prompt the model takes, in tokens: one position of a decoder's context is the start token's."""
  if model.card.length is None:
    return math.inf
  return model.card.length - (start is not None and model.card.kind != 'encoder_decoder')


def _fill(x: np.ndarray) -> np.ndarray:
  """Rows of zeros (dead from the start: `live` is one of the arrays) until the batch divides over the mesh."""
  return np.concatenate([x, np.zeros((-len(x) % mesh.batch_ways(), *x.shape[1:]), x.dtype)])


def _encode(model: Any, vocab: Any, prompt: str) -> list[int]:
  """The prompt's ids as in training: an encoder's input ends with eos where it holds sentinels (span corruption's
  inputs do, those of prefix LM do not), and is eos alone where there is no text. So is a prompt without start and
  text."""
  if vocab.size > model.card.vocab:
    raise UserError(
      f'the vocabulary has {vocab.size} ids, the model {model.card.vocab}: use the one it was trained with'
    )
  ids = list(vocab.encode(prompt))
  sentinels = set(map(int, vocab.sentinels))
  if model.card.kind != 'encoder_decoder':
    return ids if ids or vocab.start is not None else [vocab.eos]
  return [*ids, vocab.eos] if not ids or sentinels.intersection(ids) else ids


def _pad(model: Any, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded to a power of two of at least 16, or to the model's room where that is less."""
  longest = max(map(len, ids))
  width = int(max(longest, min(_room(model), 1 << max(4, (longest - 1).bit_length()))))
  padded = np.zeros((len(ids), width), np.int32)
  for row, own in zip(padded, ids, strict=True):
    row[: len(own)] = own
  return padded, np.array([len(own) for own in ids], np.int32)


def _allowed(model: Any, vocab: Any) -> np.ndarray:
  ids = np.arange(model.card.vocab)
  return (ids < vocab.size) & (True if vocab.pad is None else ids != vocab.pad)


def _shown(model: Any, prompt: list[int]) -> list[int]:
  """What stands before the first new token in the text: the prompt, or nothing when the prompt is an encoder's."""
  return [] if model.card.kind == 'encoder_decoder' else prompt


def _pieces(vocab: Any, before: list[int], tokens: Any, end_id: int) -> Iterator[str]:
  """The text that follows `before`, piece by piece; tokens: arrays of new ids in order, `end_id` is not shown.

  The whole is decoded each time, because a piece's text depends on its neighbours (spaces, bytes of one character).
  Trailing replacement characters may be a character whose last bytes are still to come, so up to three are held back.
  """
  ids, start = list(before), len(vocab.decode(before))
  for some in tokens:
    ids += [int(i) for i in np.ravel(some) if i != end_id]
    whole = vocab.decode(ids)
    end = len(whole)
    while end > start and len(whole) - end < 3 and whole[end - 1] == '\ufffd':
      end -= 1
    if end > start:
      yield whole[start:end]
      start = end
  rest = vocab.decode(ids)[start:]
  if rest:
    yield rest
