"""Beam search against the enumeration of all answers and against a search written out in numpy."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.decode import beam, generate
from llm_jax.model import attention, block, ffn, moe, positions, transformer
from llm_jax.model.recurrent import mamba, rwkv
from tests.variants import variants

VOCAB, EOS, KEY = 5, 1, jax.random.key(0)
PROMPTS = np.array([[3, 2, 4], [4, 0, 0], [0, 0, 0]], np.int32)
LENGTHS = np.array([3, 1, 0], np.int32)
KINDS = ('causal', 'prefix', 'encoder_decoder', 'mamba', 'rwkv', 'moe')


@functools.cache
def make(kind: str, vocab: int = VOCAB):
  """A tiny model with weights that make its distributions uneven."""
  mixer = functools.partial(attention.SelfAttention, heads=2)
  feed = functools.partial(ffn.Gated, hidden=12)
  plain = functools.partial(block.decoder, mixer=mixer, ffn=feed)
  settings = dict(vocab=vocab, embed=8, layers=1, length=32)
  if kind == 'encoder_decoder':
    cross = functools.partial(attention.CrossAttention, heads=2)
    both = functools.partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed)
    whole = dict(block=both, encoder_layers=1, encoder_block=plain)
    model = transformer.encoder_decoder(**whole, **settings)
  elif kind == 'mamba':
    one = functools.partial(block.mixers, mixer=functools.partial(mamba.Mamba, state=4, rank=3))
    model = transformer.causal(block=one, **settings)
  elif kind == 'rwkv':
    parts = dict(mixer=rwkv.TimeMix, channel=functools.partial(rwkv.ChannelMix, hidden=12))
    model = transformer.causal(block=functools.partial(block.mixers, **parts), **settings)
  elif kind == 'learned':
    own = functools.partial(attention.SelfAttention, heads=2, rotate=None)
    settings |= dict(length=7, positions=positions.Learned)
    model = transformer.causal(
      block=functools.partial(block.decoder, mixer=own, ffn=feed), **settings
    )
  elif kind == 'moe':
    experts = functools.partial(moe.MoE, experts=3, expert=feed)
    sparse = functools.partial(block.decoder, mixer=mixer, ffn=experts)
    model = transformer.causal(block=sparse, **settings)
  else:
    model = getattr(transformer, kind)(block=plain, **settings)
  shapes, rng = jax.eval_shape(model.init, KEY), np.random.default_rng(2)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.6, x.dtype)
  return model, jax.tree.map(draw, shapes)


def full(kind: str, row: int, answers: np.ndarray) -> np.ndarray:
  """log p of each token of `answers` [n, length] after the prompt, by one forward without a state."""
  model, params = make(kind)
  prompt = PROMPTS[row, : LENGTHS[row]].tolist()
  n, length = answers.shape
  if kind == 'encoder_decoder':
    inputs = np.concatenate([np.zeros((n, 1), np.int32), answers], axis=1)
    seen = np.tile((np.arange(3) < LENGTHS[row]).astype(np.int32), (n, 1))
    encoder = {'encoder/inputs': np.tile(PROMPTS[row], (n, 1)), 'encoder/segments': seen}
    batch, first = dict(inputs=inputs, **encoder), 0
  else:
    inputs = np.concatenate([np.tile([0, *prompt], (n, 1)), answers], axis=1).astype(np.int32)
    batch, first = dict(inputs=inputs), len(prompt)
    if kind == 'prefix':
      batch['prefix'] = np.tile(np.arange(inputs.shape[1]) <= len(prompt), (n, 1))
  logits = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))(params, batch)
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, first : first + length]
  return np.take_along_axis(logp, answers[..., None], axis=2)[..., 0]


def every_answer(kind: str, row: int, max_new: int, ends=(EOS,)) -> dict[tuple, np.ndarray]:
  """All answers: those that end with an end and those of max_new tokens; with the log p of their tokens."""
  found = {}
  whole = np.array(list(itertools.product(range(VOCAB), repeat=max_new)), np.int32)
  for answer, logp in zip(whole, full(kind, row, whole)):
    end = next((i + 1 for i, token in enumerate(answer) if token in ends), max_new)
    found[tuple(answer[:end].tolist())] = logp[:end]
  return found


def ids(out: beam.Beams, row: int, i: int) -> tuple:
  return tuple(np.asarray(out.tokens)[row, i, : int(out.lengths[row, i])].tolist())


PENALTIES = {
  'none': (beam.none, lambda n: 1.0),
  'power': (beam.power, lambda n: n),
  'gnmt': (functools.partial(beam.gnmt, alpha=0.6), lambda n: ((5 + n) / 6) ** 0.6),
  'shorter': (functools.partial(beam.power, alpha=-1.0), lambda n: 1 / n),
}


@pytest.mark.parametrize('kind', variants(KINDS, ['encoder_decoder', 'mamba']))
def test_with_a_beam_for_every_prefix_it_is_exhaustive_search(kind):
  """The best 20 of all answers of up to 3 tokens, in order, under each length penalty."""
  model, params = make(kind)
  for penalty, divisor in PENALTIES.values():
    settings = dict(max_new=3, n=20, eos=EOS, early_stopping='never', length_penalty=penalty)
    out = beam.search(model, params, PROMPTS, LENGTHS, beams=VOCAB**3, **settings)
    for row in range(3):
      if kind == 'encoder_decoder' and LENGTHS[row] == 0:
        continue
      answers = every_answer(kind, row, 3)
      scores = {a: logp.sum() / divisor(len(a)) for a, logp in answers.items()}
      best = sorted(scores, key=scores.get, reverse=True)[:20]
      assert [ids(out, row, i) for i in range(20)] == best
      np.testing.assert_allclose(out.scores[row], [scores[a] for a in best], atol=2e-4)
      for i, answer in enumerate(best):
        np.testing.assert_allclose(out.logp[row, i, : len(answer)], answers[answer], atol=2e-4)
        assert not np.asarray(out.tokens)[row, i, len(answer) :].any()


def test_early_stopping_gives_up_what_the_enumeration_finds():
  """The other two stop sooner; what they return are answers with their right scores, best first."""
  model, params = make('causal')
  answers = every_answer('causal', 0, 4)
  scores = {a: logp.sum() / len(a) for a, logp in answers.items()}
  best, found = max(scores.values()), {}
  for early in (True, False, 'never'):
    out = beam.search(
      model, params, PROMPTS[:1], LENGTHS[:1], beams=3, max_new=4, eos=EOS, early_stopping=early
    )
    told = np.asarray(out.scores[0])
    np.testing.assert_allclose(told, [scores[ids(out, 0, i)] for i in range(3)], atol=2e-4)
    assert (np.diff(told) <= 0).all() and told[0] <= best + 1e-5
    found[early] = told[0]
  assert found[True] <= found[False] <= found['never']


@pytest.mark.parametrize('kind', variants(['causal', 'encoder_decoder', 'rwkv'], ['causal']))
def test_one_beam_is_greedy(kind):
  """If it stops at the first end: else it goes on with the second best token and may find something better."""
  model, params = make(kind)
  settings = dict(max_new=8, eos=EOS)
  out = beam.search(model, params, PROMPTS, LENGTHS, beams=1, early_stopping=True, **settings)
  greedy = generate.generate(model, params, PROMPTS, LENGTHS, KEY, temperature=0.0, **settings)
  assert out.tokens[:, 0].tolist() == greedy.tokens.tolist()
  np.testing.assert_allclose(out.logp[:, 0], greedy.logp, atol=2e-5)


@pytest.mark.parametrize('kind', variants(['encoder_decoder', 'mamba'], ['mamba']))
def test_a_ragged_batch_is_its_rows_one_by_one(kind):
  model, params = make(kind)
  settings = dict(beams=3, max_new=6, eos=EOS, no_repeat_ngram=2, groups=3, diversity=0.5)
  out = beam.search(model, params, PROMPTS, LENGTHS, **settings)
  for row in range(3):
    part = slice(row, row + 1)
    alone = beam.search(model, params, PROMPTS[part], LENGTHS[part], **settings)
    assert out.tokens[row].tolist() == alone.tokens[0].tolist()
    np.testing.assert_allclose(out.scores[row], alone.scores[0], atol=2e-5)


def test_on_a_mesh():
  model, params = make('causal')
  settings = dict(beams=3, max_new=6, eos=EOS)
  alone = beam.search(model, params, PROMPTS, LENGTHS, **settings)
  with jax.set_mesh(mesh.make()):
    out = beam.search(model, params, PROMPTS, LENGTHS, **settings)
  assert out.tokens.shape == (3, 3, 6) and out.tokens.tolist() == alone.tokens.tolist()


def diverse(row: int, groups: int, width: int, max_new: int, strength: float) -> list[set]:
  """Diverse beam search (Vijayakumar et al. 2016, algorithm 1) without ends: the answers of each group."""
  beams = [[((), 0.0)] for _ in range(groups)]
  for _ in range(max_new):
    taken = np.zeros(VOCAB)
    for g in range(groups):
      candidates = []
      for tokens, score in beams[g]:
        more = np.array([[*tokens, v] for v in range(VOCAB)], np.int32)
        logp = full('causal', row, more)[:, -1]
        candidates += [((*tokens, v), score + logp[v] - strength * taken[v]) for v in range(VOCAB)]
      beams[g] = sorted(candidates, key=lambda c: -c[1])[:width]
      for tokens, _ in beams[g]:
        taken[tokens[-1]] += 1
  return beams


GROUPS = [(2, 2, 0.7), (3, 1, 5.0), (2, 2, 0.0)]


@pytest.mark.parametrize(('groups', 'width', 'strength'), variants(GROUPS, [(2, 2, 0.7)]))
def test_diverse_groups_are_the_algorithm_of_the_paper(groups, width, strength):
  model, params = make('causal')
  settings = dict(max_new=4, eos=None, length_penalty=beam.none)
  out = beam.search(
    model, params, PROMPTS, LENGTHS, beams=groups * width, groups=groups, diversity=strength, **settings
  )  # fmt: skip
  for row in range(2):
    wanted = sorted(
      (a for group in diverse(row, groups, width, 4, strength) for a in group), key=lambda a: -a[1]
    )
    np.testing.assert_allclose(out.scores[row], [score for _, score in wanted], atol=2e-4)
    found = sorted(ids(out, row, i) for i in range(groups * width))
    assert found == sorted(tokens for tokens, _ in wanted)


def test_groups_without_diversity_are_one_search_repeated():
  model, params = make('causal')
  settings = dict(max_new=5, eos=EOS)
  out = beam.search(model, params, PROMPTS, LENGTHS, beams=4, groups=2, **settings)
  one = beam.search(model, params, PROMPTS, LENGTHS, beams=2, **settings)
  assert out.tokens.tolist() == np.repeat(one.tokens, 2, axis=1).tolist()


def test_processors_compose_with_beams():
  """Enumerated: among the answers without the banned, the best by the penalised log-probability."""
  model, params = make('causal')
  allowed = np.arange(VOCAB) != 3
  told = dict(allowed=allowed, banned=[(2, 4), (0,)], no_repeat_ngram=2, repetition=1.3)
  settings = dict(max_new=3, n=5, eos=EOS, early_stopping='never', length_penalty=beam.none)
  out = beam.search(model, params, PROMPTS, LENGTHS, beams=VOCAB**3, **told, **settings)
  for row in range(2):
    prompt, scores = [0, *PROMPTS[row, : LENGTHS[row]].tolist()], {}
    for answer, logp in every_answer('causal', row, 3).items():
      text, score, fine = list(prompt), 0.0, True
      for token, x in zip(answer, logp):
        pairs = set(itertools.pairwise(text))
        fine &= token not in (0, 3) and (text[-1], token) not in pairs | {(2, 4)}
        score += x * 1.3 if token in text else x
        text.append(token)
      if fine:
        scores[answer] = score
    best = sorted(scores, key=scores.get, reverse=True)[:5]
    assert [ids(out, row, i) for i in range(5)] == best
    np.testing.assert_allclose(out.scores[row], [scores[a] for a in best], atol=2e-4)


def test_several_ids_may_end_an_answer():
  model, params = make('causal')
  settings = dict(max_new=3, n=9, eos=(1, 3), early_stopping='never', length_penalty=beam.none)
  out = beam.search(model, params, PROMPTS, LENGTHS, beams=VOCAB**3, **settings)
  for row in range(3):
    scores = {a: x.sum() for a, x in every_answer('causal', row, 3, ends=(1, 3)).items()}
    best = sorted(scores, key=scores.get, reverse=True)[:9]
    assert [ids(out, row, i) for i in range(9)] == best


def test_answers_end_with_a_learned_table():
  """Each row where its prompt leaves no position, as if it had been asked for that many tokens."""
  model, params = make('learned')
  settings = dict(beams=3, eos=None, length_penalty=beam.none)
  out = beam.search(model, params, PROMPTS, LENGTHS, max_new=12, **settings)
  assert out.lengths.tolist() == [[4] * 3, [6] * 3, [7] * 3]
  asked = beam.search(model, params, PROMPTS, LENGTHS, max_new=4, **settings)
  assert out.tokens[0, :, :4].tolist() == asked.tokens[0].tolist()
  assert not np.asarray(out.tokens)[0, :, 4:].any()


def test_fewer_answers_than_beams():
  """Where nothing but the end is allowed there is one answer, and no NaN."""
  model, params = make('causal')
  only = np.arange(VOCAB) == EOS
  out = beam.search(model, params, PROMPTS, LENGTHS, beams=3, max_new=4, eos=EOS, allowed=only)
  assert out.lengths.tolist() == [[1, 0, 0]] * 3 and out.tokens[:, 0, 0].tolist() == [EOS] * 3
  assert np.isneginf(out.scores[:, 1:]).all() and np.isfinite(out.scores[:, 0]).all()


def test_the_tree_leads_to_the_answers():
  """Followed from the end to the root, the recorded candidates spell the answers and their log-probabilities."""
  model, params = make('causal')
  out = beam.search(
    model, params, PROMPTS, LENGTHS, beams=3, max_new=5, eos=EOS, length_penalty=beam.none
  )
  tree = jax.tree.map(np.asarray, out.tree)
  assert tree.tokens.shape == (3, 1, 5, 6)
  for row in range(3):
    found = {}
    for step in range(5):
      for c in np.flatnonzero(tree.places[row, 0, step] == beam.ENDED):
        tokens, at = [int(tree.tokens[row, 0, step, c])], int(tree.parents[row, 0, step, c])
        for before in range(step - 1, -1, -1):
          own = int(np.flatnonzero(tree.places[row, 0, before] == at)[0])
          tokens.append(int(tree.tokens[row, 0, before, own]))
          at = int(tree.parents[row, 0, before, own])
        found[tuple(tokens[::-1])] = tree.scores[row, 0, step, c]
    for i in range(3):
      np.testing.assert_allclose(found[ids(out, row, i)], out.scores[row, i], atol=1e-5)


def test_compiled_once_per_shape_whatever_the_penalty():
  model, params = make('causal')
  run = lambda **kw: beam.search(model, params, PROMPTS, LENGTHS, beams=2, max_new=3, eos=EOS, **kw)
  run(length_penalty=beam.none)
  before = beam._search._cache_size()
  run(length_penalty=functools.partial(beam.gnmt, alpha=0.9), diversity=0.0)
  assert beam._search._cache_size() == before


def outcomes(kind: str, row: int, beams: int, max_new: int, sampling: dict) -> dict[tuple, float]:
  """The probability of each (best answer, ...) of beam sampling, by following every order of draws.

  As transformers' `_beam_search` with do_sample: log-probabilities over the temperature, all but the two likeliest
  tokens subject to truncation, twice the beams drawn one by one without replacement, of which the first half may end.
  """
  logp = collections.defaultdict(lambda: np.zeros(VOCAB))
  whole = np.array(list(itertools.product(range(VOCAB), repeat=max_new)), np.int32)
  for answer, own in zip(whole.tolist(), full(kind, row, whole), strict=True):
    for n in range(max_new):
      logp[tuple(answer[:n])][answer[n]] = own[n]

  def worth(prefix: tuple) -> np.ndarray:
    x = logp[prefix] / sampling.get('temperature', 1.0)
    order = np.argsort(-x)
    p = np.exp(x[order]) / np.exp(x).sum()
    keep = np.arange(VOCAB) < sampling.get('top_k', VOCAB)
    p = np.where(keep, p, 0) / p[keep].sum()
    keep &= np.cumsum(p) - p < sampling.get('top_p', 1.0)
    keep[:2] = True
    out = np.full(VOCAB, -np.inf)
    out[order[keep]] = x[order[keep]]
    return out

  def orders(weights: dict, n: int):
    """(drawn, probability) of every order of n draws."""
    if not n or not weights:
      yield (), 1.0
      return
    total = sum(weights.values())
    for one, w in weights.items():
      rest = {k: v for k, v in weights.items() if k is not one}
      for drawn, p in orders(rest, n - 1):
        yield (one, *drawn), p * w / total

  states = {((((), 0.0),), ()): 1.0}  # live beams and pool, best first
  found: dict[tuple, float] = {}
  for length in range(1, max_new + 1):
    after: dict[tuple, float] = {}
    for (live, pool), mass in states.items():
      scores = {}
      for tokens, score in live:
        own = worth(tokens)
        scores |= {(*tokens, v): score + own[v] for v in range(VOCAB) if own[v] > -np.inf}
      top = max(scores.values())
      for drawn, p in orders({t: np.exp(s - top) for t, s in scores.items()}, 2 * beams):
        ends = [t for t in drawn[:beams] if t[-1] == EOS or length == max_new]
        ended = sorted([*pool, *((t, scores[t] / length) for t in ends)], key=lambda a: -a[1])
        going = [(t, scores[t]) for t in drawn if t[-1] != EOS and length < max_new]
        going, ended = sorted(going, key=lambda a: -a[1])[:beams], tuple(ended[:beams])
        full_ = len(ended) == beams and (not going or going[0][1] / length <= ended[-1][1])
        if full_ or not going:
          told = tuple(t for t, _ in ended)
          found[told] = found.get(told, 0.0) + mass * p
        else:
          state = tuple(going), ended
          after[state] = after.get(state, 0.0) + mass * p
    states = after
  return found


CHOSEN = {
  'warm': dict(temperature=1.7),
  'truncated': dict(temperature=0.8, top_k=4, top_p=0.7),
}


@pytest.mark.parametrize(
  ('draws', 'name'),
  variants([(1000, 'truncated'), (20_000, 'warm'), (20_000, 'truncated')], [(1000, 'truncated')]),
)
def test_beam_sampling_has_the_enumerated_distribution(draws, name):
  """By a chi-square test at 1e-3."""
  model, params = make('causal')
  prompts, lengths = np.repeat(PROMPTS[:1], draws, axis=0), np.repeat(LENGTHS[:1], draws)
  settings = dict(beams=2, max_new=2, eos=EOS, **CHOSEN[name])
  out = beam.sample(model, params, prompts, lengths, jax.random.key(7), **settings)
  tokens, ends = np.asarray(out.tokens), np.asarray(out.lengths)
  drawn = collections.Counter(
    tuple(tuple(t[:n]) for t, n in zip(row.tolist(), end.tolist(), strict=True) if n)
    for row, end in zip(tokens, ends, strict=True)
  )
  chances = outcomes('causal', 0, 2, 2, CHOSEN[name])
  assert sum(chances.values()) == pytest.approx(1) and drawn.keys() <= chances.keys()
  assert pvalue(drawn, chances) > 1e-3
  warmer = CHOSEN[name] | dict(temperature=CHOSEN[name]['temperature'] * 1.3)
  assert pvalue(drawn, outcomes('causal', 0, 2, 2, warmer)) < 1e-3  # the test would notice


def pvalue(drawn: collections.Counter, chances: dict) -> float:
  """Of Pearson's chi-square; what is expected less than five times counts as one outcome."""
  draws = drawn.total()
  often = [k for k, p in chances.items() if p * draws >= 5]
  assert len(often) > 5
  seen, wanted = (np.array([x[k] for k in often], float) for x in (drawn, chances))
  wanted *= draws
  seen, wanted = np.append(seen, draws - seen.sum()), np.append(wanted, draws - wanted.sum())
  kept = wanted > 1e-6 * draws
  return stats.chisquare(seen[kept], wanted[kept] * seen[kept].sum() / draws).pvalue


