"""BART's noise: the spans are Poisson's, what is kept is in order, and the inputs match the text around the holes."""

import functools
import math

import numpy as np
import pytest

from llm_jax.data import domains, infill, pipeline, tasks, vocab
from tests.data.conftest import model, says

V = vocab.bytes_(extra_ids=0, modes=('[MASK]', *(f'[{name}]' for name in tasks.LANGUAGES)))
HOLE = V.modes['[MASK]']


def text(n, seed=0):
  return np.random.default_rng(seed).integers(3, V.base, n).astype(np.int32)


def noised(denoiser, ids, seed, end=False):
  rng = np.random.default_rng(seed)
  u = rng.random()
  found = denoiser.apply(ids, end, u, rng)
  sizes = denoiser.lengths(np.array([len(ids)]), np.array([end]), np.array([u]))
  assert (len(found[0]), len(found[1])) == (sizes[0][0], sizes[1][0])
  return found


def matches(inputs, ids):
  """Whether the text can be had by filling every hole with any number of tokens."""
  reach = {0}
  for token in inputs.tolist():
    if token == HOLE:
      reach = set(range(min(reach), len(ids) + 1))
    else:
      reach = {at + 1 for at in reach if at < len(ids) and ids[at] == token}
    if not reach:
      return False
  return len(ids) in reach


def test_span_lengths_are_poisson():
  """Chi-square of the first 40 spans of chunks with room for a hundred, none of which is cut."""
  rng = np.random.default_rng(0)
  found = np.concatenate([infill.spans(1000, 0.3, 3.0, rng)[:40] for _ in range(100)])
  pmf = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(10)])
  pmf = np.append(pmf, 1 - pmf.sum())
  counts = np.bincount(np.minimum(found, 10), minlength=11)
  expected = len(found) * pmf
  squares = ((counts - expected) ** 2 / expected).sum()
  assert len(found) == 4000 and squares < 29.6  # the 99.9 % quantile of 10 degrees of freedom


@pytest.mark.parametrize('n', [1, 2, 7, 200])
def test_thirty_percent_are_hidden_and_the_rest_is_in_order(n):
  denoiser, ids = infill.infilling(V), text(n)
  for seed in range(30):
    inputs, targets = noised(denoiser, ids, seed, end=True)
    assert targets.tolist() == [*ids, V.eos] and inputs[-1] == V.eos
    kept = (inputs[:-1] != HOLE).sum()
    assert n - kept == math.ceil(0.3 * n) and len(inputs) <= n + 1
    assert matches(inputs[:-1], ids.tolist())


def test_a_hole_may_be_anywhere():
  """With one span of one token in ten, each place is hidden alike: binomial, four deviations."""
  ids, hits = text(10), np.zeros(10)
  assert infill.spans(10, 0.1, 50.0, np.random.default_rng(0)) == [1]
  denoiser = infill.infilling(V, rate=0.1, mean=50.0)
  for seed in range(500):
    inputs, _ = noised(denoiser, ids, seed)
    hits[inputs.tolist().index(HOLE)] += 1
  assert np.abs(hits - 50).max() < 4 * math.sqrt(500 * 0.1 * 0.9)


def test_sentences_change_places_and_nothing_else():
  told = ['One fish.', ' Two fish!', '\nRed fish...', ' Blue fish?', ' And so on']
  ids = np.array(V.encode(''.join(told)), np.int32)
  orders = set()
  for seed in range(200):
    inputs, targets = noised(infill.sentence_permutation(V), ids, seed)
    assert (targets == ids).all()
    said = V.decode(inputs)
    places = [said.index(part) for part in (p.strip() for p in told)]
    orders.add(tuple(np.argsort(places).tolist()))
    assert sorted(said) == sorted(''.join(told))
  assert len(orders) > 80  # of 120 orders, 200 draws find 97 on average


def test_bart_is_both():
  told = np.array(V.encode('One fish. Two fish. Red fish. Blue fish. ' * 5), np.int32)
  moved = 0
  for seed in range(20):
    inputs, targets = noised(infill.bart(V), told, seed)
    assert (targets == told).all()
    kept = inputs[inputs != HOLE]
    assert len(told) - len(kept) == math.ceil(0.3 * len(told))
    moved += not matches(inputs, told.tolist())
  assert moved > 15
  says('no mode token', lambda: infill.bart(vocab.bytes_(modes=())))
  says('rate=0', lambda: infill.infilling(V, rate=0.0))


def test_mbart_ends_with_the_language_and_begins_with_it():
  """With all hidden in one span nothing is drawn; else the noise is BART's with mBART's numbers."""
  ids, fra = np.array([80, 60, 70], np.int32), V.modes['[fra]']
  inputs, targets, weights, first = noised(
    infill.mbart(V, language='[fra]', rate=1.0, mean=90.0), ids, 0
  )
  assert inputs.tolist() == [HOLE, V.eos, fra]
  assert targets.tolist() == [80, 60, 70, V.eos, fra] and weights is None and first == fra
  ids = text(100)
  for seed in range(20):
    found = noised(infill.mbart(V, language='[rus]'), ids, seed, end=seed % 2 == 0)
    alike = noised(infill.bart(V, rate=0.35, mean=3.5), ids, seed)
    assert found[0].tolist() == [*alike[0], V.eos, V.modes['[rus]']]
    assert 100 - (alike[0] != HOLE).sum() == 35
  says("no mode token '[deu]'", lambda: infill.mbart(V, language='[deu]'))


def test_mbart_reads_real_sentences_of_several_languages():
  """Each row in the marks of its own language; what the decoder reads are the targets with the last id in front, as
  `shift_tokens_right` of transformers' mBART has it; every chunk is in the declaration of that language."""
  spoken = ('fra', 'rus', 'cmn')
  part = functools.partial
  texts = tuple(
    part(
      pipeline.make,
      task=part(tasks.declaration, language=name, vocab=lambda text: V),
      denoiser=part(infill.mbart, language=f'[{name}]'),
    )
    for name in spoken
  )
  source = domains.make(model('encoder_decoder'), sources=texts, batch=6, length=96)
  batch = source()
  source.close()
  for row, which in enumerate(batch['domain']):
    told = V.modes[f'[{spoken[which]}]']
    (whole,) = tasks.declaration(language=spoken[which], vocab=None).corpora[0].texts('train')
    for segment in range(1, batch['segments'][row].max() + 1):
      mine = batch['segments'][row] == segment
      read, targets = batch['inputs'][row, mine], batch['targets'][row, mine]
      assert targets[-2:].tolist() == [V.eos, told] and read.tolist() == [told, *targets[:-1]]
      encoded = batch['encoder/inputs'][row, batch['encoder/segments'][row] == segment]
      assert encoded[-2:].tolist() == [V.eos, told] and HOLE in encoded
      assert (targets[:-2] - 3).astype(np.uint8).tobytes() in whole.encode()
  assert batch['segments'].any(1).all()
  says("did you mean 'eng'", lambda: tasks.declaration(language='en'))
