"""Policy objectives: TRL's numbers on the same tiny LLaMA, REINFORCE at ratio 1, no gradient behind the clip, sums.

The oracle lies in `policy.safetensors` and was written by `make_policy_reference.py`; LLM_JAX_REFERENCE names a folder
with a fresh one (`make parity`).
"""

import functools
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.interop import families, huggingface
from llm_jax.model import scalar
from llm_jax.objectives import language, loss, policy, sequence
from llm_jax.rl import layout
from tests.model.test_scalar import make as plain
from tests.objectives import make_policy_reference as oracle
from tests.objectives.test_trl import FRESH, MODELS, loaded
from tests.variants import variants

HERE = pathlib.Path(__file__).parent
STORED = pathlib.Path(FRESH) / 'policy.safetensors' if FRESH else HERE / 'policy.safetensors'
LENGTH = 11


@functools.cache
def expected():
  return load_file(STORED)


def told(advantages):
  """TRL's inputs as a batch of ours. advantages: [4] or [4, LONGEST]."""
  made = {name: np.zeros((4, LENGTH), np.int32) for name in ('inputs', 'targets')}
  arrays = dict(old_logp='told/old', ref_logp='told/ref')
  made |= {name: np.zeros((4, LENGTH), np.float32) for name in ('weights', 'advantages', *arrays)}
  for i, (p, a) in enumerate(oracle.texts()):
    ids, answer = [*p, *a], slice(len(p) - 1, len(p) + len(a) - 1)
    made['inputs'][i, : len(ids) - 1] = ids[:-1]
    made['targets'][i, : len(ids) - 1] = ids[1:]
    made['weights'][i, answer] = 1
    made['advantages'][i, answer] = (
      advantages[i][: len(a)] if np.ndim(advantages) == 2 else advantages[i]
    )
    for name, stored in arrays.items():
      made[name][i, answer] = expected()[stored][i, : len(a)]
  return made


def surrogate_of_ppo(model, params, batch, rng, **hyper):
  """PPO without its critic: the value is constant and right."""
  zeros = jnp.zeros((4, LENGTH))
  value = lambda model, params, batch, x: zeros
  return policy.ppo(
    model, params, dict(batch, values=zeros, returns=zeros), rng, value=value, **hyper
  )


CASES = {
  'grpo': (policy.grpo, dict(clip=0.2, beta=0.04)),
  'corrected': (policy.grpo, dict(clip=0.2, beta=0.04, kl=policy.corrected_k3)),
  'dr_grpo': (policy.dr_grpo, dict(clip=0.2, longest=oracle.LONGEST)),
  'dapo': (policy.dapo, dict(clip=0.2, clip_high=0.28)),
  'gspo': (policy.gspo, dict(clip=0.01, clip_high=0.02)),
  'rloo': (policy.rloo, dict(clip=0.05)),
  'ppo': (surrogate_of_ppo, dict(clip=0.2, entropy=0.05)),
}


@pytest.mark.parametrize('case', variants(CASES, ['grpo', 'ppo']))  # `make parity`: all
def test_losses_and_gradients_are_trls(case):
  (model, params), (objective, hyper) = loaded(), CASES[case]
  batch = told(oracle.per_token() if case == 'ppo' else oracle.ADVANTAGES)

  def mean(params):
    out = objective(model, params, batch, None, **hyper)
    return out.sum / out.weight, out.metrics['clipped'] / out.weight

  (value, clipped), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
  assert 0 < clipped < 1, 'the oracle has both sides of the clip'
  np.testing.assert_allclose(value, expected()[f'{case}/loss'], atol=1e-5)
  family = families.family(huggingface.settings(str(MODELS / 'llama')))
  theirs = huggingface.to_theirs(family, tree.flatten(jax.tree.map(np.asarray, grads)))
  for name in oracle.TENSORS:
    wanted = expected()[f'{case}/gradient/{name}']
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(theirs[name], wanted, atol=1e-5, err_msg=name)