def test_beam_sampling_at_a_low_temperature_is_the_search():
  """Its scores are over the temperature."""
  model, params = make('causal')
  settings = dict(beams=3, max_new=5, eos=EOS, no_repeat_ngram=2)
  out = beam.search(model, params, PROMPTS, LENGTHS, **settings)
  cold = beam.sample(model, params, PROMPTS, LENGTHS, KEY, temperature=1e-4, **settings)
  assert cold.tokens.tolist() == out.tokens.tolist()
  np.testing.assert_allclose(cold.scores * 1e-4, out.scores, rtol=1e-5)
  np.testing.assert_allclose(cold.logp, out.logp, atol=1e-5)


def test_beams_of_a_row_are_drawn_with_its_key():
  model, params = make('causal')
  run = lambda rows, key: beam.sample(
    model, params, PROMPTS[rows], LENGTHS[rows], key, beams=3, max_new=6, eos=EOS
  )
  several, again = run(slice(0, 3), KEY), run(slice(0, 3), jax.random.key(5))
  alone = run(slice(0, 1), KEY)
  assert several.tokens[0].tolist() == alone.tokens[0].tolist()
  assert several.tokens.tolist() != again.tokens.tolist()
  with pytest.raises(UserError, match='above 0'):
    beam.sample(model, params, PROMPTS, LENGTHS, KEY, temperature=0.0)


def test_text_gives_the_best_of_each_prompt():
  words = vocab_lib.bytes_(extra_ids=0, modes=())
  model, params = make('causal', vocab=words.size)
  settings = dict(beams=3, max_new=6)
  found = beam.text(model, params, words, ['ab', 'c'], n=2, **settings)
  assert len(found) == 4
  assert beam.text(model, params, words, ['ab', 'c'], batch=1, **settings) == found[::2]
  cut = beam.text(model, params, words, ['ab'], stop=[found[0][1]], **settings)
  assert cut == [found[0][: found[0].index(found[0][1])]]


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    (dict(beams=0), 'beams=0'),
    (dict(beams=4, groups=3), 'must divide into groups=3'),
    (dict(n=5), 'between 1 and the number of beams, 4; got 5'),
    (dict(early_stopping='always'), "True, False or 'never', got 'always'"),
    (dict(repetition=0.0), 'repetition'),
    (dict(max_new=0), 'max_new'),
  ],
)
def test_wrong_arguments(wrong, words):
  with pytest.raises(UserError, match=words):
    beam.search(*make('causal'), PROMPTS, LENGTHS, **wrong)
