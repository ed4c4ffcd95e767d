"""Hooks: what they write and when, with a toy model; what happens around NaN, spikes and signals."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import files
from llm_jax.core import metrics as metrics_lib
from llm_jax.core.errors import UserError
from llm_jax.core.metrics import Writer
from llm_jax.train import hooks, loop, picture, report
from llm_jax.train.checkpoint import Saver
from llm_jax.train.guards import Diverged, rewind_on_spike, stop_on_nan
from llm_jax.train.hooks import Run
from llm_jax.train.preemption import Stopped, preemption
from llm_jax.train.state import State

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = types.SimpleNamespace(card=types.SimpleNamespace(vocab=8))
VOCAB = types.SimpleNamespace(size=6, text_bytes=np.array([0, 0, 1, 2, 3, 7]))


class Source:
  """x = (position % 7) - 3 in every batch, except at the positions in `poison`."""

  vocab = VOCAB

  def __init__(self, poison=None):
    self.position, self.poison = 0, poison or {}

  def __call__(self, state):
    x = self.poison.get(self.position, self.position % 7 - 3.0)
    self.position += 1
    return dict(x=np.full(3, x, np.float32))

  def state(self):
    return dict(position=self.position)

  def restore(self, saved):
    self.position = saved['position']

  def skip(self, batches):
    self.position += batches


def make():
  return State(jnp.zeros((), jnp.int32), dict(a=jnp.zeros(2), w=jnp.zeros(3)), dict(m=jnp.zeros(3)))


@jax.jit
def step_fn(state, batch, key):
  def loss(params):
    return ((params['w'] - batch['x'].mean()) ** 2).mean() + (params['a'] ** 2).sum()

  value, grads = jax.value_and_grad(loss)(state.params)
  params = jax.tree.map(lambda p, g: p - 0.05 * g, state.params, grads)
  m = 0.9 * state.opt_state['m'] + grads['w']
  norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
  return State(state.step + 1, params, dict(m=m)), dict(
    loss=value, grad_norm=norm, weight=jnp.float32(3)
  )


update = jax.jit(step_fn, donate_argnums=0)


def train(workdir, steps, *factories, source=None, every=5, keep=3, log=1):
  """The command's own order of things. Returns (last state, run)."""
  source = source or Source()
  writer = Writer(str(workdir), every=log, steps=steps)
  with Saver(str(workdir), every=every, keep=keep, steps=steps) as saver:
    state = saver.restore(make(), source, writer)
    run = Run(MODEL, source, saver, writer, str(workdir), steps)
    made = [factory(run) for factory in factories]
    state = loop.train(
      state, source, update, steps=steps, key=jax.random.key(0), hooks=[writer, *made, saver.hook]
    )
  writer.close()
  return state, run


def lines(workdir):
  read = files.lines(os.path.join(workdir, metrics_lib.FILE))
  return [{k: v for k, v in line.items() if not metrics_lib.TIMING.search(k)} for line in read]


def by(factory, **kw):
  return lambda run: factory(run, **kw)


# --- evaluate -------------------------------------------------------------------------------------------


def batches():
  rng = np.random.default_rng(0)
  targets = rng.integers(0, 6, (3, 4, 5)).astype(np.int32)
  weights = (rng.random((3, 4, 5)) < 0.7).astype(np.float32)
  weights[2, 2:] = 0  # padding of the last batch
  return [dict(inputs=t, targets=t, weights=w) for t, w in zip(targets, weights, strict=True)]


class HeldOut:
  vocab = VOCAB

  def __init__(self, made):
    self.made = made

  def once(self):
    return iter(self.made)


def objective(model, params, batch, rng):
  """Costs w[0] + target nats; the loss has an extra term that evaluation must not count."""
  assert rng is None
  nats = (params['w'][0] + batch['targets']) * batch['weights']
  weight = batch['weights'].sum()
  parts = dict(nats=nats.sum(), accuracy=(batch['targets'] == 2).astype(jnp.float32).sum())
  return types.SimpleNamespace(sum=nats.sum() + 100.0, weight=weight, metrics=parts)


def fake_run(workdir, steps=10):
  writer = Writer(str(workdir), every=1)
  return Run(MODEL, Source(), None, writer, str(workdir), steps)


