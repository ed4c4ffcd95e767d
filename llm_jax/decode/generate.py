"""Token by token: one forward over the prompts (prefill), then a `lax.while_loop` around a one-token forward.

Row `i` draws its token number `j` with `fold_in(fold_in(key, rows[i]), j)`: what a row says depends neither on
its neighbours nor on the size of the batch. How prompts are laid out: decode/prompts.py.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps
from llm_jax.decode.prompts import START


class Output(NamedTuple):
  """tokens: int32 [batch, max_new], 0 after the end; lengths: int32 [batch], the end-of-text token counted;
  logp: f32 [batch, max_new], log-probability (nats) of each token under the model itself, before top-k, top-p and bans,
  at the temperature `logp_at`; 0 after the end."""

  tokens: jax.Array
  lengths: jax.Array
  logp: jax.Array

  @staticmethod
  def empty(rows: int, max_new: int) -> 'Output':
    """Before the first token."""
    tokens, logp = jnp.zeros((rows, max_new), jnp.int32), jnp.zeros((rows, max_new))
    return Output(tokens, jnp.zeros(rows, jnp.int32), logp)

  def add(self, made: jax.Array, token: jax.Array, logits: jax.Array, done: jax.Array) -> 'Output':
    """With `token` [rows] as number `made`, but for rows that are `done`. logits: the model's, f32 [rows, vocab]."""
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)
    put = lambda old, new: jax.lax.dynamic_update_slice(
      old, jnp.where(done[:, None], jnp.zeros_like(new), new), (0, made)
    )
    return Output(put(self.tokens, token[:, None]), self.lengths + ~done, put(self.logp, logp))


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes."""

  model: steps.Functions
  sampling: logits_lib.Sampling
  banned: tuple[tuple[int, ...], ...]
  max_new: int
  n: int
  logp_at: float


class _Carry(NamedTuple):
  """One decoding in progress. `token` [batch] was drawn last, `position` [batch] is where it will be fed."""

  made: jax.Array  # [] tokens drawn so far
  token: jax.Array
  position: jax.Array
  done: jax.Array
  states: Any
  seen: logits_lib.Seen | None
  out: Output


class _Fixed(NamedTuple):
  """What the loop reads and never changes. keys: [batch] keys, or the uniform numbers [batch, max_new]. ends: int32
  [n], the ids that end a text, -1 for none. context: the prefix slots or the encoder's arrays."""

  keys: jax.Array
  ends: jax.Array
  allowed: jax.Array | None
  bias: jax.Array | None
  context: dict[str, jax.Array]


def generate(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  max_new: int = 100,
  n: int = 1,
  eos: int | Sequence[int] | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  rows: Any = None,
  uniforms: Any = None,
  logp_at: float = 1.0,
  **sampling: float,
) -> Output:
  """Continues every prompt until it has drawn `eos` (None: never), `max_new` tokens, or filled the position table.

  prompts: int32 [batch, length], right-padded; lengths: int32 [batch], 0 starts a new document. Both host arrays, the
  same on every process. n: samples of each prompt, which is read once; the output's rows are those of the first
  prompt, then those of the second. start: id in front of every prompt; None: nothing, and no prompt may be empty.
  sampling: the fields of `logits.Sampling`; temperature 0 is greedy. allowed ([vocab] bool), bias (f32 [vocab]), banned
  (sequences of ids): see `logits.processors`. rows: int32 [batch * n], the numbers that individualise the rows' random
  keys (default 0, 1, ...). uniforms: f32 [batch * n, max_new] in [0, 1), drawn from instead of the key, by inverting
  the cumulative distribution. logp_at: the temperature that the reported log-probabilities are those of.

  A model with learned positions stops where their table ends (`lengths` tells); others go on past the length they
  were trained with. Raises `UserError` for a prompt that does not fit the model's context (`card.length`, start token
  included). Compiled once per shape and setting; inside `jax.set_mesh` the rows are spread over the batch axes.
  """
  settings = dict(max_new=max_new, n=n, eos=eos, start=start, allowed=allowed, bias=bias)
  settings |= dict(banned=banned, rows=rows, uniforms=uniforms, logp_at=logp_at, **sampling)
  static, fixed, carry = _start(model, params, prompts, lengths, key, **settings)
  out = _advance(static, params, fixed, carry, np.int32(max_new)).out
  batch = np.shape(prompts)[0] * n
  return out if out.tokens.shape[0] == batch else jax.tree.map(lambda x: x[:batch], out)


