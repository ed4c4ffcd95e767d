r"""Additions of two numbers: a task small enough to be learned in minutes, whose answers can be verified.

    17+25=  ->  42

The sums of all pairs below `limit` are split once and for all: every twentieth pair of a fixed shuffle is held out.
`demonstrations` is the source of supervised tuning, `problems` the prompts of reinforcement learning.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import pipeline
from llm_jax.rl import layout

SPLITS = ('train', 'heldout')


def problems(
  *, split: str = 'train', limit: int = 100, count: int | None = None
) -> list[dict[str, str]]:
  """Records of `prompt` and `answer`: all pairs of the split, or the first `count`. limit: numbers are below it."""
  if split not in SPLITS:
    raise UserError(f'no split {split!r} of the additions; {nearest(split, SPLITS)}')
  order = np.random.default_rng(0).permutation(limit * limit)
  chosen = order[::20] if split == 'heldout' else np.delete(order, np.s_[::20])
  pairs = [divmod(int(i), limit) for i in chosen[:count]]
  return [dict(prompt=f'{a}+{b}=', answer=str(a + b)) for a, b in pairs]


def correct(
  prompts: Sequence[str], answers: Sequence[str], told: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """A reward that can be verified: 1 where the answer is record['answer'], else 0."""
  del prompts
  return np.array(
    [a == record['answer'] for a, record in zip(answers, told, strict=True)], np.float32
  )


def demonstrations(
  model: Any,
  *,
  vocab: Callable,
  problems: Callable = problems,
  wrong: float = 0.0,
  batch: int = 64,
  length: int = 12,
  seed: int = 0,
) -> 'Demonstrations':
  """The source of problems with their answers, one to a row, weights on the answer and its end.

  wrong: the probability that a demonstration counts one too many; so a policy can be made that knows how to add, and
  mostly does something else.
  """
  words, records = vocab(), problems()
  pipeline.check_vocab(model.card, words)
  return Demonstrations(model, words, records, wrong, batch, length, seed)


class Demonstrations:
  """Gives batches of problems and answers, drawn by (seed, number of the batch)."""

  def __init__(self, model, vocab, records, wrong, batch, length, seed):
    self.vocab, self.batch, self.length = vocab, batch, length
    self._count, self._seed, self._wrong = 0, seed, wrong
    encode = lambda shift: [
      [*vocab.encode(str(int(r['answer']) + shift)), vocab.eos] for r in records
    ]
    self._rows = [_lay(model, vocab, records, encode(shift), length) for shift in (0, 1)]

  def __call__(self, state: Any = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self._seed, self._count])
    right, wrong = self._rows
    rows = rng.choice(len(right['inputs']), self.batch)
    off = rng.random((self.batch, 1)) < self._wrong
    self._count += 1
    return {name: np.where(off, wrong[name][rows], right[name][rows]) for name in right}

  def state(self) -> dict[str, int]:
    """The number of the next batch."""
    return dict(batch=self._count)

  def restore(self, state: Mapping[str, int]) -> None:
    """Goes on from a `state()`."""
    self._count = int(state['batch'])

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches."""
    self._count += batches

  def close(self) -> None:
    """Nothing runs in the background."""


def _lay(model, vocab, records, answers, length):
  """The rows of all records."""
  prompts = [vocab.encode(r['prompt']) for r in records]
  width, longest = max(map(len, prompts)), max(map(len, answers))
  if width + longest > length:
    raise UserError(f'length={length} is too short for {width + longest} tokens: raise it')
  pad = lambda rows, n: np.array([[*r, *[0] * (n - len(r))] for r in rows], np.int32)
  lengths, ends = (np.array([len(r) for r in rows]) for rows in (prompts, answers))
  told = pad(prompts, width), lengths, pad(answers, length - width), ends
  return layout.lay(model, *told, vocab.first)
