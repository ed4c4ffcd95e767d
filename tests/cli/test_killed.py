"""Tuning and alignment killed -9 while answers are written and scored, while learning, while saving: run again, the
same command ends with the same parameters, to the last bit."""

import functools
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jax.cli import main
from llm_jax.core import config, tree
from llm_jax.train import checkpoint
from tests.cli import killed
from tests.cli.test_train import metrics

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KINDS = ('sft', 'dpo', 'packed', 'reward', 'ppo', 'grpo')
MOMENTS = ('read', 'learn', 'save')
FAST = dict(sft='save', ppo='learn')
CASES = [
  pytest.param(kind, moment, marks=[] if FAST.get(kind) == moment else pytest.mark.slow)
  for kind in KINDS
  for moment in MOMENTS
]


def command(kind, workdir, run):
  told = f'kind={kind},run={run}' if kind in killed.DRAWN else f'kind={kind}'
  return ['train', f'--config={killed.__file__}:{told}', f'--workdir={workdir}']


def parameters(workdir):
  model = config.build(config.read(f'{workdir}/config.json').model)()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return tree.flatten(checkpoint.load_params(str(workdir), shapes))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """kind -> (the folder of a run that nobody disturbed, the folder of the one it starts from)."""
  folder = tmp_path_factory.mktemp('whole')

  @functools.cache
  def made(kind):
    start = made('start')[0] if kind in killed.DRAWN else ''
    assert main.main(command(kind, folder / kind, start)) == 0
    return folder / kind, start

  return made


@pytest.mark.parametrize(('kind', 'moment'), CASES)
def test_killed_and_run_again_is_bit_exact(kind, moment, whole, tmp_path):
  wanted, start = whole(kind)
  told = command(kind, tmp_path / 'run', start)
  done = subprocess.run(
    [sys.executable, '-m', 'tests.cli.killed', moment, *told],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  saved = [int(name) for name in os.listdir(tmp_path / 'run/checkpoints') if name.isdigit()]
  assert max(saved) in ((2,) if moment == 'save' else (2, 4)), saved
  assert main.main(told) == 0
  got, want = parameters(tmp_path / 'run'), parameters(wanted)
  assert sorted(got) == sorted(want)
  for name in want:
    np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), err_msg=name)
  assert metrics(tmp_path / 'run') == metrics(wanted)


def test_the_recorder_names_what_is_wrong_in_a_real_run(whole):
  """The policies here are too young to be ever right: no answer earns anything."""
  rows = metrics(whole('ppo')[0])
  assert any('rl/diagnosis/constant_reward' in row for row in rows.values())