def test_evaluate_is_the_formula(tmp_path, capsys):
  run = fake_run(tmp_path)
  hook = hooks.evaluate(run, source=lambda model: HeldOut(batches()), objective=objective, every=4)
  hook(8, make().replace(params=dict(w=jnp.full(3, 0.5))), {})
  (line,) = lines(tmp_path)
  targets = np.concatenate([b['targets'] for b in batches()])
  weights = np.concatenate([b['weights'] for b in batches()])
  nats, size = ((0.5 + targets) * weights).sum(), VOCAB.text_bytes[targets][weights > 0].sum()
  assert line['step'] == 8
  assert line['heldout/nats_per_token'] == pytest.approx(nats / weights.sum(), rel=1e-6)
  assert line['heldout/perplexity'] == pytest.approx(math.exp(nats / weights.sum()), rel=1e-5)
  assert line['heldout/bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
  assert line['heldout/accuracy'] == pytest.approx((targets == 2).sum() / weights.sum(), rel=1e-6)
  assert 'bits per byte' in capsys.readouterr().out


def test_evaluate_may_stop_after_some_batches(tmp_path):
  drawn = []
  made = HeldOut(drawn.append(len(drawn)) or batch for batch in batches())
  hook = hooks.evaluate(
    fake_run(tmp_path), source=lambda model: made, objective=objective, every=4, batches=2
  )
  hook(4, make().replace(params=dict(w=jnp.zeros(3))), {})
  (line,) = lines(tmp_path)
  targets, weights = (np.stack([b[k] for b in batches()[:2]]) for k in ('targets', 'weights'))
  assert line['heldout/nats_per_token'] == pytest.approx(
    (targets * weights).sum() / weights.sum(), rel=1e-6
  )
  assert drawn == [0, 1]


@pytest.mark.parametrize(('stride', 'most', 'read'), [(2, None, [0, 2]), (2, 1, [0]), (3, 2, [0])])
def test_evaluate_may_read_a_stride_of_the_batches(stride, most, read, tmp_path):
  hook = hooks.evaluate(
    fake_run(tmp_path),
    source=lambda model: HeldOut(batches()),
    objective=objective,
    every=4,
    stride=stride,
    batches=most,
  )
  hook(4, make().replace(params=dict(w=jnp.zeros(3))), {})
  (line,) = lines(tmp_path)
  targets, weights = (np.stack([batches()[i][k] for i in read]) for k in ('targets', 'weights'))
  assert line['heldout/nats_per_token'] == pytest.approx(
    (targets * weights).sum() / weights.sum(), rel=1e-6
  )


def test_evaluate_without_weights_counts_everything(tmp_path):
  made = [{k: v for k, v in b.items() if k != 'weights'} for b in batches()]

  def plain(model, params, batch, rng):
    return types.SimpleNamespace(
      sum=jnp.float32(8.0),
      weight=jnp.float32(batch['targets'].size),
      metrics=dict(nats=jnp.float32(7.0)),
    )

  hooks.evaluate(fake_run(tmp_path), source=lambda model: HeldOut(made), objective=plain, every=1)(
    1, make(), {}
  )
  size = VOCAB.text_bytes[np.stack([b['targets'] for b in made])].sum()
  assert lines(tmp_path)[0]['heldout/bits_per_byte'] == pytest.approx(21.0 / math.log(2) / size)


def test_evaluate_of_pairs_is_loss_and_metrics_per_pair(tmp_path, capsys):
  def compare(model, params, batch, rng):
    there = (batch['chosen/weights'] > 0).astype(jnp.float32)
    right = (batch['margin'] > 0) * there
    total = (batch['margin'] * there).sum()
    return types.SimpleNamespace(sum=total, weight=there.sum(), metrics=dict(accuracy=right.sum()))

  margins, there = np.float32([[1, -2, 3], [4, -5, 9]]), np.float32([[1, 1, 1], [1, 1, 0]])
  made = [{'margin': m, 'chosen/weights': w} for m, w in zip(margins, there, strict=True)]
  run = fake_run(tmp_path)
  hooks.evaluate(run, source=lambda model: HeldOut(made), objective=compare, every=1)(1, make(), {})
  (line,) = lines(tmp_path)
  found = {key: line[f'heldout/{key}'] for key in ('loss', 'accuracy', 'count')}
  assert found == pytest.approx(dict(loss=1 / 5, accuracy=3 / 5, count=5))
  assert not any('bits' in key or 'nats' in key for key in line)
  assert 'heldout loss 0.2000, accuracy 0.6000 of 5' in capsys.readouterr().out
  run.writer.write(2, {f'heldout/{key}': value for key, value in found.items()})
  for step in (1, 2):
    run.writer.write(step, dict(loss=1.0 / step, tokens=100 * step))
  assert picture.draw(str(tmp_path)).endswith('loss.png')


@pytest.mark.parametrize(
  ('more', 'said'),
  [
    ({}, 'held-out pairs: 75.0 % in the right order'),
    ({'heldout/label_nll': 0.4}, 'held-out texts: 75.0 % in the right class'),
  ],
)
def test_the_end_of_a_run_tells_pairs_from_classes(tmp_path, more, said):
  run = fake_run(tmp_path)
  for step in (1, 2):
    values = {'loss': 1.0 / step, 'tokens': 100 * step, 'heldout/accuracy': 0.75}
    run.writer.write(step, values | more)
  told = report.summary(str(tmp_path), 2, 2)
  assert said in told
  assert ('llm-jax generate' in told) == (not more)  # an encoder writes nothing
  assert picture.draw(str(tmp_path))


def test_evaluate_uses_the_average_of_the_parameters(tmp_path):
  state = make().replace(params=dict(w=jnp.ones(3)), opt_state=dict(ema=dict(w=jnp.full(3, 5.0))))
  hook = hooks.evaluate(
    fake_run(tmp_path), source=lambda model: HeldOut(batches()), objective=objective, every=1
  )
  hook(1, state, {})
  w = lines(tmp_path)[0]['heldout/nats_per_token']
  hook(2, state.replace(opt_state=()), {})
  assert w - lines(tmp_path)[1]['heldout/nats_per_token'] == pytest.approx(4.0, rel=1e-5)


def test_evaluate_is_due_at_multiples_and_at_the_end(tmp_path):
  hook = hooks.evaluate(
    fake_run(tmp_path), source=lambda model: HeldOut(batches()), objective=objective, every=4
  )
  for step in range(11):
    hook(step, make(), {})
  assert [line['step'] for line in lines(tmp_path)] == [4, 8, 10]


def test_evaluate_on_a_mesh_is_the_same(tmp_path):
  from llm_jax.core import mesh

  with jax.set_mesh(mesh.make(data=2, fsdp=2)), mesh.rules(**mesh.ZERO3):
    hook = hooks.evaluate(
      fake_run(tmp_path), source=lambda model: HeldOut(batches()), objective=objective, every=1
    )
    hook(1, make(), {})
  hooks.evaluate(
    fake_run(tmp_path), source=lambda model: HeldOut(batches()), objective=objective, every=1
  )(2, make(), {})
  one, two = lines(tmp_path)
  assert one | dict(step=0) == pytest.approx(two | dict(step=0), rel=1e-6)


def test_held_out_data_without_targets_is_an_error(tmp_path):
  hook = hooks.evaluate(
    fake_run(tmp_path), source=lambda model: HeldOut([]), objective=objective, every=1
  )
  with pytest.raises(UserError, match='another split'):
    hook(1, make(), {})


# --- sample, profile, plot ------------------------------------------------------------------------------


def generate(model, params, vocab, prompts, key):
  assert vocab is VOCAB
  return [f'{prompt.lower()} {float(params["w"][0]):.3f}' for prompt in prompts]


def test_samples_come_at_their_fractions_and_before_the_first_step(tmp_path, capsys):
  train(tmp_path, 20, by(hooks.sample, generate=generate, prompts=('ROMEO:', 'JULIET:')))
  text = (tmp_path / 'samples.txt').read_text()
  assert re.findall(r'^=== step (\d+) of 20 \((\d+) %\)', text, re.M) == [
    ('0', '0'),
    ('2', '10'),
    ('6', '30'),
    ('20', '100'),
  ]
  assert text.startswith(
    '=== step 0 of 20 (0 %) ===\nROMEO:romeo: 0.000\n---\nJULIET:juliet: 0.000\n---\n'
  )
  assert 'JULIET:juliet:' in capsys.readouterr().out


def test_a_resumed_run_has_every_sample_once(tmp_path):
  whole = tmp_path / 'whole'
  train(whole, 20, by(hooks.sample, generate=generate, prompts=('A',)))
  broken = tmp_path / 'broken'

  def die(run):
    def hook(step, state, metrics):
      if step == 9:
        raise RuntimeError('killed')

    return hook

  with pytest.raises(RuntimeError, match='killed'):
    train(broken, 20, by(hooks.sample, generate=generate, prompts=('A',)), die)
  train(broken, 20, by(hooks.sample, generate=generate, prompts=('A',)))
  assert (broken / 'samples.txt').read_text() == (whole / 'samples.txt').read_text()
  assert lines(broken) == lines(whole)


def test_sample_settings_are_checked(tmp_path):
  for bad in (dict(prompts='ROMEO:'), dict(at=(0, 30))):
    with pytest.raises(UserError, match='tuple of texts'):
      hooks.sample(fake_run(tmp_path), generate=generate, **bad)


def test_profile_records_a_trace(tmp_path, capsys):
  train(tmp_path, 8, by(hooks.profile, start=2, steps=2))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert 'the profile of steps 3 to 4 is in' in capsys.readouterr().out


def test_plot_draws_both_curves(tmp_path):
  evaluation = by(
    hooks.evaluate, source=lambda model: HeldOut(batches()), objective=objective, every=5
  )
  train(tmp_path, 30, evaluation, by(hooks.plot, every=10))
  data = (tmp_path / 'loss.png').read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) > 10_000


