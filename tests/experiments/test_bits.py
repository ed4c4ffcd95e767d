"""Rounding in experiments/bits against closed forms; its fits on made-up ladders; its README is of its results."""

import json
import pathlib

import numpy as np
import pytest

from experiments.bits import quantise, report
from llm_jax.scaling import laws

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')


def numbers(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('bits', (2, 3, 4, 8))
def test_every_number_becomes_the_nearest_level_of_its_block(bits):
  """By trying all levels; no error is above half of the distance of two, but for the rounding of the scale."""
  x, top = numbers(5, 64), 2 ** (bits - 1) - 1
  x[2] = 0
  x[3, 7] = 100.0  # an outlier costs its own block only
  found = quantise.rounded(x.reshape(4, 80), bits).reshape(5, 64)
  for row, got in zip(x, found):
    scale = np.float32(np.float16(np.abs(row).max()))
    levels = scale / top * np.arange(-top, top + 1, dtype=np.float32)
    nearest = levels[np.abs(row[:, None] - levels).argmin(1)]
    np.testing.assert_allclose(got, nearest, rtol=1e-6)
    assert np.abs(got - row).max() <= scale / top / 2 + abs(np.abs(row).max() - scale) + 1e-7
    assert len(np.unique(got)) <= 2**bits - 1
  one = quantise.rounded(x[4], bits)
  assert (found[4] == one).all() and not found[2].any()


def test_four_bits_use_fifteen_values_in_a_block_and_others_in_the_next():
  x = np.concatenate([np.linspace(-1, 1, 64), np.linspace(-3, 3, 64)]).astype(np.float32)
  found = quantise.rounded(x, 4)
  assert len(np.unique(found[:64])) == len(np.unique(found[64:])) == 15
  np.testing.assert_allclose(found[64:], 3 * found[:64], rtol=1e-6)


@pytest.mark.parametrize('bits', (2, 4, 6, 8))
def test_what_can_be_represented_stays_to_the_bit(bits):
  top = 2 ** (bits - 1) - 1
  levels = np.random.default_rng(1).integers(-top, top + 1, (3, 64)).astype(np.float32)
  levels[:, 0] = top
  x = levels * (np.float32([[0.5], [0.3125], [7.0]]) / top)
  np.testing.assert_array_equal(quantise.rounded(x, bits), x)
  np.testing.assert_array_equal(quantise.rounded(numbers(9), 16), numbers(9).astype(np.float16))


def test_the_last_block_may_be_short():
  x = numbers(70)
  found = quantise.rounded(x, 4)
  np.testing.assert_array_equal(found[64:], quantise.rounded(x[64:], 4))
  assert found.shape == x.shape


def test_bits_are_counted_with_scales():
  assert quantise.stored(640, 4) == 640 * 4.25
  assert quantise.stored(65, 3) == 65 * 3 + 2 * 16 and quantise.stored(65, 16) == 65 * 16
  params = dict(table=numbers(10, 64), norm=numbers(3, 64), query=numbers(3, 64, 2, 4))
  axes = dict(
    table=('vocab', 'embed'),
    norm=('layers', 'norm'),
    query=('layers', 'embed', 'heads', 'head_dim'),
  )
  made, total = quantise.quantised(params, axes, 4)
  assert total == (640 + 3 * 64 * 8) * 4.25 + 192 * 16
  np.testing.assert_array_equal(made['norm'], params['norm'].astype(np.float16))
  np.testing.assert_array_equal(made['query'], quantise.rounded(params['query'], 4))


def ladder(made: laws.Rounded) -> list[dict]:
  """Runs whose loss falls by 0.1 with every factor of e in size, and rises by what `made` says rounding adds."""

  def run(n: int, seed: int) -> dict:
    points = []
    for bits in (16, 8, 6, 5, 4, 3):
      added = float(laws.rounding(made, n, 1.0, bits)) if bits < 16 else 0.0
      stored = n * (bits + 0.25 * (bits < 16))
      points.append([bits, stored, 3 - 0.1 * np.log(n) + added])
    return dict(parameters=n, seed=seed, cpu=1.0, points=points)

  return [run(n, seed) for n in (6_400, 16_000, 64_000, 320_000) for seed in range(3)]


def test_the_law_is_recovered():
  made = laws.Rounded(60.0, 0.0, 0.2, 0.7)
  told = report.law(report.grid(ladder(made)))
  np.testing.assert_allclose([told[k] for k in made._fields], made, rtol=1e-6)
  assert told['error'] < 1e-6 and told['points'] == 16


def test_the_best_precision_of_a_budget_is_that_of_the_formula():
  """What rounding adds is the same for every size here, so that lines between sizes are exact."""
  made = laws.Rounded(60.0, 0.0, 0.0, 0.7)
  told, best = report.summarise(ladder(made)), {}
  for budget in report.BUDGETS:
    loss = {}
    for bits, stored in ((16, 16), (8, 8.25), (6, 6.25), (5, 5.25), (4, 4.25), (3, 3.25)):
      n = 8000 * budget / stored
      if 6_400 <= n <= 320_000:
        added = 60 * np.exp(-bits / 0.7) if bits < 16 else 0
        loss[bits] = 3 - 0.1 * np.log(n) + added
    best[budget] = min(loss, key=loss.get)
  assert {one['kilobytes']: one['best'] for one in told['budgets']} == best
  assert told['by_law'] == {str(k): v for k, v in best.items()}
  for one in told['budgets']:
    assert all(x['mean'] > 0 and x['half'] < 1e-9 for x in one['worse'].values())


def test_a_budget_between_two_sizes_is_read_on_the_line_between_them():
  total, nats = np.array([100.0, 400.0]), np.array([2.0, 1.0])
  assert report.at_budget(total, nats, 200.0) == pytest.approx(1.5)
  assert np.isnan([report.at_budget(total, nats, x) for x in (99.0, 401.0)]).all()


def test_shipped_results_show_what_the_readme_says():
  told = json.loads(SHIPPED.read_text())
  again = report.summarise(told['runs'])
  assert report.tables(again) in SHIPPED.with_name('README.md').read_text()
  assert [one['best'] for one in again['budgets']] == [5] * 6 == list(again['by_law'].values())
  for one in again['budgets']:
    worse = {int(k): v for k, v in one['worse'].items()}
    assert 0.003 < worse[6]['mean'] < 0.0135 and worse[6]['mean'] < worse[6]['half']
    assert 0.0215 < worse[4]['mean'] < 0.0295 and 0.055 < worse[16]['mean'] < 0.12
  sure = {
    x['kilobytes'] for x in again['budgets'] if x['worse']['4']['mean'] > x['worse']['4']['half']
  }
  assert sure == {24, 32, 48, 96}
  assert max(one['added']['8']['mean'] for one in again['sizes']) < 0.00035
  assert again['law']['error'] < 0.135 and round(again['cpu']) == 362
