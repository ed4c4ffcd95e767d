"""Combinations against their formulas, learned rewards against one forward per text, refusals by name."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.model import scalar
from llm_jax.rl import reward, verify
from llm_jax.train import checkpoint
from llm_jax.train.state import State
from tests.decode import kinds
from tests.rl import toys

PROMPTS, ANSWERS = ['p', 'q', 'r'], ['a', 'bb', 'ccc']
TOLD = [dict(), dict(safety=True), dict(safety=False)]


def constant(values):
  return lambda prompts, answers, told: np.array(values)


def test_combinations_are_their_formulas():
  a, b = [1.0, 2.0, -4.0], [3.0, 0.0, 2.0]
  parts = dict(a=constant(a), b=constant(b))
  on = lambda f, **told: f(PROMPTS, ANSWERS, TOLD, **told)
  assert on(reward.mean, parts=parts).tolist() == [2, 1, -1]
  assert on(reward.minimum, parts=parts).tolist() == [1, 0, -4]
  assert on(reward.weighted, parts=parts, weights=dict(b=0.5)).tolist() == [2.5, 2, -3]
  rules = dict(rude=constant([0.5, 0, 1]), lies=constant([0.25, 1, 0]))
  assert on(reward.ruled, preference=parts['a'], rules=rules, cost=2.0).tolist() == [-0.5, 0, -6]
  chance = on(reward.probability, reward=parts['a'])
  np.testing.assert_allclose(chance, [1 / (1 + math.exp(-x)) for x in a], rtol=1e-6)
  assert all(
    x.dtype == np.float32
    for x in (on(reward.mean, parts=parts), on(reward.minimum, parts=parts), chance)
  )
  with pytest.raises(UserError, match="no part 'c'"):
    on(reward.weighted, parts=parts, weights=dict(c=1))


def test_safety_comes_first():
  """LLaMA 2, section 3.2.3, text by text: below the threshold, tagged, neither."""
  safe, helpful = [0.1, 0.9, 0.9], [0.8, 0.3, 0.6]
  found = reward.safety_first(
    PROMPTS, ANSWERS, TOLD, safety=constant(safe), helpfulness=constant(helpful)
  )
  used = np.array([0.1, 0.9, 0.6])
  logits = np.log(used / (1 - used))
  np.testing.assert_allclose(found, (logits - logits.mean()) / logits.std(), rtol=1e-5)
  at_most = reward.safety_first(
    PROMPTS, ANSWERS, TOLD, safety=constant([0, 1, 1]), helpfulness=constant([0, 1, 0.5])
  )
  assert np.isfinite(at_most).all()
  with pytest.raises(UserError, match='must be probabilities'):
    reward.safety_first(
      PROMPTS, ANSWERS, TOLD, safety=constant([9, 9, 9]), helpfulness=constant(helpful)
    )
  assert reward.whiten(np.array([2.0, 2.0])).tolist() == [0, 0]


def test_what_is_no_number_is_named():
  parts = dict(good=constant([0, 0, 0]), bad=constant([0, float('nan'), 0]))
  with pytest.raises(UserError, match="bad gives nan for the prompt 'q' and the answer 'bb'"):
    reward.mean(PROMPTS, ANSWERS, TOLD, parts=parts)
  with pytest.raises(UserError, match='bad gives inf'):
    reward.mean(PROMPTS, ANSWERS, TOLD, parts=dict(bad=constant([0, 0, float('inf')])))
  with pytest.raises(UserError, match=r'each of 3 answers, got \(2,\)'):
    reward.mean(PROMPTS, ANSWERS, TOLD, parts=dict(bad=constant([0, 0])))


def test_a_config_can_name_them():
  from llm_jax.core.config import build, from_json, to_json, use

  c = use(
    reward.weighted,
    parts=dict(right=use(verify.math), short=use(verify.length, limit=4, slack=2)),
    weights=dict(short=0.5),
  )
  made = build(from_json(to_json(c)))
  told = [dict(answer='4')] * 2
  assert made(['', ''], ['4', 'it is surely not 5'], told).tolist() == [1, -0.5]


WORDS = vocab_lib.Bytes(extra_ids=0, modes=())
TEXTS = ['', 'a', 'Is fire hot?', 'how ' * 9]


@functools.cache
def model(kind: str, length: int | None = None):
  language, _ = kinds.make(kind, vocab=WORDS.size, length=length)
  made = scalar.head(language)
  rng = np.random.default_rng(5)
  shapes = jax.eval_shape(made.init, jax.random.key(0))
  return made, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) / 2, shapes)


def alone(kind: str, prompt: str, answer: str) -> float:
  """The reward of one text, unpadded, by one forward: what the last token before the end says."""
  made, params = model(kind)
  first, last = list(WORDS.encode(prompt)), list(WORDS.encode(answer))
  if kind == 'encoder_decoder':
    batch = {'inputs': [[0, *last]], 'encoder/inputs': [first or [WORDS.eos]]}
  else:
    batch = dict(inputs=[[0, *first, *last]])
  batch = {k: np.array(v, np.int32) for k, v in batch.items()}
  if kind == 'prefix':
    batch['prefix'] = np.arange(batch['inputs'].shape[1])[None] <= len(first)
  x = jax.jit(made.hidden)(params, batch).x[0, -1]
  return float(x @ params[scalar.NAME]['w'] + params[scalar.NAME]['bias'])


@pytest.mark.parametrize('kind', ['causal', 'prefix', 'encoder_decoder'])
def test_a_learned_reward_is_that_of_each_text_alone(kind):
  prompts, answers = ['', 'a', 'Is fire hot?', 'how ' * 9], ['yes', '', 'a', 'no']
  made, params = model(kind)
  expected = [alone(kind, p, a) for p, a in zip(prompts, answers)]
  assert np.ptp(expected) > 0.1
  for batch in (3, 8):
    score = reward.of_model(made, params, WORDS, batch=batch)
    found = score(prompts, answers, [{}] * 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_one_program_per_shape():
  made, params = model('causal')
  score = reward.of_model(made, params, WORDS, batch=4)
  before = reward._read._cache_size()
  for n in (1, 2, 3, 4, 7):
    score(['x'] * n, ['y' * (n + 3)] * n, [{}] * n)
  assert reward._read._cache_size() == before + 1
  score(['x'], ['y' * 17], [{}])
  assert reward._read._cache_size() == before + 2


def test_texts_that_do_not_fit_and_models_that_give_no_number_are_refused():
  made, params = model('causal', length=20)
  score = reward.of_model(made, params, WORDS)
  with pytest.raises(UserError, match="have 23 tokens, the reward model reads 20: 'pppp"):
    score(['p' * 12], ['a' * 10], [{}])
  with pytest.raises(UserError, match=r'set model to use\(scalar.make'):
    reward.of_model(*kinds.make('causal'), WORDS)


def open_model():
  return model('causal')[0]


def words():
  return WORDS


def others():
  return vocab_lib.Bytes(extra_ids=7, modes=())


def test_the_run_of_a_reward_model_and_the_vocabulary_of_the_policy(tmp_path):
  made, params = model('causal')
  with checkpoint.Saver(str(tmp_path), asynchronous=False) as saver:
    saver.save(0, State(jnp.int32(0), jax.tree.map(jnp.asarray, params), ()), {})
  told = dict(model=open_model, path=str(tmp_path), vocab=words)
  found = reward.learned(TEXTS, TEXTS, [{}] * 4, **told, policy_vocab=words)
  np.testing.assert_allclose(found, reward.of_model(made, params, WORDS)(TEXTS, TEXTS, [{}] * 4))
  with pytest.raises(UserError, match='the policy writes .* train it on the policy'):
    reward.learned(TEXTS, TEXTS, [{}] * 4, **told, policy_vocab=others)
  part = functools.partial(reward.learned, **told)
  mixed = functools.partial(reward.mean, parts=dict(one=part, two=constant([0])))
  reward.prepare(functools.partial(reward.probability, reward=mixed))
  mixed.keywords['parts']['one'] = functools.partial(part, policy_vocab=others)
  with pytest.raises(UserError, match='the policy writes .* train it on the policy'):
    reward.prepare(functools.partial(reward.probability, reward=mixed))
  with pytest.raises(UserError, match='the policy writes .* train it on the policy'):
    toys.make_source(reward=mixed)  # before any answer is written
