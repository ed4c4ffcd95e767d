"""When text runs out: closed forms of the crossing and of its interval, and the paper's statements."""

import numpy as np
import pytest
from scipy import stats

from llm_jax.scaling import fits, stock


def test_two_exponentials_meet_where_they_are_equal():
  assert stock.years(800, 1.0, 100, 2.0) == pytest.approx(3)  # 100 doubles three times
  t = stock.years(500e12, 1.07, 10e12, 2.4)
  assert 500e12 * 1.07**t == pytest.approx(10e12 * 2.4**t)
  told = stock.years([100, 800, 50], [2, 2, 1.0], 100, [1.5, 2.0, 2.0])
  assert told[0] == 0 and told[1] == np.inf and told[2] == pytest.approx(-1)


def test_its_interval_is_the_normal_s_where_the_rates_are_known():
  """The year is then linear in logarithms: mean log(stock / used) / rate, variances added. What is drawn agrees."""
  known = stock.VILLALOBOS._replace(growth=(1.05, 1.05), use_growth=(2.4, 2.4), used=(5e12, 20e12))
  wide = [known.tokens, known.usable, known.epochs, known.used]
  spread = np.sqrt(sum((np.log(b / a) / (2 * stats.norm.ppf(0.975))) ** 2 for a, b in wide))
  log = sum(sign * np.mean(np.log(x)) for x, sign in zip(wide, (1, 1, 1, -1)))
  rate = np.log(2.4 / 1.05)
  expected = 2024 + stats.norm.ppf([0.025, 0.5, 0.975], log / rate, spread / rate)
  found = stock.simulate(known, count=40_000)
  low, high = fits.interval(found)
  np.testing.assert_allclose([low, np.median(found), high], expected, atol=0.06)
  assert stock.exhausted(known) == pytest.approx(expected[1])


def test_the_paper_s_year():
  """Figure 5: 2028 in the median at around 4e14 tokens; section 2.5: five times overtrained, one year earlier."""
  text = stock.VILLALOBOS
  assert int(stock.exhausted(text)) == 2028
  assert stock.effective(text) == pytest.approx(4e14, rel=0.05)
  earlier = stock.exhausted(text) - stock.exhausted(text, overtraining=5.0)
  assert earlier == pytest.approx(1, abs=0.05)
  low, high = fits.interval(stock.simulate(text))
  assert 2026 < low < 2027 and 2031 < high < 2032  # the abstract: between 2026 and 2032
