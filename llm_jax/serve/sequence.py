"""A request on its way through the engine."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.serve.requests import Request, Token


class Sequence:
  """A request, what came of it so far, and where its keys and values lie. It is the `Ticket` too.

  tokens: prompt and answer. read: how many of them are in the KV pool; the last one drawn is not. pages: its table;
  encoded: that of the encoder's input, unread: whether the encoder has to run. row: where it stands in the engine, None
  while it waits. first: the model's output for the prompt's last token, f32 [embed], once the prompt is read.
  """

  def __init__(self, request: Request, listener: Callable[[Token], None], wake: Callable[[], None]):
    self.request, self._listener, self._wake = request, listener, wake
    self.tokens = list(request.prompt)
    self.read = 0
    self.pages: list[int] = []
    self.encoded: list[int] = []
    self.unread = False
    self.row: int | None = None
    self.first: np.ndarray | None = None
    self.prompt_logp: list[float | None] | None = [None] if request.prompt_logp else None
    self.total: np.ndarray | None = None  # of an embedding: the sum of the outputs so far
    self.embedding = False
    self.ended = False
    self.cancelled = threading.Event()

  @property
  def made(self) -> int:
    """Tokens of the answer."""
    return len(self.tokens) - len(self.request.prompt)

  @property
  def reading(self) -> bool:
    """Whether the prompt is not read to its end."""
    return self.read < len(self.request.prompt)

  @property
  def whole(self) -> bool:
    """Whether every token of the prompt has to be read, so that nothing can be taken from others."""
    return self.embedding or self.request.prompt_logp

  def cancel(self) -> None:
    """Gives its place and its pages back as soon as the engine comes by; the listener hears of it."""
    self.cancelled.set()
    self._wake()

  def give(self, token: int, logp: float, top: tuple, end: str | None) -> None:
    """Tells the listener of a token. What it raises is its own affair: the request ends."""
    self.ended = end is not None
    try:
      self._listener(Token(token, logp, top, end))
    except Exception:
      self.cancelled.set()

  def add(self, token: int, logp: float, top: tuple, length: int) -> None:
    """A token was drawn. length: of the longest sequence there can be."""
    self.tokens.append(token)
    constraint: Any = self.request.constraint
    end = None
    if token in self.request.ends:
      end = 'stop'
    elif constraint is not None:
      constraint.advance(token)
      end = 'stop' if constraint.done else None
    if end is None and (self.made >= self.request.max_new or len(self.tokens) >= length):
      end = 'length'
    self.give(token, logp, top, end)
