"""Runs on the toy: a policy, its reference, a method, and what came of it."""

import contextlib
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh
from llm_jax.objectives import language, policy, preference
from llm_jax.optim import chain, rules, schedules
from llm_jax.rl import advantage, layout, rollout, toy
from llm_jax.train import loop, state, step

METHODS = {
  'ppo': dict(
    objective=policy.ppo, estimate=advantage.gae, value=policy.value_head, beta=0.02, epochs=2
  ),
  'grpo': dict(objective=partial(policy.grpo, beta=0.02), estimate=advantage.grpo, epochs=2),
  'shared': dict(
    objective=partial(policy.grpo, beta=0.02),
    estimate=advantage.grpo,
    epochs=2,
    layout=layout.shared,
  ),
  'rloo': dict(objective=policy.rloo, estimate=advantage.leave_one_out, beta=0.02),
  'reinforce': dict(objective=policy.reinforce, estimate=advantage.batch_mean, beta=0.02),
  'raft': dict(objective=language.next_token, estimate=advantage.score, keep=rollout.best, tries=9),
  'dpo': dict(objective=preference.dpo),
}


@functools.cache
def model():
  return toy.model()


@functools.cache
def start(seed):
  """Parameters of an untrained policy, which is also the reference."""
  return jax.jit(model().init)(jax.random.key(seed))


def make_source(seed=0, method='grpo', **settings):
  told = {k: v for k, v in METHODS[method].items() if k != 'objective'}
  told |= dict(prompts=toy.prompts, reward=toy.gold, vocab=toy.Letters, max_new=8)
  told |= dict(batch=64, group=8, round=64, seed=seed, reference=lambda model: start(seed))
  return rollout.make(model(), **told | settings)


@functools.cache
def update(method, rate):
  objective = partial(METHODS[method]['objective'], model())
  tx = chain.make(model().axes, rule=rules.adamw, schedule=partial(schedules.constant, peak=rate))
  return step.make(objective, tx), tx


def first(seed=0, method='grpo', rate=3e-3):
  params = jax.tree.map(jnp.copy, start(seed))
  return state.State(jnp.zeros((), jnp.int32), params, update(method, rate)[1].init(params))


@contextlib.contextmanager
def world():
  with jax.set_mesh(mesh.make(data=1)):
    yield


class Quiet:
  """A writer that says nothing."""

  def say(self, text):
    pass


def train(source, begin, method='grpo', rate=3e-3, steps=40, hooks=(), **more):
  """(last state, metrics of every step)."""
  seen = []
  keep = lambda step, state, metrics: seen.append(jax.device_get(metrics)) if metrics else None
  last = loop.train(
    begin,
    source,
    update(method, rate)[0],
    steps=steps,
    key=jax.random.key(0),
    hooks=[*hooks, keep],
    **more,
  )
  return last, seen


def mean_gold(params, seed=0, count=512):
  """The mean reward of fresh answers, and their divergence from the start in nats per answer."""
  source = make_source(seed=seed + 1000, batch=count, round=count, method='rloo')
  source._s = source._s._replace(reference=lambda model: start(seed))
  rows = source(state.State(jnp.zeros((), jnp.int32), params, None))
  kl = ((rows['old_logp'] - rows['ref_logp']) * rows['weights']).sum(1).mean()
  return float(np.mean(rows['reward'])), float(kl)
