"""Batch ramps against a batch-by-batch simulation, and their published end points."""

import pytest

from llm_jax.core.errors import UserError
from llm_jax.optim import batch_size

MT_NLG = dict(start=32, end=1920, multiple=32, over=12 * 10**9 // 2048)
GPT3 = dict(start=32_768, end=3_211_264, multiple=32_768, over=12 * 10**9)
GLM = dict(start=192, end=4224, multiple=24, over=4_882_812)


@pytest.mark.parametrize(
  'kw',
  [
    MT_NLG,
    GPT3,
    GLM,
    dict(start=2, end=10, multiple=1, over=3),
    dict(start=4, end=4, multiple=1, over=9),
  ],
)
def test_ramp_is_megatrons_rule_batch_by_batch(kw):
  """size = start + multiple * floor(seen / (over / increments)), every token counted."""
  seen, increments, sizes = 0, (kw['end'] - kw['start']) // kw['multiple'], set()
  for index in range(20_000):
    size = kw['start'] + kw['multiple'] * min(increments, seen * increments // kw['over'])
    assert batch_size.ramp(index, **kw) == (size, seen)
    seen += size
    sizes.add(size)
  assert size == kw['end'] and len(sizes) <= increments + 1


def test_ramp_reaches_its_end_when_it_has_seen_enough():
  index = next(i for i in range(100_000) if batch_size.ramp(i, **GPT3).size == GPT3['end'])
  assert (
    batch_size.ramp(index - 1, **GPT3).seen < GPT3['over'] <= batch_size.ramp(index, **GPT3).seen
  )


def test_palm():
  sizes = ((0, 512), (50_000, 1024), (115_000, 2048))
  at = lambda i: batch_size.table(i, sizes=sizes)
  assert [at(i).size for i in (0, 49_999, 50_000, 114_999, 115_000, 255_000)] == [
    512,
    512,
    1024,
    1024,
    2048,
    2048,
  ]
  total = at(255_000).seen
  assert total == 512 * 50_000 + 1024 * 65_000 + 2048 * 140_000
  assert abs(total * 2048 / 780e9 - 1) < 0.01  # the paper's 780B tokens


def test_fixed():
  assert batch_size.fixed(7, size=12) == (12, 84)


@pytest.mark.parametrize(
  'call, remedy',
  [
    (lambda: batch_size.ramp(0, start=32, end=100, multiple=32, over=10), 'set end=96'),
    (lambda: batch_size.ramp(0, start=64, end=32, multiple=32, over=10), 'start <= end'),
    (lambda: batch_size.ramp(0, start=1, end=2, multiple=1, over=0), 'over >= 1'),
    (lambda: batch_size.table(0, sizes=((5, 2),)), 'rising'),
    (lambda: batch_size.table(0, sizes=((0, 2), (0, 3))), 'rising'),
  ],
)
def test_nonsense_is_refused(call, remedy):
  with pytest.raises(UserError, match=remedy):
    call()