def test_they_are_trls_too_behind_prompts_of_their_own():
  """Answers in one array, prompts in another (rl/layout.py)."""
  (model, params), batch = loaded(), told(oracle.ADVANTAGES)
  lengths = np.array([len(p) + len(a) - 1 for p, a in oracle.texts()])
  batch |= dict(segments=(np.arange(LENGTH) < lengths[:, None]).astype(np.int32))
  shape = layout.Shape(1, max(len(p) for p, _ in oracle.texts()), oracle.LONGEST)
  cut = layout.shared().cut(batch | dict(index=np.arange(4)), shape)
  assert cut['inputs'].shape == (4, oracle.LONGEST)

  @jax.jit
  @jax.value_and_grad
  def mean(params):
    out = policy.grpo(model, params, cut, None, clip=0.2, beta=0.04)
    return out.sum / out.weight

  value, grads = mean(params)
  np.testing.assert_allclose(value, expected()['grpo/loss'], atol=1e-5)
  family = families.family(huggingface.settings(str(MODELS / 'llama')))
  theirs = huggingface.to_theirs(family, tree.flatten(jax.tree.map(np.asarray, grads)))
  for name in oracle.TENSORS:
    np.testing.assert_allclose(
      theirs[name], expected()[f'grpo/gradient/{name}'], atol=1e-5, err_msg=name
    )


# --- a tiny model of our own --------------------------------------------------------------------------


def make_batch(model, params, rows=4, away=0.3, seed=0):
  """Ragged answers with made-up credit. away: standard deviation of how far the policy is from the one that wrote."""
  rng = np.random.default_rng(seed)
  ids = lambda: rng.integers(0, 32, (rows, 10)).astype(np.int32)
  batch = dict(inputs=ids(), targets=ids())
  weights = np.zeros((rows, 10), np.float32)
  for row in weights:
    row[(start := rng.integers(0, 6)) : start + rng.integers(1, 5)] = 1
  logp = np.asarray(jax.jit(lambda p, b: sequence.tokens(model, p, b).logp)(params, batch))
  noise = lambda scale: (scale * rng.normal(size=(rows, 10))).astype(np.float32)
  batch |= dict(weights=weights, old_logp=logp + noise(away), ref_logp=logp + noise(0.5))
  batch |= dict(advantages=noise(1.0) * weights, returns=noise(1.0), values=noise(1.0))
  return batch | dict(reward=noise(1.0)[:, 0], gap=np.abs(noise(1.0)[:, 0]))


def one(name, **kw):
  """`name` with a row of each answer's advantage where the objective wants one."""
  return partial(getattr(policy, name), **(dict(longest=5) if name == 'dr_grpo' else {}), **kw)


ALL = ('reinforce', 'ppo', 'rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo')


@functools.cache
def with_head():
  model = scalar.head(plain())
  return model, model.init(jax.random.key(0))


@functools.cache
def compiled(name, hyper):
  """(params, batch) -> the outcome on the model with a head, and the same with the gradient."""
  model, _ = with_head()
  outcome = lambda params, batch: one(name, **dict(hyper))(model, params, batch, None)
  total = lambda params, batch: (lambda out: (out.sum, out))(outcome(params, batch))
  return jax.jit(outcome), jax.jit(jax.value_and_grad(total, has_aux=True))


def outcome(name, params, batch, **hyper):
  return compiled(name, tuple(hyper.items()))[0](params, batch)


def found(name, params, batch, **hyper):
  (_, out), grads = compiled(name, tuple(hyper.items()))[1](params, batch)
  return out, grads


def gradient(objective, model, params, batch):
  return jax.jit(jax.grad(lambda p: objective(model, p, batch, None).sum))(params)


def close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def test_the_gradient_at_ratio_one_is_that_of_reinforce():
  model, params = with_head()
  batch = make_batch(model, params, away=0.0)
  gradient = lambda name, batch, **hyper: found(name, params, batch, **hyper)[1]
  wanted = gradient('reinforce', batch)
  close(gradient('ppo', batch, value_weight=0.0), wanted, atol=1e-6)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 0.1
  close(gradient('dapo', batch), wanted, atol=1e-6)
  even = dict(batch, advantages=np.broadcast_to(batch['reward'][:, None], (4, 10)))
  close(gradient('rloo', even), gradient('reinforce', even), atol=1e-6)


