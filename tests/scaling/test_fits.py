"""Fits against laws that made the points, against scipy's and numpy's own fits, and against known minima."""

import functools

import numpy as np
import pytest
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, laws, sums

TRUTH = laws.BESIROGLU


def grid(sizes, least=(1e3, 1e4), most=(1e12, 1e14)):
  """A square grid of N and D. Wide: A and B are what the law says at N = 1 and D = 1, far from any run, so that 1 % of
  noise leaves them within 2 % only where some losses are mostly A / N^alpha and others mostly B / D^beta. Over the
  usual three orders of magnitude a hundred runs give A to 11 % and B to 23 % (one standard deviation)."""
  axes = [np.geomspace(a, b, sizes) for a, b in zip(least, most)]
  return [x.ravel() for x in np.meshgrid(*axes)]


def noisy(law, parameters, tokens, seed, scale=0.01):
  noise = np.random.default_rng(seed).normal(size=len(parameters)) * scale
  return laws.chinchilla(law, parameters, tokens) * np.exp(noise)


@pytest.mark.parametrize('delta', [1e-3, 1e-2, np.inf])
def test_without_noise_the_constants_come_back(delta):
  n, d = grid(6, (1e6, 1e8), (1e10, 1e12))
  found = fits.parametric(n, d, laws.chinchilla(TRUTH, n, d), delta=delta)
  assert np.allclose(found.law, TRUTH, rtol=1e-6)
  assert found.objective < 1e-20