def test_plot_waits_for_something_to_draw(tmp_path):
  assert picture.draw(str(tmp_path)) is None
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0, "tokens": 3}\n')
  assert picture.draw(str(tmp_path)) is None


def test_smoothing_is_a_running_mean():
  values = np.random.default_rng(0).random(100)
  expected = [values[max(0, i - 2) : i + 3].mean() for i in range(100)]
  np.testing.assert_allclose(picture.smooth(values), expected)


# --- NaN ----------------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
  with pytest.raises(
    Diverged, match=r'step 12 went wrong: loss is nan.*first bad tensor: params/w.*step 10 is good'
  ) as e:
    train(tmp_path, 20, stop_on_nan, source=Source({11: np.nan}))
  assert (e.value.step, e.value.tensor) == (12, 'params/w') and '\n' not in str(e.value)
  saver = Saver(str(tmp_path))
  assert saver.steps() == [5, 10]
  assert np.isfinite(saver.restore(make(), Source()).params['w']).all()


def test_nan_in_the_last_step_is_found(tmp_path):
  with pytest.raises(Diverged, match='step 8'):
    train(tmp_path, 8, stop_on_nan, source=Source({7: np.nan}))
  assert Saver(str(tmp_path)).steps() == [5]


@pytest.mark.parametrize(
  'where, tensor', [(('params', 'a'), 'params/a'), (('opt_state', 'm'), 'opt_state/m')]
)
def test_the_first_bad_tensor_is_named_though_the_loss_is_fine(tmp_path, where, tensor):
  hook = stop_on_nan(Run(MODEL, Source(), Saver(str(tmp_path)), None, str(tmp_path), 100))
  good, bad = make(), make()
  part = getattr(bad, where[0]) | {where[1]: jnp.array([1.0, np.inf, 0.0])}
  fine = dict(loss=jnp.float32(1.0))
  hook(1, good, fine)
  hook(2, bad.replace(**{where[0]: part}), fine)
  with pytest.raises(Diverged) as e:
    hook(3, good, fine)
  assert e.value.tensor == tensor and e.value.step == 2


