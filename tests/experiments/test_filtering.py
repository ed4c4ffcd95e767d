"""Cleaning undoes what experiments/filtering does to text; its README is of its results."""

import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from experiments.filtering import clean, data, report

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')
TEXT = (
  '“How now?” said the old man & looked – with a smile – at the café.\n'
  'There were 3 < 4 boats in the harbour that morning, and all of them had left before noon.\n'
  'He had been to the sea with his brother; it was the last that he saw of the island.\n'
  'The wind rose, and nobody thought of the lamp that they had left to burn in the house.'
)


def test_tags_frames_and_letters_are_undone():
  rng = random.Random(0)
  assert '<p class=' in data.tagged(TEXT, rng) and '&lt;' in data.tagged(TEXT, rng)
  assert clean.untagged(data.tagged(TEXT, rng)) == TEXT == clean.untagged(TEXT)
  assert 'cafÃ©' in data.garbled(TEXT)
  assert clean.repaired(data.garbled(TEXT)) == TEXT == clean.repaired(TEXT)
  assert clean.repaired('a café, in Latin-1') == 'a café, in Latin-1'
  assert clean.sentences(TEXT) == TEXT
  left = clean.sentences('\n'.join([*data.HEADS, TEXT, *data.FEET]))
  assert left == f'{TEXT}\n{data.FEET[2]}'  # it is a sentence: only its being everywhere tells
  assert clean.unframed([f'{TEXT}\n{data.FEET[2]}', data.FEET[2], f'Other.\n{data.FEET[2]}']) == [
    TEXT, '', 'Other.',
  ]  # fmt: skip


def test_only_prose_is_kept():
  rng = random.Random(0)
  junk = [data.spam(rng) for _ in range(8)]
  assert {one[0].isdigit() for one in junk} == {True, False}
  assert not any(map(clean.prose, junk)) and clean.prose(TEXT)
  assert not clean.prose(TEXT.split('\n')[0])


def test_a_web_page_becomes_its_article():
  page = data.pages()[0]
  text = clean.sentences(clean.untagged(page))
  assert len(text) < len(page) / 5
  assert 'Language models generate probabilities by training on text corpora' in text
  assert not any(sign in text for sign in ('<', 'function(', 'Toggle', 'Cookie statement'))


def test_near_copies_are_those_of_brute_force():
  rng = random.Random(1)
  words = [f'w{i}' for i in range(300)]
  texts = []
  for _ in range(6):
    first = ' '.join(rng.choices(words, k=60))
    texts += [first, data.altered(first, words, rng), data.altered(first, words, rng)]
  rng.shuffle(texts)
  kept = []
  for one in texts:
    a = clean.shingles(one)
    if not any(len(a & (b := clean.shingles(x))) >= 0.5 * len(a | b) for x in kept):
      kept.append(one)
  assert clean.distinct(texts) == kept and 6 <= len(kept) < len(texts)
  assert len(clean.distinct(texts, 0.999)) == len(set(texts))
  assert clean.unique(['A b, c.', 'a b c', 'A b d', 'a  B: c']) == ['A b, c.', 'A b d']


def test_what_is_left_is_counted_by_bytes():
  told = clean.against(['aaaa\nbb', 'aaaa\nxx'], ['aaaa\nbb', 'cccccc'])
  assert told == dict(
    clean=0.5, repeated=pytest.approx(4 / 12), other=pytest.approx(2 / 12), recovered=0.5
  )


def test_dirty_text_has_more_and_cleaning_finds_most_of_it_again():
  rng = random.Random(2)
  words = [''.join(rng.choices('abcdefgh', k=rng.randint(3, 8))) for _ in range(400)]
  line = lambda: (
    ' '.join(['The', *rng.choices(words, k=30), 'of', 'that', *rng.choices(words, k=5)]) + '.'
  )
  own = ['\n'.join(line() for _ in range(5)) for _ in range(120)]
  found = data.dirty(own)
  told = clean.against(found, own)
  assert len(found) > 1.3 * len(own) and told['recovered'] < 0.95
  kept, steps = clean.all_of(found)
  told = clean.against(kept, own)
  assert told['recovered'] > 0.9 and told['clean'] > 0.9 and told['repeated'] < 0.01
  assert [name for name, *_ in steps] == ['as found', *clean.STEPS] and steps[-1][1] == len(kept)


def test_windows_predict_the_next_byte():
  text = bytes(range(200)) * 2
  batch = data.drawn(text, 3, 4, 16, seed=0)
  assert batch['inputs'].shape == (3, 4, 16) and (batch['weights'] == 1).all()
  assert ((batch['inputs'] + 1) % 200 == batch['targets']).all()
  parts = data.held(text, 2, 3, 16)
  starts = [row[0] for one in parts for row in one['inputs'].tolist()]
  assert starts[0] == 0 and parts[-1]['targets'][-1, -1] == text[-1]
  flat = np.concatenate([one['inputs'][:, 0] for one in parts])
  assert len(flat) == 6 and all(b - a != 0 for a, b in itertools.pairwise(starts))


def test_shipped_results_show_what_the_readme_says():
  told = json.loads(SHIPPED.read_text())
  again = report.summarise(told['runs'], {k: told[k] for k in ('steps', 'against', 'plan')})
  readme = SHIPPED.with_name('README.md').read_text()
  assert all(table in readme for table in report.tables(again).split('\n\n'))
  low, high = (lambda x: x['mean'] - x['half']), (lambda x: x['mean'] + x['half'])
  assert all(
    high(again['filters'][arm][k]) < 0
    for arm in ('filtered', 'clean')
    for k in again['rows']['clean']
  )
  for arm in ('filtered', 'clean', 'deduplicated'):
    one = again['filters'][arm]['mean']
    assert f'{abs(one["mean"]):.3f} ± {one["half"]:.3f}' in readme
  assert low(again['filters']['deduplicated']['mean']) > 0
  for arm, row in again['missing'].items():
    assert low(row[arm[3:]]) > 0.18 and low(row['mean']) > 0
    assert all(v['mean'] < 0 for k, v in row.items() if k not in (arm[3:], 'mean'))
  assert f'{round(again["cpu"])} seconds of CPU time' in readme
