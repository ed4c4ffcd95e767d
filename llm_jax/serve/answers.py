"""From the engine's tokens to pieces of text: what goes on between a request's submission and its last token.

The engine calls a listener from its own thread; the event loop of the server reads a queue. One `Answers` holds all
answers to one HTTP request, so that cutting the connection, a stop string, the time limit or an error anywhere cancels
what is left of them.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from llm_jax.decode.prompts import Writer
from llm_jax.serve.api import Refused
from llm_jax.serve.requests import Full, Request, Ticket, Token

LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this


def full(error: Full) -> Refused:
  """What a client is told of a full queue."""
  words = 'the server has as many requests as it can queue: try again later'
  return Refused(429, words, code='queue_full', retry_after=error.retry_after)


class Told(NamedTuple):
  """One token of the text. logp, top: see `requests.Token`; at: where in the answer its text begins, in characters."""

  id: int
  logp: float
  top: tuple[tuple[int, float], ...]
  at: int


class Piece(NamedTuple):
  """Some more of an answer. tokens: those whose text has begun by now; end: None, or on the last why it is."""

  text: str
  tokens: tuple[Told, ...]
  end: str | None


class Reader:
  """Puts the tokens of one answer together, stop strings included. made: how many came, the last one counted; total:
  the sum of their log-probabilities; stopped: whether a stop string ended the answer."""

  def __init__(self, vocab: Any, request: Request, before: Sequence[int], stop: Sequence[str]):
    self._writer, self._ends = Writer(vocab, before, stop), set(request.ends)
    self._held: list[Told] = []
    self.made, self.total, self.stopped = 0, 0.0, False

  def add(self, token: Token) -> Piece | None:
    """What is certain now; None where nothing is."""
    writer, text = self._writer, ''
    if token.id >= 0:
      self.made += 1
      logp = token.logp if math.isfinite(token.logp) else LEAST
      self.total += logp
      if token.id not in self._ends:
        self._held.append(Told(token.id, logp, token.top, writer.decoded))
        text = writer.add([token.id])
    if token.end is not None and writer.stopped is None:
      text += writer.end()
    self.stopped = writer.stopped is not None
    end = 'stop' if self.stopped else token.end
    if not text and end is None:
      return None
    known = len(writer.text) if end is None or self.stopped else math.inf
    tokens = tuple(t for t in self._held if t.at < known)
    self._held = self._held[len(tokens) :]
    return Piece(text, tokens, end)


class Answers:
  """All answers to one HTTP request. timeout: seconds for them. Raises what `engine.submit` does, `Full` as 429."""

  def __init__(
    self, engine: Any, requests: Sequence[Request], readers: Sequence[Reader], timeout: float
  ):
    self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
    self._timeout, self._until = timeout, self._loop.time() + timeout
    self.readers, self.tickets = list(readers), []
    self._open: dict[int, Ticket] = {}
    try:
      for i, request in enumerate(requests):
        ticket = engine.submit(request, partial(self._hear, i))
        self._open[i] = ticket
        self.tickets.append(ticket)
    except Full as e:
      self.cancel()
      raise full(e) from e
    except Exception:
      self.cancel()
      raise

  def _hear(self, i: int, token: Token) -> None:
    try:
      self._loop.call_soon_threadsafe(self._queue.put_nowait, (i, token))
    except RuntimeError:  # the loop is closed: nobody is there to read
      pass

  def cancel(self) -> None:
    """Gives back the places of all answers that go on."""
    while self._open:
      self._open.popitem()[1].cancel()

  def cut(self) -> None:
    """The same, and whoever reads the pieces is told."""
    self.cancel()
    self._queue.put_nowait((-1, Token(-1, 0.0, (), 'cancelled')))

  async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
    """(number of the answer, piece) as they come. Raises `Refused` when the engine gives up."""
    try:
      left = len(self.readers)
      while left:
        try:
          async with asyncio.timeout_at(self._until):
            i, token = await self._queue.get()
        except TimeoutError as e:
          words = f'not done after {self._timeout:g} s: ask for fewer tokens'
          raise Refused(504, words, code='timeout') from e
        if i >= 0 and i not in self._open:  # it was stopped; these were on their way
          continue
        if token.end == 'error':
          raise Refused(500, 'the engine could not go on with this request', code='engine_error')
        if token.end == 'cancelled':
          raise Refused(503, 'the server is shutting down', code='draining', retry_after=1)
        piece = self.readers[i].add(token)
        if piece is None:
          continue
        if piece.end is not None:
          ticket, left = self._open.pop(i), left - 1
          if token.end is None:
            ticket.cancel()
        yield i, piece
    finally:
      self.cancel()

  async def whole(self) -> list[tuple[str, list[Told], str]]:
    """(text, tokens, why it ended) of every answer."""
    texts: list[list[str]] = [[] for _ in self.readers]
    tokens: list[list[Told]] = [[] for _ in self.readers]
    ends = [''] * len(self.readers)
    async for i, piece in self.pieces():
      texts[i].append(piece.text)
      tokens[i] += piece.tokens
      ends[i] = piece.end or ''
    return [(''.join(t), k, e) for t, k, e in zip(texts, tokens, ends, strict=True)]
