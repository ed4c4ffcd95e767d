"""What the engine runs on the device: a few functions of fixed shapes, compiled before the first request.

`read` takes a chunk of one prompt, `step` one token of up to as many rows as the largest bucket, `choose` draws tokens,
`encode` takes an encoder's input. Rows that nobody uses have no pages, and what is computed for them is not looked at.

**Bits.** What is computed for a row must not depend on the other rows. Attention walks over pages (model/paged.py),
everything else works row by row but for matrix products, whose order of summation XLA chooses by the number of rows:
the same for 8 to 32 on the CPUs tried, others below and above. So no call has more than 32 rows or tokens nor fewer
than 8, but for what is read at once (serve/reading.py), whose number of tokens depends on nobody else. Sums along rows
change their order where an array has 4,096 numbers: a model with rows that are on either side of that, in 8 of them and
in 32, has steps of 32 alone (`buckets`), and attention sees to itself. Tests hold this.
Mixtures of experts are the exception: an expert multiplies what all rows send it at once, and the last bits of a
log-probability depend on how much that is (5e-7 where it was tried, with the same tokens).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh, tree
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import steps
from llm_jax.model import paged
from llm_jax.serve import encoder, placement
from llm_jax.serve.reading import Causal
from llm_jax.serve.requests import MOST_TOP

BUCKETS = (8, 32)
_ONE = dict(encoder.ONE, inputs=np.zeros((1, 1), np.int32))
SETTINGS = tuple(name for name in logits_lib.Sampling._fields if name != 'no_repeat_ngram')


def buckets(*widths: int) -> tuple[int, ...]:
  """The numbers of rows that a step may have, for sums along rows of these widths."""
  changes = [w for w in widths if BUCKETS[0] * w < paged.SUMMED <= BUCKETS[-1] * w]
  return BUCKETS[-1:] if changes else BUCKETS


class Sizes(NamedTuple):
  """rows: sequences at once. length: of the longest. page: slots of a page; pages: how many there are, and as many
  again for an encoder's inputs. dtype: of the pools, None for the model's, 'int8' for one byte a number."""

  rows: int
  length: int
  page: int
  pages: int
  dtype: str | None = None

  @property
  def table(self) -> int:
    """Pages of the longest sequence."""
    return -(-self.length // self.page)


class Told(NamedTuple):
  """What `choose` is told of each row, numpy arrays [rows]: see `Sampling` for `settings` [fields, rows].

  seen: `logits.Seen` with tokens [rows, length]. bias: f32, allowed: bool, [rows, vocab] or None. top: whether somebody
  wants to see the likeliest tokens.
  """

  settings: np.ndarray
  seeds: np.ndarray
  made: np.ndarray
  seen: logits_lib.Seen
  bias: np.ndarray | None
  allowed: np.ndarray | None
  top: bool


class Chosen(NamedTuple):
  """token int32, logp f32 [rows]; top_ids, top_logp [rows, MOST_TOP]."""

  token: np.ndarray
  logp: np.ndarray
  top_ids: np.ndarray
  top_logp: np.ndarray


class Device:
  """The model, its parameters and the memory of all sequences. Used by one thread, inside `place.entered()`.

  allowed: bool [vocab], the ids that may be drawn. place: where the parameters are, and the memory goes. reading: how
  the model reads, see serve/reading.py.
  """

  def __init__(
    self,
    model: Any,
    params: Any,
    sizes: Sizes,
    allowed: np.ndarray,
    place: placement.Placement,
    reading: Causal,
  ):
    self.sizes, self._model, self._params, self._place = sizes, model, params, place
    self.reading = reading
    self._head = model.head(params)
    self.buckets = buckets(model.card.embed, model.card.rows)
    states = lambda params: model.states(params, _ONE, sizes.length)
    rest = lambda all: {p: x for p, x in tree.flatten(all).items() if not _in_pages(p)}
    self._fresh = jax.jit(lambda params: rest(states(params)))(params)
    self._states = tree.map_paths(self._memory, jax.eval_shape(states, params))
    places = tuple(placement.spread(self._states).items())
    self._f = _Functions(model.hidden, model.logits, model.states, mesh.context(), places)
    self._allowed = np.pad(allowed, (0, model.card.rows - model.card.vocab))
    self._open = functools.cache(self._neutral)
    self.recurrent = bool(self._fresh)  # a state that cannot be shared nor cut at a chunk

  def warm_up(self) -> None:
    """Compiles everything there is to compile."""
    for _ in range(
      2
    ):  # what a program returned counts as another kind of input than what was made outside
      self._try_all()

  def _try_all(self) -> None:
    neutral = {name: getattr(logits_lib.Sampling(), name) for name in SETTINGS}
    nobody = np.full((1, self.sizes.table), -1, np.int32)
    inputs = encoder.Inputs(self, False)
    for width in self.reading.encodes:
      self.encode(np.zeros(width, np.int32), inputs.table((), 1))
    for width in reversed(self.reading.chunks):
      x = self.read(np.zeros(width, np.int32), 0, nobody[0], 0, inputs.told((), 1))
    self.prompt_logp(x, np.zeros(x.shape[0], np.int32))
    for rows in self.buckets:
      none = np.zeros(rows, np.int32)
      pages = np.repeat(nobody, rows, axis=0)
      x = self.step(none, none, pages, none + self.sizes.rows, inputs.told((), rows))
      tokens = np.full((rows, self.sizes.length), -1, np.int32)
      settings = np.tile(np.array(list(neutral.values()), np.float32)[:, None], (1, rows))
      seen = logits_lib.Seen(tokens, none, none)
      self.choose(x, Told(settings, none.astype(np.uint32), none, seen, None, None, False))
    self.copy(0, 0)
    if self.recurrent:
      self.reset(0)

  @property
  def compilations(self) -> int:
    """Programs compiled so far, by all engines of the process."""
    used = _forward, _choose, _score, _copy, _reset, encoder.encode
    return sum(f._cache_size() for f in used)

  def encode(self, ids: Sequence[int], pages: np.ndarray) -> None:
    """Runs the encoder over an input, whose keys and values go to the pages [1, n]."""
    told = _padded(ids, self.reading.encodes)[None], np.int32(len(ids)), pages
    self._states = encoder.encode(self._f, self._params, self._states, *told)

  def read(
    self, ids: Sequence[int], first: int, pages: np.ndarray, row: int, inputs: dict[str, np.ndarray]
  ) -> jax.Array:
    """The outputs, f32 [width, embed] with the next of `reading.chunks` as width, of ids at positions from `first` on.
    inputs: of the encoder, see `encoder.Inputs.told`."""
    tokens = _padded(ids, self.reading.chunks)
    at = np.arange(len(tokens), dtype=np.int32)
    real = (at < len(ids)).astype(np.int32)
    told = tokens[None], first + at[None], real[None], pages[None], np.array([row])
    return self._run(*told, inputs | self.reading.front(len(ids)))[0]

  def step(
    self,
    tokens: np.ndarray,
    positions: np.ndarray,
    pages: np.ndarray,
    rows: np.ndarray,
    inputs: dict[str, np.ndarray],
  ) -> jax.Array:
    """The outputs, f32 [rows, embed], of one token of each row. pages: [rows, table], -1 for none; rows: where their
    other states are, beyond the last for nobody's."""
    real = (rows < self.sizes.rows).astype(np.int32)
    return self._run(tokens[:, None], positions[:, None], real[:, None], pages, rows, inputs)[:, 0]

  def choose(self, x: jax.Array, told: Told) -> Chosen:
    """The next token of each row of `x` [rows, embed], which passes through the host: one signature for all callers."""
    rows = x.shape[0]
    bias, allowed = told.bias, told.allowed
    bias = self._open('bias', rows) if bias is None else self._place.whole(bias)
    allowed = self._open('allowed', rows) if allowed is None else self._place.whole(allowed)
    limits = bias, allowed, np.bool_(told.top)
    found = _choose(self._f, self._head, np.asarray(x), *told[:4], *limits)
    return Chosen(*jax.device_get(found))

  def prompt_logp(self, x: jax.Array, following: np.ndarray) -> np.ndarray:
    """f32 [CHUNK]: log-probability of the id that follows each token of a chunk."""
    return np.asarray(_score(self._f, self._head, x, following))

  def copy(self, source: int, target: int) -> None:
    """Copies a page."""
    self._states = _copy(self._f, self._states, np.int32(source), np.int32(target))

  def reset(self, row: int) -> None:
    """Makes the row's states those of an empty context."""
    self._states = _reset(self._f, self._states, self._fresh, np.int32(row))

  def _run(self, *told: Any) -> jax.Array:
    x, self._states = _forward(self._f, self._params, self._states, *told)
    return x

  def _memory(self, path: str, x: jax.ShapeDtypeStruct) -> Any:
    """The leaf of a row's state [1, 1, ...], as it is for all: a pool, or one for every row."""
    if not _in_pages(path):
      return jnp.repeat(self._fresh[path], self.sizes.rows, axis=1)
    if path.endswith('/segments'):  # the lengths of inputs come with every call
      return None
    groups, head_dim = x.shape[2], x.shape[4]
    dtype = self.sizes.dtype or x.dtype
    pool = paged.pool(groups, self.sizes.pages, self.sizes.page, head_dim, dtype)
    return jax.tree.map(lambda x: mesh.shard(x[None], 'layers', *paged.AXES), pool)

  def _neutral(self, name: str, rows: int) -> jax.Array:
    """A bias or a mask for rows that have none of their own."""
    shape = rows, self._model.card.rows
    neutral = (
      np.zeros(shape, np.float32) if name == 'bias' else np.broadcast_to(self._allowed, shape)
    )
    return self._place.whole(neutral)


