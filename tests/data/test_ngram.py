"""Counting models: textbook figures, Katz's formula in exact fractions, and sums to 1 for every history."""

import collections
import fractions
import functools
import itertools
import json
import pathlib

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import ngram

SAM = ['I am Sam', 'Sam I am', 'I do not like green eggs and ham']
KENLM = pathlib.Path(__file__).with_name('kenlm.json')
WORDS = ['<s>', '</s>', *sorted({w for line in SAM for w in line.split()})]
V = 9


def ids(words):
  return [WORDS.index(w) for w in words.split()]


def said(seed, texts=4, tokens=60):
  """Texts of ids 1 .. V - 2, each half as often as the one before; V - 1 is never seen, 0 is the start."""
  p = 0.5 ** np.arange(V - 2)
  rng = np.random.default_rng(seed)
  return [rng.choice(np.arange(1, V - 1), tokens, p=p / p.sum()) for _ in range(texts)]


def every_history(n):
  return np.array(list(itertools.product(range(V), repeat=n))).reshape(V**n, n)


def test_bigrams_of_the_textbook():
  """Jurafsky & Martin, Speech and Language Processing, section 3.1: the mini-corpus of three sentences."""
  texts = [[*ids(line), WORDS.index('</s>')] for line in SAM]
  made = ngram.likeliest(ngram.count(texts, order=2, vocab=len(WORDS)))

  def p(word, before):
    return ngram.probabilities(made, [ids(before)])[0][WORDS.index(word)]

  wanted = dict(I='<s>', Sam='<s>', am='I', do='I')
  found = [p(word, before) for word, before in wanted.items()]
  np.testing.assert_allclose(found, [2 / 3, 1 / 3, 2 / 3, 1 / 3])
  np.testing.assert_allclose([p('</s>', 'Sam'), p('Sam', 'am')], [1 / 2, 1 / 2])
  assert p('ham', 'I') == 0


@pytest.mark.parametrize(
  ('order', 'wanted'),
  [(1, 6.940221), (2, 1.732051), (3, 1.565085)],  # of nltk.lm.MLE, nltk 3.10
)
def test_perplexities_are_those_of_nltk(order, wanted):
  """Of 'I am Sam', with its end, after training on the three sentences."""
  texts = [[*ids(line), WORDS.index('</s>')] for line in SAM]
  made = ngram.likeliest(ngram.count(texts, order=order, vocab=len(WORDS)))
  assert ngram.perplexity(made, texts[0]) == pytest.approx(wanted, rel=1e-6)


def test_good_turing_of_the_textbook():
  """Section 4.5.2 of the second edition: 10 carp, 3 perch, 2 whitefish, 1 trout, 1 salmon, 1 eel."""
  found = ngram.good_turing([10, 3, 2, 1, 1, 1])
  assert found.unseen == pytest.approx(3 / 18)
  np.testing.assert_allclose(found.adjusted[3:], 2 / 3)  # c*(trout) = 2 * 1/3
  np.testing.assert_allclose(found.adjusted[:3], [0, 0, 3])  # N_11 and N_4 are 0


def test_good_turing_moves_mass_and_makes_none():
  times = np.repeat([1, 2, 3, 4, 5], [40, 13, 9, 6, 2])
  found = ngram.good_turing(times)
  assert found.adjusted.sum() / times.sum() + found.unseen == pytest.approx(1)
  assert found.unseen == pytest.approx(40 / 127)
  assert found.adjusted[0] == pytest.approx(26 / 40) and found.adjusted[-1] == 0


def fractional(n, k):
  """Katz's eq. 15 in exact fractions; n[r] things were seen r times."""
  f = fractions.Fraction
  q = f((k + 1) * n[k + 1], n[1])
  return [(f((r + 1) * n[r + 1], n[r] * r) - q) / (1 - q) for r in range(1, k + 1)]


def test_discounts():
  n = [0, 320, 120, 60, 35, 22, 15]
  times = np.repeat(np.arange(7), n)
  found = ngram.discounts(np.append(times, [9, 100]))
  np.testing.assert_allclose(found[1:], [float(d) for d in fractional(n, 5)])
  assert found[1] == pytest.approx((240 / 320 - 90 / 320) / (1 - 90 / 320))  # by hand
  moved = sum((1 - d) * r * n[r] for r, d in enumerate(found[1:], 1))
  assert found[0] == 1 and moved == pytest.approx(n[1])


