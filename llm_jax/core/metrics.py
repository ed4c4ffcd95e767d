"""What a run says about itself: `metrics.jsonl`, TensorBoard events, and one line on the terminal.

The `Writer` is a hook. It reads a step's metrics when the next step is already on its way, so the device never
waits, and averages them over the tokens of `every` steps. Its state goes into checkpoints: the files of a run that was
killed and resumed are those of an uninterrupted run, except for what is measured in seconds.

Events are written with TensorBoard's own record format and messages; its `EventFileWriter` and `clu.metric_writers`
would import TensorFlow. Other trackers: an entry point in the group `llm_jax.trackers`, called with the workdir, that
gives an object with `write(step, values)`, `restart(step)` and `close()`.
"""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from llm_jax.core import peak as peak_lib

TIMING = re.compile(r'(tokens_per_second|mfu|seconds)$')  # names of what no two runs share
FILE = 'metrics.jsonl'
_LAST = ('learning_rate',)  # not averaged: the value of the last step
_QUIET = 10.0  # seconds between lines where there is no terminal


class Writer:
  """Collects the metrics of the steps; writes a line every `every` steps, and whatever other hooks hand to `write`.

  steps: of the whole run, for the ETA. flops_per_token: forward and backward, for MFU. tokens_per_step: positions that
  a step computes (default: its `weight`, the targets that count). peak: FLOP/s of all devices (default: `peak.peak()`).
  Only process 0 writes.
  """

  def __init__(
    self,
    workdir: str,
    *,
    every: int = 10,
    steps: int | None = None,
    flops_per_token: float | None = None,
    tokens_per_step: int | None = None,
    peak: float | None = None,
  ):
    self._every, self._tokens_per_step = every, tokens_per_step
    self._flops_per_token = flops_per_token
    self._peak = (
      (peak or peak_lib.peak()) if flops_per_token else None
    )  # now, while the device is idle
    self.latest: dict[str, tuple[int, float]] = {}  # name -> (step, value) written last
    self._pending: tuple[int, Any] | None = None
    self._clock = _Clock()
    self._window = _Window()
    self._step, self._tokens = 0, 0.0
    self._sinks: list[Any] = []
    self._line = None
    if jax.process_index() == 0:
      self._sinks = [_Lines(workdir), _Events(workdir), *_trackers(workdir)]
      self._line = _Bar(steps) if sys.stderr.isatty() else _Plain(steps)

  def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    """The hook: takes note of this step, reads the one before."""
    self._drain()
    if metrics:
      for value in metrics.values():
        if hasattr(value, 'copy_to_host_async'):
          value.copy_to_host_async()
      self._pending = step, metrics

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line of numbers at once, after what the steps before had to say."""
    self._drain()
    self._write(step, {name: float(value) for name, value in values.items()})

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Time spent inside is not training: it counts for the ETA, not for tokens/s and MFU."""
    self._drain()
    try:
      yield
    finally:
      self._clock.resume()

  def say(self, text: str) -> None:
    """Prints text for a person without breaking the progress bar."""
    if self._line is not None:
      self._line.say(text)

  def state(self) -> dict[str, Any]:
    """All that has not been written yet, JSON-able; what was written is on disk when this returns."""
    self._drain()
    return dict(step=self._step, tokens=self._tokens, window=vars(self._window).copy())

  def restore(self, saved: Mapping[str, Any] | None) -> None:
    """Goes back to a `state()` (None: the start); lines written after its step are dropped."""
    self._pending = None
    self._window = _Window()
    self._step, self._tokens = (
      (0, 0.0) if saved is None else (int(saved['step']), float(saved['tokens']))
    )
    for name, value in (saved or dict(window={}))['window'].items():
      setattr(self._window, name, dict(value) if isinstance(value, Mapping) else value)
    self.latest = {
      name: (step, value) for name, (step, value) in self.latest.items() if step <= self._step
    }
    self._clock.resume()
    for sink in self._sinks:
      sink.restart(-1 if saved is None else self._step)

  def close(self) -> None:
    """Reads the last step and closes the files."""
    self._drain()
    for sink in (*self._sinks, *([self._line] if self._line else [])):
      sink.close()

  def _drain(self) -> None:
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    weight = values.pop('weight', 1.0)
    self._step = step
    self._tokens += weight
    self._clock.tick(step, self._tokens_per_step or weight)
    self._window.add(values, weight)
    if self._line is not None:
      self._line.advance(step)
    if step % self._every == 0:
      self._report(step)

  def _report(self, step: int) -> None:
    values = self._window.close() | dict(tokens=self._tokens)
    speed = self._clock.close()
    if speed is not None:
      values['tokens_per_second'] = speed
      if self._flops_per_token:
        self._peak = peak_lib.revised(self._peak, self._flops_per_token * speed)
        values['mfu'] = peak_lib.utilisation(self._flops_per_token, speed, self._peak)
    self._write(step, values)
    if self._line is not None:
      self._line.show(step, values, self._clock.per_step(step))

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    self.latest |= {name: (step, value) for name, value in values.items()}
    for sink in self._sinks:
      sink.write(step, values)


class _Window:
  """Sums over the steps since the last line, weighted by their tokens."""

  def __init__(self):
    self.weight, self.sums, self.last = 0.0, {}, {}

  def add(self, values: Mapping[str, float], weight: float) -> None:
    weight = weight or 1e-9  # a step without targets
    self.weight += weight
    for name, value in values.items():
      if name in _LAST:
        self.last[name] = value
      else:
        self.sums[name] = self.sums.get(name, 0.0) + value * weight

  def close(self) -> dict[str, float]:
    values = {name: total / self.weight for name, total in self.sums.items()} | self.last
    self.__init__()
    return values


