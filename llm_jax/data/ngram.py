"""Language models that count: n-grams, Good-Turing's estimate and Katz's back-off, in NumPy.

    made = ngram.katz(ngram.count(texts, order=3, vocab=259))
    ngram.probabilities(made, [[7, 12]])    # f64 [1, vocab]: what follows 7, 12
    ngram.logp(made, ids)                   # nats of every token of a text

A model of order n gives p(w | h) with h the n - 1 ids before w; in front of a text stands id `start`. An n-gram is kept
as one integer, its ids being the digits to base `vocab`, so a history's words are neighbours in a sorted array.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError


class Counts(NamedTuple):
  """grams: for each length 1 .. order the different n-grams, int64 [n], sorted; times: how often each, int64 [n].

  A gram ends in a token of a text; what precedes it may be `start`, which is never counted as a word.
  """

  vocab: int
  start: int
  grams: tuple[np.ndarray, ...]
  times: tuple[np.ndarray, ...]

  @property
  def order(self) -> int:
    """The length of the longest n-grams."""
    return len(self.grams)


class Level(NamedTuple):
  """The n-grams of one length. grams: int64 [n], sorted; p: f64 [n], of the last word after the others. histories:
  int64 [m], sorted; backoff: f64 [m], what the next shorter history's p of all other words is multiplied by."""

  grams: np.ndarray
  p: np.ndarray
  histories: np.ndarray
  backoff: np.ndarray


class NGram(NamedTuple):
  """p(w | h) = p of the n-gram hw where it has one, else backoff(h) p(w | h without its first id); backoff is 1 for a
  history that was never seen, and below the words themselves p is uniform."""

  vocab: int
  start: int
  levels: tuple[Level, ...]

  @property
  def order(self) -> int:
    """How many ids a probability depends on, the word itself included."""
    return len(self.levels)


class Estimate(NamedTuple):
  """adjusted: f64 [n], what each count becomes; unseen: the share of all tokens left for what was never seen."""

  adjusted: np.ndarray
  unseen: float


def count(texts: Iterable[Sequence[int]], *, order: int, vocab: int, start: int = 0) -> Counts:
  """The n-grams of up to `order` ids in `texts`, each int [tokens] with ids below `vocab` (add the end of the document
  to have it counted)."""
  if order < 1 or vocab**order >= 2**63:
    raise UserError(
      f'order={order} over {vocab} ids: choose 1 or more, and few enough that vocab^order is below 2^63'
    )
  rows = [np.asarray(text, np.int64) for text in texts]
  if not sum(map(len, rows)):
    raise UserError('no text to count: pass at least one token')
  if min(row.min() for row in rows if len(row)) < 0 or max(map(np.max, filter(len, rows))) >= vocab:
    raise UserError(f'an id is not one of the {vocab} of the vocabulary: raise vocab')
  found = []
  for n in range(1, order + 1):
    keys = [_keys(_windows(row, n, start), vocab) for row in rows]
    found.append(np.unique(np.concatenate(keys), return_counts=True))
  grams, times = zip(*found, strict=True)
  return Counts(vocab, start, grams, times)


def likeliest(counts: Counts) -> NGram:
  """c(hw) / c(h), the maximum of the likelihood: 0 for what was not seen after h (a history that was never seen says
  what the next shorter one does)."""
  levels = []
  for grams, times in zip(counts.grams, counts.times, strict=True):
    histories, at, total = _by_history(grams, times, counts.vocab)
    levels.append(Level(grams, times / total[at], histories, np.zeros(len(histories))))
  return NGram(counts.vocab, counts.start, tuple(levels))


def good_turing(times: Any) -> Estimate:
  """r* = (r + 1) N_{r+1} / N_r for things that were seen r times, N_r of them; N_1 / N for those that were not (Good
  1953, Biometrika 40, eq. 2 and 9). times: int [n], how often each thing was seen, none of them 0.

  N, the sum of times, is that of the adjusted ones and N_1 where no N_r is 0 up to the largest r, which becomes 0: for
  words one leaves large counts as they are, see `discounts`.
  """
  times = np.asarray(times, np.int64)
  if not len(times) or times.min() < 1:
    raise UserError('Good-Turing needs the counts of what was seen: pass positive numbers only')
  seen, of, n = np.unique(times, return_inverse=True, return_counts=True)
  at = np.searchsorted(seen, seen + 1)
  at = np.minimum(at, len(seen) - 1)
  above = np.where(seen[at] == seen + 1, n[at], 0)
  adjusted = (seen + 1) * above / n
  return Estimate(adjusted[of], float((times == 1).sum() / times.sum()))


def discounts(times: Any, cutoff: int = 5) -> np.ndarray:
  """f64 [k + 1]: what counts of 0 (1), 1, ..., k are multiplied by, all larger ones being reliable (Katz 1987, IEEE
  Transactions on ASSP 35(3), eq. 15):

      d_r = (r* / r - q) / (1 - q),   q = (k + 1) N_{k+1} / N_1

  so that sum_r N_r (1 - d_r) r = N_1, what Good and Turing leave for the unseen. k: `cutoff`, or the largest below it
  that gives every d_r between 0 and 1: small samples have gaps among their N_r.
  """
  n = np.bincount(np.minimum(np.asarray(times, np.int64), cutoff + 2), minlength=cutoff + 3)
  for k in range(cutoff, 1, -1):  # k = 1 would forget what was seen once
    if not n[1 : k + 1].all():
      continue
    r = np.arange(1, k + 1)
    q = (k + 1) * n[k + 1] / n[1]
    if q < 1:
      d = ((r + 1) * n[r + 1] / (r * n[r]) - q) / (1 - q)
      if (d > 0).all() and (d < 1).all():
        return np.concatenate([[1.0], d])
  return np.ones(1)