def test_discounts_where_counts_have_gaps():
  """A gap at N_4 leaves k = 2; where N_r do not fall there is nothing to discount by."""
  n = [0, 10, 4, 2, 0, 2, 2]
  found = ngram.discounts(np.repeat(np.arange(7), n))
  np.testing.assert_allclose(found, [1, 0.5, 0.375])  # q = 6/10
  assert ngram.discounts([1, 2, 2, 2, 3, 3, 3, 3]).tolist() == [1]


def direct(texts, order, cutoff):
  """p(word, history) by Katz's recursion from dictionaries of counts, in exact fractions."""
  f = fractions.Fraction
  counted = [collections.Counter() for _ in range(order + 1)]
  for text in texts:
    whole = (0,) * (order - 1) + tuple(map(int, text))
    for at in range(order - 1, len(whole)):
      for n in range(1, order + 1):
        counted[n][whole[at - n + 1 : at + 1]] += 1
  n_of = [collections.Counter(c.values()) for c in counted]
  d = [
    dict(zip(itertools.count(1), ngram.discounts(list(c.values()), cutoff)[1:]))
    for c in counted[1:]
  ]
  assert all(n_of[n + 1][r] for n in range(order) for r in d[n])

  @functools.cache
  def row(history):
    n = len(history) + 1
    shorter = row(history[1:]) if history else (f(1, V),) * V
    times = [counted[n][(*history, w)] for w in range(V)]
    if not any(times):
      return shorter
    kept = [f(d[n - 1].get(r, 1)) * r for r in times]
    seen = [w for w in range(V) if times[w]]
    total = sum(times) + (kept == times)
    left = 1 - sum(kept) / total
    below = sum(shorter[w] for w in range(V) if w not in seen)
    return tuple(kept[w] / total if w in seen else left / below * shorter[w] for w in range(V))

  return row


@pytest.mark.parametrize('order', [1, 2, 3])
def test_katz_is_its_formula_for_every_history(order):
  texts = said(4)
  counts = ngram.count(texts, order=order, vocab=V)
  found = ngram.probabilities(ngram.katz(counts, cutoff=3), every_history(order - 1))
  row = direct(texts, order, 3)
  wanted = [[float(p) for p in row(tuple(h.tolist()))] for h in every_history(order - 1)]
  np.testing.assert_allclose(found, wanted, rtol=1e-9)
  assert len(ngram.discounts(counts.times[-1], 3)) == (3 if order > 1 else 1)


def test_kenlm_reads_the_same():
  """KenLM's scores of our trigrams in the ARPA format (tests/data/make_kenlm.py), in f32."""
  reference = json.loads(KENLM.read_text(encoding='utf-8'))
  texts = [[*text, V - 1] for text in said(4)]
  made = ngram.katz(ngram.count(texts, order=3, vocab=V), cutoff=3)
  for text, wanted in zip(reference['texts'], reference['log10']):
    np.testing.assert_allclose(ngram.logp(made, text)[1:] / np.log(10), wanted, atol=2e-6)


@pytest.mark.parametrize('seed', range(4))
def test_every_history_sums_to_one(seed):
  """Also where a history was never seen, where nothing is discounted, and where every word followed."""
  full = [list(range(V)) * 2]
  for texts in (said(seed), said(seed, texts=1, tokens=3), full, said(seed, tokens=800) + full):
    for made in (ngram.katz, ngram.likeliest):
      model = made(ngram.count(texts, order=3, vocab=V))
      p = ngram.probabilities(model, every_history(2))
      np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
      assert (p > 0).all() if made is ngram.katz else (p >= 0).all()


def test_a_text_is_scored_as_its_distributions_say():
  texts, text = said(1), np.random.default_rng(9).integers(0, V, 40)
  made = ngram.katz(ngram.count(texts, order=3, vocab=V))
  rows = [ngram.probabilities(made, text[None, max(0, i - 2) : i])[0] for i in range(len(text))]
  wanted = [np.log(row[w]) for row, w in zip(rows, text)]
  np.testing.assert_allclose(ngram.logp(made, text), wanted)
  assert ngram.logp(made, []).shape == (0,)


def test_errors():
  with pytest.raises(UserError, match='raise vocab'):
    ngram.count([[1, 7]], order=2, vocab=5)
  with pytest.raises(UserError, match=r'2\^63'):
    ngram.count([[1]], order=5, vocab=32_000)
  with pytest.raises(UserError, match='no text'):
    ngram.count([[]], order=2, vocab=5)
  with pytest.raises(UserError, match='positive'):
    ngram.good_turing([1, 0])
