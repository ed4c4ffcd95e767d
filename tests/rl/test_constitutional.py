"""Critique, revision and labels with a scripted model, whose every answer is known, and with a small real one."""

import functools

import jax
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import pairs, preferences
from llm_jax.data import vocab as vocab_lib
from llm_jax.rl import constitutional, feedback, judge
from llm_jax.rl.constitutional import Principle
from tests.decode import kinds

KEY = jax.random.key(4)
SHORT = Principle('What is too long?', 'Make it shorter.', 'Which is shorter?')


def shortens(prompts, key):
  """Names the length of the answer it is asked about, and gives back all but its last word."""
  made = []
  for prompt in prompts:
    answer = prompt.split('Assistant: ')[1].split('\n')[0]
    if prompt.endswith('Critique:'):
      assert 'Revision request' not in prompt and SHORT.critique in prompt
      made.append(f' It has {len(answer.split())} words. ')
    else:
      assert prompt.endswith('Revision:') and SHORT.revision in prompt
      assert f'It has {len(answer.split())} words.' in prompt
      made.append(' ' + ' '.join(answer.split()[:-1]))
  return made


def test_answers_are_criticised_and_revised_in_turn():
  chains = constitutional.revise(
    shortens, ['p', 'q'], ['one two three', 'one'], KEY, principles=[SHORT], revisions=2
  )
  assert chains[0].answers == ['one two three', 'one two', 'one']
  assert chains[0].critiques == ['It has 3 words.', 'It has 2 words.']
  assert constitutional.examples(chains) == [
    dict(instruction='p', output='one two', revision=1),
    dict(instruction='p', output='one', revision=2),
  ]  # the other answer was left empty
  with pytest.raises(UserError, match='revisions=0'):
    constitutional.revise(shortens, [], [], KEY, revisions=0)


def test_principles_are_drawn_evenly_and_again_for_the_same_key():
  n = 400
  chains = [
    constitutional.revise(lambda p, k: ['x'] * len(p), ['p'] * n, ['a'] * n, key)
    for key in (KEY, KEY, jax.random.key(5))
  ]
  drawn = [[c.principles[0] for c in chain] for chain in chains]
  assert drawn[0] == drawn[1] != drawn[2]
  counts = [drawn[0].count(p) for p in constitutional.PRINCIPLES]
  assert len(set(constitutional.PRINCIPLES)) == 16 and sum(counts) == n
  assert all(abs(c - n / 16) < 3.5 * (n * 15 / 16**2) ** 0.5 for c in counts)


def biased(prompts, first, second, principles):
  """Likes the longer text, and the first place by 0.1."""
  odds = np.array([len(a) / (len(a) + len(b)) for a, b in zip(first, second)])
  return odds + 0.1


def test_both_orders_take_the_bias_out():
  a, b = ['xxx', 'x', 'xx'], ['x', 'xxx', 'xx']
  found = constitutional.fair(biased)(['p'] * 3, a, b, [SHORT] * 3)
  np.testing.assert_allclose(found, [0.75, 0.25, 0.5])


def test_labels_are_soft_and_clamped():
  a, b = ['xxx', 'x'], ['x', 'xxxx']
  compare = constitutional.fair(biased)
  made = constitutional.label(compare, ['p', 'q'], a, b, KEY)
  assert made[0] == dict(prompt='p', chosen='xxx', rejected='x', chance=0.75)
  assert made[1]['chosen'] == 'xxxx' and abs(made[1]['chance'] - 0.8) < 1e-9
  made = constitutional.label(compare, ['p', 'q'], a, b, KEY, low=0.4, high=0.6)
  assert [r['chance'] for r in made] == [0.6, 0.6]
  seen = []

  def by_principle(prompts, first, second, principles):
    seen.append(principles[0])
    return np.full(1, constitutional.PRINCIPLES.index(principles[0]) / 16)

  made = constitutional.label(by_principle, ['p'], ['a'], ['b'], KEY, ensemble=16)
  assert set(seen) == set(constitutional.PRINCIPLES)  # each once
  assert made[0] == dict(prompt='p', chosen='b', rejected='a', chance=1 - 7.5 / 16)
  with pytest.raises(UserError, match='must enclose 0.5'):
    constitutional.label(compare, ['p'], ['a'], ['b'], KEY, low=0.6)


def test_soft_labels_reach_the_batch(tmp_path):
  made = constitutional.label(
    constitutional.fair(biased), ['p', 'q'], ['xxx', 'x'], ['x', 'xxxx'], KEY
  )
  feedback.save(made, str(tmp_path / 'labels.jsonl'))
  words = lambda text: vocab_lib.Bytes(extra_ids=0, modes=())
  data = functools.partial(
    pairs.files, path=str(tmp_path / 'labels.jsonl'), format=preferences.chosen_rejected,
    template='vicuna', heldout=0.0, vocab=words,
  )  # fmt: skip
  model = kinds.make('causal', vocab=259)[0]
  source = pairs.pairs(model, data=data, batch=2, length=240, shuffle=False)
  batch = source()
  source.close()
  np.testing.assert_allclose(batch['chance'], [0.75, 0.8], rtol=1e-6)
  assert 'margin' not in batch


def test_a_real_model_compares_by_the_letters():
  words = vocab_lib.Bytes(extra_ids=0, modes=())
  made = *kinds.make('causal', vocab=words.size), words
  compare = constitutional.asked(functools.partial(judge.probabilities, *made))
  found = compare(['p'], ['one'], ['two'], [SHORT])
  question = constitutional.CHOICE.format(
    prompt='p', first='one', second='two', question=SHORT.choice
  )
  assert question.endswith('(A) one\n(B) two\n\nThe answer is:')
  np.testing.assert_allclose(
    found, judge.probabilities(*made, [question], [' (A)', ' (B)'])[:, 0], rtol=1e-6
  )
