"""The loop calls every hook after every update, once before the first, and goes back where a hook sends it."""

import jax
import jax.numpy as jnp

from llm_jax.train import loop
from llm_jax.train.state import State


def start(step=0):
  return State(jnp.asarray(step, jnp.int32), {}, {})


def update(state, batch, key):
  return State(state.step + 1, {}, {}), {'loss': batch['x'].sum()}


def source(state):
  return {'x': jnp.ones(2)}


def record(calls):
  return lambda step, state, metrics: calls.append((step, int(state.step), sorted(metrics)))


def test_hooks_see_step_zero_then_every_update():
  calls = []
  end = loop.train(start(), source, update, steps=3, key=jax.random.key(0), hooks=[record(calls)])
  assert int(end.step) == 3
  assert calls == [(0, 0, []), (1, 1, ['loss']), (2, 2, ['loss']), (3, 3, ['loss'])]


def test_a_resumed_run_does_not_repeat_its_last_hooks():
  calls = []
  loop.train(start(2), source, update, steps=3, key=jax.random.key(0), hooks=[record(calls)])
  assert [step for step, *_ in calls] == [3]


def test_a_finished_run_does_nothing():
  calls = []
  end = loop.train(start(3), source, update, steps=3, key=jax.random.key(0), hooks=[record(calls)])
  assert int(end.step) == 3 and not calls


def test_a_hook_can_send_the_loop_back():
  calls, sent = [], []

  def rewind(step, state, metrics):
    if step == 4 and not sent:
      sent.append(step)
      return start(1)
    return None

  end = loop.train(
    start(), source, update, steps=5, key=jax.random.key(0), hooks=[rewind, record(calls)]
  )
  assert int(end.step) == 5
  assert [step for step, *_ in calls] == [0, 1, 2, 3, 2, 3, 4, 5]