class _Functions(NamedTuple):
  """What the compiled code depends on besides shapes. rules: of the mesh. places: (path, where its leaf is) of the
  states that are split, which therefore stay where they are."""

  hidden: Any
  logits: Any
  states: Any
  rules: Any
  places: tuple = ()

  def settle(self, states: Any) -> Any:
    """The states, each leaf where it belongs."""
    places = dict(self.places)
    return tree.map_paths(lambda p, x: mesh.constrain(x, places[p]) if p in places else x, states)

  def whole_logits(self, head: Any, x: jax.Array) -> jax.Array:
    """f32 [rows, vocab] of x [rows, embed], all of them on every device."""
    found = self.logits(head, x[:, None])[:, 0].astype(jnp.float32)
    return steps.whole(found)


def slot_bytes(model: Any, params: Any, dtype: str | None) -> int:
  """Bytes of a slot in the pools of all layers, on each device."""
  states = tree.flatten(jax.eval_shape(lambda params: model.states(params, _ONE, 1), params))

  def count(x: jax.Array) -> int:
    groups, head_dim = x.shape[2], x.shape[4]
    pool = jax.eval_shape(lambda: paged.pool(groups, 1, 1, head_dim, dtype or x.dtype))
    return x.shape[0] * tree.nbytes(pool) // mesh.ways(*paged.AXES)

  kept = [path for path in states if _in_pages(path) and not path.endswith('/segments')]
  return sum(count(states[path]) for path in kept)


