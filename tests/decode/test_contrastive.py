"""Contrasts against their formulas in numpy, over forwards of the whole text without any state."""

import functools

import jax
import numpy as np
import pytest

from llm_jax.core import config
from llm_jax.core.errors import UserError
from llm_jax.decode import contrastive, drafts, generate, speculative
from llm_jax.model import depth
from tests.decode import kinds
from tests.decode.kinds import KEY, make, pad
from tests.variants import variants

SOME = ('causal', 'prefix', 'encoder_decoder', 'recurrent')
PROMPTS = [[7, 2, 3, 5, 2, 3], [1], [6], [8, 8, 3]]
NEW = 7
GREEDY = dict(max_new=NEW, temperature=0.0, eos=None)


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def greedy(score, *told):
  """The tokens of the largest score(answer so far, *told), one by one; none may be a near tie."""
  answer = []
  for _ in range(NEW):
    values = score(answer, *told)
    best, next_ = np.sort(values)[:-3:-1]
    assert best - next_ > 1e-5
    answer.append(int(np.argmax(values)))
  return answer


def plausible(p, score, alpha):
  return np.where(p >= p.max() + np.log(alpha), score, -np.inf)


# --- expert minus amateur -----------------------------------------------------------------------------


@pytest.mark.parametrize('kind', variants(['causal', 'encoder_decoder'], ['causal']))
def test_contrastive_decoding_is_its_formula(kind):
  expert, weak = make(kind), make(kind, layers=1, seed=5)
  model = contrastive.amateur(expert[0], weak[0], alpha=0.1, temperature=0.5)
  params = dict(expert=expert[1], amateur=weak[1])
  out = generate.generate(model, params, *pad(PROMPTS), KEY, **GREEDY)

  def score(answer, prompt):
    p = log_softmax(kinds.next_logits(kind, expert, prompt, answer))
    q = log_softmax(kinds.next_logits(kind, weak, prompt, answer) / 0.5)
    return plausible(p, p - q, 0.1)

  for row, prompt in enumerate(PROMPTS):
    assert out.tokens[row].tolist() == greedy(score, prompt)


def test_an_amateur_that_knows_nothing_changes_nothing_within_the_plausible():
  expert, weak = make('causal'), make('causal', layers=1, seed=5)
  nothing = jax.tree.map(np.zeros_like, weak[1])
  model = contrastive.amateur(expert[0], weak[0], alpha=1e-9)
  params = dict(expert=expert[1], amateur=nothing)
  found = generate.generate(model, params, *pad(PROMPTS), KEY, max_new=NEW, eos=None)
  plain = generate.generate(*expert, *pad(PROMPTS), KEY, max_new=NEW, eos=None)
  assert found.tokens.tolist() == plain.tokens.tolist()


def test_a_contrast_decodes_as_any_model_does():
  """Speculatively, with several samples of a prompt, and row by row."""
  expert, weak = make('causal'), make('causal', layers=1, seed=5)
  model = contrastive.amateur(expert[0], weak[0])
  both = model, dict(expert=expert[1], amateur=weak[1])
  out = generate.generate(*both, *pad(PROMPTS), KEY, **GREEDY)
  fast = speculative.generate(*both, *pad(PROMPTS), KEY, draft=drafts.by_ngram(), **GREEDY)
  assert fast.tokens.tolist() == out.tokens.tolist()
  twice = generate.generate(*both, *pad(PROMPTS), KEY, n=2, **GREEDY)
  assert twice.tokens.tolist() == np.repeat(out.tokens, 2, axis=0).tolist()


# --- last minus early layers --------------------------------------------------------------------------


