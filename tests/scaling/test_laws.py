"""Laws against the values that the papers print, limits by hand, and numerical minimisation."""

import numpy as np
import pytest
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.scaling import laws

GOPHER = 5.76e23  # FLOP, the budget of Gopher and Chinchilla


@pytest.mark.parametrize(
  'got, want',
  [
    (laws.kaplan_parameters(175e9), 1.604),
    (laws.kaplan_tokens(300e9), 1.638),
    (laws.kaplan_compute(3640 * count.PF_DAY), 1.764),
    (laws.chinchilla(laws.HOFFMANN, 70e9, 1.4e12), 1.937),
    (laws.chinchilla(laws.HOFFMANN, 280e9, 300e9), 1.993),  # Gopher, worse with as much compute
  ],
)
def test_point_values(got, want):
  assert round(float(got), 3) == want


def test_kaplans_joint_laws_have_the_single_ones_as_limits():
  n, d, s = 1e9, 1e10, 1e5
  assert laws.kaplan_joint(n, 1e30) == pytest.approx((6.4e13 / n) ** 0.076)
  assert laws.kaplan_joint(1e30, d) == pytest.approx((1.8e13 / d) ** 0.103)
  assert laws.kaplan_steps(n, 1e30) == pytest.approx((6.5e13 / n) ** 0.077)
  assert laws.kaplan_steps(1e90, s) == pytest.approx((2.1e3 / s) ** 0.76, rel=1e-4)
  assert laws.kaplan_joint(n, d) > max(laws.kaplan_joint(n, 1e30), laws.kaplan_joint(1e30, d))


def test_the_critical_batch_is_twice_the_fewest_steps_and_twice_the_fewest_tokens():
  loss = 2.5
  batch = laws.kaplan_critical_batch(loss)
  assert batch == pytest.approx(2e8 * 2.5 ** (-1 / 0.21))
  assert (
    2e6 < batch < 3e6
  )  # 'roughly 1-2 million tokens' at the losses of the largest models, which are higher
  assert laws.kaplan_least_steps(1000, batch, loss) == pytest.approx(500)
  assert laws.kaplan_least_compute(1e20, batch, loss) == pytest.approx(5e19)


def test_kaplans_best_run_spends_its_compute():
  law = laws.KAPLAN_BEST
  assert sum(law[name].exponent for name in ('parameters', 'batch', 'steps')) == pytest.approx(1)
  assert law['parameters'].exponent + law['tokens'].exponent == pytest.approx(1)
  best = laws.kaplan_optimum(100 * count.PF_DAY)
  assert best['parameters'] == pytest.approx(1.3e9 * 100**0.73)
  # at the critical batch a run takes twice the fewest steps and twice the least compute
  assert 2 * best['steps'] * best['batch'] == pytest.approx(best['tokens'], rel=0.1)
  spent = count.compute(parameters=best['parameters'], tokens=best['tokens'])
  assert spent == pytest.approx(2 * 100 * count.PF_DAY, rel=0.1)
  assert laws.kaplan_least_tokens(1e9) == pytest.approx(5e3 * 10 ** (9 * 0.74))


@pytest.mark.parametrize('law', [laws.HOFFMANN, laws.BESIROGLU, laws.MUENNIGHOFF])
@pytest.mark.parametrize('flops', [1e18, 1e21, GOPHER])
def test_the_closed_form_optimum_is_the_numerical_one(law, flops):
  best = laws.optimum(law, flops)
  found = optimize.minimize_scalar(
    lambda x: laws.chinchilla(law, np.exp(x), flops / (6 * np.exp(x))),
    bounds=(np.log(1e5), np.log(1e14)),
    method='bounded',
    options=dict(xatol=1e-10),
  )
  assert best.parameters == pytest.approx(np.exp(found.x), rel=1e-3)
  assert best.loss == pytest.approx(found.fun, rel=1e-12)
  assert count.compute(parameters=best.parameters, tokens=best.tokens) == pytest.approx(flops)