def stream(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  guides: Sequence[Any] = (),
  allowed: Any = None,
  **settings: Any,
) -> Iterator[np.ndarray]:
  """The columns of `generate`'s tokens, int32 [batch * n] each, as they are drawn; same arguments, same tokens.

  guides: one per row, which says after each token what the row may draw next (decode/constrain.py), besides `allowed`.
  A row that has ended yields 0. The prompts are read, and wrong arguments raise, before this returns.
  """
  rows = np.shape(prompts)[0] * settings.get('n', 1)
  if guides and len(guides) != rows:
    raise UserError(f'{rows} rows need as many guides, got {len(guides)}')
  may = lambda: prompts_lib.guided(model, guides, allowed) if guides else allowed
  static, fixed, carry = _start(model, params, prompts, lengths, key, allowed=may(), **settings)

  def columns(fixed: _Fixed, carry: _Carry) -> Iterator[np.ndarray]:
    ended = np.zeros(rows, bool)
    for made in range(1, static.max_new + 1):
      column = np.array(carry.token)[:rows]
      yield column
      for i in np.flatnonzero(~ended) if guides else ():
        guides[i].advance(column[i])
      ended = np.array(carry.done)[:rows] | np.array([guide.done for guide in guides] or False)
      if made == static.max_new or np.all(ended):
        return
      if guides:
        fixed = fixed._replace(allowed=prompts_lib.permitted(model, may()))
      carry = _advance(static, params, fixed, carry, np.int32(made + 1))

  return columns(fixed, carry)


def text(
  model: Any,
  params: Any,
  vocab: Any,
  prompts: Sequence[str],
  key: jax.Array,
  *,
  max_new: int = 100,
  stop: Sequence[str] = (),
  batch: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  typical: float = 1.0,
  epsilon: float = 0.0,
  eta: float = 0.0,
  repetition: float = 1.0,
  presence: float = 0.0,
  frequency: float = 0.0,
  no_repeat_ngram: int = 0,
) -> list[str]:
  """The continuation of each prompt (without the prompt), decoded `batch` rows at a time.

  stop: the text ends in front of the first of these. The others: see `logits.Sampling`. Prompts are padded to the
  next power of two, so that few shapes are compiled. Padding and ids beyond the vocabulary (a table rounded up for
  the mesh) are never drawn.
  """
  settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical=typical)
  settings |= dict(epsilon=epsilon, eta=eta, repetition=repetition, presence=presence)
  settings |= dict(frequency=frequency, no_repeat_ngram=no_repeat_ngram)
  settings |= dict(max_new=max_new, eos=vocab.eos, start=vocab.start)
  settings['allowed'] = prompts_lib.drawable(model, vocab)
  ids = [prompts_lib.encode(model, vocab, prompt) for prompt in prompts]
  found: list[str] = []
  for first in range(0, len(ids), batch):
    some = ids[first : first + batch]
    rows = first + np.arange(len(some))
    padded = prompts_lib.pad(model, some)
    tokens, lengths, _ = generate(model, params, *padded, key, rows=rows, **settings)
    for prompt, row, length in zip(some, np.asarray(tokens), np.asarray(lengths), strict=True):
      before = prompts_lib.shown(model, prompt)
      found.append(''.join(prompts_lib.pieces(vocab, before, [row[:length]], vocab.eos, stop)))
  return found


def stream_text(
  model: Any,
  params: Any,
  vocab: Any,
  prompt: str,
  key: jax.Array,
  *,
  stop: Sequence[str] = (),
  **settings: Any,
) -> Iterator[str]:
  """The text that `text(..., [prompt], key)` returns, in pieces as they come; a character is never cut in two.

  settings: those of `text`.
  """
  ids = prompts_lib.encode(model, vocab, prompt)
  told = dict(eos=vocab.eos, start=vocab.start, allowed=prompts_lib.drawable(model, vocab))
  columns = stream(model, params, *prompts_lib.pad(model, [ids]), key, **settings, **told)
  return prompts_lib.pieces(vocab, prompts_lib.shown(model, ids), columns, vocab.eos, stop)


def stream_answer(
  model: Any,
  params: Any,
  vocab: Any,
  ids: Sequence[int],
  key: jax.Array,
  *,
  stop: Sequence[str] = (),
  **settings: Any,
) -> Iterator[str]:
  """The answer to a conversation written as the model's chat template writes it (`data.templates.prompt`), in pieces.

  The template writes the start itself (an encoder reads none), and the answer ends with the token that ends a turn.
  settings: those of `text`.
  """
  prompts_lib.check_vocab(model, vocab)
  start, ids = None, list(ids)
  if model.card.kind == 'encoder_decoder':
    start = vocab.first
    ids = ids[1:] if vocab.start is not None and ids[:1] == [vocab.start] else ids
  told = dict(eos=vocab.turn, start=start, allowed=prompts_lib.drawable(model, vocab))
  columns = stream(model, params, *prompts_lib.pad(model, [ids]), key, **settings, **told)
  return prompts_lib.pieces(vocab, [], columns, vocab.turn, stop)


