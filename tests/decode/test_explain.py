"""What --explain shows: the tokens that generate draws, and the probabilities of the definitions."""

import jax
import numpy as np
import pytest

from llm_jax.cli import explain as command
from llm_jax.data import vocab
from llm_jax.decode import explain, generate
from tests.decode.test_beam import LENGTHS, PROMPTS, make

KEY = jax.random.key(3)


def steps(kind='causal', row=0, **settings):
  model, params = make(kind)
  prompt = PROMPTS[row, : LENGTHS[row]].tolist()
  return list(explain.steps(model, params, prompt, KEY, **settings))


@pytest.mark.parametrize('kind', ['causal', 'encoder_decoder', 'mamba'])
def test_the_tokens_are_those_of_generate(kind):
  model, params = make(kind)
  settings = dict(max_new=9, temperature=1.4, top_k=4, repetition=1.2, no_repeat_ngram=3, eos=1)
  out = generate.generate(model, params, PROMPTS[:1], LENGTHS[:1], KEY, **settings)
  found = [step.token for step in steps(kind, **settings)]
  assert found == np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()


def softmax(x):
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_the_stages_are_the_definitions():
  """Model, repetition, a banned id, temperature, top-k, step by step in numpy from the logits of a whole forward."""
  settings = dict(max_new=4, temperature=0.5, top_k=2, repetition=2.0, eos=None, top=5)
  model, params = make('causal')
  text = [0, *PROMPTS[0].tolist()]
  for step in steps(allowed=np.arange(5) != 4, **settings):
    assert step.stages == ('model', 'repetition', 'allowed', 'temperature', 'top_k')
    logits = model.logits(params, model.hidden(params, dict(inputs=np.array([text]))).x)
    stages = [np.asarray(logits[0, -1], np.float64)]
    there = np.isin(np.arange(5), text)
    stages.append(np.where(there, stages[0] * np.where(stages[0] > 0, 0.5, 2.0), stages[0]))
    stages.append(np.where(np.arange(5) == 4, -np.inf, stages[1]))
    stages.append(stages[2] * 2)
    stages.append(np.where(stages[3] >= np.sort(stages[3])[-2], stages[3], -np.inf))
    told = {c.token: c.probabilities for c in step.candidates}
    found = np.array([told[v] for v in range(5)]).T
    np.testing.assert_allclose(found, [softmax(x) for x in stages], atol=1e-5)
    assert step.left == (5, 5, 4, 4, 2) and found[4][step.token] > 0
    assert list(told)[:5] == np.argsort(-found[0], kind='stable').tolist()
    text.append(step.token)


def test_the_token_drawn_is_shown_when_it_is_not_among_the_likeliest():
  shown = list(steps(max_new=12, temperature=50.0, eos=None, top=1))
  assert all(step.token in [c.token for c in step.candidates] for step in shown)
  assert any(len(step.candidates) > 1 for step in shown)


def test_a_table_keeps_to_its_width_and_names_what_did_nothing():
  names = ('model', 'repetition', 'presence', 'frequency', 'no_repeat_ngram', 'temperature')
  names += ('top_k', 'top_p', 'min_p', 'typical', 'epsilon', 'eta')
  rows = [explain.Candidate(i, tuple(0.9 / (i + s + 1) for s in range(12))) for i in range(3)]
  rows.append(explain.Candidate(9, (0.5,) + (0.0,) * 11))
  step = explain.Step(1, names, tuple(50_000 - i for i in range(12)), rows)
  lines = command.table(step, lambda i: 'x' * 22)
  assert max(map(len, lines)) <= command.WIDTH
  assert all(sum(line.split().count(name) for line in lines) == 1 for name in names)
  assert any(line.endswith('<- drawn') for line in lines) and any(' -' in line for line in lines)
  same = explain.Step(0, ('model', 'eta'), (2, 2), [explain.Candidate(0, (0.5, 0.5))])
  assert command.table(same, str)[-1] == 'changed nothing: eta'


def test_ids_are_shown_as_what_they_are():
  words = vocab.bytes_(extra_ids=1, modes=())
  shown = [command.spelling(words, i) for i in (0, 1, words.encode('a')[0], 3 + 0xC3, 259, 500)]
  assert shown == ['<id 0>', '<end>', "'a'", "b'\\xc3'", "'<extra_id_0>'", '<id 500>']
