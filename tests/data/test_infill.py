"""BART's noise: the spans are Poisson's, what is kept is in order, and the inputs match the text around the holes."""

import math

import numpy as np
import pytest

from llm_jax.data import infill, vocab
from tests.data.conftest import says

V = vocab.bytes_(extra_ids=0, modes=('[MASK]',))
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
