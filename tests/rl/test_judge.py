"""Asking a model against one forward per choice; step rewards and searches against enumeration."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.rl import judge
from llm_jax.train import checkpoint
from llm_jax.train.state import State
from tests.decode import kinds

WORDS = vocab_lib.Bytes(extra_ids=0, modes=())
CHOICES = ['yes', 'no', 'maybe so']


def model():
  return kinds.make('causal', vocab=WORDS.size)[0]


def words():
  return WORDS


@functools.cache
def logp(question: str, choice: str) -> float:
  """log p(choice | question), by one forward over both."""
  made, params = kinds.make('causal', vocab=WORDS.size)
  first, last = list(WORDS.encode(question)), list(WORDS.encode(choice))
  inputs = np.array([[0, *first, *last[:-1]]], np.int32)
  run = lambda params, batch: made.logits(params, made.hidden(params, batch).x)
  told = jax.nn.log_softmax(jax.jit(run)(params, dict(inputs=inputs)))[0, len(first) :]
  return float(sum(told[i, c] for i, c in enumerate(last)))


def expected(question: str, choices=CHOICES) -> np.ndarray:
  odds = np.exp([logp(question, c) for c in choices])
  return odds / odds.sum()


def test_probabilities_of_choices_are_those_of_the_whole_texts():
  made, params = kinds.make('causal', vocab=WORDS.size)
  questions = ['', 'Is this longer than the others?', 'a']
  found = judge.probabilities(made, params, WORDS, questions, CHOICES, batch=4)
  np.testing.assert_allclose(found, [expected(q) for q in questions], rtol=2e-4)
  with pytest.raises(UserError, match='two or more choices'):
    judge.probabilities(made, params, WORDS, questions, ['yes', ''])


def test_a_rule_based_reward_is_the_mean_value_of_the_choices(tmp_path):
  made, params = kinds.make('causal', vocab=WORDS.size)
  template, choices = 'Q {prompt} A {answer} ({topic}):', dict(zip(CHOICES, [1.0, -1.0, 0.5]))
  told = [dict(topic='x'), dict(topic='yy')]
  prompts, answers = ['p', 'q'], ['a', 'b']
  questions = ['Q p A a (x):', 'Q q A b (yy):']
  score = judge.asked(made, params, WORDS, template=template, choices=choices)
  value = [expected(q) @ [1.0, -1.0, 0.5] for q in questions]
  np.testing.assert_allclose(score(prompts, answers, told), value, rtol=2e-4)
  with pytest.raises(UserError, match="asks for 'topic'"):
    score(prompts, answers, [{}, {}])
  with checkpoint.Saver(str(tmp_path), asynchronous=False) as saver:
    saver.save(0, State(jnp.int32(0), params, ()), {})
  run = dict(model=model, path=str(tmp_path), vocab=words)
  found = judge.judged(prompts, answers, told, **run, template=template, choices=choices)
  np.testing.assert_allclose(found, value, rtol=2e-4)


def test_steps_are_the_text():
  assert judge.steps('a\nb\nc') == ['a\n', 'b\n', 'c']
  assert judge.steps('a\n') == ['a\n'] and judge.steps('') == []
  assert judge.steps('a. b.', '. ') == ['a. ', 'b.']


def test_a_process_reward_is_the_product_or_the_least_of_the_steps():
  chance = {'good\n': 0.9, 'so-so\n': 0.5, 'bad\n': 0.1, 'good': 0.8}
  grade = lambda prompt, steps, told: [chance[s] for s in steps]
  answers = ['good\nso-so\ngood', 'bad\ngood', '']
  run = lambda **told: judge.stepwise(grade, **told)(['p'] * 3, answers, [{}] * 3)
  np.testing.assert_allclose(run(), [0.9 * 0.5 * 0.8, 0.08, 0], rtol=1e-6)
  np.testing.assert_allclose(run(combine=judge.least), [0.5, 0.1, 0], rtol=1e-6)
  with pytest.raises(UserError, match='gave 1 numbers for 2 steps'):
    judge.stepwise(lambda *_: [1.0])(['p'], ['a\nb'], [{}])


def test_a_process_reward_beats_the_majority():
  """A solver whose three steps are each right with 0.6, where one wrong answer is common: the majority is often wrong,
  and a judge that sees which step went wrong, with noise, picks better (the finding of arXiv:2305.20050)."""
  rng = np.random.default_rng(0)
  majority = process = 0
  for _ in range(200):
    right = rng.random((16, 3)) < 0.6
    answers = np.where(right.all(1), 'right', np.where(rng.random(16) < 0.8, 'trap', 'wrong'))
    common = collections.Counter(answers).most_common(1)[0][0]
    grade = lambda prompt, steps, told: np.clip(
      np.where(told['right'], 0.8, 0.2) + rng.normal(0, 0.1, 3), 0.01, 0.99
    )
    texts = [f'a\nb\n{x}' for x in answers]
    scores = judge.stepwise(grade)(['p'] * 16, texts, [dict(right=r) for r in right])
    majority += common == 'right'
    process += answers[int(np.argmax(scores))] == 'right'
  assert majority < 60 < 180 < process


def tree(prompt: str, steps: list[str], told) -> list[float]:
  """Fixed numbers in (0, 1) for every beginning of a solution."""
  found = []
  for i in range(len(steps)):
    seed = sum(map(ord, ''.join(steps[: i + 1]))) * 7919 + len(steps[i]) * 31 + i
    found.append(float(np.random.default_rng(seed).uniform(0.05, 0.95)))
  return found


def propose(text: str, key) -> list[str]:
  depth = text.count('\n')
  return [f'{c}{depth}' + ('\n' if depth < 2 else '') for c in 'abc']


@pytest.mark.parametrize('combine', [judge.product, judge.least, math.fsum])
def test_a_search_with_room_for_all_is_exhaustive_and_with_one_is_greedy(combine):
  key = jax.random.key(0)
  run = lambda beams: judge.search(propose, tree, '', key, beams=beams, combine=combine)
  value = lambda steps: combine(tree('', list(steps), {}))
  levels = [propose('\n' * d, key) for d in range(3)]
  best = max(itertools.product(*levels), key=value)
  assert run(27) == ''.join(best)
  taken = []
  for level in levels:
    taken = max(([*taken, s] for s in level), key=value)
  assert run(1) == ''.join(taken)


def test_a_search_stops_where_nothing_follows():
  grade = lambda prompt, steps, told: [0.5] * len(steps)
  nothing = lambda text, key: [] if text else ['a\n']
  assert judge.search(nothing, grade, '', jax.random.key(0)) == 'a\n'
