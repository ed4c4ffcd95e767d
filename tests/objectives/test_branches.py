"""Pairs that read their prompt once have the losses and gradients of pairs in rows of their own.

The oracle is TRL's, which pads (`test_trl.py`), for every objective that has a number from it; the others are compared
with our own padded rows. And no answer sees the other, to the last bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import branches
from llm_jax.model import attention, block, ffn, positions, scalar, transformer
from llm_jax.model.recurrent import mamba
from llm_jax.objectives import feedback, preference, reward, sequence
from llm_jax.rl import annotate
from tests.objectives import make_reference as oracle
from tests.objectives import test_trl
from tests.rl.test_annotate import Fixed
from tests.variants import variants

LAYOUT = batch_lib.Layout('causal', 28, 0, True)
PLACES = ((0, 1), (0, 2), (2, 1), (2, 2))  # (row, number) of each pair; row 1 is padding


def branched(pairs, end=False):
  """The pairs in three rows, two to a row."""
  made = branches.empty(LAYOUT, 3, 2)
  used = [0, 0, 0]
  for one, (row, number) in zip(pairs, PLACES, strict=True):
    first, *prompt = one['prompt_ids']
    texts = [
      batch_lib.Example(*(np.array(x, np.int32) for x in (prompt, answer + [1] * end)), first=first)
      for answer in (one['chosen_ids'], one['rejected_ids'])
    ]
    laid = branches.lay(texts, LAYOUT)
    branches.put(made, row, number, used[row], laid)
    used[row] += len(laid['inputs'])
  return made


def spread(values):
  """One number per pair, where `branched` has its pair."""
  made = np.zeros((3, 2), np.float32)
  for value, (row, number) in zip(values, PLACES, strict=True):
    made[row, number - 1] = value
  return made


def with_reference(batch):
  found = test_trl.expected()
  return batch | {f'{s}/ref_logp': spread(found[f'reference/{s}']) for s in ('chosen', 'rejected')}


CASES = {name: (*told, True) for name, told in test_trl.DPO.items()}
CASES |= {name: (*told, False) for name, told in test_trl.WITHOUT.items()}


@pytest.mark.parametrize('case', variants(CASES, ['dpo']))
def test_losses_and_gradients_are_those_of_trl(case):
  objective, hyper, referenced = CASES[case]
  batch = branched(oracle.pairs())
  batch = with_reference(batch) if referenced else batch
  hyper = (dict(beta=0.3) if referenced else {}) | hyper
  test_trl.check(case, *test_trl.loaded(), objective, batch, **hyper)


@pytest.mark.slow
def test_odds_ratios_are_those_of_trl():
  pairs = oracle.pairs(prompt=1)
  test_trl.check('orpo', *test_trl.loaded(), preference.orpo, branched(pairs), beta=0.3)


@pytest.mark.slow
def test_reward_models_are_those_of_trl():
  model, params = test_trl.loaded()
  head = dict(w=jnp.asarray(test_trl.expected()['head/weight'][0]), bias=jnp.zeros(()))
  batch = branched(oracle.pairs(), end=True) | dict(margin=spread(oracle.MARGINS))
  told = scalar.head(model), dict(params, scalar=head), reward.bradley_terry, batch
  test_trl.check('reward_margin', *told, oracle.REWARDED)


PADDED = dict(
  unlikelihood=preference.unlikelihood,
  slic=preference.slic,
  soft_labels=preference.dpo,
  reward=functools.partial(reward.bradley_terry, lm=0.1, centre=0.1, noise=0.1),
)


@pytest.mark.parametrize('case', variants(PADDED, []))
def test_sums_metrics_and_gradients_are_those_of_padded_rows(case):
  model, params = test_trl.loaded()
  params = scalar.head(model).init(jax.random.key(2)) | params
  chance = np.array([0.9, 0.6, 1.0, 0.5], np.float32)
  padded = test_trl.with_reference(test_trl.sides(oracle.pairs())) | dict(chance=chance)
  shared = with_reference(branched(oracle.pairs())) | dict(chance=spread(chance))

  def total(params, batch):
    out = PADDED[case](model, params, batch, None)
    return out.sum, out

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  a, b = run(params, padded), run(params, shared)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)
  assert b[0][1].weight == 4


def small(mixer=attention.SelfAttention, make=transformer.causal, **kw):
  """A model of one layer that is built and never run."""
  told = {} if mixer is mamba.Mamba else dict(heads=2)
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(mixer, **told, **kw.pop('mixing', {})),
    ffn=functools.partial(ffn.Gated, hidden=16),
  )
  return make(vocab=32, embed=16, layers=1, block=layer, **kw)


class Rows(Fixed):
  """A source of one batch."""

  def __init__(self, batch):
    self.batches, self.batch = (
      [batch],
      len(batch['compared' if 'compared' in batch else 'chosen/inputs']),
    )

  def __call__(self, state=None):
    return self.batches[0]


def test_reference_log_probabilities_are_those_of_padded_rows():
  """Per pair, from `with_reference`, whose padded rows are held to float64 in tests/rl."""
  model = small()
  padded, shared = (
    annotate.with_reference(model, source=lambda _: Rows(batch), seed=4)(None)  # noqa: B023
    for batch in (test_trl.sides(oracle.pairs()), branched(oracle.pairs()))
  )
  for side in ('chosen', 'rejected'):
    wanted = spread(padded[f'{side}/ref_logp'])
    assert shared[f'{side}/ref_logp'].dtype == np.float32 and np.abs(wanted).max() > 5, 'no zeros'
    np.testing.assert_allclose(shared[f'{side}/ref_logp'], wanted, atol=1e-5)


@pytest.fixture(scope='module')
def scored():
  """batch -> (log-probabilities of every answer, [rows, comparisons] of each side)."""
  model, params = test_trl.loaded()
  run = jax.jit(lambda p, b: preference.read(model, p, b, None, sequence.BRANCHES, None).logp)
  return functools.partial(run, params)


def test_no_answer_sees_another(scored):
  """Other tokens in one answer leave all others as they are, to the last bit; in the prompt they move both."""
  batch = branched(oracle.pairs())
  before = scored(batch)
  told = batch['segments'], batch['branches']
  for k in (1, 2):
    moved = dict(batch, inputs=batch['inputs'].copy())
    inside = (told[0] == 1) & (told[1] == k) & (batch['positions'] > 3)
    assert inside[0].any() and inside[2].any()
    moved['inputs'][inside] = (moved['inputs'][inside] + 5) % oracle.VOCAB
    for side, (a, b) in enumerate(zip(before, scored(moved), strict=True), 1):
      same = np.asarray(a == b)
      assert same[:, 1].all() and (same[:, 0] == [side != k, True, side != k]).all()
  moved = dict(batch, inputs=batch['inputs'].copy())
  moved['inputs'][(told[0] == 1) & (told[1] == 0) & (batch['positions'] == 0)] = 7
  for a, b in zip(before, scored(moved), strict=True):
    assert (np.asarray(a != b)[:, 0] == [True, False, True]).all()
    np.testing.assert_array_equal(a[:, 1], b[:, 1])


def test_texts_that_are_not_there_are_named():
  batch = branched(oracle.pairs())
  with pytest.raises(UserError, match='hold chosen and rejected, not chosen, rejected, sft'):
    preference.slic(*test_trl.loaded(), batch, None, target='sft')
  with pytest.raises(UserError, match='no chosen/inputs'):
    feedback.figa(*test_trl.loaded(), batch, None)


def test_models_say_why_their_rows_cannot_branch():
  """And refuse such a batch, should they be given one all the same."""
  assert small().card.unbranched is None
  refused = {
    'the model is prefix, not causal': dict(make=transformer.prefix),
    'Mamba reads a row as one text': dict(mixer=mamba.Mamba),
    'its position bias counts slots of the row': dict(bias=positions.Alibi),
    'its attention counts distances in slots of the row': dict(
      mixing=dict(rotate=None, relative=positions.TransformerXL)
    ),
  }
  batch = branched(oracle.pairs())
  for why, told in refused.items():
    model = small(**told)
    assert model.card.unbranched == why
    with pytest.raises(UserError, match=f'{why}: its rows cannot branch'):
      jax.eval_shape(lambda key: model.hidden(model.init(key), batch).x, jax.random.key(0))  # noqa: B023
