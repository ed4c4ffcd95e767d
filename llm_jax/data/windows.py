"""Words and what is around them: the batches of word2vec and the matrix of GloVe (objectives/word_vectors.py)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError


def keep(counts: Any, threshold: float = 1e-5) -> np.ndarray:
  """f64 [vocab]: the chance of each word to stay in the text, min(1, sqrt(threshold / share)) (Mikolov et al. 2013,
  arXiv:1310.4546, eq. 5). counts: int [vocab]."""
  counts = np.asarray(counts)
  share = np.maximum(counts, 1) / counts.sum()
  return np.minimum(1.0, np.sqrt(threshold / share))


def noise(counts: Any, power: float = 0.75) -> np.ndarray:
  """f64 [vocab]: p of each word as a negative, in proportion to count^power (section 2.2)."""
  raised = np.asarray(counts, np.float64) ** power * (np.asarray(counts) > 0)
  return raised / raised.sum()


class Windows:
  """A source: words of a text in random order with those around them, another draw in every epoch.

  A batch: center int32 [batch], context int32 [batch, 2 window], weights f32 [batch, 2 window], noise int32 [batch,
  2 window, negatives]. What `keep` takes out of the text is out of the windows too; each window reaches 1 .. window
  words, all as often (arXiv:1301.3781, section 3.2), and stops where a text does.
  """

  def __init__(
    self,
    texts: Sequence[Sequence[int]],
    *,
    vocab: int,
    batch: int = 512,
    window: int = 5,
    negatives: int = 5,
    threshold: float = 1e-5,
    power: float = 0.75,
    seed: int = 0,
  ):
    rows = [np.asarray(text, np.int32) for text in texts]
    self._ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    self._text = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    if len(self._ids) < 2 or self._ids.min() < 0 or self._ids.max() >= vocab:
      raise UserError(f'words around words need a text of 2 or more ids below vocab={vocab}')
    if min(batch, window, negatives) < 1:
      raise UserError(f'batch={batch}, window={window}, negatives={negatives}: choose 1 or more')
    counts = np.bincount(self._ids, minlength=vocab)
    self._keep = keep(counts, threshold)[self._ids]
    self._noise = np.cumsum(noise(counts, power))
    self.vocab, self.batch, self.length = vocab, batch, 2 * window
    self._window, self._negatives, self._seed = window, negatives, seed
    self._state = dict(epoch=0, at=0)
    self._drawn: tuple | None = None

  def __call__(self, state: Any = None) -> dict[str, np.ndarray]:
    """The next batch. The training state is not looked at."""
    found: list[np.ndarray] = []
    while (missing := self.batch - sum(map(len, found))) > 0:
      epoch, at = self._state['epoch'], self._state['at']
      found.append(self._order(epoch)[at : at + missing])
      done = at + missing >= len(self._order(epoch))
      self._state = dict(epoch=epoch + 1, at=0) if done else dict(epoch=epoch, at=at + missing)
    return self._fill(np.concatenate(found), self._generator(1, *self._state.values()))

  def state(self) -> dict[str, int]:
    """Where the next batch starts."""
    return dict(self._state)

  def restore(self, state: dict[str, int]) -> None:
    """Goes on from a `state()`."""
    self._state = {k: int(state[k]) for k in ('epoch', 'at')}

  def _generator(self, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))

  def _order(self, epoch: int) -> np.ndarray:
    """[words, 2 window + 1] of what is left of the text in this epoch: a word and its places around, -1 for none."""
    if self._drawn is None or self._drawn[0] != epoch:
      rng = self._generator(0, epoch)
      left = np.flatnonzero(rng.random(len(self._ids)) < self._keep)
      offset = np.concatenate(
        [[0], np.delete(np.arange(-self._window, self._window + 1), self._window)]
      )
      at = np.arange(len(left))[:, None] + offset
      inside = (at >= 0) & (at < len(left))
      at = np.clip(at, 0, max(0, len(left) - 1))
      same = inside & (self._text[left][at] == self._text[left][:, None])
      reach = rng.integers(1, self._window + 1, len(left))[:, None]
      places = np.where(same & (np.abs(offset) <= reach), left[at], -1)
      self._drawn = epoch, rng.permutation(places)
    return self._drawn[1]

  def _fill(self, places: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    words = np.where(places >= 0, self._ids[places], 0).astype(np.int32)
    size = (len(words), self.length, self._negatives)
    drawn = np.searchsorted(self._noise, rng.random(size), side='right')
    return dict(
      center=words[:, 0],
      context=words[:, 1:],
      weights=(places[:, 1:] >= 0).astype(np.float32),
      noise=np.minimum(drawn, self.vocab - 1).astype(np.int32),
    )


def cooccurrences(
  texts: Sequence[Sequence[int]], *, vocab: int, window: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(row, column int32 [cells], count f32 [cells]): X_ij, how often j is within `window` words of i on either side, a
  word d away counting 1 / d (Pennington et al. 2014, section 4.2)."""
  keys, weights = [], []
  for text in texts:
    ids = np.asarray(text, np.int64)
    for d in range(1, min(window, len(ids) - 1) + 1):
      for a, b in ((ids[:-d], ids[d:]), (ids[d:], ids[:-d])):
        keys.append(a * vocab + b)
        weights.append(np.full(len(a), 1 / d))
  if not keys:
    raise UserError('no word has another beside it: pass a text of 2 or more ids')
  cells, at = np.unique(np.concatenate(keys), return_inverse=True)
  count = np.bincount(at, np.concatenate(weights)).astype(np.float32)
  return (cells // vocab).astype(np.int32), (cells % vocab).astype(np.int32), count


def cells(
  row: np.ndarray, column: np.ndarray, count: np.ndarray, *, batch: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the cells of a matrix without end, in another order in every epoch."""
  rng = np.random.default_rng(seed)
  while True:
    for at in np.array_split(rng.permutation(len(row)), max(1, len(row) // batch)):
      yield dict(row=row[at], column=column[at], count=count[at])