def far(p, q):
  """The Jensen-Shannon divergence of two distributions given as logs, by its definition."""
  p, q = np.exp(p), np.exp(q)
  m = (p + q) / 2
  return (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2


@pytest.mark.parametrize('kind', variants(['prefix', 'encoder_decoder', 'recurrent'], ['prefix']))
def test_dola_is_its_formula(kind):
  model, params = make(kind, layers=4)
  around = jax.jit(lambda batch: model.hidden(params, batch, around=depth.exits((1, 2, 3))).aux)
  out = generate.generate(
    contrastive.dola(model, layers=(1, 2, 3)), params, *pad(PROMPTS), KEY, **GREEDY
  )
  picked = set()

  def score(answer, prompt):
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(answer)] = answer
    batch, first = kinds.text(kind, np.array([prompt], np.int32), tokens)
    early = np.asarray(around(batch)['around'], np.float64)[:, 0, first + len(answer)]
    table = np.asarray(params['embedding']['table'], np.float64)
    q = log_softmax(early @ table.T)
    p = log_softmax(kinds.next_logits(kind, (model, params), prompt, answer))
    layer = int(np.argmax([far(p, one) for one in q]))
    picked.add(layer)
    return plausible(p, p - q[layer], 0.1)

  for row, prompt in enumerate(PROMPTS):
    assert out.tokens[row].tolist() == greedy(score, prompt)
  assert len(picked) > 1


def test_buckets_of_candidate_layers():
  model = lambda n: make('causal', layers=n)[0].card
  assert contrastive.buckets(model(8), 'low') == (2,)
  assert contrastive.buckets(model(8), 'high') == (4, 6)
  assert contrastive.buckets(model(8)._replace(tied=False), 'low') == (0, 2)
  assert contrastive.buckets(model(1), 'low') == (0,)
  assert contrastive.buckets(model(48), 'low') == tuple(range(2, 20, 2))
  assert contrastive.buckets(model(48), 'high') == tuple(range(28, 48, 2))


# --- with a prompt minus without ----------------------------------------------------------------------

OTHERS = [[3], [5, 9, 1], [6, 6], [2, 4, 4, 1, 9, 10, 11, 3]]


@pytest.mark.parametrize('kind', variants(SOME, ['causal']))
def test_guidance_is_its_formula(kind):
  made = make(kind)
  both = contrastive.guidance(*made, *pad(OTHERS), scale=2.5, max_new=NEW)
  out = generate.generate(*both, *pad(PROMPTS), KEY, **GREEDY)

  def score(answer, prompt, other):
    p = log_softmax(kinds.next_logits(kind, made, prompt, answer))
    q = log_softmax(kinds.next_logits(kind, made, other, answer))
    return (1 - 2.5) * q + 2.5 * p

  for row, (prompt, other) in enumerate(zip(PROMPTS, OTHERS)):
    assert out.tokens[row].tolist() == greedy(score, prompt, other)
  twice = generate.generate(*both, *pad(PROMPTS), KEY, n=2, **GREEDY)
  assert twice.tokens.tolist() == np.repeat(out.tokens, 2, axis=0).tolist()


def test_guidance_of_one_is_the_model_and_of_another_scale_is_not():
  made, given = make('causal'), (*pad(PROMPTS), KEY)
  told = dict(max_new=NEW, eos=None)
  plain = generate.generate(*made, *given, **told)
  for scale in (1.0, 3.0):
    other = contrastive.last_tokens(*pad(PROMPTS))
    both = contrastive.guidance(*made, *other, scale=scale, max_new=NEW)
    out = generate.generate(*both, *given, **told)
    assert (out.tokens.tolist() == plain.tokens.tolist()) == (scale == 1)
  np.testing.assert_array_equal(other[0][:, 0], [p[-1] for p in PROMPTS])


