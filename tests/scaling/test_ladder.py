"""The table of a sweep in a world whose law is known: the three approaches, predictions, the figure, the command."""

import json

import numpy as np
import pytest

from llm_jax.cli import main
from llm_jax.core import config
from llm_jax.core.errors import UserError
from llm_jax.scaling import fits, ladder, laws, sweep

TRUTH = laws.Chinchilla(E=1.2, A=40.0, B=120.0, alpha=0.4, beta=0.4)


def rows(noise=0.002, budgets=5, sizes=5, seed=0, law=TRUTH):
  """Budgets a factor of two apart, sizes around the best of each, curves that lie on the law."""
  rng, found = np.random.default_rng(seed), []
  for c in 1e11 * 2.0 ** np.arange(budgets):
    best = float(laws.power(laws.frontier(law).parameters, c))
    for ratio in np.geomspace(1 / 3, 3, sizes):
      n, d = best * ratio, c / (6 * best * ratio)
      tokens = np.geomspace(d / 10, d, 5)
      loss = laws.chinchilla(law, n, tokens) * (1 + noise * rng.standard_normal(5))
      curve = [list(point) for point in zip(tokens, loss)]
      found.append(dict(cell=f'{c:g}-{ratio:g}', config=dict(budget=c), parameters=n, tokens=d))
      found[-1] |= dict(flops=c, loss=loss[-1], curve=curve)
  return found


@pytest.fixture(scope='module')
def found():
  return ladder.fit(ladder.read(rows(seed=2)), trials=60)


def test_the_three_approaches_find_the_law(found):
  """a = beta / (alpha + beta) = 1/2; k = G 6^-a."""
  assert list(found.estimates) == list(ladder.APPROACHES)
  for name, estimate in found.estimates.items():
    low, high = fits.interval(estimate.draws)[:, 1]
    assert low < 0.5 < high, (name, low, high)
    width = dict(envelope=0.5, isoflop=0.15, parametric=0.1)[name]
    assert high - low < width, (name, low, high)
  assert ladder.agree(found)
  n = ladder.optimum(found.estimates['parametric'], 1e13)['parameters']
  assert n[1] < 1e13**0.5 * (40 / 120) ** 1.25 * 6**-0.5 < n[2]


def test_approaches_that_differ_do_not_agree(found):
  moved = found.estimates['isoflop'].draws + np.array([0, 0.5, 0, -0.5])
  estimates = found.estimates | dict(isoflop=ladder.Estimate(laws.frontier(TRUTH), moved))
  assert not ladder.agree(found._replace(estimates=estimates))


def test_a_larger_run_is_predicted_before_it_is_there(found):
  n, d = 4e5, 6e12 / (6 * 4e5)
  truth = float(laws.chinchilla(TRUTH, n, d))
  said = ladder.predict(found, n, d)
  low, high = said['interval']
  assert low < truth < high and abs(said['parametric'] / truth - 1) < 0.005
  assert said['loss'] == said[said['by']] and said['by'] == found.trusted
  row = dict(cell='largest', parameters=n, tokens=d, loss=truth * 1.01)
  (one,) = ladder.compare(found, [row])
  assert one['error'] == pytest.approx(said['loss'] / (truth * 1.01) - 1)
  best = float(laws.optimum(TRUTH, 6e12).loss)
  assert abs(float(laws.offset(found.lowest, 6e12)) / best - 1) < 0.01


def test_what_extrapolates_within_the_ladder_is_trusted_beyond_it(found):
  """Where the small budgets are worse than the law the parametric fit is led astray, and the back-test says so."""
  assert max(map(abs, found.back.values())) < 0.01
  some = rows(noise=0.0)
  for row in some:
    row['loss'] *= 1 + 0.05 * (1e11 / row['config']['budget']) ** 0.5 * (row['tokens'] < 6e5)
  table = ladder.read(some)
  parabolas = ladder.isoflop(table)[0]
  errors = ladder.backtest(table, parabolas)
  known = table.take(np.flatnonzero(table.budget < 1.6e12))
  law = fits.parametric(*known[:3], delta=1e-2).law
  truth = parabolas[-1].loss
  assert errors['parametric'] == pytest.approx(float(laws.optimum(law, 1.6e12).loss) / truth - 1)
  crooked = found._replace(back=dict(parametric=0.03, isoflop=-0.001))
  assert crooked.trusted == 'isoflop'
  assert ladder.predict(crooked, 4e5, 2.5e6)['loss'] == ladder.predict(found, 4e5, 2.5e6)['isoflop']


def test_a_budget_without_a_lowest_point_is_left_out():
  some = rows(noise=0.0)
  table = ladder.read(
    [row for i, row in enumerate(some) if not (i < 5 and i >= 2)]
  )  # two sizes left
  parabolas, frontier = ladder.isoflop(table)
  assert len(parabolas) == 4 and abs(frontier.parameters.exponent - 0.5) < 0.01
  with pytest.raises(UserError, match='fewer than two budgets have a lowest point'):
    ladder.isoflop(ladder.read([row for i, row in enumerate(some) if i % 5 < 2]))


def test_a_table_without_budgets_is_grouped_by_compute():
  some = rows()
  for row in some:
    row['config'] = dict(width=3)
  assert len(np.unique(ladder.read(some).budget)) == 5
  with pytest.raises(UserError, match='7 finished cells with 2 budgets are too few'):
    ladder.fit(ladder.read(some[:7]))


def test_the_command_writes_numbers_figure_and_config(tmp_path, capsys):
  def table(folder, some):
    folder.mkdir(exist_ok=True)
    (folder / sweep.TABLE).write_text(''.join(json.dumps(row) + '\n' for row in some))

  table(tmp_path, rows(seed=2))
  largest = dict(rows(noise=0)[-1], parameters=4e5, tokens=2.5e6, cell='largest')
  largest['loss'] = float(laws.chinchilla(TRUTH, 4e5, 2.5e6))
  table(tmp_path / 'held', [largest])
  told = ['--budget=6e12', '--devices=4', '--trials=30', f'--heldout={tmp_path}/held']
  assert (
    main.main(
      ['fit', str(tmp_path), '--config=configs/scaling/isoflop.py:budgets=1,sizes=1', *told]
    )
    == 0
  )
  out = capsys.readouterr().out
  assert 'the intervals of a overlap' in out and 'was predicted, ' in out
  assert f'llm-jax train --config={tmp_path}/optimal.json' in out
  with open(tmp_path / 'fit.json') as f:
    fit = json.load(f)
  assert fit['agree'] and fit['runs'] == 25 and abs(fit['heldout'][0]['error']) < 0.01
  assert fit['law']['alpha'][1] < 0.4 < fit['law']['alpha'][2]
  c = config.read(str(tmp_path / 'optimal.json'))
  assert c.source.batch % 4 == 0 and c.mesh.data == 4
  spent = fit['optimum']
  assert 6 * spent['parameters'] * spent['tokens'] == pytest.approx(6e12)
  assert (tmp_path / 'fit.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