def test_in_the_units_of_toys_too():
  law = laws.Chinchilla(E=1.2, A=30, B=90, alpha=0.4, beta=0.45)
  n, d = grid(6, (1e3, 1e4), (3e6, 1e8))
  assert np.allclose(fits.parametric(n, d, laws.chinchilla(law, n, d)).law, law, rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_with_one_percent_of_noise_they_come_back_within_two(seed):
  """400 runs, N from 1e3 to 1e12 and D from 1e4 to 1e14: the standard deviations of A and B are 0.5 %."""
  n, d = grid(20)
  found = fits.parametric(n, d, noisy(TRUTH, n, d, seed), delta=1e-2)
  assert np.allclose(found.law, TRUTH, rtol=0.02)


def test_the_objective_is_the_papers_and_scipy_finds_none_lower():
  n, d = grid(5, (1e7, 1e9), (1e10, 1e12))
  loss = noisy(TRUTH, n, d, 0)

  def objective(p, delta=1e-3):
    e, a, b, alpha, beta = p
    r = np.logaddexp(np.logaddexp(a - alpha * np.log(n), b - beta * np.log(d)), e) - np.log(loss)
    return np.where(np.abs(r) < delta, r**2 / 2, delta * (np.abs(r) - delta / 2)).sum()

  found = fits.parametric(n, d, loss)
  at = np.array([*np.log(found.law[:3]), *found.law[3:]])
  assert objective(at) == pytest.approx(found.objective, rel=1e-9)
  for start in (at, at + 0.01, at * 1.05):
    other = optimize.minimize(objective, start, method='Nelder-Mead', options=dict(maxiter=2000))
    assert other.fun >= found.objective * (1 - 1e-7)


def test_least_squares_is_scipys():
  n, d = grid(8, (1e6, 1e8), (1e10, 1e12))
  loss = noisy(TRUTH, n, d, 1)

  def residual(p):
    law = laws.Chinchilla(*np.exp(p[:3]), *p[3:])
    return np.log(laws.chinchilla(law, n, d)) - np.log(loss)

  start = [*np.log(TRUTH[:3]), *TRUTH[3:]]
  want = optimize.least_squares(residual, start, xtol=1e-15, ftol=1e-15, x_scale='jac')
  found = fits.parametric(n, d, loss, delta=np.inf)
  assert found.objective == pytest.approx(want.cost, rel=1e-6)
  assert np.allclose(found.law, laws.Chinchilla(*np.exp(want.x[:3]), *want.x[3:]), rtol=1e-3)


def test_an_outlier_moves_the_huber_fit_less():
  n, d = grid(8, (1e6, 1e8), (1e10, 1e12))
  loss = noisy(TRUTH, n, d, 2, scale=1e-3)
  loss[10] *= 1.5
  robust, plain = (fits.parametric(n, d, loss, delta=x).law for x in (1e-3, np.inf))
  assert abs(robust.E / TRUTH.E - 1) < 0.005 < abs(plain.E / TRUTH.E - 1)


def test_gradient_and_hessian_are_those_of_differences():
  rng = np.random.default_rng(0)
  columns, target, theta = rng.normal(size=(3, 9, 4)), rng.normal(size=9), rng.normal(size=4)
  counts, delta = rng.integers(0, 4, size=(1, 9)).astype(float), 0.7

  def value(t):
    return sums._evaluate(columns, target, t[None], counts, delta).value[0]

  def slopes(t):
    state = sums._evaluate(columns, target, t[None], counts, delta)
    return sums._derivatives(columns, state, counts, delta)

  gradient, hessian, bound = slopes(theta)
  assert np.allclose(gradient[0], optimize.approx_fprime(theta, value, 1e-7), atol=1e-5)
  numeric = [(slopes(theta + h)[0] - slopes(theta - h)[0])[0] / 2e-6 for h in 1e-6 * np.eye(4)]
  assert np.allclose(hessian[0], numeric, atol=1e-5)
  assert np.all(np.linalg.eigvalsh(bound[0]) > 0)
  one = sums.objective(columns.reshape(-1, 4), target, delta, theta)
  counts = np.ones((1, 9))
  assert one[0] == pytest.approx(value(theta))
  assert np.allclose(one[1], optimize.approx_fprime(theta, value, 1e-7), atol=1e-5)


def test_all_samples_at_once_are_the_samples_one_by_one():
  n, d = grid(7, (1e6, 1e8), (1e10, 1e12))
  loss = noisy(TRUTH, n, d, 3)
  law = fits.parametric(n, d, loss, delta=1e-2).law
  draws = fits.parametric_draws(law, n, d, loss, trials=4, seed=5, delta=1e-2)
  counts = np.random.default_rng(5).multinomial(49, np.full(49, 1 / 49), size=4)
  for got, count in zip(draws, counts):
    one = fits.parametric(*(np.repeat(x, count) for x in (n, d, loss)), delta=1e-2)
    assert np.allclose(got, one.law, rtol=1e-4)


@functools.cache
def coverage(trials, sizes, samples, delta=1e-2):
  """How often the 95 % intervals hold the truth, by constant [5], and the largest error of the fit by trial."""
  n, d = grid(sizes)
  hits, errors = [], []
  for seed in range(trials):
    loss = noisy(TRUTH, n, d, seed)
    law = fits.parametric(n, d, loss, delta=delta).law
    draws = fits.parametric_draws(law, n, d, loss, trials=samples, seed=seed, delta=delta)
    low, high = fits.interval(draws)
    hits.append((low <= TRUTH) & (TRUTH <= high))
    errors.append(np.abs(np.array(law) / TRUTH - 1).max())
  return np.mean(hits, axis=0), np.array(errors)


def test_intervals_hold_the_truth():
  held, _ = coverage(trials=40, sizes=10, samples=100)
  assert np.all(held >= 0.82)
  assert held.mean() < 1


@pytest.mark.slow
def test_ninety_five_percent_intervals_hold_the_truth_that_often():
  held, errors = coverage(trials=300, sizes=20, samples=200)
  print('intervals hold the truth:', dict(zip(TRUTH._fields, held.round(3))), held.mean().round(4))
  print('largest error of a constant, median and worst:', np.median(errors), errors.max())
  assert 0.93 <= held.mean() <= 0.97
  assert np.all((held >= 0.92) & (held <= 0.98))
  assert errors.max() < 0.02


def test_groups_are_drawn_whole():
  x, y = np.arange(1.0, 9), np.arange(1.0, 9)
  seen = set()

  def fit(x, y):
    seen.add(tuple(sorted(x)))
    return [x.mean()]

  draws = fits.bootstrap(fit, (x, y), trials=20, groups=[0, 0, 0, 0, 1, 1, 1, 1])
  assert draws.shape == (20, 1)
  assert seen == {(1, 1, 2, 2, 3, 3, 4, 4), (5, 5, 6, 6, 7, 7, 8, 8), tuple(range(1, 9))}


def test_the_bootstrap_of_a_mean_has_the_error_of_a_mean():
  x = np.random.default_rng(0).normal(size=400)
  draws = fits.bootstrap(lambda x: [x.mean()], (x,), trials=2000)
  assert draws.std() == pytest.approx(x.std() / 20, rel=0.06)
  low, high = fits.interval(draws)[:, 0]
  assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.08)


