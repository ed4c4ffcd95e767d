"""Cells of a sweep with a training that only writes numbers: who trains what, how often, and what the table says."""

import collections
import json
import os
import threading
import time

import jax
import pytest

from llm_jax.core import config, tree
from llm_jax.core.errors import UserError
from llm_jax.scaling import sweep, workers
from tests.cli import tiny_sweep


def cells(count=3):
  return tiny_sweep.get_config(f'seeds={count}').cells


def train(recipe, where, losses=(5.0, 4.0)):
  """What a training leaves behind, without one: 4 rows of 16 tokens a step, 100 tokens a second."""
  lines = [
    {'step': 4, 'tokens': 256, 'tokens_per_second': 100.0, 'loss': 5.1},
    {'step': 4, 'heldout/nats_per_token': losses[0]},
    {'step': 8, 'tokens': 512, 'tokens_per_second': 200.0, 'loss': 4.1},
    {'step': 8, 'heldout/nats_per_token': losses[1], 'heldout/accuracy': 0.5},
  ]
  with open(os.path.join(where, 'metrics.jsonl'), 'w') as f:
    f.write(''.join(json.dumps(line) + '\n' for line in lines))
  with open(os.path.join(where, 'config.json'), 'w') as f:
    f.write(config.to_json(recipe))


def test_every_combination_is_a_cell_with_a_name():
  points = sweep.grid(peak=(1e-3, 0.02), rates=((1, 2), (0.5, 1.5)))
  assert points[1] == dict(peak=1e-3, rates=(0.5, 1.5)) and len(points) == 4
  assert [sweep.name_of(p) for p in points[1:3]] == [
    'peak=0.001,rates=0.5-1.5',
    'peak=0.02,rates=1-2',
  ]
  make = lambda seed: tiny_sweep.make(kind='plain', steps=8, seed=seed)
  found = sweep.cells(make, sweep.grid(seed=(3, 4)))
  assert [(cell.name, cell.recipe.seed) for cell in found.cells] == [('seed=3', 3), ('seed=4', 4)]
  with pytest.raises(UserError, match='two cells are called seed=3'):
    sweep.cells(make, sweep.grid(seed=(3, 3)))

  def deaf(seed):
    c = make(seed)
    with c.unlocked():
      c.hooks = {}
    return c

  with pytest.raises(UserError, match='seed=3 has no loss: add hooks.heldout'):
    sweep.cells(deaf, sweep.grid(seed=(3,)))


def test_a_row_says_what_was_trained(tmp_path):
  """Tokens, seconds and FLOPs by hand; parameters counted on the tree of the model."""
  (cell,) = cells(1)
  sweep.work(str(tmp_path), [cell], train)
  (row,) = sweep.results(str(tmp_path))
  shapes = jax.eval_shape(config.build(cell.recipe.model)().init, jax.random.key(0))
  assert row['parameters'] == tree.count(shapes)
  assert row['non_embedding'] == row['parameters'] - 264 * 16  # tied: the table is all of both
  assert (row['tokens'], row['curve']) == (8 * 4 * 16, [[256, 5.0], [512, 4.0]])
  assert row['seconds'] == round(256 / 100 + 256 / 200, 1) and row['loss'] == 4.0
  assert row['metrics'] == {'heldout/nats_per_token': 4.0, 'heldout/accuracy': 0.5}
  # forward, per token: 4 + 3 matrices of each of two layers, half of 16 keys met twice by 16 numbers, the head
  matrices = 4 * 16 * 16 + 3 * 16 * 32
  forward = 2 * (2 * matrices + 2 * 2 * 16 * 16 / 2) + 2 * 16 * 264
  assert row['flops'] == 3 * forward * 512


