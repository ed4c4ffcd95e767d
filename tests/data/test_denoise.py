"""Denoisers: what goes in comes out, and the statistics are those of the papers."""

import itertools
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest

from llm_jax.data import denoise, vocab
from tests.data.conftest import says

V = vocab.bytes_(extra_ids=300)
KINDS = {
  'causal': denoise.causal,
  'prefix_lm': denoise.prefix_lm,
  'prefix_lm with a mode': partial(denoise.prefix_lm, mode='[S]'),
  'span_corruption': denoise.span_corruption,
  'short spans': partial(denoise.span_corruption, rate=0.5, mean=1.0),
  'extreme': partial(denoise.span_corruption, rate=0.5, mean=64.0, mode='[X]'),
  'last_quarter': partial(denoise.last_quarter, mode='[S]'),
  'ul2': denoise.ul2,
  'ul2r': denoise.ul2r,
}


def rebuild(inputs, targets):
  """The text that an example was made from: sentinels in the inputs replaced by what follows them in the targets."""
  inputs, targets = inputs.tolist(), targets.tolist()
  if inputs and inputs[0] in V.modes.values():
    inputs = inputs[1:]
  sentinels = set(V.sentinels.tolist())
  if not sentinels & set(targets):
    return [t for t in inputs + targets if t != V.eos]
  hidden, at = {}, None
  assert targets[-1] == inputs[-1] == V.eos
  for t in targets[:-1]:
    if t in sentinels:
      at = t
      hidden[at] = []
    else:
      hidden[at].append(t)
  assert list(hidden) == V.sentinels[: len(hidden)].tolist() and all(hidden.values())
  return list(itertools.chain(*(hidden[t] if t in sentinels else [t] for t in inputs[:-1])))


def noise_mask(inputs, targets):
  """bool per token of the text: was it hidden?"""
  sentinels = set(V.sentinels.tolist())
  lengths = [
    len(list(g))
    for is_mark, g in itertools.groupby(targets.tolist()[:-1], lambda t: t in sentinels)
    if not is_mark
  ]
  body, spans = [t for t in inputs.tolist()[:-1] if t not in V.modes.values()], iter(lengths)
  return list(itertools.chain(*([True] * next(spans) if t in sentinels else [False] for t in body)))


def text(n, seed=0):
  return np.random.default_rng(seed).integers(3, 259, n).astype(np.int32)


@pytest.mark.parametrize('kind', KINDS)
def test_inputs_and_targets_rebuild_the_text(kind):
  d, rng = KINDS[kind](V), np.random.default_rng(0)
  for n, end, _ in itertools.product((1, 2, 3, 5, 17, 100, 301), (False, True), range(8)):
    ids, u = text(n, n), rng.random()
    inputs, targets = d.apply(ids, end, u, rng)
    assert rebuild(inputs, targets) == ids.tolist()
    lengths = d.lengths(np.array([n]), np.array([end]), np.array([u]))
    assert [int(x[0]) for x in lengths] == [len(inputs), len(targets)]
    most = [int(m) for m in d.longest(np.array(n + end))]
    assert all(
      a <= b
      for a, b in zip((len(inputs), len(targets), len(inputs) + len(targets)), most, strict=True)
    )
    assert inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize('kind', KINDS)
def test_same_u_and_rng_give_the_same_example(kind):
  d = KINDS[kind](V)
  a, b, c = (d.apply(text(200), False, 0.3, np.random.default_rng(s)) for s in (1, 1, 2))
  np.testing.assert_array_equal(a[0], b[0])
  assert len(a[0]) == len(c[0]) and len(a[1]) == len(c[1])  # the rng never changes a length


def test_empty_chunks():
  end = np.array([False, True])
  for make, want in (
    (denoise.causal, [0, 1]),
    (denoise.prefix_lm, [0, 0]),
    (denoise.span_corruption, [0, 0]),
  ):
    inputs, targets = make(V).lengths(np.zeros(2, np.int64), end, np.array([0.5, 0.5]))
    assert inputs.tolist() == [0, 0] and targets.tolist() == want


# Raw tokens, inputs and targets for 512 inputs, as T5's random_spans_helper gives them.
TABLE = [(0.15, 3, 568, 114), (0.15, 8, 588, 100), (0.5, 3, 766, 512), (0.5, 8, 908, 512), (0.15, 64, 600, 92),
         (0.5, 64, 1006, 512), (0.15, 32, 598, 94)]  # fmt: skip