def katz(counts: Counts, *, cutoff: int = 5) -> NGram:
  """Katz's back-off (eq. 16 to 18): d_r c(hw) / c(h) for what was seen after h, what is left in proportion to p of the
  next shorter history for the rest. cutoff: see `discounts`.

  Where nothing was discounted after a history, one more is added to its count, so that something is left; where all
  words were seen, nothing is.
  """
  made = NGram(counts.vocab, counts.start, ())
  for grams, times in zip(counts.grams, counts.times, strict=True):
    made = made._replace(levels=(*made.levels, _above(made, grams, times, cutoff)))
  return made


def _above(shorter: NGram, grams: np.ndarray, times: np.ndarray, cutoff: int) -> Level:
  """Katz's n-grams that are one longer than those of `shorter`."""
  vocab = shorter.vocab
  histories, at, total = _by_history(grams, times, vocab)
  d = discounts(times, cutoff)
  kept = times * np.where(times < len(d), d[np.minimum(times, len(d) - 1)], 1.0)
  used, words = np.bincount(at, kept), np.bincount(at)
  reliable = np.bincount(at, kept < times) == 0
  everything = words == vocab
  total = np.where(everything, used, total + reliable)
  lower = _conditional(shorter, _digits(grams, vocab, shorter.order + 1))
  beyond = np.where(everything, 1.0, 1 - np.bincount(at, lower))
  return Level(grams, kept / total[at], histories, (1 - used / total) / beyond)


def probabilities(model: NGram, histories: Any) -> np.ndarray:
  """f64 [rows, vocab]: p of every next word. histories: int [rows, n] of any n; the last order - 1 ids count, and
  `start` stands in front of shorter ones."""
  histories = np.asarray(histories, np.int64)
  short = max(0, model.order - 1 - histories.shape[1])
  histories = np.pad(histories, ((0, 0), (short, 0)), constant_values=model.start)
  p = np.full((len(histories), model.vocab), 1 / model.vocab)
  for n, level in enumerate(model.levels):
    history = _keys(histories[:, histories.shape[1] - n :], model.vocab)
    p *= _backoff(level, history)[:, None]
    first, last = (np.searchsorted(level.grams, (history + i) * model.vocab) for i in (0, 1))
    row = np.repeat(np.arange(len(p)), last - first)
    at = np.arange(len(row)) - np.repeat(np.cumsum(last - first) - last, last - first)
    p[row, level.grams[at] % model.vocab] = level.p[at]
  return p


def logp(model: NGram, ids: Any) -> np.ndarray:
  """f64 [tokens]: nats of each token after those before it; -inf where p is 0."""
  p = _conditional(model, _windows(np.asarray(ids, np.int64), model.order, model.start))
  with np.errstate(divide='ignore'):
    return np.log(p)


def perplexity(model: NGram, ids: Any) -> float:
  """exp of the mean of -logp."""
  return float(np.exp(-logp(model, ids).mean()))


def _windows(ids: np.ndarray, n: int, start: int) -> np.ndarray:
  """[tokens, n]: each token with the n - 1 before it."""
  whole = np.concatenate([np.full(n - 1, start, np.int64), ids])
  return np.lib.stride_tricks.sliding_window_view(whole, n) if len(ids) else whole[:0].reshape(0, n)


def _keys(ids: np.ndarray, vocab: int) -> np.ndarray:
  """[rows, n] -> [rows]: ids as digits."""
  key = np.zeros(len(ids), np.int64)
  for column in ids.T:
    key = key * vocab + column
  return key


def _digits(keys: np.ndarray, vocab: int, n: int) -> np.ndarray:
  """Undoes `_keys`."""
  return np.stack([keys // vocab**i % vocab for i in range(n - 1, -1, -1)], axis=1)


def _by_history(grams: np.ndarray, times: np.ndarray, vocab: int) -> tuple:
  """(the histories, which of them each gram has, how often each was followed by a word)."""
  histories, at = np.unique(grams // vocab, return_inverse=True)
  return histories, at, np.bincount(at, times, len(histories))


def _backoff(level: Level, history: np.ndarray) -> np.ndarray:
  """What p of shorter histories is multiplied by: 1 for histories without words."""
  at = np.minimum(np.searchsorted(level.histories, history), len(level.histories) - 1)
  return np.where(level.histories[at] == history, level.backoff[at], 1.0)


def _conditional(model: NGram, ids: np.ndarray) -> np.ndarray:
  """f64 [rows]: p of the last id after the others. ids: [rows, at least order]."""
  p = np.full(len(ids), 1 / model.vocab)
  for n, level in enumerate(model.levels, 1):
    gram = _keys(ids[:, ids.shape[1] - n :], model.vocab)
    at = np.minimum(np.searchsorted(level.grams, gram), len(level.grams) - 1)
    p = np.where(level.grams[at] == gram, level.p[at], p * _backoff(level, gram // model.vocab))
  return p