def test_samples_that_cannot_be_fitted_are_drawn_again_or_end_it():
  def fit(x):
    if len(np.unique(x)) < 3:
      raise UserError('too few')
    return [x.mean()]

  assert fits.bootstrap(fit, (np.arange(4.0),), trials=30).shape == (30, 1)
  with pytest.raises(UserError, match='half of the samples'):
    fits.bootstrap(fit, (np.arange(2.0),), trials=5)


def test_a_power_law_is_a_line_of_logarithms():
  x = np.geomspace(1, 1e4, 12)
  y = 3 * x**-0.4
  assert np.allclose(fits.power(x, y).law, (3, -0.4))
  assert np.allclose(fits.power(x, y + 2, irreducible=2).law, (3, -0.4))
  assert fits.power(x, y).spread < 1e-12
  with pytest.raises(UserError, match='above zero'):
    fits.power(x, y, irreducible=2)


def test_akaike_tells_whether_there_is_an_irreducible_loss():
  """Where there is none, the criterion is wrong for about one sample in six: that is its level."""
  x = np.geomspace(1e6, 1e12, 25)
  law = laws.Offset(1.7, 1e8, 0.3)
  right = []
  for seed in range(12):
    noise = np.exp(0.003 * np.random.default_rng(seed).normal(size=25))
    above, bare = laws.offset(law, x) * noise, 4 * x**-0.05 * noise
    assert fits.offset(x, above).aic < fits.power(x, above).aic - 10
    assert fits.offset(x, above).law.irreducible == pytest.approx(1.7, rel=0.02)
    right.append(fits.power(x, bare).aic < fits.offset(x, bare).aic)
  assert sum(right) >= 8
  assert fits.offset(x, laws.offset(law, x)).law == pytest.approx(law, rel=1e-5)


def test_one_exponent_for_both():
  law = laws.Chinchilla(E=1.8, A=300.0, B=600.0, alpha=0.3, beta=0.3)
  n, d = grid(4, (1e7, 1e8), (1e9, 1e11))
  found = fits.tied(n, d, laws.chinchilla(law, n, d)).law
  assert np.allclose(found, law, rtol=1e-5)
  # the same law in the words of over-training: parallel lines in log C, one for each M = D / N
  eta, m, c = found.alpha / 2, d / n, 6 * n * d
  a, b = found.A * 6**eta, found.B * 6**eta
  assert np.allclose(found.E + (a * m**eta + b * m**-eta) * c**-eta, laws.chinchilla(law, n, d))


def isoflops(law, budgets, sizes=9, width=1.2):
  best = [laws.optimum(law, c).parameters for c in budgets]
  n = np.concatenate([b * np.exp(np.linspace(-width, width, sizes)) for b in best])
  c = np.repeat(budgets, sizes)
  return c, n, c / (6 * n), laws.chinchilla(law, n, c / (6 * n))


def test_parabolas_find_the_frontier():
  budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
  found, frontier = fits.isoflop(*isoflops(TRUTH, budgets))
  want = laws.frontier(TRUTH)
  assert frontier.parameters.exponent == pytest.approx(want.parameters.exponent, abs=2e-3)
  assert frontier.tokens.exponent == pytest.approx(want.tokens.exponent, abs=2e-3)
  for parabola in found:
    best = laws.optimum(TRUTH, parabola.budget)
    assert parabola.parameters == pytest.approx(best.parameters, rel=0.02)
    assert parabola.tokens == pytest.approx(best.tokens, rel=0.02)
    assert parabola.loss == pytest.approx(best.loss, rel=1e-3)
    assert 6 * parabola.parameters * parabola.tokens == pytest.approx(parabola.budget)