@pytest.mark.parametrize(('rate', 'mean', 'raw', 'targets'), TABLE)
def test_lengths_for_512_inputs(rate, mean, raw, targets):
  d = denoise.span_corruption(V, rate=rate, mean=float(mean))
  assert denoise.raw_length(d, inputs=512, targets=512) == raw
  inputs, outputs = d.apply(text(raw), False, 0.5, np.random.default_rng(0))
  assert (len(inputs), len(outputs)) == (512, targets)


def test_raw_length_is_the_largest_that_fits():
  for kind, limits in itertools.product(KINDS, (dict(total=64), dict(inputs=64, targets=48))):
    d = KINDS[kind](V)
    raw = denoise.raw_length(d, **limits)
    want = [limits.get(k, math.inf) for k in ('inputs', 'targets', 'total')]
    fits = lambda n, d=d, want=want: all(
      int(x) <= w for x, w in zip(d.longest(np.array(n)), want, strict=True)
    )
    assert fits(raw) and not fits(raw + 1)
  says('raise length', lambda: denoise.raw_length(denoise.span_corruption(V), total=3))


def test_span_corruption_is_t5s_given_the_same_mask():
  """T5's noise_span_to_unique_sentinel, written from its definition, on the mask that we drew."""
  d, rng = denoise.span_corruption(V), np.random.default_rng(3)
  for n in (40, 41, 568):
    ids = text(n, n)
    inputs, targets = d.apply(ids, False, 0.0, rng)
    mask = np.array(noise_mask(inputs, targets))
    np.testing.assert_array_equal(inputs, [*one_sentinel_per_span(ids, mask), 1])
    np.testing.assert_array_equal(targets, [*one_sentinel_per_span(ids, ~mask), 1])


def one_sentinel_per_span(ids, mask):
  first = mask & ~np.concatenate([[False], mask[:-1]])
  marked = np.where(first, V.size - np.cumsum(first), ids)
  return marked[~(mask & ~first)]


def test_noise_counts_are_t5s():
  for n, rate, mean in itertools.product((2, 3, 10, 33, 512, 568), (0.15, 0.5), (3.0, 8.0, 64.0)):
    noise = min(max(round(float(np.float32(n) * np.float32(rate))), 1), n - 1)
    spans = max(round(noise / mean), 1)
    assert [int(x) for x in denoise.noise_counts(np.array(n), rate=rate, mean=mean)] == [
      noise,
      spans,
    ]


@pytest.mark.parametrize(('items', 'parts'), [(6, 3), (7, 2), (5, 5), (300, 2)])
def test_partitions_are_uniform_over_all_compositions(items, parts):
  """T5 shuffles parts - 1 ones among items - 1 places: every composition has probability 1 / C(items - 1, parts -
  1).
  """
  rng, draws = np.random.default_rng(0), 6000
  seen = Counter(tuple(denoise.partition(items, parts, rng).tolist()) for _ in range(draws))
  cells = math.comb(items - 1, parts - 1)
  assert len(seen) == cells and all(sum(c) == items and min(c) >= 1 for c in seen)
  expected = draws / cells
  chi2 = sum((k - expected) ** 2 / expected for k in seen.values())
  assert chi2 <= (cells - 1) + 4 * math.sqrt(2 * (cells - 1) + 1)