def test_the_exponents_are_not_swapped():
  n, d = laws.frontier(laws.HOFFMANN)
  assert (round(n.exponent, 4), round(d.exponent, 4)) == (0.4516, 0.5484)
  swapped = n._replace(
    exponent=d.exponent, coefficient=n.coefficient * 6 ** (n.exponent - d.exponent)
  )
  wrong = laws.power(swapped, GOPHER)
  assert wrong == pytest.approx(
    5.4e12, rel=0.02
  )  # parameters, as the survey's formula would have it
  best = laws.optimum(laws.HOFFMANN, GOPHER)
  loss = laws.chinchilla(laws.HOFFMANN, wrong, GOPHER / (6 * wrong))
  assert loss > best.loss + 0.3


def test_the_frontier_by_hand():
  found = laws.optimum(laws.HOFFMANN, 1e21)
  assert found.parameters == pytest.approx(1.824e9, rel=1e-3)
  assert found.tokens == pytest.approx(9.14e10, rel=1e-3)
  assert laws.frontier(laws.HOFFMANN).parameters.coefficient * 6**0.4516 == pytest.approx(
    1.3447, abs=2e-4
  )


def test_rounded_constants_are_a_trap():
  """The published digits put Gopher's budget at 93 tokens per parameter, the refit at 18: 32B or 72B parameters."""
  rounded, refit = (laws.optimum(law, GOPHER) for law in (laws.HOFFMANN, laws.BESIROGLU))
  assert rounded.parameters == pytest.approx(3.22e10, rel=2e-3)
  assert rounded.tokens == pytest.approx(2.98e12, rel=2e-3)
  assert round(rounded.tokens / rounded.parameters) == 93
  assert 17 < refit.tokens / refit.parameters < 20
  assert 67e9 < refit.parameters < 75e9


def test_tokens_to_reach_inverts_the_law():
  loss = laws.chinchilla(laws.BESIROGLU, 7e9, 1e12)
  assert laws.tokens_to_reach(laws.BESIROGLU, 7e9, loss) == pytest.approx(1e12)
  with pytest.raises(UserError, match='take more parameters'):
    laws.tokens_to_reach(laws.BESIROGLU, 1e7, 2.0)


def test_fresh_parameters_are_the_other_side_of_the_frontier():
  best = laws.optimum(laws.BESIROGLU, 1e22)
  assert laws.fresh_parameters(laws.BESIROGLU, best.tokens) == pytest.approx(best.parameters)


@pytest.mark.parametrize('served', [0, 1e9, 1e12, 1e14])
def test_the_cheapest_model_for_a_lifetime_is_the_numerical_one(served):
  law, loss = laws.BESIROGLU, 2.1
  best = laws.lifetime_optimum(law, loss, served)
  sizes = np.geomspace(best.parameters / 3, best.parameters * 10, 4001)
  sizes = sizes[law.A * sizes**-law.alpha < loss - law.E]
  tokens = laws.tokens_to_reach(law, sizes, loss)
  cost = 6 * sizes * tokens + 2 * sizes * served
  assert best.parameters == pytest.approx(sizes[np.argmin(cost)], rel=2e-3)
  assert best.flops <= cost.min()
  assert laws.chinchilla(law, best.parameters, best.tokens) == pytest.approx(loss)
  assert best.flops == pytest.approx(
    6 * best.parameters * best.tokens + 2 * best.parameters * served
  )


def test_more_inference_makes_smaller_models_trained_for_longer():
  law = laws.BESIROGLU
  found = [laws.lifetime_optimum(law, 2.1, served) for served in (0, 1e11, 1e12, 1e13)]
  assert np.all(np.diff([f.parameters for f in found]) < 0)
  assert np.all(np.diff([f.tokens for f in found]) > 0)
  alone = laws.optimum(law, found[0].flops)
  assert found[0].parameters == pytest.approx(alone.parameters)
  assert alone.loss == pytest.approx(2.1)
  with pytest.raises(UserError, match='irreducible'):
    laws.lifetime_optimum(law, 1.8, 1e12)


