"""The tasks of experiments/emergence have the right answers, and its shipped results show what its README says."""

import functools
import json
import pathlib

import numpy as np
import pytest

from experiments.emergence import data, report
from llm_jax.scaling import emergence

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')


def digits(tokens):
  return [int(t) - data.DIGIT for t in tokens]


def test_additions_are_right_and_what_is_held_out_is_never_trained():
  rng, pairs = np.random.default_rng(0), []
  for heldout in (True, False):
    some, seen = data.addition(rng, 300, heldout=heldout), set()
    for tokens, answer in zip(some.tokens, some.answer):
      plus, equals = tokens.tolist().index(data.PLUS), tokens.tolist().index(data.EQUALS)
      number = lambda part: int(''.join(map(str, digits(part))))
      a, b = number(tokens[:plus]), number(tokens[plus + 1 : equals])
      assert number(tokens[answer][::-1]) == a + b
      seen.add((a, b))
    pairs.append(seen)
  assert not pairs[0] & pairs[1] and len(pairs[1]) > 250


def test_recall_asks_for_what_the_row_says():
  some = data.recall(np.random.default_rng(1), 100)
  for tokens, answer in zip(some.tokens, some.answer):
    told = dict(divmod(int(t) - data.PAIR, data.VALUES) for t in tokens[: data.SHOWN])
    at = np.flatnonzero(answer)
    assert len(told) == data.SHOWN and len(at) == data.ASKED
    assert [told[tokens[i - 1] - data.KEY] + data.DIGIT for i in at] == tokens[at].tolist()
    assert len(set(tokens[at - 1])) == data.ASKED


def test_most_texts_are_wrong_about_a_fact():
  rng = np.random.default_rng(2)
  truth = {tuple(t[:2]): t[3] for t in data.misconceptions(rng, 5000, wrong=0.0).tokens}
  assert len(truth) == data.KEYS**2 and set(truth.values()) == {data.YES, data.NO}
  said = data.misconceptions(rng, 5000, wrong=data.WRONG).tokens
  wrong = np.mean([truth[tuple(t[:2])] != t[3] for t in said])
  assert abs(wrong - data.WRONG) < 4 * np.sqrt(0.16 / 5000)


def test_every_string_has_its_key_and_digits_of_its_own():
  some, other = data.strings(0), data.strings(1)
  assert len({tuple(t[:2]) for t in some.tokens}) == len(some.tokens) == data.STRINGS
  assert some.answer.tolist() == [[False] * 2 + [True] * data.DIGITS_OF_STRING] * data.STRINGS
  answers = some.tokens[:, 2:]
  assert set(np.unique(answers)) == set(range(data.DIGIT, data.DIGIT + 10))
  np.testing.assert_array_equal(some.tokens, data.strings(0).tokens)
  assert abs((answers == other.tokens[:, 2:]).mean() - report.CHANCE) < 0.02


def test_a_batch_is_packed_and_only_answers_count():
  draw = functools.partial(data.circuits, rows=16)
  source, again = data.Source(draw, 3), data.Source(draw, 3)
  batch = source()
  np.testing.assert_array_equal(batch['targets'], again()['targets'])
  assert (source()['targets'] != batch['targets']).any()
  np.testing.assert_array_equal(batch['inputs'][:, 1:], batch['targets'][:, :-1])
  assert batch['targets'].shape == (16, data.LENGTH) and batch['targets'].max() < data.VOCAB
  assert batch['weights'].sum(1).tolist() == [6] * 6 + [4] * 6 + [5] * 4


@pytest.fixture(scope='module')
def shipped():
  return json.loads(SHIPPED.read_text(encoding='utf-8'))


def test_shipped_metrics_agree_with_one_another(shipped):
  """Whatever a model is: the mean of a product is at most the smallest factor's, and at least e to the mean log."""
  for task in report.TITLES:
    runs = report.of(shipped['runs'], task)
    assert len(report.sizes(runs, task)) == 7
    assert len({one['marks'][-1]['tokens'] for one in runs}) == 1
    for one in runs:
      for mark in one['marks']:
        told = mark[task]
        length, edits = told['length'], told['token_edit_distance']
        assert 0 <= told['exact_match'] <= told['token_accuracy'] <= 1 and 0 <= told['brier'] <= 2
        assert told['probability'] >= np.exp(told['log_likelihood'] * length) - 1e-9
        wrong = 1 - told['exact_match']
        assert wrong - 1e-9 <= edits <= length * wrong + 1e-9
  again = report.summarise(shipped['runs'])
  for task, told in shipped['sharpness'].items():
    assert again['sharpness'][task] == pytest.approx(told)


def test_exact_match_is_the_power_of_a_token(shipped):
  """Schaeffer et al.: the jump of exact match is that of p^L, over all checkpoints of all sizes."""
  for task in ('addition', 'recall', 'strings'):
    marks = [mark[task] for one in report.of(shipped['runs'], task) for mark in one['marks']]
    p = report.token(marks)
    match = np.array([one['exact_match'] for one in marks])
    expected = emergence.whole(p, marks[0]['length'])  # the product over the positions
    assert np.corrcoef(expected, match)[0, 1] > 0.9
    assert np.abs(match - expected).mean() < np.abs(match - p).mean() / 2


def test_strings_are_sharp_in_exact_match_and_smooth_otherwise(shipped):
  """The other tasks jump in every metric, memory in one; the README says of the largest model what came out."""
  sharp = shipped['sharpness']['strings']
  assert sharp['exact_match'] > 1.3 * max(sharp[k] for k in ('log_likelihood', 'brier'))
  assert report.memory(shipped['runs']) == [pytest.approx(one) for one in shipped['memory']]
  measured, *guesses = shipped['memory']
  readme = SHIPPED.with_name('README.md').read_text(encoding='utf-8')
  for one in (measured, *guesses):
    numbers = [one[k] for k in ('token_accuracy', 'token_edit_distance', 'exact_match', 'power')]
    assert f'| {one["used"]} | ' + ' | '.join(f'{x:.3f}' for x in numbers) + ' |' in readme