@pytest.mark.parametrize('name', ['ppo', 'rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo'])
@pytest.mark.parametrize('sign', [1, -1])
def test_there_is_no_gradient_behind_the_clip(name, sign):
  """Ratios have moved to where the advantage wanted them: nothing is left to do. On the other side there is."""
  model, params = with_head()
  batch = make_batch(model, params, away=0.0)
  batch['advantages'] = sign * np.ones((4, 10), np.float32)
  kw = dict(value_weight=0.0) if name == 'ppo' else {}
  for away, still in ((-0.5, True), (0.5, False)):
    moved = dict(batch, old_logp=batch['old_logp'] + sign * away)
    out, grads = found(name, params, moved, **kw)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(grads)) == still
    assert float(out.metrics['clipped'] / out.weight) == pytest.approx(float(still), abs=1e-6)


@pytest.mark.parametrize('name', variants(ALL, ['ppo', 'grpo']))
def test_parts_of_a_batch_add_up(name):
  """Law 3: sums and weights of any split are those of the whole, so microbatches change nothing."""
  model, params = with_head()
  batch = make_batch(model, params)
  if name == 'ppo':
    ptx = make_batch(model, params, seed=1)
    batch |= {f'ptx/{k}': ptx[k] for k in ('inputs', 'targets', 'weights')}
  objective = lambda batch: outcome(name, params, batch)
  whole = objective(batch)
  parts = [objective({k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
  close(functools.reduce(loss.add, parts), whole, rtol=2e-5, atol=1e-5)
  expected = batch['weights'].sum() if name in ('ppo', 'dapo') else 4
  assert float(whole.weight) == pytest.approx(expected, rel=1e-6)
  # rows without an answer change nothing
  empty = lambda x: np.concatenate([x[:2], np.zeros((2, 10), np.float32)])
  empty = {k: empty(v) if k.endswith('weights') else v for k, v in batch.items()}
  close(objective(empty), parts[0], rtol=2e-5, atol=1e-5)


def test_ppo_is_its_formula_in_float64():
  model, params = with_head()
  batch = make_batch(model, params)
  out = policy.ppo(
    model, params, batch, None, clip=0.2, value_weight=0.7, value_clip=0.3, entropy=0.1
  )
  now = sequence.tokens(model, params, batch)
  logp, entropy, value = (
    np.asarray(x, np.float64) for x in (now.logp, now.entropy, scalar.read(params, now.x))
  )
  total, clipped, over = 0.0, 0, 0
  for i, t in zip(*np.nonzero(batch['weights'])):
    r, a = np.exp(logp[i, t] - batch['old_logp'][i, t]), batch['advantages'][i, t]
    pi = min(r * a, min(max(r, 0.8), 1.2) * a)
    v, old, goal = value[i, t], batch['values'][i, t], batch['returns'][i, t]
    near = old + min(max(v - old, -0.3), 0.3)
    over += (near - goal) ** 2 > (v - goal) ** 2
    total += -pi + 0.7 * max((v - goal) ** 2, (near - goal) ** 2) / 2 - 0.1 * entropy[i, t]
    clipped += (r > 1.2 and a > 0) or (r < 0.8 and a < 0)
  assert over and clipped
  np.testing.assert_allclose(out.sum, total, rtol=1e-5)
  assert out.metrics['clipped'] == clipped
  kl = ((logp - batch['ref_logp']) * batch['weights']).sum()
  np.testing.assert_allclose(out.metrics['kl'], kl, rtol=1e-4)


@pytest.mark.parametrize('name', ['ppo', 'rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo'])
def test_a_fresh_row_has_the_ratio_one_whatever_is_stored(name):
  """To the last bit: not a token is clipped by a clip of nothing, and the policy has not moved."""
  model, params = with_head()
  batch = dict(make_batch(model, params), fresh=np.ones(4, np.float32))
  hyper = dict(clip=0.0, clip_high=0.0) if name in ('dapo', 'gspo') else dict(clip=0.0)
  metrics = outcome(name, params, batch, **hyper).metrics
  assert metrics['clipped'] == 0 and metrics['old_kl'] == 0
  stale = outcome(name, params, batch | dict(fresh=np.zeros(4, np.float32)), **hyper)
  assert stale.metrics['clipped'] > 0 and stale.metrics['old_kl'] > 0


def test_ptx_is_the_cross_entropy_of_the_other_text():
  model, params = with_head()
  batch, ptx = make_batch(model, params), make_batch(model, params, seed=1)
  text = {k: ptx[k] for k in ('inputs', 'targets', 'weights')}
  both = batch | {f'ptx/{k}': v for k, v in text.items()}
  cross = lambda p: language.next_token(model, p, text, None)
  nats = cross(params)
  (plus, grads), (alone, without) = (found('ppo', params, b, ptx=27.8) for b in (both, batch))
  np.testing.assert_allclose(plus.sum - alone.sum, 27.8 * nats.sum, rtol=1e-5)
  assert plus.weight == alone.weight
  wanted = jax.jit(jax.grad(lambda p: 27.8 * cross(p).sum))(params)
  close(jax.tree.map(jnp.subtract, grads, without), wanted, rtol=1e-4, atol=1e-3)


def test_a_critic_of_its_own_is_moved_by_the_value_loss_alone():
  critic = plain
  model = scalar.make_with_critic(model=plain, critic=critic)
  params = model.init(jax.random.key(0))
  batch = make_batch(model, params)
  value = partial(policy.critic, critic=critic)
  grads = gradient(partial(policy.ppo, value=value, value_weight=0.5), model, params, batch)
  own = {k: v for k, v in params.items() if k != 'critic'}
  x = critic().hidden(params['critic'], batch).x

  def error(theirs):
    found = scalar.read(theirs, critic().hidden(theirs, batch).x)
    near = jnp.clip(found, batch['values'] - 0.2, batch['values'] + 0.2)
    goal = batch['returns']
    return (0.25 * jnp.maximum((found - goal) ** 2, (near - goal) ** 2) * batch['weights']).sum()

  close(grads['critic'], jax.jit(jax.grad(error))(params['critic']), atol=1e-5)
  assert scalar.read(params['critic'], x).shape == (4, 10)
  without = partial(policy.ppo, value=value, value_weight=0.0)
  alone = {k: v for k, v in gradient(without, model, params, batch).items() if k != 'critic'}
  close({k: v for k, v in grads.items() if k != 'critic'}, alone, atol=1e-6)
  assert jax.tree.structure(own) == jax.tree.structure(alone)


def test_estimators_of_the_divergence_by_enumeration():
  """Over all tokens, weighted by the policy: k1 and k3 are the divergence, k2 is not, k3 is never negative."""
  rng = np.random.default_rng(0)
  p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 50)))
  logp, ref = np.log(p), np.log(q)
  exact = (p * np.log(p / q)).sum()
  mean = lambda k: float((p * np.asarray(k(jnp.asarray(logp), jnp.asarray(ref)))).sum())
  assert mean(policy.k1) == pytest.approx(exact, rel=1e-5)
  assert mean(policy.k3) == pytest.approx(exact, rel=1e-5)
  assert mean(policy.k2) == pytest.approx((p * (logp - ref) ** 2).sum() / 2, rel=1e-5)
  assert (np.asarray(policy.k3(logp, ref)) >= 0).all()


def test_a_batch_of_something_else_is_named():
  model, params = with_head()
  batch = make_batch(model, params)
  del batch['old_logp']
  with pytest.raises(
    UserError, match='no old_logp: policy objectives need the source rollout.make'
  ):
    policy.grpo(model, params, batch, None)