def test_the_formula_of_guidance_is_that_of_transformers():
  """UnbatchedClassifierFreeGuidanceLogitsProcessor: scale (log p - log q) + log q."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 9))
  p, q = log_softmax(a), log_softmax(b)
  np.testing.assert_allclose(contrastive.guided(a, b, scale=1.5), 1.5 * (p - q) + q, atol=1e-5)


def test_guidance_is_compiled_once():
  made = make('causal')
  run = lambda: generate.generate(
    *contrastive.guidance(*made, *pad(OTHERS), max_new=NEW), *pad(PROMPTS), KEY, **GREEDY
  )
  run()
  before = generate._prefill._cache_size(), generate._advance._cache_size()
  run()
  assert (generate._prefill._cache_size(), generate._advance._cache_size()) == before


# --- contrastive search -------------------------------------------------------------------------------


SEARCHES = [
  *((kind, dict(alpha=0.6, k=4)) for kind in SOME),
  ('causal', dict(alpha=0.3, k=8, repetition=1.3)),
]


@pytest.mark.parametrize(('kind', 'settings'), variants(SEARCHES, SEARCHES[-1:]), ids=str)
def test_contrastive_search_is_its_formula(kind, settings):
  made = make(kind)
  alpha, k, penalty = settings['alpha'], settings['k'], settings.get('repetition', 1)
  out = contrastive.search(*made, *pad(PROMPTS), max_new=NEW, eos=None, **settings)

  def score(answer, prompt):
    tokens = np.zeros((12, 16), np.int32)
    tokens[:, : len(answer)], tokens[:, len(answer)] = answer, np.arange(12)
    prompts = np.tile(np.array(prompt, np.int32), (12, 1))
    logits, x = kinds.read(kind, *made, prompts, tokens)
    at = x.shape[1] - 16 + len(answer)  # of the candidates; what is before is the same in all rows
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    alike = np.einsum('vd,vsd->vs', unit[:, at], unit[:, :at]).max(1)
    logits = logits[0, len(answer)]
    for token in {0, *([] if kind == 'encoder_decoder' else prompt), *answer}:
      logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    p = np.exp(log_softmax(logits))
    value = (1 - alpha) * p - alpha * alike
    value[np.argsort(-p)[k:]] = -np.inf
    return value

  for row, prompt in enumerate(PROMPTS):
    assert out.tokens[row].tolist() == greedy(score, prompt)


@pytest.mark.parametrize('settings', variants([dict(alpha=0.0), dict(k=1)], [dict(k=1)]), ids=str)
def test_without_the_penalty_or_a_choice_it_is_greedy(settings):
  for told in (dict(), dict(length=9)):
    made = make('causal', **told)
    plain = generate.generate(*made, *pad(PROMPTS), KEY, max_new=12, temperature=0.0, eos=9)
    out = contrastive.search(*made, *pad(PROMPTS), max_new=12, eos=9, **settings)
    assert out.tokens.tolist() == plain.tokens.tolist()
    assert out.lengths.tolist() == plain.lengths.tolist()
    np.testing.assert_allclose(out.logp, plain.logp, atol=1e-4)


def test_a_ragged_batch_is_its_rows_one_by_one():
  run = functools.partial(contrastive.search, *make('causal'), max_new=9, eos=3)
  together = run(*pad(PROMPTS))
  for row, prompt in enumerate(PROMPTS):
    alone = run(*pad([prompt, PROMPTS[0]]))
    assert together.tokens[row].tolist() == alone.tokens[0].tolist()


# --- wrong settings -----------------------------------------------------------------------------------

WRONG = {
  'a kind': (lambda m, p: contrastive.amateur(m, make('prefix')[0]), 'amateur is prefix with 12'),
  'alpha': (lambda m, p: contrastive.amateur(m, m, alpha=0.0), 'alpha must be in'),
  'temperature': (lambda m, p: contrastive.amateur(m, m, temperature=0.0), 'temperature positive'),
  'a bucket': (lambda m, p: contrastive.dola(m, layers='middle'), "'low' or 'high', got 'middle'"),
  'no layers': (lambda m, p: contrastive.dola(m, layers=()), 'needs candidate layers'),
  'scale': (lambda m, p: contrastive.guidance(m, p, *pad(OTHERS), scale=np.inf), 'a number'),
  'k': (lambda m, p: contrastive.search(m, p, *pad(PROMPTS), k=0), 'k in 1 to 12'),
  'weight': (lambda m, p: contrastive.search(m, p, *pad(PROMPTS), alpha=1.5), 'alpha must be in'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_settings(case):
  run, message = WRONG[case]
  with pytest.raises(UserError, match=message):
    run(*make('causal'))


def test_search_is_an_argument_of_a_config():
  assert (config.use(contrastive.search).alpha, config.use(contrastive.search).k) == (0.6, 4)
