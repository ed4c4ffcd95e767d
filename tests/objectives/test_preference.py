"""Objectives of preferences against the papers' formulas in float64; TRL's numbers are in test_trl.py.

All are held to one update whatever the number of microbatches, with a row of padding in the batch.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.objectives import feedback, preference, ranking, reward
from llm_jax.train import state as state_lib
from llm_jax.train import step
from tests.objectives import pairs
from tests.variants import variants

CLOSE = dict(rtol=2e-5, atol=2e-5)


def pair(seed=0, **more):
  return pairs.batch('chosen', 'rejected', seed=seed, **more)


def log_sigmoid(x):
  return -np.log1p(np.exp(-np.asarray(x, np.float64)))


def test_dpo_at_the_reference_is_log_two_and_its_gradient_that_of_the_paper():
  """Equation 7: the gradient is -beta sigmoid(-margin) (grad log p(w) - grad log p(l)), here at margin 0."""
  batch = pair(padding=False)
  made, params = pairs.model()
  for side in ('chosen', 'rejected'):
    told = pairs.side(batch, side)
    batch[f'{side}/ref_logp'] = (pairs.logp(told)[0] * told['weights']).sum(1).astype(np.float32)
  out = pairs.run(preference.dpo, batch)
  np.testing.assert_allclose(out.sum / out.weight, math.log(2), rtol=1e-5)

  def gap(params):
    w, l = preference.read(made, params, batch, None, ('chosen', 'rejected'), None).logp
    return (w - l).sum()

  found = jax.grad(lambda p: preference.dpo(made, p, batch, None, beta=0.2).sum)(params)
  wanted = jax.tree.map(lambda g: -0.2 * 0.5 * g, jax.grad(gap)(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_metrics_are_those_of_the_pairs_that_are_there():
  batch = pair()
  out = pairs.run(preference.dpo, batch, beta=0.2, label_smoothing=0.1)
  (w, _), (l, _) = pairs.totals(batch, 'chosen', 'rejected')
  w, l = 0.2 * (w - batch['chosen/ref_logp'][:3]), 0.2 * (l - batch['rejected/ref_logp'][:3])
  np.testing.assert_allclose(
    out.sum, -(0.9 * log_sigmoid(w - l) + 0.1 * log_sigmoid(l - w)).sum(), **CLOSE
  )
  assert out.weight == 3
  found = {k: out.metrics[k] for k in ('accuracy', 'margin', 'chosen', 'rejected')}
  wanted = dict(accuracy=(w > l).sum(), margin=(w - l).sum(), chosen=w.sum(), rejected=l.sum())
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, **CLOSE)


def test_soft_labels_are_cross_entropy_with_the_chance():
  """RLAIF (arXiv:2309.00267, section 2.2): -p log P(chosen) - (1 - p) log P(rejected), each pair with its own p."""
  batch = pair()
  chance = np.array([1.0, 0.5, 0.75, 0.9], np.float32)[: len(batch['chosen/ref_logp'])]
  out = pairs.run(preference.dpo, batch | dict(chance=chance), beta=0.2)
  (w, _), (l, _) = pairs.totals(batch, 'chosen', 'rejected')
  m = 0.2 * (w - batch['chosen/ref_logp'][:3] - l + batch['rejected/ref_logp'][:3])
  p = chance[:3]
  np.testing.assert_allclose(
    out.sum, -(p * log_sigmoid(m) + (1 - p) * log_sigmoid(-m)).sum(), **CLOSE
  )


def test_flipped_labels_leave_robust_dpo_unbiased():
  """The mean over labels flipped with probability e is DPO under the right ones (arXiv:2403.00409, lemma 3.1)."""
  batch, e = pair(), 0.2
  swap = dict(chosen='rejected', rejected='chosen')
  flipped = {swap[k.split('/')[0]] + k[k.index('/') :]: v for k, v in batch.items()}
  right, wrong = (
    pairs.run(preference.robust_dpo, b, label_smoothing=e).sum for b in (batch, flipped)
  )
  clean = pairs.run(preference.dpo, batch).sum
  np.testing.assert_allclose((1 - e) * right + e * wrong, clean, **CLOSE)


def test_slic():
  batch = pairs.batch('chosen', 'rejected', 'sft')
  for target in ('chosen', 'sft'):
    out = pairs.run(preference.slic, batch, delta=3.0, nll=0.2, target=target)
    (w, _), (l, _), (t, _) = pairs.totals(batch, 'chosen', 'rejected', target)
    np.testing.assert_allclose(out.sum, (np.maximum(0, 3 - w + l) - 0.2 * t).sum(), **CLOSE)


def test_unlikelihood():
  batch = pair()
  out = pairs.run(preference.unlikelihood, batch, alpha=0.7)
  wanted = 0.0
  for i in range(3):
    mean = lambda side, f: np.mean(
      f(pairs.logp(pairs.side(batch, side))[0][i])[batch[f'{side}/weights'][i] > 0]  # noqa: B023
    )
    wanted += -mean('chosen', lambda x: x) - 0.7 * mean('rejected', lambda x: np.log(1 - np.exp(x)))
  np.testing.assert_allclose(out.sum, wanted, **CLOSE)


def test_kto_turns_at_the_mean_divergence():
  """Equation 8 row by row; a reward of exactly z costs half, and z has no gradient."""
  text = pairs.text(np.random.default_rng(3))
  logp = (pairs.logp(text)[0] * text['weights']).sum(1)
  ref = (logp - [2.0, 0.5, -1.0, 0.0]).astype(np.float32)
  good, kl = np.array([True, False, True, True]), np.full(4, 0.5, np.float32)
  batch = dict(text, ref_logp=ref, desirable=good, kl=kl)
  out = pairs.run(preference.kto, batch, beta=0.4, desirable=1.2, undesirable=0.8)
  sigmoid = lambda x: 1 / (1 + math.exp(-x))
  wanted = 1.2 * (1 - sigmoid(0.4 * 1.5)) + 0.8 * 0.5 + 1.2 * (1 - sigmoid(0.4 * -1.5))
  np.testing.assert_allclose(out.sum, wanted, **CLOSE)
  assert out.weight == 3
  made, params = pairs.model()
  along = jax.grad(lambda kl: preference.kto(made, params, dict(batch, kl=kl), None).sum)(kl)
  assert not np.any(along)


def answers(seed=0, **more):
  return pairs.batch('answer0', 'answer1', 'answer2', seed=seed, **more)


def test_rrhf():
  there = np.ones((4, 3), bool)
  there[1, 2] = False
  batch = answers(ranked=there)
  out = pairs.run(ranking.rrhf, batch, nll=0.3)
  told = pairs.totals(batch, 'answer0', 'answer1', 'answer2')
  p = np.stack([logp / size for logp, size in told], 1)
  wanted = 0.0
  for row in range(3):
    for i in range(3):
      for j in range(i + 1, 3):
        wanted += max(0.0, p[row, j] - p[row, i]) * there[row, i] * there[row, j]
    wanted -= 0.3 * told[0][0][row]
  np.testing.assert_allclose(out.sum, wanted, **CLOSE)
  assert out.weight == 3


def test_stable_alignment():
  ratings = np.array([[7, 5, 1], [6, 6, 2], [4, 3, 3], [0, 0, 0]], np.float32)
  batch = answers(ratings=ratings)
  out = pairs.run(ranking.stable_alignment, batch, margin=2.0, scale=7.0, ratio=0.5)
  told = pairs.totals(batch, 'answer0', 'answer1', 'answer2')
  nll = -np.stack([logp / size for logp, size in told], 1)
  wanted = 0.0
  for n, r in zip(nll, ratings, strict=False):
    hinges = [max(0.0, n[0] - n[i] + 2.0 * (r[0] - r[i]) / 7) for i in (1, 2)]
    wanted += n[0] + 0.5 * np.mean(hinges)
  np.testing.assert_allclose(out.sum, wanted, **CLOSE)


def test_hindsight_instructions_are_told_apart():
  batch = pairs.batch('instruction0', 'instruction1', 'instruction2')
  out = pairs.run(ranking.hindsight_instruction, batch, contrast=0.4, entropy=0.2)
  p = np.stack([logp for logp, _ in pairs.totals(batch, *(f'instruction{i}' for i in range(3)))], 1)
  own = p[:, 0] - np.log(np.exp(p).sum(1))
  side = {
    k.removeprefix('instruction0/'): v for k, v in batch.items() if k.startswith('instruction0/')
  }
  every = pairs.logp(side)[1]
  spread = -(np.exp(every) * every).sum(-1) * side['weights']
  np.testing.assert_allclose(out.metrics['entropy'], spread.sum(), **CLOSE)
  np.testing.assert_allclose(out.sum, (-p[:, 0] - 0.4 * own).sum() - 0.2 * spread.sum(), **CLOSE)


def quark_batch(k, seed=0):
  rng = np.random.default_rng(seed)
  text = pairs.text(rng)
  ref = np.log(rng.dirichlet(np.ones(pairs.VOCAB), text['inputs'].shape))
  ids = np.argsort(-ref, -1)[..., :k].astype(np.int32)
  return dict(text, ref_ids=ids, ref_top=np.take_along_axis(ref, ids, -1).astype(np.float32)), ref


@pytest.mark.parametrize('chunk', [None, 4])
def test_quark_with_all_tokens_is_the_exact_divergence(chunk):
  batch, ref = quark_batch(pairs.VOCAB)
  out = pairs.run(feedback.quark, batch, kl=0.3, chunk=chunk)
  own, every = pairs.logp(batch)
  kl = (np.exp(ref) * (ref - every)).sum(-1)
  np.testing.assert_allclose(out.metrics['kl'], (kl * batch['weights']).sum(), rtol=1e-4)
  np.testing.assert_allclose(out.sum, ((0.3 * kl - own) * batch['weights']).sum(), rtol=1e-4)


def test_quark_with_few_tokens_bounds_the_divergence_from_below():
  found = [
    float(pairs.run(feedback.quark, quark_batch(k)[0]).metrics['kl']) for k in (2, 8, 31, 32)
  ]
  assert 0 < found[0] < found[1] < found[2] <= found[3] * (1 + 1e-5)


def test_hindsight_forgets_only_what_was_read():
  """Without a key it is language modelling; with one, a part of the inputs that is never above `forget`."""
  text = pairs.text(np.random.default_rng(0))
  plain = pairs.run(feedback.hindsight, text)
  np.testing.assert_allclose(plain.sum, -(pairs.logp(text)[0] * text['weights']).sum(), **CLOSE)
  seen = []

  class Fake(pairs.Means):
    @staticmethod
    def hidden(params, batch, *, rng=None):
      seen.append(np.asarray(batch['inputs']))
      return pairs.Hidden(jnp.zeros((*batch['inputs'].shape, pairs.EMBED)), None, {})

  wide = dict(text, inputs=np.tile(text['inputs'] + 1, (64, 40)))
  wide['targets'], wide['weights'] = np.zeros_like(wide['inputs']), np.ones(wide['inputs'].shape)
  feedback.hindsight(Fake, pairs.model()[1], wide, jax.random.key(0), forget=0.4, mask=0)
  lost = seen[0] == 0
  assert (seen[0] == np.where(lost, 0, wide['inputs'])).all() and not lost[:, 0].any()
  rate = lost[:, 1:].mean(
    1
  )  # per row evenly from 0 to 0.4: mean 0.2, standard deviation 0.4 / sqrt(12)
  assert abs(rate.mean() - 0.2) < 4 * 0.4 / math.sqrt(12 * len(rate)) and rate.std() > 0.08
  assert rate.max() < 0.4 + 4 * math.sqrt(0.24 / lost.shape[1])


def test_figa():
  batch = pair()
  rng = np.random.default_rng(1)
  for side in ('chosen', 'rejected'):
    batch[f'{side}/credit'] = rng.random((4, pairs.LENGTH)).astype(np.float32)
  out = pairs.run(feedback.figa, batch)
  sums = [
    (pairs.logp(told)[0] * told['weights'] * told['credit']).sum()
    for told in (pairs.side(batch, 'chosen'), pairs.side(batch, 'rejected'))
  ]
  np.testing.assert_allclose(out.sum, sums[1] - sums[0], **CLOSE)


def kto_batch():
  text = pairs.text(np.random.default_rng(3))
  told = dict(ref_logp=np.full(4, -20, np.float32), kl=np.full(4, 0.3, np.float32))
  return dict(text, desirable=np.array([True, False, True, True]), **told)


def process_batch():
  text = pairs.text(np.random.default_rng(4))
  steps = np.zeros((4, pairs.LENGTH), np.int32)
  steps[0, 3], steps[0, 5], steps[1, 2], steps[2, 7] = 3, 1, 2, 3
  return dict(text, steps=steps)


EVERY = {
  'dpo': (preference.dpo, pair),
  'robust_dpo': (preference.robust_dpo, pair),
  'hinge_dpo': (preference.hinge_dpo, pair),
  'ipo': (preference.ipo, pair),
  'simpo': (preference.simpo, pair),
  'cpo': (preference.cpo, pair),
  'orpo': (preference.orpo, pair),
  'slic': (preference.slic, pair),
  'unlikelihood': (preference.unlikelihood, pair),
  'kto': (preference.kto, kto_batch),
  'rrhf': (ranking.rrhf, answers),
  'stable_alignment': (
    ranking.stable_alignment,
    lambda: answers(ratings=np.tile(np.float32([3, 2, 1]), (4, 1))),
  ),
  'hindsight_instruction': (
    ranking.hindsight_instruction,
    lambda: pairs.batch('instruction0', 'instruction1'),
  ),
  'quark': (feedback.quark, lambda: quark_batch(8)[0]),
  'figa': (
    feedback.figa,
    lambda: pair() | {f'{s}/credit': np.ones((4, 9), np.float32) for s in ('chosen', 'rejected')},
  ),
  'bradley_terry': (functools.partial(reward.bradley_terry, lm=0.1, centre=0.1, noise=0.1), pair),
  'ranked': (reward.ranked, answers),
  'regression': (
    reward.regression,
    lambda: dict(pairs.text(np.random.default_rng(5)), reward=np.arange(4, dtype=np.float32)),
  ),
  'process': (functools.partial(reward.process, labels=(4, 5, 6)), process_batch),
}


@pytest.mark.parametrize('name', variants(EVERY, ['dpo', 'quark']))
def test_microbatches_agree(name):
  """One step of SGD and its metrics with 1, 2 and 4 microbatches; one row of the four is padding."""
  objective, make = EVERY[name]
  model, params = pairs.model()
  batch, tx = jax.tree.map(jnp.asarray, make()), optax.sgd(0.1)
  found = []
  for parts in (1, 2, 4):
    update = step.make(functools.partial(objective, model), tx, microbatches=parts)
    first = jax.tree.map(jnp.array, params)
    state = state_lib.State(jnp.zeros((), jnp.int32), first, tx.init(first))
    after, metrics = update(state, batch, jax.random.key(0))
    found.append((after.params, metrics))
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found[0], other
    )
  metrics = found[0][1]
  assert metrics['weight'] > 0 and metrics['grad_norm'] > 1e-3
  assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize(
  ('call', 'remedy'),
  [
    (lambda: preference.dpo(*pairs.model(), without('ref_logp'), None), 'annotate.with_reference'),
    (lambda: pairs.run(preference.dpo, pair(), label_smoothing=0.7), 'below 1/2'),
    (lambda: pairs.run(ranking.rrhf, pair()), 'answer0'),
    (lambda: pairs.run(feedback.hindsight, pairs.text(np.random.default_rng(0)), forget=1.0), 'part'),
  ],
)  # fmt: skip
def test_nonsense_is_refused(call, remedy):
  with pytest.raises(UserError, match=remedy):
    call()


def without(name):
  return {k: v for k, v in pair().items() if not k.endswith(name)}
