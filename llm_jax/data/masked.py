r"""What an encoder is trained on: hidden words and pairs of sentences, as functions that wrap a source.

    pairs = use(masked.sentences, source=use(pipeline.make, length=125, rows=use(batch.pad)))
    source = use(masked.words, source=pairs)

`sentences` makes [CLS] A [SEP] B [SEP] of every text, where B follows A or is another row's; `words` hides some of the
tokens that count, which are then the only ones that do. Row r of batch k is drawn from a generator of its own, keyed by
the seed and by r and k, so masks are other ones in every epoch (RoBERTa's dynamic masking, Liu et al. 2019,
arXiv:1907.11692, section 4.1), and a resumed run draws what an uninterrupted one would.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import denoise, pipeline

Batch = dict[str, np.ndarray]
MARKS = ('[CLS]', '[SEP]', '[MASK]')


def words(
  model: Any,
  *,
  source: Callable,
  rate: float = 0.15,
  mask: float = 0.8,
  random: float = 0.1,
  seed: int = 0,
) -> 'Wrapped':
  """Masked language modelling (Devlin et al. 2018, arXiv:1810.04805, section 3.1, task 1).

  rate: of the tokens that count (weights > 0, no end of document) in a row, rounded, at least one: the chosen ones, of
  which each becomes [MASK] with probability `mask`, any piece of the vocabulary with probability `random`, and else
  stays. `targets` are the tokens as they were, `weights` 1 at the chosen ones.
  """
  if not 0 < rate <= 1 or min(mask, random) < 0 or mask + random > 1:
    raise UserError(
      f'rate={rate}, mask={mask}, random={random}: a share above 0, and two probabilities with a sum of at most 1'
    )
  inner = source(model)
  vocab = inner.vocab
  hidden = denoise.mark(vocab, '[MASK]')
  pieces = np.setdiff1d(np.arange(vocab.base), [vocab.eos, *_known(vocab.pad, vocab.unk)])

  def change(batch: Batch, rngs: list[np.random.Generator]) -> Batch:
    inputs, weights = batch['inputs'].copy(), np.zeros_like(batch['weights'])
    there = (batch['weights'] > 0) & (batch['targets'] != vocab.eos)
    for row, rng in enumerate(rngs):
      at = np.flatnonzero(there[row])
      if not len(at):
        continue
      chosen = rng.choice(at, max(1, round(rate * len(at))), replace=False)
      u, drawn = rng.random(len(chosen)), rng.choice(pieces, len(chosen))
      replaced = np.where(u < mask + random, drawn, inputs[row, chosen])
      inputs[row, chosen] = np.where(u < mask, hidden, replaced)
      weights[row, chosen] = 1
    return dict(batch, inputs=inputs, weights=weights)

  return Wrapped(inner, inner.length, change, seed)


def sentences(model: Any, *, source: Callable, random: float = 0.5, seed: int = 0) -> 'Wrapped':
  """Next sentence prediction (the same, task 2): a text cut in two at a place drawn uniformly.

  source: of one text per row (`rows=batch.pad`), three tokens shorter than what comes out. With probability `random`
  the second part is another row's, cut to what fits: `label` int32 [batch] is then 1, else 0 (BERT's code). Adds
  `types`, 0 in [CLS] A [SEP] and 1 in B [SEP], and `at`, the position of [CLS]. Markers do not count. A text of one
  token gives an empty row, and so does a batch of one row where another is asked for.
  """
  if not 0 <= random <= 1:
    raise UserError(f'random={random} is a probability: choose 0 <= random <= 1')
  inner = source(model)
  first, apart = (denoise.mark(inner.vocab, mark) for mark in MARKS[:2])
  length = inner.length + 3

  def change(batch: Batch, rngs: list[np.random.Generator]) -> Batch:
    sizes = (batch['weights'] > 0).sum(1)
    texts = [batch['targets'][row, :n] for row, n in enumerate(sizes)]
    cuts = [rng.integers(1, n) if n > 1 else 0 for rng, n in zip(rngs, sizes, strict=True)]
    made = _empty(len(texts), length)
    others = np.flatnonzero(sizes > 1)
    for row, (text, rng) in enumerate(zip(texts, rngs, strict=True)):
      label, choice = int(rng.random() < random), others[others != row]
      if not cuts[row] or (label and not len(choice)):
        continue
      a, b = text[: cuts[row]], text[cuts[row] :]
      if label:
        other = rng.choice(choice)
        b = texts[other][cuts[other] :][: inner.length - len(a)]
      _put(made, row, (a, b), (first, apart), label)
    return made

  return Wrapped(inner, length, change, seed + 1)


def _put(made: Batch, row: int, parts: tuple, marks: tuple, label: int) -> None:
  """[CLS] A [SEP] B [SEP] in a row, in place."""
  (a, b), (first, apart) = parts, marks
  ids = np.concatenate([[first], a, [apart], b, [apart]])
  n, second = len(ids), len(a) + 2
  for name in ('inputs', 'targets'):
    made[name][row, :n] = ids
  made['weights'][row, 1 : n - 1] = 1
  made['weights'][row, second - 1] = 0
  made['types'][row, second:n] = 1
  made['segments'][row, :n] = 1
  made['positions'][row, :n] = np.arange(n)
  made['label'][row] = label


def _empty(rows: int, length: int) -> Batch:
  names = ('inputs', 'targets', 'positions', 'segments', 'types')
  made = {name: np.zeros((rows, length), np.int32) for name in names}
  ends = {name: np.zeros(rows, np.int32) for name in ('label', 'at')}
  return dict(made, **ends, weights=np.zeros((rows, length), np.float32))


class Wrapped:
  """A source whose batches are changed: `change(batch, a generator for each row)`."""

  def __init__(self, source: Any, length: int, change: Callable, seed: int):
    self.batch, self.length, self.vocab = source.batch, length, source.vocab
    self._source, self._change, self._seed, self._made = source, change, seed, 0
    self._process = pipeline.processes(None, None)

  def __call__(self, state: Any = None) -> Batch:
    """This process' rows of the next global batch."""
    made = self._changed(self._source(state), self._made)
    self._made += 1
    return made

  def once(self) -> Iterator[Batch]:
    """One pass of the source, changed the same way every time."""
    for number, batch in enumerate(self._source.once()):
      yield self._changed(batch, number)

  def state(self) -> dict[str, Any]:
    """Where the next batch starts."""
    return dict(source=self._source.state(), made=self._made)

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    self._source.restore(state['source'])
    self._made = int(state['made'])

  def skip(self, batches: int) -> None:
    """Leaves out the next batches."""
    self._source.skip(batches)
    self._made += batches

  def close(self) -> None:
    """Stops what runs in the background."""
    self._source.close()

  def _changed(self, batch: Batch, number: int) -> Batch:
    rows = len(batch['inputs'])
    first = (number * self._process[1] + self._process[0]) * rows
    return self._change(
      batch, [np.random.default_rng((self._seed, first + row)) for row in range(rows)]
    )


def _known(*ids: int | None) -> list[int]:
  return [i for i in ids if i is not None]
