"""Verifiers against the flags, programs and answers of published data sets (tests/rl/verify.json), and case by case."""

import fractions
import functools
import json
import pathlib

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.rl import sandbox, verify


@functools.cache
def data() -> dict:
  return json.loads(pathlib.Path(__file__).with_name('verify.json').read_text(encoding='utf-8'))


def test_math_agrees_with_the_flags_of_gsm8k():
  rows = data()['gsm8k']
  told = [dict(answer=row['truth']) for row in rows]
  found = verify.math([''] * len(rows), [row['solution'] for row in rows], told)
  assert found.dtype == np.float32
  assert found.tolist() == [float(row['correct']) for row in rows]
  assert {row['correct'] for row in rows} == {True, False}


@pytest.mark.parametrize(
  'text, answer',
  [
    ('first \\boxed{1}, then \\boxed{\\frac{1}{2}}', '\\frac{1}{2}'),
    ('so \\boxed{\\text{(A)}} and 7', '\\text{(A)}'),
    ('thus $\\boxed 9$.', '9'),
    ('12 in all\n#### 1,234\nmore 5', '1,234'),
    ('The answer is $18.50. It was 3 before.', '$18.50'),
    ('Answer: Paris.', 'Paris'),
    ('work 4 + 5 = 9\nA: 18', '18'),
    ('From 3 apples and 4 pears we get 7.', '7'),
    ('it costs $2,350.75', '$2,350.75'),
    ('that is 3/4', '3/4'),
    ('it fell by -12.5%', '-12.5%'),
    ('x2 and v1.5b', None),
    ('nothing here', None),
    ('####', None),
  ],
)
def test_extraction(text, answer):
  assert verify.extract(text) == answer


@pytest.mark.parametrize(
  'text, value',
  [
    ('1,234,567', 1234567),
    ('$18.50', '37/2'),
    ('-.5', '-1/2'),
    ('+3', 3),
    ('3/4', '3/4'),
    ('-3/4', '-3/4'),
    ('1 1/2', '3/2'),
    ('-1 1/2', '-3/2'),
    ('\\frac{3}{4}', '3/4'),
    ('137\\frac{1}{2}', '275/2'),
    ('\\dfrac12', '1/2'),
    ('-\\frac{-3}{4}', None),
    ('50%', 50),
    ('50\\%', 50),
    ('18 dollars.', 18),
    ('\\$32,\\!348', 32348),
    ('x = 5', 5),
    ('90^\\circ', 90),
    ('12 \\text{ inches}', 12),
    ('1/0', None),
    ('two', None),
    ('2x', None),
    ('2 x + 1', None),
    ('2+3', None),
    ('1,23', None),
    ('', None),
  ],
)
def test_numbers(text, value):
  assert verify.number(text) == (None if value is None else fractions.Fraction(value))


@pytest.mark.parametrize(
  'a, b, equal',
  [
    ('0.5', '1/2', True),
    ('50%', '50', True),
    ('50%', '0.5', True),
    ('50%', '50%', True),
    ('0.5%', '50%', False),
    ('1000', '1,000.00', True),
    ('0.333', '1/3', False),
    ('\\left( 3, \\frac{\\pi}{2} \\right)', '(3,\\frac{\\pi}{2})', True),
    ('11\\sqrt2', '11\\sqrt{2}', True),
    ('Paris', ' paris.', True),
    ('x', 'y', False),
  ],
)
def test_equality(a, b, equal):
  assert verify.same(a, b) == equal == verify.same(b, a)


def test_math_takes_whole_solutions_and_names_a_missing_field():
  told = [dict(answer='2 + 2 = 4\n#### 4'), dict(answer='$\\boxed{4}$'), dict(answer=4)]
  assert verify.math([''] * 3, ['4', '#### 4', 'five'], told).tolist() == [1, 1, 0]
  assert verify.math([''], ['#### 5'], [dict(gold='5')], field='gold', wrong=-1).tolist() == [1]
  assert verify.math([''], [''], [dict(gold='5')], field='gold', wrong=-1).tolist() == [-1]
  with pytest.raises(UserError, match="no field 'answer': did you mean 'answers'"):
    verify.math([''], ['5'], [dict(answers='5')])


@pytest.fixture
def isolated():
  """Whether programs can be isolated here; where they cannot, none may run."""
  try:
    sandbox.check()
  except UserError:
    with pytest.raises(UserError, match='cannot be isolated'):
      verify.code([''], ['pass'], [dict(tests='')])
    return False
  return True


def test_code_passes_and_fails_the_tests_of_the_data_sets(isolated):
  if not isolated:
    return
  problems = [(verify.human_eval(r), r['canonical_solution']) for r in data()['human_eval']]
  problems += [(verify.mbpp(r), r['code']) for r in data()['mbpp']]
  told, right = zip(*problems)
  score = functools.partial(verify.code, [''] * len(told), told=told, seconds=20.0)
  assert score(answers=right).all()
  assert not score(answers=[*right[1:], right[0]]).any()
  whole = [
    f'Here:\n```python\n{r["prompt"]}{r["canonical_solution"]}\n```' for r in data()['human_eval']
  ]
  assert verify.code([''] * 4, whole, told[:4], seconds=20.0).all()
  empty = [
    '',
    'pass',
    '```python\n',
    'import os; os._exit(0)',
    'raise SystemExit',
    '    return x x',
  ]
  assert not score(answers=empty).any()


def test_programs_are_judged_by_what_they_print(isolated):
  if not isolated:
    return
  cases = [dict(cases=[('1 2\n', '3'), ('5 5\n', '10\n')])] * 4
  right = '```python\nprint(sum(map(int, input().split())))\n```'
  cheat = 'class Same:\n  __eq__ = lambda *_: True\nprint(Same())'
  found = verify.program(
    [''] * 4, [right, 'print(3)', cheat, 'print(10); raise ValueError'], cases, seconds=20
  )
  assert found.tolist() == [1, 0.5, 0, 0]


def test_forms():
  good = '<think>a</think>\n<answer>4</answer>'
  answers = [
    good,
    f'well {good}',
    good + good,
    '<answer>4</answer><think></think>',
    '<think>a</think>',
  ]
  told = [{}] * 5
  assert verify.tags(answers, answers, told).tolist() == [1, 0, 0, 0, 0]
  assert verify.tags(answers, answers, told, names=('think',)).tolist() == [0, 0, 0, 0, 1]
  pattern = r'<think>.*</think>\s*<answer>.*</answer>'
  assert verify.matches(answers, answers, told, pattern=pattern).tolist() == [1, 0, 1, 0, 0]
  with pytest.raises(UserError, match='no regular expression'):
    verify.matches(answers, answers, told, pattern='(')


def test_length_is_dapo_s_line():
  """Equation 13 of arXiv:2503.14476 with L_max = 10 and L_cache = 4."""
  answers = ['w ' * n for n in (0, 6, 7, 8, 10, 11, 50)]
  expected = [0, 0, -0.25, -0.5, -1, -1, -1]
  told = [{}] * len(answers)
  assert verify.length(answers, answers, told, limit=10, slack=4).tolist() == expected
  assert verify.length(['aaaaaaaa'], ['aaaaaaaa'], [{}], limit=10, slack=4, count=len).tolist() == [
    -0.5
  ]
  with pytest.raises(UserError, match='slack=11'):
    verify.length([], [], [], limit=10, slack=11)
