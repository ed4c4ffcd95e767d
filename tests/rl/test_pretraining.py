"""PPO-ptx: two sources as one; the text counts as its mean per token however the batch is cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.objectives import language, policy
from llm_jax.optim import chain, rules, schedules
from llm_jax.rl import arithmetic, pretraining, toy
from llm_jax.train import step
from llm_jax.train.state import State
from tests.rl import toys


@pytest.fixture(autouse=True)
def one_device():
  with toys.world():
    yield


def letters():
  """Something to demonstrate in a vocabulary without digits: `answer` is made of numbers, so the ids are unknown."""
  return [dict(prompt=p['prompt'], answer='12') for p in toy.prompts(count=16)]


def make_source(rows=64):
  text = partial(
    arithmetic.demonstrations, vocab=toy.Letters, problems=letters, batch=rows, length=6
  )
  source = lambda model: toys.make_source(method='ppo')
  return pretraining.with_ptx(toys.model(), source=source, pretraining=text)


def updated(batch, params, microbatches):
  tx = chain.make(toys.model().axes, rule=rules.sgd, schedule=partial(schedules.constant, peak=0.1))
  update = step.make(partial(policy.ppo, toys.model()), tx, microbatches=microbatches)
  begin = State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
  return update(begin, batch, jax.random.key(0))


@pytest.mark.slow
def test_ptx_counts_as_a_mean_per_token_for_any_number_of_microbatches():
  params = toys.start(0)
  batch = make_source()(State(None, params, None))
  np.testing.assert_allclose(batch['ptx/weights'].sum(), batch['weights'].sum(), rtol=1e-5)
  side = {k.removeprefix('ptx/'): v for k, v in batch.items() if k.startswith('ptx/')}
  nats = language.next_token(toys.model(), params, side, None)
  whole, metrics = updated(batch, params, 1)
  np.testing.assert_allclose(metrics['ptx'], nats.sum / nats.weight, rtol=1e-5)
  parts, other = updated(batch, params, 4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, parts.params)
  np.testing.assert_allclose(metrics['loss'], other['loss'], rtol=1e-5)


def test_both_go_on_from_where_they_were():
  state = State(None, toys.start(0), None)
  first, second = make_source(), make_source()
  first(state)
  second.restore(first.state())
  wanted, found = first(state), second(state)
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name])
  assert second.round == first.round


def test_they_need_as_many_rows():
  with pytest.raises(UserError, match='64 answers beside 32 rows of text'):
    make_source(rows=32)
