"""Continuous batching: requests come and go while others are being answered (Orca, Yu et al. 2022; PagedAttention,
arXiv:2309.06180).

One thread goes round: let requests in, read at most `chunks` chunks of prompts, draw a token for everyone whose prompt
is read. So a long prompt holds the others up by a chunk at a time (chunked prefill, arXiv:2308.16369; SplitFuse,
arXiv:2401.08671). Keys and values lie in pages, taken as they are needed; when none is left, the request that came last
gives its own back and starts over, its answer fed in again token by token as it was drawn. What a model reads at once
(serve/reading.py), the input of an encoder or a prompt that is seen in both directions, is one chunk.

A request's answer depends on nobody else, to the bit: not on who is in the batch, on what is cached, or on having been
sent away. For that, chunks begin at multiples of `reading.CHUNK`, only whole chunks of prompts are cached, and what was
drawn is read again one by one.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import logits as logits_lib
from llm_jax.model import stack
from llm_jax.serve import encoder, placement, reading
from llm_jax.serve.device import SETTINGS, Device, Sizes, Told, slot_bytes
from llm_jax.serve.pages import Pages
from llm_jax.serve.reading import CHUNK
from llm_jax.serve.requests import Full, Request, Token
from llm_jax.serve.sequence import Sequence


class Engine:
  """Answers requests. Owns a thread and the device's memory: `close` it, or use it in a `with`.

  params: best with their layers apart already (`stack.apart`); else they are copied so. Made inside `jax.set_mesh`, the
  engine splits them, its pool and its states over the mesh axis `tensor` (serve/placement.py).

  rows: answered at once. length: the longest prompt and answer (each of them, with an encoder), None: the model's
  context. pages: of `page` slots each, and as many for an encoder's inputs, None: enough for every row at full length,
  but no more than fit into `memory` GiB of each device (a single row always fits). kv: 'int8' keeps keys and values in
  a byte a number. queue: requests that may wait. chunks: of prompts between two tokens. prefix_cache: keeps what
  prompts begin with, and an encoder's inputs. allowed: bool [vocab], the ids that may be drawn, None for all.

  `reading` is how the model reads (serve/reading.py).
  """

  def __init__(
    self,
    model: Any,
    params: Any,
    *,
    rows: int = 32,
    length: int | None = None,
    page: int = 8,
    pages: int | None = None,
    memory: float = 1.0,
    kv: str | None = None,
    queue: int = 256,
    chunks: int = 4,
    prefix_cache: bool = True,
    allowed: np.ndarray | None = None,
  ):
    kind, self._place = reading.kind(model), placement.find(model)
    length = min(x for x in (length, model.card.length, 1 << 20) if x is not None)
    if min(rows, length, page, queue, chunks) < 1 or CHUNK % page:
      raise UserError(
        f'rows={rows}, length={length}, queue={queue}, chunks={chunks} must be at least 1, page={page} divide {CHUNK}'
      )
    if kv not in (None, 'int8'):
      raise UserError(f"kv={kv!r}: choose None (the model's type) or 'int8'")
    self._allowed = np.ones(model.card.vocab, bool) if allowed is None else np.asarray(allowed)
    with self._place.entered():
      params = self._place.put(model, stack.apart(params))
      if pages is None:
        row, room = -(-length // page), memory * 2**30 / max(slot_bytes(model, params, kv), 1)
        pages = max(row, min(rows * row, int(room) // page))
      self.length = min(length, pages * page)
      self.reading, sizes = kind(self.length), Sizes(rows, self.length, page, pages, kv)
      self._device = Device(model, params, sizes, self._allowed, self._place, self.reading)
      self._device.warm_up()
    self._vocab, self._table_rows = model.card.vocab, model.card.rows
    self._pages, self._rows, self._chunks = Pages(pages), rows, chunks
    self._inputs = encoder.Inputs(self._device, prefix_cache)
    self._most, self._cached = queue, prefix_cache and not self._device.recurrent
    self._waiting: collections.deque[Sequence] = collections.deque()
    self._active: list[Sequence] = []  # in the order they were let in
    self._counts: collections.Counter[str] = collections.Counter()
    self._wake, self._lock = threading.Event(), threading.Lock()
    self._closing, self._failed = False, None
    self._seconds = 1.0  # a request's time in the engine, averaged
    self._compiled = self._device.compilations
    self._thread = threading.Thread(target=self._work, name='engine', daemon=True)
    self._thread.start()

  def __enter__(self) -> 'Engine':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def submit(self, request: Request, listener: Callable[[Token], None]) -> Sequence:
    """Takes a request; `listener` hears every token, from the engine's thread. Returns the ticket to cancel it by.

    Raises `Full` when too many wait, `UserError` when it can never be answered.
    """
    self._check(request)
    return self._enter(Sequence(request, listener, self._wake.set))

  def answer(self, request: Request) -> list[Token]:
    """All tokens of one request's answer. Waits."""
    tokens: queue.Queue[Token] = queue.Queue()
    self.submit(request, tokens.put)
    found = [tokens.get()]
    while found[-1].end is None:
      found.append(tokens.get())
    return found

  def embed(self, prompts: Iterable[Iterable[int]]) -> np.ndarray:
    """f32 [n, embed]: the mean of the model's outputs over the tokens of each prompt, of length 1. Waits."""
    done: queue.Queue[Token] = queue.Queue()
    entered = []
    for prompt in prompts:
      request = self.reading.embed(tuple(map(int, prompt)))
      self._check(request)
      one = Sequence(request, done.put, self._wake.set)
      one.embedding = True
      entered.append(self._enter(one))
    for _ in entered:
      if (end := done.get().end) != 'stop':
        raise RuntimeError(f'the engine could not read it: {end}')
    rows = np.stack([one.total for one in entered])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  def stats(self) -> dict[str, float]:
    """Gauges and counters of this moment."""
    active, inputs = list(self._active), self._inputs.pages
    held = {page for one in active for page in one.pages}
    held |= {('encoder', page) for one in active for page in one.encoded}
    total = self._pages.total + inputs.total
    return dict(
      running=len(active),
      waiting=len(self._waiting),
      blocks_total=total,
      blocks_used=len(held),
      blocks_cached=total - self._pages.free - inputs.free - len(held),
      kv_waste=self._waste(),
      compilations_total=self._device.compilations - self._compiled,
      failed=self._failed is not None,
      **{
        name: self._counts[name]
        for name in (
          'requests_total', 'tokens_total', 'prompt_tokens_total', 'prefix_hit_tokens_total',
          'prefix_hits_total', 'forks_total', 'copies_total', 'preemptions_total', 'cancelled_total', 'steps_total',
        )
      },
    )  # fmt: skip

  def close(self, drain: float | None = None) -> None:
    """Takes no more requests, lets those there go on for up to `drain` seconds, cancels the rest, ends the thread."""
    self._closing = True
    end = time.monotonic() + (drain or 0)
    while self._thread.is_alive() and (self._active or self._waiting) and time.monotonic() < end:
      time.sleep(0.02)
    with self._lock:
      left = [*self._active, *self._waiting]
    for one in left:
      one.cancelled.set()
    self._wake.set()
    self._thread.join()

  # --- entering ---------------------------------------------------------------------------------------

  def _check(self, request: Request) -> None:
    if not request.prompt or request.max_new < 1:
      raise UserError('a request needs a prompt of at least one token and max_new of at least 1')
    self.reading.check(request)
    ids = *request.prompt, *request.encoded, *(b[0] for b in request.bias)
    if wrong := [i for i in ids if not 0 <= i < self._vocab]:
      raise UserError(f'there is no token {wrong[0]}: ids go from 0 to {self._vocab - 1}')
    if request.sampling.no_repeat_ngram:
      raise UserError('the engine has no no_repeat_ngram: use llm-jax generate')
    logits_lib.check(**request.sampling._asdict())

  def _enter(self, one: Sequence) -> Sequence:
    if self._failed is not None:
      raise UserError(f'the engine has failed ({self._failed}): start it again')
    with self._lock:
      if self._closing or len(self._waiting) >= self._most:
        raise Full(max(1.0, self._seconds * len(self._waiting) / self._rows))
      self._waiting.append(one)
    self._counts['requests_total'] += 1
    self._wake.set()
    return one

  # --- the thread -------------------------------------------------------------------------------------

  def _work(self) -> None:
    with self._place.entered():
      self._run()

  def _run(self) -> None:
    try:
      while not (self._closing and not self._active and not self._waiting):
        self._sweep()
        self._admit()
        for _ in range(self._chunks):
          self._read()
        drawing = [one for one in self._active if not one.reading]
        for first in range(0, len(drawing), self._device.buckets[-1]):
          self._step(drawing[first : first + self._device.buckets[-1]])
        if not self._active and not self._waiting:
          self._wake.wait(0.1)
          self._wake.clear()
    except Exception as e:  # nobody may wait for ever
      self._failed = f'{type(e).__name__}: {e}'
      with self._lock:
        left = [*self._active, *self._waiting]
        self._active, self._waiting = [], collections.deque()
      for one in left:
        one.give(-1, 0.0, (), 'error')
      raise

  def _sweep(self) -> None:
    """Lets go of those who were cancelled."""
    with self._lock:
      gone = [one for one in (*self._active, *self._waiting) if one.cancelled.is_set()]
      for one in gone:
        if one in self._waiting:
          self._waiting.remove(one)
    for one in gone:
      self._counts['cancelled_total'] += 1
      if not one.ended:
        one.give(-1, 0.0, (), 'cancelled')
      self._leave(one)

  def _leave(self, one: Sequence) -> None:
    self._pages.drop(one.pages)
    self._inputs.leave(one)
    one.pages = []
    if one in self._active:
      self._active.remove(one)

  def _admit(self) -> None:
    """Lets the first in the queue in while there are rows, and pages for its prompt."""
    while self._waiting and len(self._active) < self._rows:
      one, size = self._waiting[0], self._device.sizes.page
      twin = None if one.whole or not self._cached else self._twin(one)
      if twin is not None and twin.reading:
        return  # its pages can be shared when it has read them
      need = len(self._active) + (-(-len(one.tokens) // size) if twin is None else 1)
      if self._active and self._pages.free + self._pages.cached < need:
        return
      if not self._inputs.admit(one):
        return
      with self._lock:
        self._waiting.popleft()
      one.row = min(set(range(self._rows)) - {other.row for other in self._active})
      self._active.append(one)
      if self._device.recurrent:
        self._device.reset(one.row)
      if twin is not None:
        self._fork(twin, one)
      elif self._cached and self.reading.cuts and not one.whole:
        self._recall(one)

  def _twin(self, one: Sequence) -> Sequence | None:
    """Somebody with the same prompt."""
    asked = lambda one: (one.request.prompt, one.request.encoded)
    return next((o for o in self._active if asked(o) == asked(one) and not o.whole), None)

  def _fork(self, twin: Sequence, one: Sequence) -> None:
    """Shares the pages of the prompt; who writes first makes a copy."""
    prompt = len(one.request.prompt)
    one.pages = twin.pages[: -(-prompt // self._device.sizes.page)]
    self._pages.hold(one.pages)
    one.read, one.first = prompt, twin.first
    self._counts['forks_total'] += 1
    self._counts['prefix_hit_tokens_total'] += prompt
    if one.made == 0:
      self._choose([one], np.stack([one.first] * self._device.buckets[0]))

  def _recall(self, one: Sequence) -> None:
    """Takes the chunks its prompt begins with from the cache, but never the last token's."""
    prompt = one.request.prompt
    one.pages = self._pages.find(prompt[: (len(prompt) - 1) // CHUNK * CHUNK], CHUNK)
    one.read = len(one.pages) * self._device.sizes.page
    self._counts['prefix_hits_total'] += one.read > 0
    self._counts['prefix_hit_tokens_total'] += one.read

  def _room(self, one: Sequence, end: int) -> bool:
    """Sees to it that the slots from `one.read` up to `end` are there and its own; False if `one` had to go itself."""
    size = self._device.sizes.page
    for i in range(one.read // size, -(-end // size)):
      fresh = i >= len(one.pages)
      if not fresh and not self._pages.shared(one.pages[i]):
        continue
      while (page := self._pages.take()) is None:
        victim = self._active[-1]
        self._preempt(victim)
        if victim is one:
          return False
      if fresh:
        one.pages.append(page)
        continue
      self._device.copy(one.pages[i], page)
      self._pages.drop([one.pages[i]])
      one.pages[i] = page
      self._counts['copies_total'] += 1
    return True

  def _preempt(self, one: Sequence) -> None:
    """Back to the head of the queue, with what was drawn and without pages."""
    self._leave(one)
    one.read, one.first, one.total = 0, None, None
    if one.request.prompt_logp:
      one.prompt_logp = [None]
    with self._lock:
      self._waiting.appendleft(one)
    self._counts['preemptions_total'] += 1

  def _read(self) -> None:
    """Reads the next chunk of the prompt that came first, the encoder's input before it."""
    one = next((one for one in self._active if one.reading), None)
    if one is None:
      return
    prompt, first = one.request.prompt, one.read
    end = min(first + self.reading.chunks[-1], len(prompt))
    if not self._room(one, end):
      return
    self._counts['prompt_tokens_total'] += end - first + one.unread * len(one.request.encoded)
    self._inputs.read(one)
    told = self._table([one], 1)[0], one.row, self._inputs.told([one], 1)
    x = self._device.read(prompt[first:end], first, *told)
    if one.request.prompt_logp:
      following = np.zeros(CHUNK, np.int32)
      after = prompt[first + 1 : end + 1]
      following[: len(after)] = after
      one.prompt_logp += self._device.prompt_logp(x, following)[: len(after)].tolist()
    one.read = end
    size = self._device.sizes.page
    if self._cached and self.reading.cuts and not one.whole and end - first == CHUNK:
      self._pages.keep(prompt[:end], one.pages[first // size : end // size])
    if one.embedding:
      some = np.asarray(x)[: end - first].sum(0)
      one.total = some if one.total is None else one.total + some
    if one.reading:
      return
    if one.embedding:
      one.give(-1, 0.0, (), 'stop')
      self._leave(one)
      return
    one.first = np.asarray(x)[end - first - 1]
    if one.made == 0:
      self._choose([one], np.stack([one.first] * self._device.buckets[0]))

  def _step(self, several: list[Sequence]) -> None:
    """Reads one token of each and draws the next, where it was not drawn before."""
    several = [one for one in several if one.row is not None and one in self._active]
    ready = [one for one in several if self._room(one, one.read + 1)]
    ready = [
      one for one in ready if one in self._active
    ]  # somebody's room may have cost another his
    if not ready:
      return
    bucket = next(b for b in self._device.buckets if b >= len(ready))
    fill = lambda values, rest: np.array([*values, *[rest] * (bucket - len(ready))], dtype=np.int32)
    tokens = fill([one.tokens[one.read] for one in ready], 0)
    positions = fill([one.read for one in ready], 0)
    rows = fill([one.row for one in ready], self._rows)
    told = self._table(ready, bucket), rows, self._inputs.told(ready, bucket)
    x = self._device.step(tokens, positions, *told)
    self._counts['steps_total'] += 1
    self._note_waste()
    for one in ready:
      one.read += 1
    if any(one.read == len(one.tokens) for one in ready):
      self._choose(ready, x)

  def _choose(self, several: list[Sequence], x: Any) -> None:
    """Draws a token for those whose tokens are all read. x: [bucket, embed]."""
    found = self._device.choose(x, self._told(several, x.shape[0]))
    for i, one in enumerate(several):
      if one.read < len(one.tokens):
        continue
      top = one.request.top
      pairs = zip(found.top_ids[i, :top].tolist(), found.top_logp[i, :top].tolist(), strict=True)
      one.add(int(found.token[i]), float(found.logp[i]), tuple(pairs), self.length)
      self._counts['tokens_total'] += 1
      if one.ended:
        self._leave(one)

  def _table(self, several: list[Sequence], bucket: int) -> np.ndarray:
    table = np.full((bucket, self._device.sizes.table), -1, np.int32)
    for row, one in zip(table, several, strict=False):
      row[: len(one.pages)] = one.pages
    return table

  def _told(self, several: list[Sequence], bucket: int) -> Told:
    """What `several` asked for, as arrays."""
    asked = [one.request for one in several]
    asked += [Request((0,))] * (bucket - len(asked))
    settings = np.array([[getattr(r.sampling, n) for r in asked] for n in SETTINGS], np.float32)
    tokens = np.full((bucket, self.length), -1, np.int32)
    lengths, prompts, made = (np.zeros(bucket, np.int32) for _ in range(3))
    for i, one in enumerate(several):
      lengths[i], prompts[i], made[i] = len(one.tokens), len(one.request.prompt), one.made
      if logits_lib.needs_seen(one.request.sampling):
        tokens[i, : len(one.tokens)] = one.tokens
    bias = allowed = None
    if any(r.bias for r in asked):
      bias = np.zeros((bucket, self._table_rows), np.float32)
      for i, r in enumerate(asked):
        for token, value in r.bias:
          bias[i, token] = value
    if any(r.constraint is not None for r in asked):
      allowed = np.zeros((bucket, self._table_rows), bool)
      allowed[:, : self._vocab] = self._allowed
      for i, r in enumerate(asked):
        if r.constraint is not None and several[i].read == len(several[i].tokens):
          allowed[i, : self._vocab] &= r.constraint.allowed()[: self._vocab]
    seeds = np.array([r.seed % 2**32 for r in asked], np.uint32)
    seen = logits_lib.Seen(tokens, prompts, lengths)
    return Told(settings, seeds, made, seen, bias, allowed, any(r.top for r in asked))

  # --- the waste of the KV pool -------------------------------------------------------------------------

  def _note_waste(self) -> None:
    held = sum(len(one.pages) + len(one.encoded) for one in self._active)
    self._counts['held_slot_steps'] += held * self._device.sizes.page
    used = sum(one.read + len(one.request.encoded) for one in self._active)
    self._counts['used_slot_steps'] += used

  def _waste(self) -> float:
    """The part of the slots held by requests that nothing was written to, over all steps so far."""
    held = self._counts['held_slot_steps']
    return 1 - self._counts['used_slot_steps'] / held if held else 0.0
