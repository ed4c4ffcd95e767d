r"""What is hidden and what is predicted: pure functions on the ids of one example, numpy only.

A `Denoiser` turns a chunk of a document into (inputs, targets). One number `u` in [0, 1) decides everything that their
lengths depend on (the pivot, the member of a mixture), so a batch can be planned before a token is read; `rng` decides
the rest. Targets hold every token that `inputs` lacks, in order, so the two together rebuild the text.

  causal           nothing                                   | the text                           (OBJ-001)
  prefix_lm        the text up to a random pivot             | the rest                           (OBJ-002)
  span_corruption  text, each noise span is one sentinel     | each sentinel and its noise span   (OBJ-003, T5)
  last_quarter     span corruption whose one span is the end | sentinel and the end               (OBJ-005)
  ul2, ul2r        one of several, its mode token first      |                                    (OBJ-004, OBJ-006)

A document's end (`vocab.eos`) belongs to the last chunk of it. Causal and prefix targets end with it there and nowhere
else; span corruption ends its inputs and its targets with it in every chunk, as T5 does.
"""

import bisect
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError, nearest

EOS = 1  # of our own vocabularies; imported ones bring theirs


class Denoiser(NamedTuple):
  """Lengths first, tokens second.

  lengths(n, end, u) -> (inputs, targets): for arrays of chunk sizes without end of document [k], whether the document
    ends there [k], and u [k]. Both lengths are 0 for a chunk that gives no example.
  apply(ids, end, u, rng) -> (inputs, targets): one chunk, ids [n] int32. May be an `Example` of batch.py, to say more.
  longest(n) -> (inputs, targets, both): the most that any u gives for chunks of n ids, end of document counted.
  sentinels(n): the most sentinels that a chunk of n ids needs.
  """

  lengths: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
  apply: Callable[[np.ndarray, bool, float, np.random.Generator], tuple[np.ndarray, np.ndarray]]
  longest: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
  sentinels: Callable[[int], int]


def causal(vocab: Any = None) -> Denoiser:
  """Language modelling: predict all of it, L = sum log p(x_i | x_<i)."""
  end_id = EOS if vocab is None else vocab.eos

  def lengths(n, end, u):
    return np.zeros_like(n), n + end

  def apply(ids, end, u, rng):
    return ids[:0], np.append(ids, np.int32(end_id)) if end else ids

  return Denoiser(lengths, apply, lambda n: (np.zeros_like(n), n, n), lambda n: 0)


def prefix_lm(vocab: Any, *, mode: str = '') -> Denoiser:
  """The text before a pivot drawn uniformly from 0 .. n-1 is given, the rest predicted (Raffel et al. 2019, section
  3.2).
  """
  head, end_id = _mode(vocab, mode), np.int32(vocab.eos)

  def lengths(n, end, u):
    pivot = (u * n).astype(np.int64)
    return np.where(n > 0, pivot + len(head), 0), np.where(n > 0, n - pivot + end, 0)

  def apply(ids, end, u, rng):
    pivot = int(u * len(ids))
    rest = ids[pivot:]
    return np.concatenate([head, ids[:pivot]]), np.append(rest, end_id) if end else rest

  return Denoiser(lengths, apply, lambda n: (n - 1 + len(head), n, n + len(head)), lambda n: 0)


def span_corruption(
  vocab: Any, *, rate: float = 0.15, mean: float = 3.0, mode: str = ''
) -> Denoiser:
  """T5's span corruption: `rate` of the tokens hidden in spans of `mean` on average (Raffel et al. 2019, section
  3.1.4).
  """
  if not 0 < rate < 1 or mean < 1:
    raise UserError(
      f'span corruption needs a rate between 0 and 1 and a mean span of at least 1, got {rate} and {mean}'
    )
  return _spans(vocab, functools.partial(noise_counts, rate=rate, mean=mean), mode)


def last_quarter(vocab: Any, *, rate: float = 0.25, mode: str = '') -> Denoiser:
  """What T5's noise mask makes of UL2's S setting, one span of length rate * n: always the LAST quarter, never
  another part.

  `prefix_lm` with its random pivot is the sane S-denoiser; this one is for reproducing runs that used the mask.
  """
  if not 0 < rate < 1:
    raise UserError(f'last_quarter needs a rate between 0 and 1, got {rate}')

  def counts(n):
    noise, _ = noise_counts(n, rate=rate, mean=1.0)
    return noise, np.minimum(noise, 1)

  return _spans(vocab, counts, mode)