def test_a_metric_of_the_objective_may_be_nan(tmp_path):
  hook = stop_on_nan(Run(MODEL, Source(), Saver(str(tmp_path)), None, str(tmp_path), 100))
  for step in range(1, 5):
    hook(step, make(), dict(loss=jnp.float32(1.0), share_of_code=jnp.float32(np.nan)))


# --- spikes ---------------------------------------------------------------------------------------------

SPIKES = dict(factor=5.0, window=20, back=4, skip=7, limit=2)


@pytest.mark.parametrize('poison', [40.0, np.nan])
def test_a_spike_sends_the_run_back_and_around_the_bad_batch(tmp_path, capsys, poison):
  clean, _ = train(tmp_path / 'clean', 40)
  source = Source({23: poison})
  state, _run = train(
    tmp_path / 'bad', 40, by(rewind_on_spike, **SPIKES), stop_on_nan, source=source
  )
  assert int(state.step) == 40
  # Spike in step 24; the checkpoint of step 20 is 4 steps older; batches 20..26 are left out; the data has period 7.
  assert source.position == 47
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert 'going back to step 20, leaving out 7 batches (rewind 1 of 2)' in capsys.readouterr().out
  steps = [line['step'] for line in lines(tmp_path / 'bad') if 'loss' in line]
  assert steps == list(range(1, 41))
  assert [line for line in lines(tmp_path / 'bad') if 'rewinds' in line] == [
    dict(step=20, rewinds=1, skipped_batches=7)
  ]