class _Clock:
  """Training time: from one step read to the next, without the first (it compiles) and without what went on aside."""

  def __init__(self):
    self._mark = self._first = None
    self._spent = self._tokens = 0.0

  def tick(self, step: int, tokens: float) -> None:
    now = time.perf_counter()
    if self._first is None:
      self._first = step, now
    else:
      self._spent += now - self._mark
      self._tokens += tokens
    self._mark = now

  def resume(self) -> None:
    if self._mark is not None:
      self._mark = time.perf_counter()

  def close(self) -> float | None:
    """Tokens per second since the last call."""
    spent, tokens, self._spent, self._tokens = self._spent, self._tokens, 0.0, 0.0
    return tokens / spent if spent > 0 else None

  def per_step(self, step: int) -> float | None:
    """Seconds a step takes in all, with everything in between."""
    if self._first is None or step <= self._first[0]:
      return None
    return (time.perf_counter() - self._first[1]) / (step - self._first[0])


class _Lines:
  """`metrics.jsonl`: a JSON object a line, in the order of the steps, on disk as soon as written. Not finite: null."""

  def __init__(self, workdir: str):
    self._path, self._file = os.path.join(workdir, FILE), None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self._file is None:
      self._file = open(self._path, 'a', encoding='utf-8')
    finite = {
      name: float(f'{value:.9g}') if math.isfinite(value) else None
      for name, value in values.items()
    }
    self._file.write(json.dumps(dict(step=step, **finite)) + '\n')
    self._file.flush()

  def restart(self, step: int) -> None:
    self.close()
    if os.path.exists(self._path):
      with open(self._path, 'rb+') as f:
        f.truncate(_end(f, step))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def _end(file: Any, step: int) -> int:
  """The position after the last whole line of at most `step`."""
  end = 0
  for line in file:
    try:
      if not line.endswith(b'\n') or json.loads(line)['step'] > step:
        break
    except (ValueError, KeyError):
      break
    end += len(line)
  return end


class _Events:
  """TensorBoard's event files. A restart tells TensorBoard to forget what came after the step."""

  _number = itertools.count()

  def __init__(self, workdir: str):
    from tensorboard.compat.proto import event_pb2, summary_pb2  # a third of a second
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary, self._session = (
      event_pb2.Event,
      summary_pb2.Summary,
      event_pb2.SessionLog,
    )
    self._writer, self._file = RecordWriter, None
    self._folder, self._restart = os.path.join(workdir, 'tensorboard'), None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self._file is None:
      self._open()
    scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._record(step=step, summary=self._summary(value=scalars))

  def restart(self, step: int) -> None:
    self.close()
    self._restart = step + 1

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def _open(self) -> None:
    os.makedirs(self._folder, exist_ok=True)
    name = f'events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(self._number)}'
    self._file = self._writer(open(os.path.join(self._folder, name), 'wb'))
    self._record(file_version='brain.Event:2')
    if self._restart is not None:
      self._record(step=self._restart, session_log=self._session(status=self._session.START))

  def _record(self, **fields: Any) -> None:
    self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
    self._file.flush()


def _trackers(workdir: str) -> list[Any]:
  return [
    entry.load()(workdir) for entry in importlib.metadata.entry_points(group='llm_jax.trackers')
  ]


def _describe(values: Mapping[str, float]) -> str:
  """`loss 2.345  12.3k tokens/s  MFU 41 %`, of what there is."""
  parts = [f'loss {values["loss"]:.4f}'] if 'loss' in values else []
  if 'tokens_per_second' in values:
    speed = values['tokens_per_second']
    parts.append(f'{speed / 1000:.1f}k tokens/s' if speed >= 1000 else f'{speed:.0f} tokens/s')
  parts += [f'MFU {100 * values["mfu"]:.0f} %'] if 'mfu' in values else []
  return '  '.join(parts)


class _Bar:
  """One line on a terminal that is redrawn."""

  def __init__(self, steps: int | None):
    self._steps, self._bar, self._text, self._left = steps, None, '', ''

  def advance(self, step: int) -> None:
    from tqdm import tqdm

    if self._bar is None:
      style = '{n_fmt}/{total_fmt} |{bar}| {desc}' if self._steps else '{n_fmt} {desc}'
      first = max(0, step - 1)
      self._bar = tqdm(
        total=self._steps,
        initial=first,
        bar_format=style,
        dynamic_ncols=True,
        leave=True,
        miniters=1,
      )
    if step < self._bar.n:  # the run was sent back
      self._bar.reset(total=self._steps)
    self._bar.update(step - self._bar.n)

  def show(self, step: int, values: Mapping[str, float], per_step: float | None) -> None:
    self._bar.set_description_str(_describe(values) + _eta(self._steps, step, per_step))

  def say(self, text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
      self._bar = None


class _Plain:
  """A line now and then, for logs."""

  def __init__(self, steps: int | None):
    self._steps, self._next = steps, 0.0

  def advance(self, step: int) -> None:
    """Nothing to redraw."""

  def show(self, step: int, values: Mapping[str, float], per_step: float | None) -> None:
    if time.monotonic() >= self._next or step == self._steps:
      self._next = time.monotonic() + _QUIET
      of = f'/{self._steps}' if self._steps else ''
      self.say(f'step {step}{of}  {_describe(values)}{_eta(self._steps, step, per_step)}')

  def say(self, text: str) -> None:
    print(text, flush=True)

  def close(self) -> None:
    """Nothing to close."""


def _eta(steps: int | None, step: int, per_step: float | None) -> str:
  if not steps or per_step is None or step >= steps:
    return ''
  left = round((steps - step) * per_step)
  hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
  return f'  ETA {hours}:{minutes:02}:{seconds:02}' if hours else f'  ETA {minutes}:{seconds:02}'