_part = functools.partial
UL2 = (
  _part(span_corruption, rate=0.15, mean=3.0, mode='[R]'),
  _part(span_corruption, rate=0.15, mean=8.0, mode='[R]'),
  _part(prefix_lm, mode='[S]'),
  _part(span_corruption, rate=0.5, mean=3.0, mode='[X]'),
  _part(span_corruption, rate=0.5, mean=8.0, mode='[X]'),
  _part(span_corruption, rate=0.15, mean=64.0, mode='[X]'),
  _part(span_corruption, rate=0.5, mean=64.0, mode='[X]'),
)
UL2R = (
  _part(prefix_lm, mode='[S]'),
  _part(span_corruption, rate=0.15, mean=3.0, mode='[R]'),
  _part(span_corruption, rate=0.15, mean=32.0, mode='[X]'),
  _part(span_corruption, rate=0.5, mean=3.0, mode='[X]'),
)


def mixed(vocab: Any, *, denoisers: tuple, rates: tuple) -> Denoiser:
  """One of `denoisers` for each chunk, drawn in proportion to `rates`."""
  if len(denoisers) != len(rates) or not denoisers or min(rates) <= 0:
    raise UserError(
      f'{len(denoisers)} denoisers need as many positive rates, got {tuple(rates)}: set denoiser.rates'
    )
  parts = [make(vocab) for make in denoisers]
  edges = np.concatenate([[0.0], np.cumsum(rates) / np.sum(rates)])
  edges[-1] = 1.0

  borders, below_one = edges.tolist(), float(np.nextafter(1.0, 0.0))

  def lengths(n, end, u):
    which = np.searchsorted(edges, u, side='right') - 1
    rest = np.minimum((u - edges[which]) / (edges[which + 1] - edges[which]), below_one)
    inputs, targets = np.zeros_like(n), np.zeros_like(n)
    for i, part in enumerate(parts):
      here = which == i
      inputs[here], targets[here] = part.lengths(n[here], end[here], rest[here])
    return inputs, targets

  def apply(ids, end, u, rng):
    which = bisect.bisect_right(borders, u) - 1
    rest = min((u - borders[which]) / (borders[which + 1] - borders[which]), below_one)
    return parts[which].apply(ids, end, rest, rng)

  def longest(n):
    each = [part.longest(n) for part in parts]
    return tuple(np.max([e[i] for e in each], axis=0) for i in range(3))

  return Denoiser(lengths, apply, longest, lambda n: max(part.sentinels(n) for part in parts))


def ul2(vocab: Any, *, denoisers: tuple = UL2, rates: tuple = (1.0,) * 7) -> Denoiser:
  """UL2's mixture of denoisers (Tay et al. 2022, arXiv:2205.05131, table 1): R (regular), S (sequential), X
  (extreme).
  """
  return mixed(vocab, denoisers=denoisers, rates=rates)


def ul2r(
  vocab: Any, *, denoisers: tuple = UL2R, rates: tuple = (0.5, 0.25, 0.125, 0.125)
) -> Denoiser:
  """U-PaLM's mixture for continued training of a causal model (Tay et al. 2022, arXiv:2210.11399): 50 % S, 25 % R,
  25 % X.
  """
  return mixed(vocab, denoisers=denoisers, rates=rates)