def test_many_workers_train_every_cell_once(tmp_path):
  ran, chosen = collections.Counter(), cells(6)
  together = threading.Barrier(4)

  def slow(recipe, where):
    ran[recipe.seed] += 1
    time.sleep(0.02)
    train(recipe, where)

  def worker():
    together.wait()
    sweep.work(str(tmp_path), chosen, slow)
    assert all(sweep.ended(str(tmp_path), cell) == 'done' for cell in chosen)  # none left behind

  threads = [threading.Thread(target=worker) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert ran == dict.fromkeys(range(6), 1)
  names = [row['cell'] for row in sweep.results(str(tmp_path))]
  assert sorted(names) == sorted(cell.name for cell in chosen)
  sweep.work(str(tmp_path), chosen, slow)
  assert sum(ran.values()) == 6  # what is done is done
  os.remove(tmp_path / sweep.TABLE)
  sweep.publish(str(tmp_path))
  assert len(sweep.results(str(tmp_path))) == 6


def test_a_failed_cell_is_told_and_tried_again_only_when_asked(tmp_path):
  folder, chosen, tried = str(tmp_path), cells(3), []

  def fails_first(recipe, where):
    tried.append(recipe.seed)
    if recipe.seed == 1 and len(tried) <= 3:
      raise ValueError('the first\n  line, and more')
    train(recipe, where)

  sweep.work(folder, chosen, fails_first)
  assert [sweep.state(folder, c) for c in chosen] == ['done', 'failed', 'done']
  assert sweep.failures(folder, chosen) == {chosen[1].name: 'ValueError: the first line, and more'}
  sweep.work(folder, chosen, fails_first)
  assert tried == [0, 1, 2]
  assert sweep.forgive(folder, chosen) == 1
  sweep.work(folder, chosen, fails_first)
  assert tried == [0, 1, 2, 1] and len(sweep.results(folder)) == 3


def test_a_stopped_cell_waits_and_a_cell_that_kills_its_process_fails(tmp_path):
  folder, (cell,) = str(tmp_path), cells(1)

  def stopped(recipe, where):
    raise SystemExit(143)

  for _ in range(5):  # as often as one likes: its state is saved
    with pytest.raises(SystemExit):
      sweep.work(folder, [cell], stopped)
    assert sweep.state(folder, cell) == 'waiting'
  where = sweep.place(folder, cell)
  with open(os.path.join(where, 'begun'), 'wb') as f:
    f.write(b'.' * sweep.DEATHS)  # what processes leave that die
  sweep.work(folder, [cell], stopped)
  assert 'died 3 times without a word' in sweep.failures(folder, [cell])[cell.name]
  sweep.forgive(folder, [cell])
  sweep.work(folder, [cell], train)
  assert sweep.state(folder, cell) == 'done'


def test_a_cell_of_another_process_is_left_to_it(tmp_path):
  folder, (cell,) = str(tmp_path), cells(1)
  with sweep.claim(sweep.place(folder, cell)) as mine:
    assert mine and sweep.state(folder, cell) == 'running'
    with sweep.claim(sweep.place(folder, cell)) as theirs:
      assert not theirs
    sweep.work(folder, [cell], train, wait=False)
    assert not os.path.exists(tmp_path / sweep.TABLE)
  assert sweep.state(folder, cell) == 'waiting'


def test_results_of_two_configs_do_not_mix(tmp_path):
  folder, (cell,) = str(tmp_path), cells(1)
  sweep.work(folder, [cell], train)
  other = tiny_sweep.get_config('seeds=1').cells[0]
  other.recipe.optimizer.schedule.peak = 0.5
  sweep.same_config(sweep.place(folder, cell), cell)
  with pytest.raises(UserError, match=r'schedule.peak is 0.01 there, 0.5 here\): choose another'):
    sweep.same_config(sweep.place(folder, other), other)
  with open(tmp_path / sweep.TABLE, 'a') as f:
    f.write('{"cell":')
  with pytest.raises(UserError, match='results.jsonl is damaged'):
    sweep.results(folder)
  with pytest.raises(UserError, match='no results.jsonl in'):
    sweep.results(str(tmp_path / 'nowhere'))


def test_progress_counts_in_flops(tmp_path):
  """A cell of 8 and one of 24 steps: half of the second leaves 3/8 of the work."""
  folder, said = str(tmp_path), []
  short, long = cells(1)[0], tiny_sweep.get_config('seeds=1,steps=24').cells[0]
  progress = workers.Progress(folder, [short, long], said.append)
  assert progress.line().startswith('0 of 2 cells, 0 % of ')
  sweep.work(folder, [short], train)
  os.makedirs(sweep.place(folder, long))
  with open(os.path.join(sweep.place(folder, long), 'metrics.jsonl'), 'w') as f:
    f.write('{"step": 12}\n{"step": 1')
  progress.look()
  assert said[0] == f'{short.name}: loss 4.0000'
  assert said[1].startswith('1 of 2 cells, 62 % of ') and 'ETA 0:00:0' in said[1]
