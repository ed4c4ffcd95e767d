"""The sums of experiments/grokking, and that its shipped curves say what its README says."""

import json
import pathlib

import numpy as np

from experiments.grokking import run

SHIPPED = pathlib.Path(run.__file__).with_name('results.json')


def test_every_sum_is_right_and_in_one_of_the_parts():
  seen, unseen = run.sums(7, 0.4)
  both = [np.concatenate([seen[k], unseen[k]]) for k in ('inputs', 'targets', 'weights')]
  inputs, targets, weights = both
  assert len(seen['inputs']) == 19 and len({tuple(x) for x in inputs[:, :2]}) == 49
  np.testing.assert_array_equal(inputs[:, :2].sum(1) % 7, targets[:, 2])
  assert (inputs[:, 2] == 7).all() and (weights == [0, 0, 1]).all()


def test_the_shipped_runs_generalise_late_and_with_weight_decay_only():
  runs = json.loads(SHIPPED.read_text())
  assert {one['decay'] for one in runs} == {0.0, 1.0}
  for one in runs:
    curve, told = one['curve'], one['reached']
    for part, at in told.items():
      late = np.array(curve['step'])[np.array(curve[part]) >= run.ENOUGH]
      assert (late[0] if len(late) else None) == at
    if one['decay']:
      assert told['validation'] > 5 * told['train']
    else:
      assert told['train'] and told['validation'] is None
  assert run.table(runs) in SHIPPED.with_name('README.md').read_text()