def test_spikes_that_do_not_end_stop_the_run(tmp_path):
  with pytest.raises(Diverged, match='2 rewinds did not help'):
    train(
      tmp_path, 40, by(rewind_on_spike, **SPIKES), source=Source(dict.fromkeys(range(23, 60), 40.0))
    )
  assert Saver(str(tmp_path)).steps() == [
    10,
    15,
  ]  # back from 24 to 20, from 21 to 15, and no further


def test_a_spike_without_an_older_checkpoint_is_told(tmp_path, capsys):
  state, _ = train(tmp_path, 12, by(rewind_on_spike, **SPIKES), source=Source({7: 40.0}))
  assert int(state.step) == 12
  assert 'warning: the loss of step 8 is 1598' in capsys.readouterr().out


def test_the_checkpoint_with_the_spike_is_deleted(tmp_path):
  _, run = train(
    tmp_path, 26, by(rewind_on_spike, **SPIKES), source=Source({24: 40.0}), every=5, keep=9
  )
  assert run.saver.steps() == [5, 10, 15, 20, 25, 26]
  state = Saver(str(tmp_path)).restore(make(), Source())
  assert float(abs(state.opt_state['m']).max()) < 5  # without the spike


# --- signals --------------------------------------------------------------------------------------------


def signalled(run, signum, at):
  def hook(step, state, metrics):
    if step == at:
      os.kill(os.getpid(), signum)

  return hook


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_stops(tmp_path, capfd, signum, code):
  train(tmp_path / 'whole', 20, log=4)
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(Stopped) as e:
    train(tmp_path / 'cut', 20, lambda run: signalled(run, signum, 13), preemption, log=4)
  assert (e.value.code, e.value.step) == (code, 13)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  out, err = capfd.readouterr()
  assert (
    'Stopping after this step' in err
    and 'Stopped at step 13 of 20' in out
    and 'go on from step 13' in out
  )
  train(tmp_path / 'cut', 20, preemption, log=4)
  assert lines(tmp_path / 'cut') == lines(tmp_path / 'whole')


def test_a_second_ctrl_c_aborts_at_once(tmp_path):
  def twice(run):
    def hook(step, state, metrics):
      if step == 3:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    return hook

  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, 20, twice, preemption)
  assert signal.getsignal(signal.SIGINT) == before


def test_handlers_are_put_back_at_the_end(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  train(tmp_path, 3, preemption)
  assert signal.getsignal(signal.SIGTERM) == before


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {here!r}]
import jax
{join}
import test_hooks
from test_hooks import *
from llm_jax.core import mesh

def slow(run):
  def hook(step, state, metrics):
    print('step', step, flush=True)
    time.sleep(0.05)

  return hook

with jax.set_mesh(mesh.make()), mesh.rules(**mesh.DATA):
  whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
  first = jax.jit(test_hooks.make, out_shardings=whole)()
  test_hooks.make = lambda: first
  train({workdir!r}, 400, slow, preemption, every=100)
"""


def script(workdir, join=''):
  text = SCRIPT.format(
    root=str(ROOT), here=str(ROOT / 'tests/train'), workdir=str(workdir), join=textwrap.dedent(join)
  )
  environ = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='')
  return subprocess.Popen(
    [sys.executable, '-c', text],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environ,
  )


def wait_for(process, step):
  for line in process.stdout:
    if line == f'step {step}\n':
      return
  raise AssertionError(process.stderr.read())


def test_the_exit_code_of_a_process_that_was_told_to_stop(tmp_path):
  process = script(tmp_path)
  try:
    wait_for(process, 10)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 143, err
  assert 'Traceback' not in err
  (step,) = Saver(str(tmp_path)).steps()
  assert f'Stopped at step {step} of 400' in out and step >= 10


def test_processes_told_to_stop_stop_at_the_same_step(tmp_path):
  import socket

  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  join = "jax.distributed.initialize('127.0.0.1:{}', 2, {})"
  processes = [script(tmp_path, join.format(port, i)) for i in (0, 1)]
  try:
    wait_for(processes[0], 5)
    processes[1].send_signal(signal.SIGINT)  # Ctrl-C in the terminal of one of them
    said = [p.communicate(timeout=120) for p in processes]
  finally:
    for p in processes:
      p.kill()
  assert [p.returncode for p in processes] == [143, 130], said
  (step,) = Saver(str(tmp_path)).steps()
  assert f'Stopped at step {step} of 400' in said[0][0]


def test_metrics_lines_are_json(tmp_path):
  train(tmp_path, 4)
  with open(tmp_path / 'metrics.jsonl', encoding='utf-8') as f:
    assert [json.loads(line)['step'] for line in f] == [1, 2, 3, 4]
