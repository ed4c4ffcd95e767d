"""What the server asks of the engine and what the engine says back; neither of the two needs to know the other."""

from typing import NamedTuple, Protocol

import numpy as np

from llm_jax.decode import logits

MOST_TOP = 20  # alternatives that a request may ask for with each token


class Constraint(Protocol):
  """Which tokens may come next, for one request (see decode/constrain.py)."""

  done: bool

  def allowed(self) -> np.ndarray:
    """bool [vocab]."""
    ...

  def advance(self, token: int) -> None:
    """Told of every token that was drawn."""
    ...


class Request(NamedTuple):
  """One prompt to be answered once.

  prompt: all ids that the decoder reads, a start token among them. max_new: tokens of the answer at most. sampling:
  numbers, not arrays. seed: the same seed gives the same answer, whoever else is being served. ends: ids that end the
  answer; they are reported and counted, not shown. bias: (id, what is added to its logit) pairs. top: so many of the
  likeliest tokens are reported with each token, at most `MOST_TOP`. prompt_logp: whether the log-probabilities of the
  prompt's own tokens are wanted. constraint: None or a `Constraint`. encoded: all ids that the encoder reads, () for a
  model without one.
  """

  prompt: tuple[int, ...]
  max_new: int = 16
  sampling: logits.Sampling = logits.Sampling()
  seed: int = 0
  ends: tuple[int, ...] = ()
  bias: tuple[tuple[int, float], ...] = ()
  top: int = 0
  prompt_logp: bool = False
  constraint: Constraint | None = None
  encoded: tuple[int, ...] = ()


class Token(NamedTuple):
  """One token of an answer.

  id: -1 where the answer ends without one. logp: its log-probability under the model, natural logarithm, before any
  processor. top: (id, log-probability) of the likeliest, in descending order. end: None, or on the last one why it is:
  'stop' (one of `ends`, or the constraint is done), 'length', 'cancelled', 'error'.
  """

  id: int
  logp: float
  top: tuple[tuple[int, float], ...] = ()
  end: str | None = None


class Ticket(Protocol):
  """A request that the engine has taken. prompt_logp: set before the first token, None for the prompt's first."""

  prompt_logp: list[float | None] | None

  def cancel(self) -> None:
    """Gives its place and its blocks back; the last token the listener hears has end 'cancelled'."""
    ...


class Full(Exception):
  """The engine has as many requests waiting as it may. retry_after: seconds after which to ask again."""

  def __init__(self, retry_after: float):
    super().__init__(f'the queue is full: ask again in {retry_after:g} s')
    self.retry_after = retry_after
