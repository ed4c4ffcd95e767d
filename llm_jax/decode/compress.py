"""Prediction is compression: a text in as many bits as the model finds it surprising.

    data = compress.encode(predictor, ids)               # bytes
    ids = compress.decode(predictor, data, len(ids))

Arithmetic coding in integers (Witten, Neal & Cleary 1987, Communications of the ACM 30(6)): the text is an interval
whose width is the product of the probabilities of its tokens, and its code is a number inside, so it has
sum(-log2 p) + 2 bits at most, rounded up to bytes (Deletang et al. 2023, arXiv:2309.10668). The decoder makes the same
distributions from what it has decoded. To the last bit the same: on another device, or with another version of the
compiler, a rounding differs and the rest of the text is lost.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode.predict import Predictor

WHOLE = 1 << 64  # the interval in integers
HALF, QUARTER = WHOLE // 2, WHOLE // 4
TOTAL = 1 << 30  # what frequencies sum to


def encode(predictor: Predictor, ids: Sequence[int]) -> bytes:
  """The code of a text. It does not say how long the text is."""
  bits: list[int] = []
  low, high, undecided = 0, WHOLE - 1, 0

  def put(bit: int) -> None:
    nonlocal undecided
    bits.extend((bit, *[1 - bit] * undecided))
    undecided = 0

  p, state = predictor.begin()
  for at, token in enumerate(map(int, ids)):
    bounds = cumulative(p)
    if not 0 <= token < len(bounds) - 1:
      raise UserError(f'token {at} is {token}, the model has {len(bounds) - 1} ids')
    low, high = _narrow(low, high, int(bounds[token]), int(bounds[token + 1]))
    while True:
      if high < HALF:
        put(0)
      elif low >= HALF:
        put(1)
        low, high = low - HALF, high - HALF
      elif low >= QUARTER and high < 3 * QUARTER:
        undecided += 1
        low, high = low - QUARTER, high - QUARTER
      else:
        break
      low, high = 2 * low, 2 * high + 1
    if at + 1 < len(ids):
      p, state = predictor.read(state, token)
  undecided += 1
  put(int(low >= QUARTER))  # two bits that name a quarter inside the interval
  return np.packbits(bits).tobytes()


def decode(predictor: Predictor, data: bytes, count: int) -> list[int]:
  """The first `count` ids of the text that `encode` made `data` of."""
  bits = _bits(data)
  low, high, value = 0, WHOLE - 1, 0
  for _ in range(WHOLE.bit_length() - 1):
    value = 2 * value + next(bits)
  ids: list[int] = []
  p, state = predictor.begin() if count else (None, None)
  while len(ids) < count:
    bounds = cumulative(p)
    scaled = ((value - low + 1) * TOTAL - 1) // (high - low + 1)
    token = int(np.searchsorted(bounds, scaled, side='right')) - 1
    ids.append(token)
    low, high = _narrow(low, high, int(bounds[token]), int(bounds[token + 1]))
    while True:
      if high < HALF:
        pass
      elif low >= HALF:
        low, high, value = low - HALF, high - HALF, value - HALF
      elif low >= QUARTER and high < 3 * QUARTER:
        low, high, value = low - QUARTER, high - QUARTER, value - QUARTER
      else:
        break
      low, high, value = 2 * low, 2 * high + 1, 2 * value + next(bits)
    if len(ids) < count:
      p, state = predictor.read(state, token)
  return ids


def cumulative(p: np.ndarray) -> np.ndarray:
  """int64 [vocab + 1], from 0 to TOTAL: where each id's share begins, at least 1 wide: every text has a code, and the
  least likely id costs 30 bits.

  What rounding leaves goes to the likeliest id. A token costs less than 1.5 vocab / TOTAL bits more than its -log2 p.
  """
  p = np.asarray(p, np.float64)
  share = 1 + np.floor(p / p.sum() * (TOTAL - len(p))).astype(np.int64)
  share[np.argmax(share)] += TOTAL - share.sum()
  return np.concatenate([[0], np.cumsum(share)])


def _narrow(low: int, high: int, first: int, last: int) -> tuple[int, int]:
  """The part [first, last) of TOTAL of the interval, both ends inside."""
  width = high - low + 1
  return low + width * first // TOTAL, low + width * last // TOTAL - 1


def _bits(data: bytes) -> Iterator[int]:
  """The bits of the code, and zeros without end."""
  yield from np.unpackbits(np.frombuffer(data, np.uint8)).tolist()
  while True:
    yield 0
