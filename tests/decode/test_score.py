"""Scores of given tokens against the numbers of decoding, and the rankings against their definitions."""

import functools
import math

import jax
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.decode import generate, score
from tests.decode.test_beam import EOS, KEY, LENGTHS, PROMPTS, full, make


@pytest.mark.parametrize('kind', ['causal', 'prefix', 'encoder_decoder', 'mamba'])
def test_scores_are_those_of_one_forward_and_of_decoding(kind):
  model, params = make(kind)
  settings = dict(max_new=7, eos=EOS, temperature=1.5)
  out = generate.generate(model, params, PROMPTS, LENGTHS, KEY, **settings)
  scores = score.tokens(model, params, PROMPTS, LENGTHS, out.tokens, out.lengths)
  np.testing.assert_allclose(scores.logp, out.logp, atol=2e-5)
  for row in range(2):
    end = int(out.lengths[row])
    answer = np.asarray(out.tokens)[row : row + 1, :end]
    np.testing.assert_allclose(scores.logp[row, :end], full(kind, row, answer)[0], atol=2e-5)
    assert not np.asarray(scores.logp)[row, end:].any()
    # every token once in place of the next gives the whole distribution, and so the divergence
    every = np.concatenate([np.repeat(answer[:, : end - 1], 5, 0), np.arange(5)[:, None]], 1)
    logp = full(kind, row, every)[:, -1]
    divergence = sum(0.2 * (math.log(0.2) - x) for x in logp)
    np.testing.assert_allclose(scores.certainty[row, end - 1], divergence, atol=2e-5)


def test_without_a_start_token_the_first_token_has_no_score():
  model, params = make('causal')
  answers, ends = np.array([[3, 2, 4, 1], [4, 4, 0, 0]], np.int32), [4, 2]
  alone = score.tokens(model, params, np.zeros((2, 1)), [0, 0], answers, ends, start=None)
  after = score.tokens(model, params, answers[:, :1], [1, 1], answers[:, 1:], [3, 1], start=None)
  np.testing.assert_allclose(alone.logp[:, 1:], after.logp, atol=1e-6)
  assert not alone.logp[:, 0].any() and (np.asarray(after.logp)[:, 0] < 0).all()


def test_a_text_that_fills_the_context():
  """The last token is predicted and not read, so prompt and answer may fill all 32 positions; padding counts for
  nothing."""
  model, params = make('causal')
  text = np.random.default_rng(0).integers(2, 5, (1, 32))
  whole = score.tokens(model, params, text[:, :30], [30], text[:, 30:], [2])
  padded = score.tokens(
    model, params, np.pad(text[:, :30], ((0, 0), (0, 9))), [30], text[:, 30:], [2]
  )
  np.testing.assert_allclose(whole.logp, padded.logp, atol=1e-6)
  with pytest.raises(UserError, match='reads at most 31'):
    score.tokens(model, params, text, [32], text[:, :2], [2])
  with pytest.raises(UserError, match='same rows'):
    score.tokens(model, params, text, [32], text[0], [2])


def test_on_a_mesh():
  model, params = make('causal')
  answers, ends = np.array([[3, 1], [2, 2], [4, 0]], np.int32), [2, 2, 1]
  alone = score.tokens(model, params, PROMPTS, LENGTHS, answers, ends)
  with jax.set_mesh(mesh.make()):
    out = score.tokens(model, params, PROMPTS, LENGTHS, answers, ends)
  assert out.logp.shape == (3, 2)
  np.testing.assert_allclose(out.logp, alone.logp, atol=2e-5)


def candidates() -> score.Candidates:
  texts = ['the cat sat', 'the cat sat down', 'a dog', 'the cat ran']
  tokens = [[5, 6, 7], [5, 6, 7, 8], [9], [5, 6, 1]]
  logp = -np.array([[1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5], [1.9, 0, 0, 0], [2, 2, 2, 0]])
  return score.Candidates('p', texts, tokens, score.Scores(logp, -2 * logp))


def test_rankings_are_their_definitions():
  told = candidates()
  assert score.sum_logp(told).tolist() == [-3, -2, -1.9, -6]
  assert score.mean_logp(told).tolist() == [-1, -0.5, -1.9, -2]
  assert score.certainty(told).tolist() == [2, 1, 3.8, 4]
  same = functools.partial(score.minimum_risk, utility=lambda a, b: float(a[0] == b[0]))
  np.testing.assert_allclose(same(told), [2 / 3, 2 / 3, 0, 2 / 3])
  f1 = np.array([[0, 6 / 7, 0, 4 / 6], [6 / 7, 0, 0, 4 / 7], [0, 0, 0, 0], [4 / 6, 4 / 7, 0, 0]])
  np.testing.assert_allclose(score.minimum_risk(told), f1.sum(1) / 3)
  assert score.token_f1('', '') == 1 and score.token_f1('a', '') == 0
  assert score.token_f1('a a b', 'a c') == 2 * 1 / 5
  one = told._replace(texts=['x'])
  assert score.minimum_risk(one).tolist() == [0]


def test_the_best_of_n_is_the_sample_that_ranks_first():
  words = vocab_lib.bytes_(extra_ids=0, modes=())
  model, params = make('causal', vocab=words.size)
  settings = dict(max_new=6, temperature=1.2)
  seen = []

  def longest(told):
    seen.append(told)
    return [len(text) for text in told.texts]

  found = score.best_of(model, params, words, ['ab', ''], KEY, n=4, rank=longest, **settings)
  assert [told.prompt for told in seen] == ['ab', '']
  samples = generate.text(model, params, words, ['ab'] * 4, KEY, **settings)
  assert seen[0].texts == samples and len(set(samples)) > 1
  assert found == [max(told.texts, key=len) for told in seen]
  logp = np.asarray(seen[0].scores.logp).sum(-1) / [len(t) for t in seen[0].tokens]
  likeliest = score.best_of(model, params, words, ['ab'], KEY, n=4, **settings)
  assert likeliest == [samples[int(logp.argmax())]]
  with pytest.raises(UserError, match='one number for each of the 4 texts'):
    score.best_of(model, params, words, ['ab'], KEY, n=4, rank=lambda told: 1.0, **settings)
