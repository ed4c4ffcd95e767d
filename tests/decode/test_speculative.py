"""Speculative decoding: what comes out is what the model alone would draw, whatever the draft proposes."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import drafts, generate, speculative
from llm_jax.model import stack
from tests.decode import kinds
from tests.decode.kinds import KEY, KINDS, PROMPTS, make, pad
from tests.variants import variants

DRAWS, TINY = 20_000, 4


def draft_of(name: str, kind: str, vocab: int = 12) -> drafts.Draft:
  if name == 'model':
    return drafts.by_model(*make(kind, vocab, layers=1, seed=5))
  return drafts.by_ngram() if name == 'ngram' else drafts.by_early_exit(1)


DRAFTS = ('model', 'ngram', 'exit')


# --- the distribution ---------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def processed(logits, text, temperature=1.0, top_k=0, repetition=1.0):
  """The probabilities of the next token after `text` by the definitions of Holtzman and Keskar, in numpy."""
  logits = logits.copy()
  for token in set(text):
    logits[token] *= repetition if logits[token] < 0 else 1 / repetition
  if top_k:
    logits[np.argsort(-logits, kind='stable')[top_k:]] = -np.inf
  return softmax(logits / temperature)


def enumerated(made, prompt, n, **settings):
  """{answer: probability} of all answers of n tokens, from forwards without a state."""
  answers = np.array(list(itertools.product(range(TINY), repeat=n)), np.int32)
  prompts = np.tile(np.array(prompt, np.int32), (len(answers), 1))
  logits, _ = kinds.read('causal', *made, prompts, answers)
  found = {}
  for answer, rows in zip(answers.tolist(), logits):
    chances = [
      processed(row, [0, *prompt, *answer[:i]], **settings)[answer[i]]
      for i, row in enumerate(rows[:n])
    ]
    found[tuple(answer)] = float(np.prod(chances))
  return found


def p_value(out, expected) -> float:
  rows = np.asarray(out.tokens).tolist()
  counts = dict.fromkeys(expected, 0)
  for row in rows:
    counts[tuple(row)] += 1
  assert not sum(counts[a] for a, p in expected.items() if p == 0)
  pairs = sorted((p * len(rows), counts[a]) for a, p in expected.items() if p > 0)
  while pairs[0][0] < 5:  # what is too rare to count goes together
    (a, b), (c, d) = pairs[:2]
    pairs = sorted([(a + c, b + d), *pairs[2:]])
  want, got = np.array(pairs).T
  return stats.chisquare(got, want * got.sum() / want.sum()).pvalue


PROMPT = [2, 1, 3, 2, 1]
SETTINGS = [dict(), dict(temperature=0.7, top_k=3), dict(temperature=1.5, repetition=1.4)]


def drawn(draft, gamma=2, seed=0, **settings):
  made = make('causal', TINY)
  prompts, lengths = pad([PROMPT])
  rows = np.repeat(prompts, DRAWS, 0), np.repeat(lengths, DRAWS)
  told = dict(max_new=3, eos=None, gamma=gamma, **settings)
  return speculative.generate(*made, *rows, jax.random.key(seed), draft=draft, **told)


PAIRS = [(name, settings) for name in DRAFTS for settings in SETTINGS]


@pytest.mark.parametrize(('name', 'settings'), variants(PAIRS, PAIRS[::2]), ids=str)
def test_draws_have_the_distribution_of_the_model(name, settings):
  expected = enumerated(make('causal', TINY), PROMPT, 3, **settings)
  out = drawn(draft_of(name, 'causal', TINY), **settings)
  assert p_value(out, expected) > 1e-3
  assert 0.1 < (np.asarray(out.accepted)[:, 0] > 0).mean() < 0.95  # both branches count


def test_the_chi_square_test_would_notice():
  expected = enumerated(make('causal', TINY), PROMPT, 3, temperature=1.05)
  assert p_value(drawn(draft_of('model', 'causal', TINY)), expected) < 1e-3


def test_the_rate_of_acceptance_is_what_two_distributions_share():
  """sum min(p, q), Leviathan et al., corollary 3.6."""
  answers = np.arange(TINY, dtype=np.int32)[:, None]
  prompts = np.tile(np.array(PROMPT, np.int32), (TINY, 1))
  p, _ = kinds.read('causal', *make('causal', TINY), prompts, answers)
  q, _ = kinds.read('causal', *make('causal', TINY, layers=1, seed=5), prompts, answers)
  share = np.minimum(softmax(p[:, 1]), softmax(q[:, 1])).sum(-1)
  alpha = (softmax(p[0, 0]) * share).sum()
  out = drawn(draft_of('model', 'causal', TINY), gamma=1)
  found = (np.asarray(out.accepted)[:, 0] > 0).mean()
  assert abs(found - alpha) < 4 * np.sqrt(alpha * (1 - alpha) / DRAWS)


class Card(NamedTuple):
  kind: str = 'causal'
  vocab: int = 3
  rows: int = 3
  length: int | None = None
  positions: str = 'none'


class Hidden(NamedTuple):
  x: Any
  states: Any
  aux: Any


class Same(NamedTuple):
  """A model that says the same after every text: its parameters are the logits."""

  card: Any
  hidden: Any
  logits: Any
  states: Any


def _nothing(params, batch, *, states=None, rng=None):
  return Hidden(jnp.zeros((*batch['inputs'].shape, 1)), states, {})


SAME = Same(Card(), _nothing, lambda p, x: x + p, lambda *_: {})


@pytest.mark.parametrize('gamma', [1, 4])
def test_tokens_per_step_with_a_constant_rate(gamma):
  """(1 - alpha^(gamma + 1)) / (1 - alpha), Leviathan et al., equation 1; 3.3616 for 0.8 and 4."""
  p, q = np.log([0.5, 0.3, 0.2]), np.log([0.3, 0.3, 0.4])  # share 0.8
  prompts, rows = np.zeros((4000, 1), np.int32), np.ones(4000, np.int32)
  draft = drafts.by_model(SAME, jnp.array(q))
  told = dict(draft=draft, gamma=gamma, max_new=30, eos=None)
  out = speculative.generate(SAME, jnp.array(p), prompts, rows, KEY, **told)
  found = np.asarray(out.accepted)[:, :5] + 1  # steps that no row has to cut short
  assert found.min() >= 1
  expected = (1 - 0.8 ** (gamma + 1)) / 0.2
  assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(found.size)
  if gamma == 4:
    assert round(expected, 4) == 3.3616
  counts = np.bincount(np.asarray(out.tokens).ravel(), minlength=3)
  assert stats.chisquare(counts, counts.sum() * np.exp(p)).pvalue > 1e-3


# --- greedy -------------------------------------------------------------------------------------------


def same(a, b, atol=1e-4):
  assert a.tokens.tolist() == b.tokens.tolist() and a.lengths.tolist() == b.lengths.tolist()
  np.testing.assert_allclose(a.logp, b.logp, atol=atol)


CASES = [(kind, 'model') for kind in KINDS]
CASES += [(kind, name) for kind in ('causal', 'encoder_decoder') for name in ('ngram', 'exit')]
CASES += [('recurrent', 'exit')]


@pytest.mark.parametrize(('kind', 'name'), variants(CASES, CASES[2::2]))
def test_greedy_tokens_are_those_of_greedy_decoding(kind, name):
  model, params = make(kind)
  given = *pad([p or [6] for p in PROMPTS]), KEY
  told = dict(max_new=20, temperature=0.0, eos=9)
  plain = generate.generate(model, params, *given, **told)
  out = speculative.generate(model, params, *given, draft=draft_of(name, kind), gamma=3, **told)
  same(out, plain)
  assert 1 <= out.per_step().max() <= 4


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['causal', 'encoder_decoder', 'recurrent'])
def test_with_layers_apart(kind):
  model, params = make(kind)
  given, told = (*pad([p or [6] for p in PROMPTS]), KEY), dict(max_new=12, temperature=0.0, eos=9)
  plain = generate.generate(model, params, *given, **told)
  params = stack.apart(params)
  for draft in (drafts.by_ngram(), drafts.by_early_exit(1)):
    same(speculative.generate(model, params, *given, draft=draft, gamma=2, **told), plain)


def test_a_draft_that_is_the_model_is_accepted_throughout():
  model, params = make('recurrent')
  draft = drafts.by_model(model, params)
  told = dict(max_new=21, temperature=0.0, eos=None, gamma=4)
  out = speculative.generate(model, params, *pad(PROMPTS), KEY, draft=draft, **told)
  assert out.per_step().tolist() == [5.0] * 4
  drawn = speculative.generate(
    model, params, *pad(PROMPTS), KEY, draft=draft, **told | dict(temperature=0.8)
  )
  assert drawn.per_step().tolist() == [5.0] * 4


@pytest.mark.parametrize(
  'settings',
  [
    dict(repetition=1.8),
    dict(presence=1.0, frequency=0.5),
    dict(no_repeat_ngram=2),
    dict(banned=[[3], [2, 5]], bias=np.linspace(-1, 1, 12)),
    dict(allowed=np.arange(12) % 2 == 0),
  ],
  ids=lambda s: '-'.join(s),
)
def test_under_every_processor(settings):
  name = 'ngram' if 'no_repeat_ngram' in settings else 'model'
  made, told = make('causal'), dict(max_new=12, temperature=0.0, eos=None, **settings)
  plain = generate.generate(*made, *pad(PROMPTS), KEY, **told)
  out = speculative.generate(
    *made, *pad(PROMPTS), KEY, draft=draft_of(name, 'causal'), gamma=4, **told
  )
  same(out, plain)


def test_a_repetition_is_continued_as_a_cycle():
  """The text is copied from where it stood before, and a period that reaches the end goes on."""
  told = dict(gamma=5, longest=3)
  for text, want in (
    ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9, 1, 2]),
    ([5, 6, 7, 6, 7], [6, 7, 6, 7, 6]),
    ([5, 3, 2, 8, 7, 2], [8, 7, 2, 8, 7]),
    ([5, 3, 2], [2, 2, 2, 2, 2]),
    ([4], [4, 4, 4, 4, 4]),
  ):
    tokens = jnp.array([[*text, *[-1] * (9 - len(text))]])
    seen = drafts.Seen(tokens, jnp.array([1]), jnp.array([len(text)]))
    how = drafts.Told(None, told['gamma'], told['longest'])
    found, _ = drafts.by_ngram().propose(how, None, None, {}, seen, None, None)
    assert found.ids.tolist() == [want] and found.probs is None


def test_the_encoders_input_is_looked_up_too():
  batch = {'encoder/inputs': jnp.array([[5, 6, 7, 8, 3]])}
  batch['encoder/segments'] = jnp.array([[1, 1, 1, 1, 0]])
  state = drafts.by_ngram().start(None, None, batch, None)
  seen = drafts.Seen(jnp.array([[0, 6, 7, -1, -1]]), jnp.array([1]), jnp.array([3]))
  how = drafts.Told(None, 2, 3)
  found, _ = drafts.by_ngram().propose(how, None, None, state, seen, None, None)
  assert found.ids.tolist() == [[8, 0]]


# --- rows, ends, limits -------------------------------------------------------------------------------


ROWS = [
  ('causal', 'exit'),
  ('encoder_decoder', 'ngram'),
  ('encoder_decoder', 'model'),
  ('recurrent', 'model'),
]


@pytest.mark.parametrize(('kind', 'name'), variants(ROWS, ROWS[:2]))
def test_rows_are_independent_of_one_another(kind, name):
  prompts = [p or [6] for p in PROMPTS]
  run = functools.partial(
    speculative.generate,
    *make(kind),
    key=KEY,
    draft=draft_of(name, kind),
    gamma=3,
    max_new=9,
    eos=5,
  )
  together = run(*pad(prompts))
  for row, prompt in enumerate(prompts):
    alone = run(*pad([prompt, prompts[0]]), rows=[row, 9])
    assert together.tokens[row].tolist() == alone.tokens[0].tolist()
    assert together.accepted[row].tolist() == alone.accepted[0].tolist()
    np.testing.assert_allclose(together.logp[row], alone.logp[0], atol=1e-4)


def test_the_end_of_a_text_may_be_one_of_those_proposed():
  made, given = make('causal'), (*pad(PROMPTS), KEY)
  told = dict(max_new=12, temperature=0.0)
  free = generate.generate(*made, *given, eos=None, **told)
  for eos in set(np.asarray(free.tokens).ravel().tolist()):
    out = speculative.generate(*made, *given, draft=drafts.by_model(*made), eos=eos, **told)
    same(out, generate.generate(*made, *given, eos=eos, **told))


@pytest.mark.slow
def test_learned_positions_end_a_row():
  made, told = make('causal', length=10), dict(max_new=12, temperature=0.0, eos=None)
  plain = generate.generate(*made, *pad(PROMPTS), KEY, **told)
  assert plain.lengths.tolist() == [4, 9, 10, 7]
  for name in DRAFTS:
    draft = drafts.by_model(*made) if name == 'model' else draft_of(name, 'causal')
    same(speculative.generate(*made, *pad(PROMPTS), KEY, draft=draft, **told), plain)


def test_one_token_takes_no_step():
  out = speculative.generate(
    *make('causal'), *pad(PROMPTS), KEY, draft=drafts.by_ngram(), max_new=1, eos=None
  )
  assert out.lengths.tolist() == [1] * 4 and out.accepted.tolist() == [[-1]] * 4


def test_compiled_once_per_setting():
  run = lambda seed: speculative.generate(
    *make('causal'), *pad(PROMPTS), jax.random.key(seed), draft=drafts.by_early_exit(1), eos=seed
  )
  run(0)
  before = speculative._run._cache_size()
  run(1)
  assert speculative._run._cache_size() == before


@pytest.mark.slow
def test_on_a_mesh():
  (model, params), draft = make('causal'), draft_of('model', 'causal')
  run = lambda params: speculative.generate(
    model, params, *pad(PROMPTS[:3]), KEY, draft=draft, max_new=8, eos=None
  )
  alone = run(params)
  with jax.set_mesh(mesh.make(data=4, fsdp=2)), mesh.rules(**mesh.ZERO3):
    out = run(jax.device_put(params, mesh.shardings(model.axes, params)))
  assert out.tokens.tolist() == alone.tokens.tolist()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(gamma=0), 'gamma must be at least 1'),
    (dict(draft=drafts.by_model(*make('prefix'))), 'prefix with 12 logits, the model causal'),
    (dict(draft=drafts.by_model(*make('causal', TINY))), 'causal with 4 logits'),
    (dict(draft=drafts.by_early_exit(3)), 'ends after 3 layers: choose one of'),
    (dict(top_p=2.0), 'top_p'),
  ],
  ids=['gamma', 'kind', 'vocab', 'layers', 'sampling'],
)
def test_wrong_settings(change, message):
  told = dict(draft=drafts.by_ngram()) | change
  with pytest.raises(UserError, match=message):
    speculative.generate(*make('causal'), *pad(PROMPTS), KEY, **told)
  for wrong in (drafts.by_ngram, drafts.by_early_exit):
    with pytest.raises(UserError, match='at least 1'):
      wrong(0)
