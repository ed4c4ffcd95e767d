"""The ladder that is shipped: its laws come out of its table again, and the largest run was predicted."""

import json
import pathlib

import pytest

from experiments.scaling_ladder import run
from llm_jax.cli import flags
from llm_jax.scaling import fits, ladder, laws, sweep

FOLDER = pathlib.Path(run.__file__).parent


def shipped(name):
  return json.loads((FOLDER / name).read_text())


@pytest.fixture(scope='module')
def rows():
  return sweep.results(str(FOLDER))


def test_the_fit_is_that_of_the_table(rows):
  told, table = shipped('fit.json'), ladder.read(rows)
  law = fits.parametric(*table[:3], delta=1e-2).law
  assert [told['law'][name][0] for name in law._fields] == pytest.approx(law, rel=1e-3)
  for name, frontier in dict(
    envelope=ladder.envelope(table),
    isoflop=ladder.isoflop(table)[1],
    parametric=laws.frontier(law),
  ).items():
    value, low, high = told['approaches'][name]['a']
    assert value == pytest.approx(frontier.parameters.exponent, rel=1e-3)
    assert low < high
  assert told['agree'] and told['runs'] == len(rows)


def test_the_largest_run_was_predicted_within_two_percent(rows):
  said = shipped('prediction.json')
  (row,) = [json.loads(line) for line in (FOLDER / 'heldout.jsonl').read_text().splitlines()]
  assert (row['parameters'], row['tokens']) == (said['parameters'], said['tokens'])
  assert row['flops'] > 3 * max(one['flops'] for one in rows)
  assert abs(said['loss'] / row['loss'] - 1) < 0.02
  found = ladder.fit(ladder.read(rows), trials=1)  # what was known before
  again = ladder.predict(found, row['parameters'], row['tokens'])
  for name in ('loss', 'parametric', 'isoflop'):
    assert again[name] == pytest.approx(said[name], rel=1e-3)


def test_the_table_is_of_the_config_that_makes_it(rows):
  """Names, sizes and tokens of the shipped runs are those that the command would train."""
  cells = {c.name: c for c in flags.read_sweep([f'--config={run.CONFIG}']).cells}
  assert {row['cell'] for row in rows} <= cells.keys()
  for row in rows:
    recipe = cells[row['cell']].recipe
    assert row['tokens'] == recipe.steps * recipe.source.batch * recipe.source.length
    assert row['parameters'] <= 3_000_000