def test_a_budget_that_pays_for_inference_too():
  law = laws.BESIROGLU
  alone, shared = laws.optimum(law, 1e22), laws.budget_optimum(law, 1e22, 1e12)
  assert laws.budget_optimum(law, 1e22, 0).parameters == pytest.approx(alone.parameters, rel=1e-6)
  assert shared.parameters < alone.parameters
  spent = 6 * shared.parameters * shared.tokens + 2 * shared.parameters * 1e12
  assert spent == pytest.approx(1e22)
  same = laws.lifetime_optimum(law, shared.loss, 1e12)  # the same question from its other end
  assert same.parameters == pytest.approx(shared.parameters, rel=1e-4)
  assert same.flops == pytest.approx(1e22, rel=1e-7)


def test_limits_of_repeated_data():
  star = 15.387756
  assert laws.effective(10, 10, star) == 10
  assert laws.effective(7, 10, star) == 7
  assert laws.effective(10.1, 10, star) == pytest.approx(
    10.1, rel=1e-5
  )  # few repetitions count in full
  assert laws.effective(1e9, 10, star) == pytest.approx(10 * (1 + star))  # endlessly many
  # worked examples of the paper's constants: 4 epochs are worth 93 %, 16 epochs 66 %
  assert laws.effective(4, 1, star) / 4 == pytest.approx(0.93, abs=0.005)
  assert laws.effective(16, 1, star) / 16 == pytest.approx(0.66, abs=0.005)


def test_data_constrained_loss_is_the_fresh_one_when_nothing_repeats():
  law = laws.DataConstrained()
  n = laws.fresh_parameters(law.fresh, 1e10) / 2
  fresh = laws.chinchilla(law.fresh, n, 1e10)
  assert laws.data_constrained(law, n, 1e10, 1e10) == pytest.approx(fresh)
  assert laws.data_constrained(law, n, 1e10, 1e11) == pytest.approx(fresh)
  repeated = [float(laws.data_constrained(law, n, 1e10, 1e10 / e)) for e in (1, 4, 16, 64)]
  assert np.all(np.diff(repeated) > 0)
  assert repeated[1] - repeated[0] < 0.3 * (repeated[2] - repeated[0])


def test_with_few_unique_tokens_more_goes_into_epochs_than_into_size():
  """The paper's figure: 9.3e21 FLOP and 25B unique tokens want fewer parameters than fresh data would."""
  law, flops, unique = laws.DataConstrained(), 9.3e21, 25e9
  best = laws.data_constrained_optimum(law, flops, unique)
  fresh = laws.optimum(law.fresh, flops)
  sizes = np.geomspace(1e9, 3e10, 20001)
  losses = laws.data_constrained(law, sizes, flops / (6 * sizes), unique)
  assert best.parameters == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)
  assert best.loss == pytest.approx(losses.min(), abs=1e-9)
  assert best.parameters < fresh.parameters
  assert best.epochs > fresh.tokens / unique > 1
  assert laws.data_constrained_optimum(law, flops, 1e13).parameters == pytest.approx(
    fresh.parameters, rel=1e-3
  )


def test_what_is_reducible():
  law = laws.Offset(irreducible=1.7, scale=1e8, exponent=0.3)
  assert laws.offset(law, 1e8) == pytest.approx(2.7)
  assert laws.offset(law, 1e30) == pytest.approx(1.7, abs=1e-5)
  assert laws.reducible(law, 2e9) == pytest.approx(laws.offset(law, 2e9) - 1.7)
  # an entropy and a divergence: over the distribution of a biased coin
  p, q = np.array([0.3, 0.7]), np.array([0.5, 0.5])
  entropy, divergence = -(p @ np.log(p)), p @ np.log(p / q)
  assert -(p @ np.log(q)) == pytest.approx(entropy + divergence)


@pytest.mark.parametrize('law', [laws.SINKHORN_BASE, laws.REINFORCED, laws.HASH])
def test_experts_saturate_and_one_is_almost_a_dense_model(law):
  assert laws.saturated(law, 1) == pytest.approx(law.start)
  assert laws.saturated(law, 1e12) == pytest.approx(law.limit)
  dense = (3.568e13 / 1e9) ** 0.078  # table 3's law of dense models
  assert laws.routed(law, 1e9, 1) == pytest.approx(dense, rel=0.015)
  losses = laws.routed(law, 1e8, np.array([1, 8, 64, 512]))
  assert np.all(np.diff(losses) < 0)
  assert laws.dense_equivalent(law, 1e8, 1) == pytest.approx(1e8)


