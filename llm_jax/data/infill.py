r"""BART's noise (Lewis et al. 2019, arXiv:1910.13461, section 2.2): text infilling and sentence permutation.

    denoiser=use(infill.bart)                       # vocab.modes with '[MASK]' among them
    denoiser=use(infill.mbart, language='[fra]')    # and the languages

A span is replaced by one [MASK] whatever its length, also one of length 0; the targets are all of the text, so the
model has to find out how much is missing. These are denoisers as in denoise.py, whose targets repeat what the inputs
have: use them with an encoder-decoder. mBART has a source for every language, side by side in `domains.make`; how often
each is drawn is `examples.proportional(sizes, temperature=1 / 0.7)` in its paper.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data.batch import Example
from llm_jax.data.denoise import Denoiser, mark

Permute = Callable[[np.ndarray, np.random.Generator], np.ndarray]
STOPS = tuple('.!?\n')


def infilling(vocab: Any, *, rate: float = 0.3, mean: float = 3.0) -> Denoiser:
  """`rate` of the tokens (rounded up) hidden in spans of Poisson(`mean`) tokens, the last one cut to fit.

  Spans lie anywhere, every arrangement of spans and kept tokens equally likely. Those of length 0 are insertions; there
  are never so many that the inputs are longer than the text.
  """
  return _noised(vocab, rate, mean, lambda ids, rng: ids)


def sentence_permutation(vocab: Any) -> Denoiser:
  """The sentences of the chunk in random order. A sentence ends with the last of one or more of . ! ? and newlines."""
  permute = sentences(vocab)

  def lengths(n, end, u):
    whole = np.where(n > 0, n + end, 0)
    return whole, whole

  def apply(ids, end, u, rng):
    last = np.full(int(end), vocab.eos, np.int32)
    return np.append(permute(ids, rng), last), np.append(ids, last)

  return Denoiser(lengths, apply, lambda n: (n, n, 2 * n), lambda n: 0)


def bart(vocab: Any, *, rate: float = 0.3, mean: float = 3.0) -> Denoiser:
  """Sentences permuted, then infilling: what BART large was trained on (section 5.1)."""
  return _noised(vocab, rate, mean, sentences(vocab))


def mbart(vocab: Any, *, language: str, rate: float = 0.35, mean: float = 3.5) -> Denoiser:
  """BART's noise on a text of one language, which both sides name (Liu et al. 2020, arXiv:2001.08210, section 2.2).

  language: its mark among vocab.modes. The encoder reads the noised text, </s>, the language; the decoder reads the
  language, the text, </s> and predicts the text, </s>, the language: its code moves the last id of the targets to the
  front of what is read. To translate, begin with the mark of another language. Paragraphs are texts of several
  sentences here, without a </s> between those.
  """
  inner, told = bart(vocab, rate=rate, mean=mean), mark(vocab, language)
  ending = np.array([vocab.eos, told], np.int32)

  def lengths(n, end, u):
    inputs, targets = inner.lengths(n, np.zeros_like(end), u)
    return tuple(np.where(targets > 0, size + len(ending), 0) for size in (inputs, targets))

  def apply(ids, end, u, rng):
    inputs, targets = inner.apply(ids, False, u, rng)
    return Example(np.append(inputs, ending), np.append(targets, ending), None, told)

  longest = lambda n: (n + len(ending), n + len(ending), 2 * (n + len(ending)))
  return Denoiser(lengths, apply, longest, lambda n: 0)


def spans(n: int, rate: float, mean: float, rng: np.random.Generator) -> list[int]:
  """Lengths of spans, Poisson(`mean`) each, that hide ceil(rate * n) of n tokens."""
  hidden, found, left = int(np.ceil(rate * n)), [], int(np.ceil(rate * n))
  while left:
    for length in rng.poisson(mean, 1 + int(left / mean)):
      found.append(min(int(length), left))
      left -= found[-1]
      if not left:
        break
  spare = hidden - sum(1 for x in found if x)  # so many may be empty
  empty = np.cumsum([x == 0 for x in found])
  return [x for x, e in zip(found, empty, strict=True) if x or e <= spare]


def sentences(vocab: Any) -> Permute:
  """ids, rng -> the same ids, sentence by sentence in random order."""
  stops = np.array([vocab.decode([i]).endswith(STOPS) for i in range(vocab.base)])

  def permute(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ends = (ids < vocab.base) & stops[np.minimum(ids, vocab.base - 1)]
    cuts = np.flatnonzero(ends[:-1] & ~ends[1:]) + 1
    parts = np.split(ids, cuts)
    return np.concatenate([parts[i] for i in rng.permutation(len(parts))])

  return permute


def _noised(vocab: Any, rate: float, mean: float, permute: Permute) -> Denoiser:
  """Text permuted, then infilled. The spans of a chunk follow from its `u`, so that lengths are known before tokens."""
  if not 0 < rate <= 1 or mean <= 0:
    raise UserError(f'rate={rate}, mean={mean}: a share above 0 and at most 1, a positive mean')
  hole, end_id = mark(vocab, '[MASK]'), np.int32(vocab.eos)

  @functools.lru_cache(maxsize=1 << 16)
  def drawn(n: int, u: float) -> tuple[int, ...]:
    return tuple(spans(n, rate, mean, np.random.default_rng(int(u * 2**53))))

  def lengths(n, end, u):
    some = np.asarray(n) > 0
    told = [
      drawn(k, x) for k, x in zip(np.asarray(n).tolist(), np.asarray(u).tolist(), strict=True)
    ]
    inputs = np.array([len(t) - sum(t) for t in told], np.int64) + n + end
    return np.where(some, inputs, 0), np.where(some, n + end, 0)

  def apply(ids, end, u, rng):
    last = np.full(int(end), end_id, np.int32)
    told = rng.permutation(np.array(drawn(len(ids), u), np.int64))
    kept = len(ids) - int(told.sum())
    takes = np.ones(kept + len(told), np.int64)  # of each item, how many tokens it stands for
    at = np.sort(rng.choice(len(takes), len(told), replace=False))
    takes[at] = told
    out = permute(ids, rng)
    out = np.append(out, hole)[np.minimum(takes.cumsum() - takes, len(ids))]
    out[at] = hole
    return np.concatenate([out, last]).astype(np.int32), np.append(ids, last)

  return Denoiser(lengths, apply, lambda n: (n, n, 2 * n), lambda n: 0)
