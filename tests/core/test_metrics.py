"""Metrics: averages, what is on disk when, resuming, TensorBoard events without TensorFlow, throughput and MFU."""

import glob
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import metrics, peak
from llm_jax.core.metrics import Writer


def lines(workdir):
  """What was written, without what is measured in seconds."""
  with open(workdir / metrics.FILE, encoding='utf-8') as f:
    read = [json.loads(line) for line in f]
  return [{k: v for k, v in line.items() if not metrics.TIMING.search(k)} for line in read]


def values(step, **kw):
  """Metrics of a step as the update gives them: f32 on the device."""
  kw = dict(loss=10.0 / step, weight=step % 3 + 1.0, learning_rate=step * 0.5) | kw
  return {k: jnp.float32(v) for k, v in kw.items()}


def run(writer, first, last, evaluate_every=4):
  for step in range(first, last + 1):
    writer(step, None, values(step) if step else {})
    if step and step % evaluate_every == 0:
      writer.write(step, {'heldout/bits_per_byte': 1.0 / step})


def expected(first, last):
  """The averages over the tokens of steps first..last, in numpy."""
  steps = np.arange(first, last + 1)
  weight = steps % 3 + 1.0
  loss = (np.float32(10.0) / steps.astype(np.float32)).astype(np.float64)
  return dict(
    step=last,
    loss=pytest.approx((loss * weight).sum() / weight.sum(), rel=1e-7),
    learning_rate=last * 0.5,
  )


def test_a_line_is_the_average_over_the_tokens_of_its_steps(tmp_path):
  writer = Writer(str(tmp_path), every=3)
  run(writer, 0, 6, evaluate_every=100)
  writer.close()
  tokens = np.cumsum([2, 3, 1] * 2)
  assert lines(tmp_path) == [
    expected(1, 3) | dict(tokens=tokens[2]),
    expected(4, 6) | dict(tokens=tokens[5]),
  ]


def test_metrics_are_read_one_step_late(tmp_path):
  read = []

  class Value:
    def __init__(self, step):
      self.step = step

    def copy_to_host_async(self):
      pass

    def __float__(self):
      read.append(self.step)
      return 1.0

  writer = Writer(str(tmp_path), every=1)
  for step in (1, 2, 3):
    writer(step, None, dict(loss=Value(step)))
    assert read == list(range(1, step))
  writer.close()
  assert read == [1, 2, 3]


def test_lines_come_in_order_and_are_on_disk_at_once(tmp_path):
  writer = Writer(str(tmp_path), every=2)
  run(writer, 0, 4)
  assert [(line['step'], 'loss' in line) for line in lines(tmp_path)] == [
    (2, True),
    (4, True),
    (4, False),
  ]


@pytest.mark.parametrize('saved_at, killed_at', [(4, 4), (5, 6), (6, 11), (7, 12)])
def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path, saved_at, killed_at):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  for folder in (whole, broken):
    folder.mkdir()
  writer = Writer(str(whole), every=3)
  run(writer, 0, 13)
  writer.close()
  first = Writer(str(broken), every=3)
  run(first, 0, saved_at)
  state = json.loads(json.dumps(first.state()))
  run(first, saved_at + 1, killed_at)
  with open(broken / metrics.FILE, 'a', encoding='utf-8') as f:
    f.write('{"step": ')  # killed in the middle of a line
  second = Writer(str(broken), every=3)
  second.restore(state)
  run(second, saved_at + 1, 13)
  second.close()
  assert lines(broken) == lines(whole)


def test_a_fresh_start_drops_what_an_older_run_left(tmp_path):
  writer = Writer(str(tmp_path), every=1)
  run(writer, 0, 3)
  writer.close()
  writer = Writer(str(tmp_path), every=1)
  writer.restore(None)
  run(writer, 0, 2)
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2]


def test_going_back_forgets_the_step_that_is_on_its_way(tmp_path):
  writer = Writer(str(tmp_path), every=1)
  run(writer, 0, 3)
  state = writer.state()
  run(writer, 4, 6)
  writer.restore(state)
  run(writer, 4, 4)
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]
  assert writer.latest['loss'][0] == 4


def test_what_is_not_finite_is_null_so_that_every_line_is_json(tmp_path):
  writer = Writer(str(tmp_path), every=1)
  writer.write(1, dict(a=float('nan'), b=np.float32(np.inf), c=jnp.int32(3)))
  text = (tmp_path / metrics.FILE).read_text()
  assert json.loads(text, parse_constant=pytest.fail) == dict(step=1, a=None, b=None, c=3.0)


