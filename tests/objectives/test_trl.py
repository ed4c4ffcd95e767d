"""Losses and gradients of TRL 1.16 on the same tiny LLaMA and the same texts, tensor by tensor.

The oracle lies in `reference.safetensors` and was written by `make_reference.py`; LLM_JAX_REFERENCE names a folder with
a fresh one (`make parity`).
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.core import tree
from llm_jax.interop import families, huggingface
from llm_jax.model import scalar
from llm_jax.objectives import language, preference, reward
from tests.objectives import make_reference as oracle
from tests.variants import variants

HERE = pathlib.Path(__file__).parent
FRESH = os.environ.get('LLM_JAX_REFERENCE')
STORED = (
  pathlib.Path(FRESH) / 'preferences.safetensors' if FRESH else HERE / 'reference.safetensors'
)
MODELS = pathlib.Path(FRESH) if FRESH else HERE.parent / 'interop/reference'
TOLERANCE = 1e-5


@functools.cache
def expected():
  return load_file(STORED)


@functools.cache
def loaded():
  return huggingface.load(str(MODELS / 'llama'))


LENGTH = 10


def text(rows, end=False):
  """Arrays of (prompt, response) lists of ids. end: the response is followed by one more target."""
  made = {name: np.zeros((len(rows), LENGTH), np.int32) for name in ('inputs', 'targets')}
  made['weights'] = np.zeros((len(rows), LENGTH), np.float32)
  for i, (p, r) in enumerate(rows):
    ids = [*p, *r, 1] if end else [*p, *r]
    made['inputs'][i, : len(ids) - 1] = ids[:-1]
    made['targets'][i, : len(ids) - 1] = ids[1:]
    made['weights'][i, len(p) - 1 : len(ids) - 1] = 1
  return made


def sides(pairs, end=False):
  made = {}
  for side in ('chosen', 'rejected'):
    told = text([(p['prompt_ids'], p[f'{side}_ids']) for p in pairs], end)
    made |= {f'{side}/{name}': value for name, value in told.items()}
  return made


def with_reference(batch):
  found = expected()
  return batch | {f'{side}/ref_logp': found[f'reference/{side}'] for side in ('chosen', 'rejected')}


def singles():
  rows = oracle.singles()
  batch = text([(r['prompt_ids'], r['completion_ids']) for r in rows])
  kl = np.repeat(expected()['kto_reference/kl'], len(rows))
  return dict(
    batch,
    desirable=np.array([r['label'] for r in rows]),
    ref_logp=expected()['kto_reference/logp'],
    kl=kl,
  )


def check(case, model, params, objective, batch, names=oracle.TENSORS, **hyper):
  """The mean loss and the named gradients are TRL's."""
  batch = jax.tree.map(jnp.asarray, batch)

  def mean(params):
    out = objective(model, params, batch, None, **hyper)
    return out.sum / out.weight

  loss, grads = jax.jit(jax.value_and_grad(mean))(params)
  np.testing.assert_allclose(loss, expected()[f'{case}/loss'], atol=TOLERANCE)
  found = tree.flatten(jax.tree.map(np.asarray, grads))
  head = {'score.weight': found.pop('scalar/w')[None]} if 'scalar/w' in found else {}
  found.pop('scalar/bias', None)
  family = families.family(huggingface.settings(str(MODELS / 'llama')))
  theirs = huggingface.to_theirs(family, found) | head
  for name in names:
    wanted = expected()[f'{case}/gradient/{name}']
    assert np.abs(wanted).max() > 1e-4, 'the oracle moves every tensor'
    np.testing.assert_allclose(theirs[name], wanted, atol=TOLERANCE, err_msg=name)


def test_fine_tuning():
  rows = [(p['prompt_ids'], p['chosen_ids']) for p in oracle.pairs()]
  check('sft', *loaded(), language.next_token, text(rows))


DPO = dict(
  dpo=(preference.dpo, {}),
  dpo_hinge=(preference.hinge_dpo, {}),
  dpo_ipo=(preference.ipo, {}),
  dpo_robust=(preference.robust_dpo, dict(label_smoothing=0.2)),
)


@pytest.mark.parametrize('case', variants(DPO, ['dpo']))  # `make parity` runs them all
def test_the_dpo_family(case):
  objective, hyper = DPO[case]
  batch = with_reference(sides(oracle.pairs()))
  check(case, *loaded(), objective, batch, beta=0.3, **hyper)


KTO = dict(kto={}, kto_weighted=dict(desirable=1.5, undesirable=0.5))


@pytest.mark.parametrize('case', variants(KTO, ['kto_weighted']))
def test_kto(case):
  hyper = KTO[case]
  assert expected()['kto_reference/kl'] > 0.1  # or the clamp would hide a wrong one
  check(case, *loaded(), preference.kto, singles(), beta=0.3, **hyper)


WITHOUT = dict(
  cpo=(preference.cpo, dict(beta=0.3)),
  cpo_smoothed=(preference.cpo, dict(beta=0.3, nll=0.0, label_smoothing=0.2)),
  simpo=(preference.simpo, dict(beta=2.0, gamma=0.7)),
)


@pytest.mark.parametrize('case', variants(WITHOUT, ['simpo']))
def test_without_a_reference(case):
  objective, hyper = WITHOUT[case]
  check(case, *loaded(), objective, sides(oracle.pairs()), **hyper)


def test_dpo_with_a_flat_reference_is_cpo_without_imitation():
  """Reference-free DPO, which TRL has under that name: also smoothed."""
  batch = sides(oracle.pairs())
  batch |= {f'{side}/ref_logp': np.zeros(4, np.float32) for side in ('chosen', 'rejected')}
  check('cpo_smoothed', *loaded(), preference.dpo, batch, beta=0.3, label_smoothing=0.2)


def test_orpo():
  check('orpo', *loaded(), preference.orpo, sides(oracle.pairs(prompt=1)), beta=0.3)


REWARD = dict(reward={}, reward_margin={}, reward_centred=dict(centre=0.05))


@pytest.mark.parametrize('case', variants(REWARD, ['reward_margin']))
def test_reward_models(case):
  hyper = REWARD[case]
  model, params = loaded()
  head = dict(w=jnp.asarray(expected()['head/weight'][0]), bias=jnp.zeros(()))
  batch = sides(oracle.pairs(), end=True)
  if case == 'reward_margin':
    batch['margin'] = np.array(oracle.MARGINS, np.float32)
  check(
    case,
    scalar.head(model),
    dict(params, scalar=head),
    reward.bradley_terry,
    batch,
    oracle.REWARDED,
    **hyper,
  )