def test_routing_stops_helping_at_a_size():
  """5M parameters with 128 experts do as a dense 55M; from 10^(0.108 / 0.009) = 1e12 on experts do not help."""
  law = laws.SINKHORN_BASE
  assert laws.dense_equivalent(law, 5e6, 128) == pytest.approx(55e6, rel=0.1)
  edge = 10 ** (-law.b / law.c)
  assert laws.routed(law, edge, 64) == pytest.approx(laws.routed(law, edge, 1))
  assert laws.routed(law, 10 * edge, 64) > laws.routed(law, 10 * edge, 1)


def test_rounding_hurts_more_the_longer_the_training():
  law = laws.Rounded(scale=0.06, tokens=0.5068, parameters=0.3439, bits=0.6)
  cost = laws.rounding(law, 1e9, 1e10, 4)
  assert laws.rounding(law, 1e9, 2e10, 4) / cost == pytest.approx(2**0.5068)
  assert laws.rounding(law, 2e9, 1e10, 4) / cost == pytest.approx(2**-0.3439)
  assert laws.rounding(law, 1e9, 1e10, 4.6) / cost == pytest.approx(np.exp(-1))


def test_four_bits_of_a_model_twice_as_large_beat_eight():
  """Memory for 30B parameters in 8 bits: 60B in 4 are better, 80B in 3 are not (the survey's example)."""

  def loss(parameters, bits):
    whole = laws.chinchilla(laws.BESIROGLU, parameters, 1.4e12)
    return whole + laws.rounding(laws.Rounded(500, 0, 0, 0.4), parameters, 1.4e12, bits)

  bits, value = laws.best_bits(loss, 30e9 * 8)
  assert bits == 4
  assert value == loss(60e9, 4) < loss(30e9, 8)
  assert laws.best_bits(lambda n, k: -n, 1.0)[0] == 3
  assert laws.best_bits(lambda n, k: -k, 1.0)[0] == 16


def test_effective_parameters_of_low_precision():
  """gamma = 2.6745: 4 bits are worth 0.776 of the parameters, 8 bits 0.950 (appendix K of the paper)."""
  assert laws.low_precision(1.0, np.array([3, 4, 8, 16])) == pytest.approx(
    [0.674, 0.776, 0.950, 0.997], abs=1e-3
  )


def test_loss_to_task():
  law = laws.Sigmoid(low=0.25, high=0.9, slope=6.0, middle=1.0)
  assert laws.accuracy(law, 1.0) == pytest.approx((0.25 + 0.9) / 2)
  assert laws.accuracy(law, [50.0, -50.0]) == pytest.approx([0.25, 0.9])
  error = laws.Decay(top=0.9, scale=2.0, rate=1.0)
  assert laws.task_error(error, np.log(4)) == pytest.approx(0.9 - 0.5)


@pytest.mark.parametrize(
  'got, want',
  [
    (laws.deepseek_batch(1e17), 0.11e6),
    (laws.deepseek_rate(1e17), 2.34e-3),
    (
      laws.deepseek_batch(3e24 * 67 / 70 * 0.28),
      19e6,
    ),  # the order of what DeepSeek 67B used: 18.9M
    (laws.step_batch(1e11), 0.58 * 10 ** (11 * 0.571)),
    (laws.step_rate(1e9, 1e11), 1.79 * 10 ** (-9 * 0.713 + 11 * 0.307)),
    (laws.kaplan_rate(1e9), 0.003239 - 0.0001395 * 20.723),
  ],
)
def test_batch_sizes_and_rates(got, want):
  assert got == pytest.approx(want, rel=0.05)


def test_along_chinchillas_path_both_laws_of_the_rate_fall():
  best = [laws.optimum(laws.BESIROGLU, c) for c in (1e20, 1e22)]
  rates = [laws.step_rate(b.parameters, b.tokens) for b in best]
  assert rates[1] < rates[0]
  assert laws.deepseek_rate(1e22) < laws.deepseek_rate(1e20)
  # with the size held, more data asks for a higher rate in Step Law
  assert laws.step_rate(1e9, 2e10) > laws.step_rate(1e9, 1e10)