def events(workdir, monkeypatch):
  """tag -> [(step, value)], as TensorBoard reads them (with its own stand-in for TensorFlow)."""
  monkeypatch.setitem(sys.modules, 'tensorboard.compat.notf', types.ModuleType('notf'))
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  accumulator = EventAccumulator(str(workdir / 'tensorboard')).Reload()
  return {
    t: [(e.step, e.value) for e in accumulator.Scalars(t)] for t in accumulator.Tags()['scalars']
  }


def test_tensorboard_reads_the_events(tmp_path, monkeypatch):
  writer = Writer(str(tmp_path), every=2)
  run(writer, 0, 4)
  state = writer.state()
  run(writer, 5, 8)  # lost: the run goes back to step 4
  again = Writer(str(tmp_path), every=2)
  again.restore(state)
  run(again, 5, 6)
  again.close()
  read = events(tmp_path, monkeypatch)
  assert [step for step, _ in read['loss']] == [2, 4, 6]
  assert read['heldout/bits_per_byte'] == [(4, 0.25)]
  assert read['learning_rate'] == [(2, 1.0), (4, 2.0), (6, 3.0)]


def test_writing_imports_no_tensorflow(tmp_path):
  code = f"""
import sys
from llm_jax.core.metrics import Writer
writer = Writer({str(tmp_path)!r}, every=1)
writer(1, None, dict(loss=1.0, weight=2.0))
writer.close()
assert 'tensorflow' not in sys.modules and 'clu' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True)
  assert glob.glob(str(tmp_path / 'tensorboard' / 'events.out.tfevents.*'))


def test_a_tracker_from_an_entry_point_gets_every_line(tmp_path, monkeypatch):
  calls = []

  class Tracker:
    def __init__(self, workdir):
      calls.append(workdir)

    def write(self, step, values):
      calls.append((step, values))

    def restart(self, step):
      calls.append(step)

    def close(self):
      calls.append('closed')

  entry = types.SimpleNamespace(load=lambda: Tracker)
  monkeypatch.setattr(
    metrics.importlib.metadata,
    'entry_points',
    lambda group: [entry] * (group == 'llm_jax.trackers'),
  )
  writer = Writer(str(tmp_path), every=1)
  writer.write(3, dict(a=1.0))
  writer.close()
  assert calls == [str(tmp_path), (3, dict(a=1.0)), 'closed']


# --- speed ------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves."""
  now = types.SimpleNamespace(time=100.0)
  fake = types.SimpleNamespace(
    perf_counter=lambda: now.time, monotonic=lambda: now.time, time=lambda: now.time
  )
  monkeypatch.setattr(metrics, 'time', fake)
  return now


class Step:
  """The loss of a step that takes some seconds: reading it waits for the device."""

  def __init__(self, clock, seconds):
    self.clock, self.seconds = clock, seconds

  def __float__(self):
    self.clock.time += self.seconds
    return 2.0


def test_speed_counts_neither_the_first_step_nor_evaluation(tmp_path, clock, capsys):
  writer = Writer(str(tmp_path), every=2, steps=8, flops_per_token=50.0, peak=1e4)
  for step in range(1, 5):
    writer(
      step, None, dict(loss=Step(clock, 60.0 if step == 1 else 0.5), weight=30.0)
    )  # the first compiles
    if step == 3:
      with writer.aside():
        clock.time += 1000.0
  writer.close()
  read = [json.loads(line) for line in open(tmp_path / metrics.FILE, encoding='utf-8')]
  assert [line['tokens_per_second'] for line in read] == [60.0, 60.0]
  assert read[0]['mfu'] == pytest.approx(60.0 * 50.0 / 1e4)
  assert 'ETA 22:15' in capsys.readouterr().out  # four steps more at (1000 + 3 * 0.5) / 3 s each


def test_the_first_line_alone_has_no_speed(tmp_path):
  writer = Writer(str(tmp_path), every=1)
  run(writer, 0, 1)
  writer.close()
  assert 'tokens_per_second' not in json.loads((tmp_path / metrics.FILE).read_text())


def test_lines_in_a_log_are_rare_and_say_what_matters(tmp_path, clock, capsys):
  writer = Writer(str(tmp_path), every=1, steps=100, flops_per_token=1.0, peak=100.0)
  for step in range(1, 60):
    clock.time += 1.0
    writer(step, None, dict(loss=2.0, weight=30.0))
  writer.close()
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 6
  assert said[1] == 'step 11/100  loss 2.0000  30 tokens/s  MFU 30 %  ETA 1:29'


