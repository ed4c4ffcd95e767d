"""Schedules at the values of the papers, against optax's own, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.optim import schedules


def at(fn, where, /, **kw):
  """The rates at the steps `where`."""
  return np.asarray(jax.jit(jax.vmap(functools.partial(fn, **kw)))(jnp.asarray(where)))


def test_t5_values():
  """1 / sqrt(max(n, 10^4)): OPT-003."""
  rates = at(schedules.rsqrt, [0, 1, 9_999, 10_000, 40_000, 1_000_000])
  np.testing.assert_allclose(rates, [0.01, 0.01, 0.01, 0.01, 0.005, 0.001], rtol=1e-6)


def test_t5x_warms_up_and_decays_by_one_length():
  """T5X `constant * linear_warmup * rsqrt_decay`, shifted by the one update that would have rate 0."""
  steps = np.arange(400)
  rates = at(schedules.rsqrt, steps, peak=0.1, hold=100, warmup=100)
  expected = np.minimum(1, (steps + 1) / 100) / np.sqrt(np.maximum(steps, 100))
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize('warmup', [0, 7])
def test_cosine_is_optax(warmup):
  steps = np.arange(warmup, 130)
  expected = optax.cosine_decay_schedule(3e-4, 100 - warmup, alpha=0.1)(steps - warmup)
  np.testing.assert_allclose(
    at(schedules.cosine, steps, peak=3e-4, steps=100, warmup=warmup), expected, rtol=1e-5
  )


def test_linear_is_optax():
  expected = optax.linear_schedule(2e-3, 2e-4, 90)(np.arange(110))
  rates = at(schedules.linear, np.arange(10, 120), peak=2e-3, steps=100, warmup=10)
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


EVERY = dict(
  constant=dict(peak=0.5),
  rsqrt=dict(peak=0.5, hold=40),
  cosine=dict(peak=0.5, steps=100),
  linear=dict(peak=0.5, steps=100),
  wsd=dict(peak=0.5, steps=100, decay=20),
)


@pytest.mark.parametrize('name', EVERY)
def test_update_k_of_the_warmup_has_k_nths_of_the_peak(name):
  rates = at(getattr(schedules, name), np.arange(12), **EVERY[name], warmup=10)
  np.testing.assert_allclose(rates[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
  assert rates.dtype == np.float32 and rates[10] <= 0.5 + 1e-7


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd'])
def test_decays_end_at_ten_percent_and_stay(name):
  rates = at(getattr(schedules, name), [100, 101, 10_000], **EVERY[name])
  np.testing.assert_allclose(rates, 0.05, rtol=1e-5)


def test_wsd_is_stable_then_a_line():
  rates = at(
    schedules.wsd, [10, 79, 80, 90, 100], peak=1.0, steps=100, decay=20, warmup=10, floor=0.0
  )
  np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0], atol=1e-6)


def test_manual_interpolates():
  rates = at(schedules.manual, [0, 5, 10, 15, 99], points=((0, 1.0), (10, 3.0), (20, 1.0)))
  np.testing.assert_allclose(rates, [1, 2, 3, 2, 1], rtol=1e-6)


def test_cooldown_ends_any_schedule():
  inner = functools.partial(schedules.rsqrt, peak=1.0, hold=10)
  plain = at(inner, np.arange(60))
  rates = at(schedules.cooldown, np.arange(60), schedule=inner, steps=50, length=20)
  np.testing.assert_allclose(rates[:31], plain[:31], rtol=1e-6)
  np.testing.assert_allclose(rates[30:51], plain[30:51] * (1 - np.arange(21) / 20), atol=1e-6)
  assert not rates[50:].any()


def test_tokens_are_updates_times_their_size():
  """GPT-3 in tokens and in updates of 2M tokens."""
  tokens = functools.partial(schedules.cosine, peak=6e-5, warmup=400_000_000, steps=260_000_000_000)
  steps = np.array([0, 1, 99, 199, 200, 50_000, 129_999, 140_000])
  rates = at(schedules.in_tokens, steps, schedule=tokens, tokens_per_step=2_000_000)
  expected = at(schedules.cosine, steps, peak=6e-5, warmup=200, steps=130_000)
  np.testing.assert_allclose(rates, expected, rtol=1e-3)  # within the tokens of one update
  np.testing.assert_allclose(rates[:4], expected[:4], rtol=1e-6)  # the warm-up exactly
  np.testing.assert_allclose(rates[-1], 6e-6, rtol=1e-6)


@pytest.mark.parametrize(
  'call, remedy',
  [
    (lambda: schedules.cosine(0, peak=1.0, steps=10, warmup=10), 'lower warmup or raise steps'),
    (lambda: schedules.linear(0, peak=1.0, steps=10, warmup=11), 'lower warmup or raise steps'),
    (lambda: schedules.cosine(0, peak=-1.0, steps=10), 'must be positive'),
    (lambda: schedules.cosine(0, peak=1.0, steps=10, floor=1.5), '0 <= floor <= 1'),
    (lambda: schedules.constant(0, peak=1.0, warmup=-1), '0 is none'),
    (lambda: schedules.rsqrt(0, hold=10, warmup=20), 'raise hold'),
    (lambda: schedules.wsd(0, peak=1.0, steps=10, decay=9, warmup=5), 'decay <= 5'),
    (lambda: schedules.manual(0, points=((5, 1.0), (5, 2.0))), 'sort them'),
    (lambda: schedules.manual(0, points=()), 'points='),
    (lambda: schedules.cooldown(0, schedule=schedules.rsqrt, steps=10, length=11), 'length <= 10'),
    (
      lambda: schedules.in_tokens(0, schedule=schedules.rsqrt, tokens_per_step=0),
      'batch times length',
    ),
  ],
)
def test_nonsense_is_refused(call, remedy):
  with pytest.raises(UserError, match=remedy):
    call()


def test_from_a_config():
  schedule = build(
    use(schedules.cooldown, schedule=use(schedules.rsqrt, hold=10), steps=100, length=10)
  )
  assert float(schedule(40)) == pytest.approx(0.005)
