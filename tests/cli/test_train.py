"""`llm-jax train` as a user runs it: killed, interrupted, resumed, on several processes, given wrong input."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax.cli import main
from llm_jax.core import config, tree
from llm_jax.train import checkpoint
from tests.variants import variants

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIG = os.path.join(HERE, 'tiny.py')
TIMES = ('seconds', 'tokens_per_second', 'mfu', 'time')  # what may differ between equal runs


def environment(devices=1, **extra):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  return (
    env | {'PYTHONPATH': os.path.dirname(os.path.dirname(HERE)), 'PYTHONUNBUFFERED': '1'} | extra
  )


def start(workdir, *overrides, config=CONFIG, devices=1, **env):
  command = [
    sys.executable,
    '-m',
    'llm_jax.cli.main',
    'train',
    f'--config={config}',
    f'--workdir={workdir}',
    *overrides,
  ]
  return subprocess.Popen(
    command,
    env=environment(devices, **env),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=os.path.dirname(str(workdir)),
  )


@pytest.mark.slow
def test_every_command_is_a_module_too(tmp_path):
  """`python -m llm_jax.cli.train` is `llm-jax train`, for launchers that want a module."""
  for command in main.COMMANDS:
    done = subprocess.run(
      [sys.executable, '-m', f'llm_jax.cli.{command}', '--hlep=x'],
      env=environment(),
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 2 and 'llm-jax: error: no flag --hlep' in done.stderr, done


def run(workdir, *overrides, expect=0, **kw):
  process = start(workdir, *overrides, **kw)
  out, err = process.communicate(timeout=300)
  assert process.returncode == expect, (
    f'exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}'
  )
  return out, err


def metrics(workdir):
  """{step: metrics that do not depend on the clock} from metrics.jsonl; several lines of a step are merged."""
  found = {}
  with open(os.path.join(workdir, 'metrics.jsonl')) as f:
    for line in f:
      row = json.loads(line)
      kept = {k: v for k, v in row.items() if not any(t in k for t in TIMES)}
      found.setdefault(row['step'], {}).update(kept)
  return found


def parameters(workdir):
  """The parameters of the newest checkpoint, as numpy by path."""
  model = config.build(config.read(f'{workdir}/config.json').model)()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  found = tree.flatten(checkpoint.load_params(str(workdir), shapes))
  return {name: np.asarray(x) for name, x in found.items()}


def assert_same_run(found, wanted, rtol=0.0):
  found_metrics, wanted_metrics = metrics(found), metrics(wanted)
  assert sorted(found_metrics) == sorted(wanted_metrics)
  for step, row in wanted_metrics.items():
    assert sorted(found_metrics[step]) == sorted(row)
    for name, value in row.items():
      np.testing.assert_allclose(
        found_metrics[step][name], value, rtol=rtol, err_msg=f'{name} at step {step}'
      )
  got, want = parameters(found), parameters(wanted)
  assert sorted(got) == sorted(want)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run that nobody disturbed, and what it printed."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  return workdir, run(workdir)[0]


def test_a_run_leaves_what_it_promises(finished):
  workdir, out = finished
  for name in (
    'config.json',
    'metrics.jsonl',
    'samples.txt',
    'vocab',
    'checkpoints',
    'tensorboard',
  ):
    assert (workdir / name).exists(), name
  rows = metrics(workdir)
  assert sorted(rows) == list(range(1, 9)) or sorted(rows) == list(range(9))
  assert all(np.isfinite(rows[s]['loss']) for s in range(1, 9))
  assert 0 < rows[8]['heldout/bits_per_byte'] < rows[4]['heldout/bits_per_byte'] < 9
  assert 'Finished: step 8 of 8' in out and 'llm-jax generate' in out and 'bits per byte' in out


def test_run_again_says_that_it_is_finished(finished):
  workdir, _ = finished
  before = (workdir / 'metrics.jsonl').read_text()
  out, _ = run(workdir)
  assert 'Finished: step 8 of 8' in out
  assert (workdir / 'metrics.jsonl').read_text() == before


def kill_at(workdir, moment):
  """Starts a run and kills it -9 when `moment(workdir)` says so; True if it was still running."""
  process = start(workdir)
  while process.poll() is None and not moment(workdir):
    time.sleep(0.002)
  alive = process.poll() is None
  process.kill()
  process.communicate()
  return alive


def steps_written(workdir):
  path = os.path.join(workdir, 'metrics.jsonl')
  return open(path).read().count('"loss"') if os.path.exists(path) else 0


def saving(workdir):
  """A checkpoint of step 4 or later is being written right now."""
  folder = os.path.join(workdir, 'checkpoints')
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return any('tmp' in name and not name.startswith(('0.', '2.')) for name in names)


def after(steps, pause):
  def moment(workdir):
    if steps_written(workdir) < steps:
      return False
    time.sleep(pause)
    return True

  return moment


MOMENTS = dict(
  early=after(1, 0.0),
  middle=after(3, random.Random(1).uniform(0, 0.1)),
  late=after(6, random.Random(2).uniform(0, 0.1)),
  during_a_save=saving,
)


# during a save: tests/train/test_checkpoint.py, tests/cli/test_killed.py
@pytest.mark.parametrize('name', variants(MOMENTS, ['middle']))
def test_kill_9_and_run_again_is_bit_exact(name, finished, tmp_path):
  workdir = tmp_path / 'run'
  kill_at(workdir, MOMENTS[name])
  run(workdir)
  assert_same_run(workdir, finished[0])


@pytest.mark.parametrize('sent', variants([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM]))
def test_a_signal_saves_and_says_how_to_go_on(sent, finished, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, '--config.steps=5000', '--config.checkpoint.every=5000')
  while process.poll() is None and steps_written(workdir) < 3:
    time.sleep(0.01)
  process.send_signal(sent)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 128 + sent, err
  assert 'same command' in out + err and 'Traceback' not in err
  stopped = max(metrics(workdir))
  assert 3 <= stopped < 5000
  assert parameters(workdir)
  assert (workdir / 'checkpoints' / str(stopped)).is_dir()


def test_resume_on_another_mesh(finished, tmp_path):
  """Stopped on one device, taken up by four (two of them tensor-parallel): equal to 1e-6."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  for step in (6, 8):  # as if it had been stopped at 4
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
  kept = [line for line in lines if json.loads(line)['step'] <= 4]
  (workdir / 'metrics.jsonl').write_text(''.join(kept))
  run(workdir, '--config.mesh.data=2', '--config.mesh.tensor=2', devices=4)
  found, wanted = metrics(workdir), metrics(finished[0])
  for step in range(5, 9):
    np.testing.assert_allclose(found[step]['loss'], wanted[step]['loss'], rtol=1e-6)
  got, want = parameters(workdir), parameters(finished[0])
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def run_two(workdir, *overrides):
  """Two processes of one device each, connected by jax.distributed."""
  address = f'127.0.0.1:{free_port()}'
  processes = [
    start(
      workdir,
      '--config.mesh.data=2',
      *overrides,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f'{out[-1000:]}\n{err[-3000:]}'


@pytest.mark.slow  # the next test has two processes too
def test_two_processes_equal_one(finished, tmp_path):
  workdir = tmp_path / 'run'
  run_two(workdir)
  assert_same_run(workdir, finished[0], rtol=2e-5)


@pytest.mark.slow  # the batches of it: tests/data/test_pipeline.py
def test_resume_with_another_number_of_processes(finished, tmp_path):
  """Two processes for four steps, then one: the same global batches, so the same run."""
  workdir = tmp_path / 'run'
  run_two(workdir, '--config.steps=4')
  run(workdir)
  found, wanted = metrics(workdir), metrics(finished[0])
  for step in range(1, 9):
    np.testing.assert_allclose(found[step]['loss'], wanted[step]['loss'], rtol=2e-5)


# --- wrong input -------------------------------------------------------------------------------------

BAD_FLAGS = {
  'no config': ((), 'name one config file', dict(config='')),
  'missing config file': ((), 'no config file', dict(config='configs/quikstart.py')),
  'unknown flag': (('--wrkdir=x',), "did you mean 'workdir'", {}),
  'unknown key': (('--config.modl.embed=3',), "did you mean 'model'", {}),
  'unknown nested key': (('--config.model.embd=3',), "did you mean 'embed'", {}),
  'unknown key in a block': (('--config.model.block.mixer.head=3',), "did you mean 'heads'", {}),
  'wrong type': (('--config.steps=many',), 'must be int', {}),
  'wrong type in a mesh': (('--config.mesh.data=two',), 'must be int', {}),
  'a group set to a number': (('--config.model=3',), 'is a group of settings', {}),
  'a missing value': (('--config.steps',), 'has no value', {}),
  'a stray argument': (('steps=3',), 'unexpected argument', {}),
  'a function that is not there': (
    ('--config.objective=llm_jax.objectives.language:next_tokn',),
    "did you mean 'next_token'",
    {},
  ),
  'a mesh larger than the machine': (('--config.mesh.data=64',), 'this machine has 8', {}),
  'a mesh of size zero': (('--config.mesh.data=0',), 'sizes are positive', {}),
  'a batch that does not divide over the mesh': (('--config.mesh.data=3',), 'multiple of 3', {}),
  'a batch that does not divide into microbatches': (
    ('--config.microbatches=3',),
    'divisor of 4',
    {},
  ),
  'heads that do not divide the width': (
    ('--config.model.block.mixer.heads=3',),
    'does not divide by heads=3',
    {},
  ),
  'heads that do not divide over tensor': (
    ('--config.mesh.tensor=4',),
    'of size 2 does not divide',
    {},
  ),
  'an axis that is not there': (('--config.axes.weights.embed=fspd',), "did you mean 'fsdp'", {}),
  'a vocabulary that does not fit the model': (
    ('--config.model.vocab=100',),
    'set model.vocab=262',
    {},
  ),
  'a negative learning rate': (('--config.optimizer.schedule.peak=-1.0',), 'peak', {}),
  'a trainable regex that matches nothing': (
    ('--config.trainable=lora',),
    'matches no parameter',
    {},
  ),
  'a text file that is not there': (
    ('--config.source.task.train=("nowhere.txt",)',),
    'nowhere.txt',
    {},
  ),
  'a held-out fraction of one': (('--config.source.task.heldout=1.5',), 'heldout', {}),
  'an init_from without checkpoints': (('--config.init.init_from=nowhere',), 'nowhere', {}),
  'an unknown remat policy': (('--config.model.runner.remat=some',), 'no remat policy', {}),
  'an unknown dtype': (('--config.model.dtype=float31',), "did you mean 'float32'", {}),
}


def assert_one_line(err, message):
  lines = [line for line in err.splitlines() if line.startswith('llm-jax: error:')]
  assert len(lines) == 1 and 'Traceback' not in err, err
  assert message in lines[0], lines[0]


def refuse(capfd, workdir, *overrides, config=CONFIG):
  """The error of a command that must be refused, run in this process."""
  code = main.main(['train', f'--config={config}', f'--workdir={workdir}', *overrides])
  err = capfd.readouterr().err
  assert code == 2, err
  return err


@pytest.mark.parametrize('name', BAD_FLAGS)
def test_wrong_input_gets_one_line(name, tmp_path, capfd):
  overrides, message, kw = BAD_FLAGS[name]
  assert_one_line(refuse(capfd, tmp_path / 'run', *overrides, **kw), message)


def test_an_unknown_command(capfd):
  assert main.main(['trian']) == 2
  assert_one_line(capfd.readouterr().err, "did you mean 'train'")


def test_no_workdir(capfd):
  assert main.main(['train', f'--config={CONFIG}']) == 2
  assert_one_line(capfd.readouterr().err, '--workdir')


def test_a_workdir_that_is_a_file(tmp_path, capfd):
  (tmp_path / 'file').write_text('')
  assert_one_line(refuse(capfd, tmp_path / 'file'), 'choose another folder')


def test_an_empty_text(tmp_path, capfd):
  (tmp_path / 'empty.txt').write_text('')
  assert_one_line(
    refuse(capfd, tmp_path / 'run', f'--config.source.task.train=("{tmp_path}/empty.txt",)'),
    'empty',
  )


def test_a_text_that_is_not_utf8(tmp_path, capfd):
  (tmp_path / 'latin.txt').write_bytes('déjà vu '.encode('latin-1') * 100)
  assert_one_line(
    refuse(capfd, tmp_path / 'run', f'--config.source.task.train=("{tmp_path}/latin.txt",)'),
    'UTF-8',
  )


def test_a_context_longer_than_a_learned_table(tmp_path, capfd):
  overrides = (
    '--config.model.positions=llm_jax.model.positions:Learned',
    '--config.source.length=32',
  )
  assert_one_line(refuse(capfd, tmp_path / 'run', *overrides), 'length')


def train(workdir, *overrides):
  """In this process, which spares imports."""
  assert main.main(['train', f'--config={CONFIG}', f'--workdir={workdir}', *overrides]) == 0


def test_a_checkpoint_of_another_model_is_named_and_kept(tmp_path, capfd):
  workdir = tmp_path / 'run'
  train(workdir, '--config.steps=2')
  before = (workdir / 'config.json').read_text()
  assert_one_line(refuse(capfd, workdir, '--config.model.embed=32'), 'workdir')
  assert (workdir / 'config.json').read_text() == before
  train(workdir, '--config.steps=4')  # nothing was lost


@pytest.mark.slow
def test_a_full_disk(tmp_path):
  """A limit on the size of files stands in for the disk: the error is one line and the good checkpoint stays."""
  workdir = tmp_path / 'run'
  train(workdir, '--config.steps=2')
  code = (
    'import resource, signal, sys\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n'
    'from llm_jax.cli.main import main\n'
    f'sys.exit(main(["train", "--config={CONFIG}", "--workdir={workdir}", "--config.steps=4"]))\n'
  )
  env = environment(JAX_ENABLE_COMPILATION_CACHE='false')
  done = subprocess.run(
    [sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 2, done.stderr[-3000:]
  assert_one_line(done.stderr, 'large')
  train(workdir, '--config.steps=4')


def test_distributed_variables_without_a_number(tmp_path, capfd, monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '127.0.0.1:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  assert_one_line(refuse(capfd, tmp_path / 'run'), 'JAX_NUM_PROCESSES')
