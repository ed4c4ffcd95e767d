"""Hidden words and pairs of sentences: the statistics of the paper, and what has to be true of every row."""

import functools
import math

import numpy as np

from llm_jax.data import batch, masked, pipeline, tasks, vocab
from tests.data.conftest import model, says

MAKE = functools.partial(vocab.bytes_, extra_ids=0, modes=masked.MARKS)
V = MAKE()
CLS, SEP, MASK = (V.modes[mark] for mark in masked.MARKS)
TEXTS = functools.partial(
  pipeline.make,
  task=functools.partial(tasks.domain, name='stories', vocab=MAKE),
  batch=16,
  length=61,
  rows=batch.pad,
)
PAIRS = functools.partial(masked.sentences, source=TEXTS)
ENCODER = model('encoder')


def drawn(make, count=40):
  source = make(ENCODER)
  found = [source() for _ in range(count)]
  source.close()
  return {name: np.concatenate([b[name] for b in found]) for name in found[0]}


def within(found, of, p):
  """Whether a count is a binomial one, to four standard deviations."""
  return abs(found - of * p) < 4 * math.sqrt(of * p * (1 - p))


def test_a_text_is_its_own_target_in_an_encoder():
  found = drawn(TEXTS, 2)
  assert (found['inputs'] == found['targets']).all() and found['weights'].sum() > 1000
  assert ((found['segments'] > 0) == (found['weights'] > 0)).all()


def test_15_percent_are_chosen_and_those_become_80_10_10():
  """Chi-square of the random pieces: all of the vocabulary alike."""
  found = drawn(functools.partial(masked.words, source=PAIRS))
  inputs, targets, chosen = found['inputs'], found['targets'], found['weights'] > 0
  special = np.isin(targets, [CLS, SEP, MASK, V.eos, V.pad])
  assert not (chosen & special).any() and not np.isin(targets, [MASK]).any()
  words = (~special).sum(1)
  assert (chosen.sum(1) == np.maximum(1, np.round(0.15 * words))).all()
  assert (inputs[~chosen] == targets[~chosen]).all()
  n, hidden = chosen.sum(), inputs[chosen] == MASK
  kept = inputs[chosen] == targets[chosen]
  pieces = V.base - 3
  assert n > 4000 and within(hidden.sum(), n, 0.8)
  assert within(kept.sum(), n, 0.1 + 0.1 / pieces)
  random = inputs[chosen][~hidden & ~kept]
  assert (
    within(len(random), n, 0.1 * (1 - 1 / pieces)) and random.min() >= 3 and random.max() < V.base
  )
  counts = np.bincount(random, minlength=V.base)[3:]
  expected = len(random) / pieces
  squares = ((counts - expected) ** 2 / expected).sum()
  assert abs(squares - (pieces - 1)) < 4 * math.sqrt(2 * (pieces - 1))  # its mean and deviation


def test_every_place_is_chosen_alike():
  """The position of a chosen token in its text is uniform: mean 1/2, variance 1/12."""
  found = drawn(functools.partial(masked.words, source=TEXTS))
  rows, at = np.nonzero(found['weights'])
  sizes = (found['segments'] > 0).sum(1)
  place = (at + 0.5) / sizes[rows]
  assert abs(place.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(place))


def test_pairs_of_sentences():
  """Half of them follow one another, and then the two are the text; else the second is the end of another row."""
  source, plain = PAIRS(ENCODER), TEXTS(ENCODER)
  labels = []
  for _ in range(20):
    made, texts = source(), plain()
    whole = [row[w > 0].tolist() for row, w in zip(texts['targets'], texts['weights'], strict=True)]
    for row, text in enumerate(whole):
      ids, types = made['targets'][row], made['types'][row]
      n = int(made['segments'][row].sum())
      assert ids[0] == CLS and (ids[:n] == SEP).sum() == 2 and ids[n - 1] == SEP
      assert not ids[n:].any() and not types[n:].any() and made['at'][row] == 0
      cut = ids.tolist().index(SEP)
      assert types[:n].tolist() == [0] * (cut + 1) + [1] * (n - cut - 1)
      a, b = ids[1:cut].tolist(), ids[cut + 1 : n - 1].tolist()
      assert text[: len(a)] == a and a and b
      assert made['weights'][row].sum() == len(a) + len(b) <= 61
      if made['label'][row]:
        others = [t for i, t in enumerate(whole) if i != row]
        assert any(t[i : i + len(b)] == b for t in others for i in range(1, len(t)))
      else:
        assert text == a + b
      labels.append(made['label'][row])
  source.close(), plain.close()
  assert len(labels) == 320 and within(sum(labels), len(labels), 0.5)


def test_resumed_is_uninterrupted_and_masks_are_new_each_time():
  make = functools.partial(masked.words, source=PAIRS)
  source = make(ENCODER)
  first = source()
  state = source.state()
  second = source()
  source.close()
  again = make(ENCODER)
  again.restore(state)
  for name, x in again().items():
    np.testing.assert_array_equal(x, second[name])
  again.restore(dict(state, made=7))
  other = again()
  again.close()
  assert (other['targets'].shape == second['targets'].shape) and first['inputs'].shape == (16, 64)
  assert (other['weights'] != second['weights']).any()
  held = functools.partial(
    make,
    source=functools.partial(
      PAIRS, source=functools.partial(TEXTS, split='validation', shuffle=False, jitter=False)
    ),
  )
  one, two = (next(iter(held(ENCODER).once())) for _ in range(2))
  assert all((one[name] == two[name]).all() for name in one)


def test_wrong_numbers_and_marks():
  plain = functools.partial(
    TEXTS, task=functools.partial(tasks.domain, name='stories', vocab=vocab.bytes_)
  )
  says(('[MASK]', 'set vocab.modes'), lambda: masked.words(ENCODER, source=plain))
  says('probabilities', lambda: masked.words(ENCODER, source=TEXTS, mask=0.8, random=0.3))
  says('random=2', lambda: masked.sentences(ENCODER, source=TEXTS, random=2))