@pytest.mark.parametrize(('rate', 'mean'), [(0.15, 3.0), (0.5, 8.0), (0.15, 8.0)])
def test_rate_and_span_lengths(rate, mean):
  """Rate and number of spans are fixed; the length of one span has the mean and variance of a uniform composition."""
  d, rng, n = denoise.span_corruption(V, rate=rate, mean=mean), np.random.default_rng(1), 400
  noise, spans = (int(x) for x in denoise.noise_counts(np.array(n), rate=rate, mean=mean))
  assert abs(noise / n - rate) <= 0.5 / n and abs(noise / spans - mean) < mean / spans + 0.1
  firsts, masks = [], []
  for _ in range(400):
    mask = noise_mask(*d.apply(text(n), False, 0.0, rng))
    assert sum(mask) == noise and mask[-1] and not mask[0]
    runs = [len(list(g)) for hidden, g in itertools.groupby(mask) if hidden]
    assert len(runs) == spans
    firsts.append(runs[0])
    masks.append(mask)
  m = noise / spans
  variance = (
    (spans - 1) * noise * (noise - spans) / (spans**2 * (spans + 1))
  )  # of a part of a uniform composition
  assert abs(np.mean(firsts) - m) < 3 * math.sqrt(variance / len(firsts)) + 1e-9
  assert abs(np.mean(masks, axis=0)[n // 4 : -n // 4].mean() - rate) < 0.05


def test_pivot_is_uniform():
  d, n = denoise.prefix_lm(V), 100
  rng = np.random.default_rng(2)
  inputs, targets = d.lengths(np.full(20000, n), np.zeros(20000, bool), rng.random(20000))
  assert inputs.min() == 0 and inputs.max() == n - 1 and ((inputs + targets) == n).all()
  assert abs(inputs.mean() - (n - 1) / 2) < 3 * math.sqrt((n**2 - 1) / 12 / 20000)


def test_ul2_mixes_its_seven_denoisers_evenly_and_names_the_mode_first():
  d, rng, draws = denoise.ul2(V), np.random.default_rng(4), 3500
  modes, shapes = Counter(), Counter()
  for _ in range(draws):
    inputs, targets = d.apply(text(400), False, rng.random(), rng)
    modes[int(inputs[0])] += 1
    hidden = int((targets >= V.sentinels.min()).sum())
    shapes[(int(inputs[0]), hidden, len(targets) if hidden else 0)] += 1
  share = {m: modes[i] / draws for m, i in V.modes.items()}
  for mode, p in (('[R]', 2 / 7), ('[S]', 1 / 7), ('[X]', 4 / 7)):
    assert abs(share[mode] - p) < 3 * math.sqrt(p * (1 - p) / draws)
  assert len(shapes) == 7
  for k in shapes.values():
    assert abs(k / draws - 1 / 7) < 3.5 * math.sqrt(6 / 49 / draws)
  settings = [
    (p.keywords.get('rate'), p.keywords.get('mean'), p.keywords['mode']) for p in denoise.UL2
  ]
  assert settings == [(0.15, 3.0, '[R]'), (0.15, 8.0, '[R]'), (None, None, '[S]'), (0.5, 3.0, '[X]'), (0.5, 8.0, '[X]'),
                      (0.15, 64.0, '[X]'), (0.5, 64.0, '[X]')]  # fmt: skip


def test_ul2r_weighs_s_most():
  d, rng, draws = denoise.ul2r(V), np.random.default_rng(5), 3000
  modes = Counter(int(d.apply(text(60), False, rng.random(), rng)[0][0]) for _ in range(draws))
  for mode, p in (('[S]', 0.5), ('[R]', 0.25), ('[X]', 0.25)):
    assert abs(modes[V.modes[mode]] / draws - p) < 3 * math.sqrt(p * (1 - p) / draws)


def test_s_denoiser_trap():
  """T5's mask with one span of a quarter hides the last quarter every time; the prefix LM's pivot moves."""
  ids, rng = text(200), np.random.default_rng(6)
  trap, sane = denoise.last_quarter(V), denoise.prefix_lm(V)
  for u in (0.0, 0.4, 0.99):
    inputs, targets = trap.apply(ids, False, u, rng)
    assert inputs.tolist() == [*ids[:150].tolist(), V.sentinels[0], 1]
    assert targets.tolist() == [V.sentinels[0], *ids[150:].tolist(), 1]
    inputs, targets = sane.apply(ids, False, u, rng)
    assert inputs.tolist() == ids[: int(200 * u)].tolist()
  assert denoise.UL2[2].func is denoise.prefix_lm  # the sane one is the default


def test_end_of_document():
  ids, rng = text(10), np.random.default_rng(0)
  assert denoise.causal(V).apply(ids, True, 0.0, rng)[1].tolist() == [*ids.tolist(), 1]
  assert denoise.causal(V).apply(ids, False, 0.0, rng)[1].tolist() == ids.tolist()
  assert denoise.prefix_lm(V).apply(ids, True, 0.5, rng)[1].tolist() == [*ids[5:].tolist(), 1]
  assert denoise.prefix_lm(V).apply(ids, False, 0.5, rng)[1].tolist() == ids[5:].tolist()


def test_wrong_settings_name_the_remedy():
  says('rate', lambda: denoise.span_corruption(V, rate=1.5))
  says('mean span', lambda: denoise.span_corruption(V, mean=0.5))
  says('rate', lambda: denoise.last_quarter(V, rate=0.0))
  says("did you mean '[X]'?", lambda: denoise.prefix_lm(V, mode='[X'))
  says('set vocab.modes', lambda: denoise.ul2(vocab.bytes_(modes=())))
  says('set denoiser.rates', lambda: denoise.ul2(V, rates=(1.0, 2.0)))
  few = denoise.span_corruption(vocab.bytes_(extra_ids=4))
  says('set vocab.extra_ids=28', lambda: few.apply(text(568), False, 0.0, np.random.default_rng(0)))