# --- the compiled part --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
  static: _Static, params: Any, batch: dict, last: jax.Array, live: jax.Array, fixed: _Fixed
) -> _Carry:
  """Reads the prompts and draws the first token of each row. last: [batch] position of the last prompt token."""
  x, states = steps.prefill(static.model, params, batch, last)
  x, last, live, inputs = (
    steps.repeat(y, static.n, axis=0) for y in (x, last, live, batch['inputs'])
  )
  states, rows = steps.repeat(states, static.n), len(last)
  seen = None
  if logits_lib.needs_seen(static.sampling) or static.banned:
    seen = logits_lib.Seen.begin(inputs, last, static.max_new)
  out = Output.empty(rows, static.max_new)
  carry = _Carry(jnp.int32(0), jnp.zeros(rows, jnp.int32), last, ~live, states, seen, out)
  return _draw(static, params, fixed, carry, x, states)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(
  static: _Static, params: Any, fixed: _Fixed, carry: _Carry, until: jax.Array
) -> _Carry:
  """Goes on until `until` tokens are drawn or every row has ended."""

  def go_on(carry: _Carry) -> jax.Array:
    return (carry.made < until) & ~carry.done.all()

  def step(carry: _Carry) -> _Carry:
    told = fixed.context, carry.token, carry.position, carry.states
    return _draw(static, params, fixed, carry, *steps.step(static.model, params, *told))

  carry = jax.lax.while_loop(go_on, step, carry)
  return carry._replace(out=jax.tree.map(steps.whole, carry.out))


def _draw(
  static: _Static, params: Any, fixed: _Fixed, carry: _Carry, x: jax.Array, states: Any
) -> _Carry:
  """Draws one token per row from the model's output `x` [batch, embed] at `carry.position`."""
  logits = steps.logits(static.model, params, x)
  if jnp.issubdtype(fixed.keys.dtype, jnp.floating):
    keys = jax.lax.dynamic_index_in_dim(fixed.keys, carry.made, axis=1, keepdims=False)
  else:
    keys = jax.vmap(jax.random.fold_in, (0, None))(fixed.keys, carry.made)
  told = dict(allowed=fixed.allowed, bias=fixed.bias, banned=static.banned)
  settings = static.sampling._asdict()
  token = logits_lib.sample(logits, keys, seen=carry.seen, **told, **settings)
  out = carry.out.add(carry.made, token, logits / static.logp_at, carry.done)
  token = jnp.where(carry.done, 0, token)
  seen = carry.seen and carry.seen.add(jnp.where(carry.done, -1, token))
  position = carry.position + 1
  done = carry.done | (position >= static.model.slots)  # no slot left to feed the token to
  done |= (token[:, None] == fixed.ends).any(-1)
  position = jnp.minimum(position, static.model.slots - 1)
  return _Carry(carry.made + 1, steps.whole(token), position, steps.whole(done), states, seen, out)


# --- the host's part ----------------------------------------------------------------------------------


def _start(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  max_new: int = 100,
  n: int = 1,
  eos: int | Sequence[int] | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  rows: Any = None,
  uniforms: Any = None,
  logp_at: float = 1.0,
  **sampling: float,
) -> tuple[_Static, _Fixed, _Carry]:
  """Checks the arguments, lays out the batch and runs the prefill."""
  chosen = logits_lib.check(**sampling)
  laid = prompts_lib.lay(model, prompts, lengths, max_new, start)
  total = len(laid.last) * n
  if n < 1:
    raise UserError(f'n must be at least 1, got {n}')
  if uniforms is not None:
    keys = np.zeros((total, max_new), np.float32)
    keys[: np.shape(prompts)[0] * n] = uniforms
  else:
    keys = prompts_lib.row_keys(key, rows, np.shape(prompts)[0] * n, total)
  rules = prompts_lib.rules(model, eos, allowed, bias, banned)
  fixed = _Fixed(keys, rules.ends, rules.allowed, rules.bias, laid.context)
  if n > 1:  # of the encoder nothing is read again
    fixed = fixed._replace(context={k: np.repeat(v, n, axis=0) for k, v in laid.context.items()})
  told = chosen, rules.banned, max_new, n, logp_at
  static = _Static(steps.functions(model, laid.slots), *told)
  return static, fixed, _prefill(static, params, laid.batch, laid.last, laid.live, fixed)