def _padded(ids: Sequence[int], widths: tuple[int, ...]) -> np.ndarray:
  """int32 [width]: followed by zeros up to the next width."""
  tokens = np.zeros(next(w for w in widths if w >= len(ids)), np.int32)
  tokens[: len(ids)] = ids
  return tokens


def _is_paged(path: str) -> bool:
  return '/mixer/k' in path or '/mixer/v' in path


def _in_pages(path: str) -> bool:
  return _is_paged(path) or encoder.holds(path)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _forward(
  f: _Functions,
  params: Any,
  states: Any,
  tokens: jax.Array,
  positions: jax.Array,
  real: jax.Array,
  pages: jax.Array,
  rows: jax.Array,
  more: dict[str, jax.Array],
) -> tuple[jax.Array, Any]:
  """(outputs [rows, t, embed], states). All arrays [rows, t], but pages [rows, n] and rows [rows]. more: of the
  batch."""

  def own(path: str, x: jax.Array) -> jax.Array:
    return x if _in_pages(path) else x.at[:, rows].get(mode='clip')

  def put(path: str, old: jax.Array, new: jax.Array) -> jax.Array:
    return new if _in_pages(path) else old.at[:, rows].set(new, mode='drop')

  batch = dict(more, inputs=tokens, positions=positions, segments=real, pages=pages)
  hidden = f.hidden(params, batch, states=tree.map_paths(own, states))
  x = steps.whole(hidden.x.astype(jnp.float32))
  return x, f.settle(tree.map_paths(put, states, hidden.states))


@functools.partial(jax.jit, static_argnums=0)
def _choose(
  f: _Functions, head: Any, x: jax.Array, settings, seeds, made, seen, bias, allowed, top
):
  logits = f.whole_logits(head, x)
  sampling = logits_lib.Sampling(**dict(zip(SETTINGS, settings, strict=True)))
  key = lambda seed, n: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), n)
  found = logits_lib.process(logits, sampling, seen, bias=bias, allowed=allowed)
  token = logits_lib.draw(found, jax.vmap(key)(seeds, made), sampling.temperature)
  logp = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
  best = lambda x: tuple(jax.lax.top_k(x, min(MOST_TOP, x.shape[1])))
  none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(best, logp))
  likeliest, ids = jax.lax.cond(top, best, lambda _: none, logp)
  return token, own, ids, likeliest


@functools.partial(jax.jit, static_argnums=0)
def _score(f: _Functions, head: Any, x: jax.Array, following: jax.Array) -> jax.Array:
  logp = jax.nn.log_softmax(f.whole_logits(head, x))
  return jnp.take_along_axis(logp, following[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _copy(f: _Functions, states: Any, source: jax.Array, target: jax.Array) -> Any:
  """The states with one page copied; leaves [1, groups, pages, size, ...]."""
  one = lambda x: x.at[:, :, target].set(x[:, :, source])
  return f.settle(tree.map_paths(lambda path, x: one(x) if _is_paged(path) else x, states))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _reset(f: _Functions, states: Any, fresh: dict[str, jax.Array], row: jax.Array) -> Any:
  """The states with those of a row as they are in `fresh`."""
  one = lambda path, x: x.at[:, row].set(fresh[path][:, 0]) if path in fresh else x
  return f.settle(tree.map_paths(one, states))