def test_a_parabola_is_exact_for_a_parabola():
  x = np.array([-1.0, -0.5, 0.2, 0.9])
  n = np.exp(15 + x)
  (found, _), _ = fits.isoflop(
    np.repeat([1e18, 2e18], 4),
    np.tile(n, 2),
    np.tile(1e18 / n, 2),
    np.tile(3 + 0.2 * (x - 0.1) ** 2, 2),
  )
  assert (found.loss, found.curvature) == pytest.approx((3, 0.2))
  assert found.parameters == pytest.approx(np.exp(15.1))


def test_a_budget_without_a_lowest_point_is_left_out():
  c, n, d, loss = isoflops(TRUTH, np.array([1e19, 1e20, 1e21]))
  low = n < laws.power(laws.frontier(TRUTH).parameters, c) * 0.8
  found, _ = fits.isoflop(*(x[low | (c > 1e19)] for x in (c, n, d, loss)))
  assert [p.budget for p in found] == [1e20, 1e21]
  with pytest.raises(UserError, match='fewer than two .* 1e\\+21 FLOP has no lowest loss'):
    fits.isoflop(c[low], n[low], d[low], loss[low])
  with pytest.raises(UserError, match='3 or more'):
    fits.isoflop(c, n, d, loss, nearest=2)


def test_the_envelope_of_training_curves_finds_the_frontier():
  tokens = np.geomspace(1e8, 1e12, 200)
  curves = [(n, tokens, laws.chinchilla(TRUTH, n, tokens)) for n in np.geomspace(3e7, 1e10, 24)]
  found, want = fits.envelope(curves), laws.frontier(TRUTH)
  assert found.parameters.exponent == pytest.approx(want.parameters.exponent, abs=0.02)
  assert found.tokens.exponent == pytest.approx(want.tokens.exponent, abs=0.02)
  assert laws.power(found.parameters, 1e21) == pytest.approx(
    laws.optimum(TRUTH, 1e21).parameters, rel=0.1
  )
  with pytest.raises(UserError, match='add sizes'):
    fits.envelope(curves[:3])


def test_the_three_approaches_agree():
  budgets = np.geomspace(1e19, 1e21, 5)
  c, n, d, loss = isoflops(TRUTH, budgets)
  third = laws.frontier(fits.parametric(n, d, loss).law).parameters
  second = fits.isoflop(c, n, d, loss)[1].parameters
  tokens = np.geomspace(1e8, 1e12, 100)
  first = fits.envelope(
    [(m, tokens, laws.chinchilla(TRUTH, m, tokens)) for m in np.geomspace(3e7, 1e10, 24)]
  ).parameters
  at = [laws.power(law, 3e20) for law in (first, second, third)]
  assert max(at) / min(at) < 1.1


def test_extrapolation_is_measured_on_the_runs_held_out():
  n, d = grid(6, (1e6, 1e8), (1e10, 1e12))
  loss = laws.chinchilla(TRUTH, n, d)
  known = n * d < np.median(n * d)
  errors = fits.extrapolation(
    lambda n, d, y: fits.parametric(n, d, y).law, laws.chinchilla, (n, d), loss, known
  )
  assert errors.shape == ((~known).sum(),)
  assert np.abs(errors).max() < 1e-5
  off = fits.extrapolation(lambda n, d, y: y.mean(), lambda m, n, d: m, (n, d), loss, known)
  assert np.allclose(off, loss[known].mean() / loss[~known] - 1)
  with pytest.raises(UserError, match='all or nothing'):
    fits.extrapolation(None, None, (n, d), loss, np.ones_like(n))


@pytest.mark.parametrize(
  'arrays, message',
  [
    (([1, 2], [1, 2], [1, 2]), '5 constants: 2 runs'),
    (([1, 2, 3], [1, 2], [1, 2]), 'shapes'),
    (([1, -2], [1, 2], [1, 2]), 'above zero'),
    (([1, 2], [1, 2], [1, np.nan]), 'finite'),
  ],
)
def test_wrong_arrays(arrays, message):
  with pytest.raises(UserError, match=message):
    fits.parametric(*arrays)
