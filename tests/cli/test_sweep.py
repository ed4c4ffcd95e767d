"""`llm-jax sweep` with real trainings of seconds: by two processes at once, killed, failing, by index."""

import json

import pytest

from llm_jax.cli import main
from llm_jax.core.errors import UserError
from llm_jax.scaling import sweep, workers
from tests.cli import tiny_sweep

CONFIG = tiny_sweep.__file__


def command(folder, *more, kind='plain', seeds=2):
  return ['sweep', f'--config={CONFIG}:{kind},seeds={seeds}', f'--workdir={folder}', *more]


def rows(folder):
  return [row['config']['seed'] for row in sweep.results(str(folder))]


def test_two_workers_one_killed_and_a_cell_that_fails(tmp_path, capfd):
  """kill -9 in the middle of a cell: another process goes on from its checkpoint; nothing is lost or run twice."""
  told = command(tmp_path, kind='troubled', seeds=3)
  assert main.main([*told, '--workers=2']) == 1
  out, err = capfd.readouterr()
  assert '3 of 3 cells, 100 % of' in out and '2 of 3 cells are done' in out
  assert "seed=1 failed: there is no split 'nowhere'; known: train, validation" in err
  assert rows(tmp_path) == [0, 2]
  killed, plain = (
    (tmp_path / f'cells/kind=troubled,steps=8,seed={seed}/log.txt').read_text().split('=== ')[1:]
    for seed in (0, 2)
  )
  assert len(killed) == 2 and len(plain) == 1  # how often each was begun
  assert 'step 1/8' in killed[0] and 'step 5/8' in killed[1] and 'step 1/8' not in killed[1]
  assert [row['curve'][-1][0] for row in sweep.results(str(tmp_path))] == [512, 512]
  # what is done stays done; what failed is told, and tried when asked
  assert main.main([*told, '--index=0']) == 0 and 'step' not in capfd.readouterr().out
  assert main.main([*told, '--list']) == 0
  listed = capfd.readouterr().out.splitlines()
  assert [line.split()[4].strip(',') for line in listed[:3]] == ['done', 'failed', 'done']
  assert main.main([*told, '--index=1']) == 1
  assert main.main([*told, '--index=1', '--retry']) == 1
  assert '1 failed cells are tried again' in capfd.readouterr().out


def test_a_worker_that_is_stopped_before_its_last_row_is_in_the_table(tmp_path, monkeypatch):
  def run(folder, cells, command, *, count):
    for i, cell in enumerate(cells):
      where = tmp_path / 'cells' / cell.name
      where.mkdir(parents=True)
      row = dict(cell=cell.name, config=cell.arguments, flops=i)
      (where / 'result.json').write_text(json.dumps(row))
    return {}

  monkeypatch.setattr(workers, 'run', run)
  assert main.main(command(tmp_path)) == 0
  assert rows(tmp_path) == [0, 1]


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys):
  def error(*words):
    assert main.main(list(words)) == 2
    return capsys.readouterr().err

  assert 'the sweep has the cells 0 to 1' in error(*command(tmp_path, '--index=2'))
  assert 'is the config of one training: run it with llm-jax train' in error(
    'sweep', '--config=configs/quickstart.py', f'--workdir={tmp_path}'
  )
  assert 'is a sweep of many configs: run it with llm-jax sweep' in error(
    'train', f'--config={CONFIG}', f'--workdir={tmp_path}'
  )
  assert "no key 'stepps'; did you mean 'steps'?" in error(*command(tmp_path, '--config.stepps=3'))
  assert 'no results.jsonl' in error('fit', str(tmp_path / 'nothing'))
  with open(tmp_path / sweep.TABLE, 'w') as f:
    row = dict(cell='a', config={}, parameters=9.0, tokens=9.0, loss=2.0, curve=[[9, 2.0]])
    f.write(json.dumps(row) + '\n')
  assert '1 finished cells with 1 budgets are too few' in error('fit', str(tmp_path))
  with pytest.raises(UserError, match='no cells'):
    sweep.cells(tiny_sweep.make, [])