def test_the_bar_fits_one_line_of_a_terminal(tmp_path, clock, monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  writer = Writer(str(tmp_path), every=1, steps=100, flops_per_token=1.0, peak=1e5)
  for step in range(1, 6):
    clock.time += 1.0
    writer(step, None, dict(loss=2.0, weight=30000.0))
  writer.say('between')
  clock.time += 1.0
  writer.close()
  out, err = capsys.readouterr()
  assert out == 'between\n'
  drawn = err.replace('\n', '\r').split('\r')
  assert '5/100' in drawn[-2] and 'loss 2.0000  30.0k tokens/s  MFU 30 %  ETA 1:3' in drawn[-2]


# Checklist row 6.5: parameters, tokens, chips, seconds, kind -> MFU, from the survey's Table 1.
DAY, HOUR = 86400.0, 3600.0
RUNS = {
  'LLaMA-65B': (65.2e9, 1.4e12, 2048, 21 * DAY, 'NVIDIA A100-SXM4-80GB', 0.472),
  'BLOOM': (176e9, 366e9, 384, 105 * DAY, 'NVIDIA A100-SXM4-80GB', 0.356),
  'GLM': (130e9, 400e9, 768, 60 * DAY, 'NVIDIA A100-SXM4-40GB', 0.251),
  'HyperCLOVA': (82e9, 300e9, 1024, 13.4 * DAY, 'NVIDIA A100-SXM4-80GB', 0.399),
  'AlexaTM': (20e9, 1.3e12, 128, 120 * DAY, 'NVIDIA A100-SXM4-40GB', 0.377),
  'Gopher': (280e9, 300e9, 4096, 920 * HOUR, 'TPU v3', 0.302),
  'GLaM': (96.6e9, 280e9, 1024, 574 * HOUR, 'TPU v4', 0.279),
  'ERNIE 3.0 Titan': (260e9, 300e9, 2048, 28 * DAY, 'Tesla V100-SXM2-32GB', 0.756),
}


@pytest.mark.parametrize('name', RUNS)
def test_mfu_of_published_runs(name):
  parameters, tokens, chips, seconds, kind, mfu = RUNS[name]
  total = chips * peak.find(kind).bf16
  assert peak.utilisation(6 * parameters, tokens / seconds, total) == pytest.approx(mfu, abs=6e-4)


@pytest.mark.parametrize(
  'kind, count, bf16',
  [
    ('TPU v2', 8, 4 * 46e12), ('TPU v3', 8, 4 * 123e12), ('TPU v4', 4, 4 * 275e12), ('TPU v5 lite', 4, 4 * 197e12),
    ('TPU v5p', 4, 4 * 459e12), ('TPU v6 lite', 4, 4 * 918e12), ('TPU7x', 8, 4 * 2307e12),
    ('NVIDIA H100 80GB HBM3', 8, 8 * 989.4e12), ('NVIDIA H100 PCIe', 1, 756e12), ('NVIDIA H200', 1, 989.4e12),
    ('NVIDIA B200', 2, 2 * 2250e12), ('NVIDIA GB200', 1, 2500e12), ('NVIDIA L4', 1, 121e12), ('NVIDIA L40S', 1, 362e12),
  ],
)  # fmt: skip
def test_peak_of_all_devices(monkeypatch, kind, count, bf16):
  device = types.SimpleNamespace(platform='tpu', device_kind=kind)
  monkeypatch.setattr(peak.jax, 'devices', lambda: [device] * count)
  monkeypatch.setattr(peak.jax, 'device_count', lambda: count)
  assert peak.peak() == pytest.approx(bf16)
  assert 0 < peak.peak('f32') <= bf16


def test_what_was_reached_revises_a_measured_peak_alone(monkeypatch):
  """Measured beside other work, a peak can be too low, and MFU would be above 1; a data sheet is right."""
  assert peak.revised(1e9, 3e9) == 3e9 and peak.revised(4e9, 3e9) == 4e9
  device = types.SimpleNamespace(platform='tpu', device_kind='TPU v4')
  monkeypatch.setattr(peak.jax, 'devices', lambda: [device])
  assert peak.revised(1e9, 3e9) == 1e9


def test_the_peak_of_a_cpu_is_measured_once_for_all_its_virtual_devices():
  assert jax.device_count() == 8
  assert peak.peak() == peak.measured() == peak.peak('f32')
  assert 1e8 < peak.measured() < 1e15