def noise_counts(n: np.ndarray, *, rate: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
  """(noise tokens, noise spans) of T5's `random_spans_noise_mask` for chunks of n tokens, in its float32 arithmetic."""
  n = np.asarray(n)
  longer = np.maximum(n, 2)
  noise = np.round(longer.astype(np.float32) * np.float32(rate)).astype(np.int64)
  noise = np.clip(noise, 1, longer - 1)
  spans = np.maximum(np.round(noise.astype(np.float32) / np.float32(mean)).astype(np.int64), 1)
  spans = np.minimum(spans, longer - noise)  # every span follows at least one kept token
  short = n < 2  # T5 masks two tokens and cuts the mask: a single token is kept
  return np.where(short, 0, noise), np.where(short, 0, spans)


def partition(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Lengths [parts] >= 1 that sum to `items`, every such list equally likely (T5's `_random_segmentation`)."""
  if parts == 1:
    return np.array([items])
  edges = np.empty(parts + 1, np.int64)
  edges[0], edges[-1] = 0, items
  if items < 256:  # both draw a subset of the cuts uniformly, each is the faster one in its range
    edges[1:-1] = rng.permutation(items - 1)[: parts - 1]
  else:
    edges[1:-1] = rng.choice(items - 1, parts - 1, replace=False, shuffle=False)
  edges[1:-1].sort()
  edges[1:-1] += 1
  return edges[1:] - edges[:-1]


def raw_length(
  denoiser: Denoiser,
  *,
  inputs: int | None = None,
  targets: int | None = None,
  total: int | None = None,
) -> int:
  """The largest chunk, end of document counted, whose inputs, targets and both together stay within the limits.

  T5's `random_spans_helper`: 568 raw tokens for 512 inputs at the defaults. Raises `UserError` when no chunk fits.
  """
  limit = max(x for x in (inputs, targets, total) if x is not None)
  n = np.arange(1, 4 * limit + 8)
  fits = np.ones(len(n), bool)
  for size, most in zip(denoiser.longest(n), (inputs, targets, total), strict=True):
    fits &= size <= most if most is not None else True
  if not fits[0] or not fits[1]:
    raise UserError(
      f'no text fits a length of {limit} with this denoiser: raise length or encoder_length'
    )
  return int(n[-1] if fits.all() else n[np.argmin(fits)] - 1)


def _spans(vocab: Any, counts: Callable, mode: str) -> Denoiser:
  """Span corruption with a number of noise tokens and spans per chunk size: counts(n) -> (noise, spans)."""
  head, sentinels, end_id = (
    _mode(vocab, mode),
    np.asarray(vocab.sentinels),
    np.array([vocab.eos], np.int32),
  )

  def lengths(n, end, u):
    noise, spans = counts(n)
    some = n > 0
    return np.where(some, len(head) + n - noise + spans + 1, 0), np.where(
      some, noise + spans + 1, 0
    )

  @functools.cache
  def table(size: int) -> list[list[int]]:
    return np.stack(counts(np.arange(size)), 1).tolist()

  def count(n: int) -> list[int]:
    return table(1 << n.bit_length())[n]

  def apply(ids, end, u, rng):
    noise, spans = count(len(ids))
    if spans > len(sentinels):
      raise UserError(
        f'{spans} spans need as many sentinels, the vocabulary has {len(sentinels)}: set vocab.extra_ids={spans}'
      )
    if not spans:
      return np.concatenate([head, ids, end_id]), end_id
    parts = np.empty(
      2 * spans, np.int64
    )  # the text starts with a kept part and ends with a hidden one
    hidden, kept = partition(noise, spans, rng), partition(len(ids) - noise, spans, rng)
    parts[0::2], parts[1::2] = kept, hidden
    is_noise = np.repeat(_alternate(spans), parts)
    after = kept.cumsum() + (_arange(spans) + len(head))
    before = hidden.cumsum() - hidden + _arange(spans)
    inputs = _interleave(ids[~is_noise], sentinels[:spans], after, head, vocab.eos)
    return inputs, _interleave(ids[is_noise], sentinels[:spans], before, head[:0], vocab.eos)

  def longest(n):
    inputs, targets = lengths(n, False, None)
    return inputs, targets, inputs + targets

  return Denoiser(lengths, apply, longest, lambda n: count(n)[1])


def _interleave(
  text: np.ndarray, marks: np.ndarray, at: np.ndarray, head: np.ndarray, eos: int
) -> np.ndarray:
  """head, then `text` with `marks` at the positions `at` of the result, then end of document."""
  out = np.empty(len(head) + len(text) + len(marks) + 1, np.int32)
  is_text = np.ones(len(out) - 1, bool)
  is_text[at] = is_text[: len(head)] = False
  out[:-1][is_text], out[at], out[: len(head)], out[-1] = text, marks, head, eos
  return out


@functools.cache
def _arange(n: int) -> np.ndarray:
  return np.arange(n)


@functools.cache
def _alternate(n: int) -> np.ndarray:
  return np.arange(2 * n) % 2 == 1


def _mode(vocab: Any, mode: str) -> np.ndarray:
  return np.array([mark(vocab, mode)] if mode else [], np.int32)


def mark(vocab: Any, mode: str) -> int:
  """The id of a mode token."""
  if mode not in vocab.modes:
    raise UserError(
      f'the vocabulary has no mode token {mode!r}; {nearest(mode, vocab.modes)}; set vocab.modes, '
      'or a denoiser with an empty mode'
    )
  return vocab.modes[mode]
