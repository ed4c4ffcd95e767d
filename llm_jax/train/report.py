"""What a run tells a person: where it writes, and at the end what came out and what to try next."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax

from llm_jax.core import files, metrics
from llm_jax.core.errors import UserError


def open_workdir(workdir: str | None) -> str:
  """The absolute workdir, made and proved writable before any work is done."""
  if not workdir:
    raise UserError('name a folder for checkpoints and metrics: --workdir=runs/NAME')
  workdir = os.path.abspath(os.path.expanduser(workdir))
  try:
    os.makedirs(workdir, exist_ok=True)
    probe = os.path.join(workdir, f'.probe.{os.getpid()}')
    with open(probe, 'w', encoding='utf-8') as f:
      f.write('writable')
    os.remove(probe)
  except OSError as e:
    reason = (e.strerror or str(e)).lower()
    raise UserError(
      f'cannot write to --workdir={workdir} ({reason}): choose another folder or make room'
    ) from e
  return workdir


def record(workdir: str, config_json: str, vocab: Any) -> None:
  """Writes the config and the vocabulary beside the checkpoints, so that the workdir is all that `generate` needs."""
  if jax.process_index() == 0:
    files.write(os.path.join(workdir, 'config.json'), config_json)
    vocab.save(os.path.join(workdir, 'vocab'))


def rescue(run: Any) -> Callable:
  """What `loop.train` calls when a source fails: saves the state and says where the run goes on.

  With several processes nothing is saved, because a checkpoint is written by all and only one of them may have failed.
  """

  def save(step: int, state: Any, metrics: Any) -> None:
    if jax.process_count() > 1:
      return
    with contextlib.suppress(UserError):  # the error on its way is the one to show
      run.saver.save(step, state, metrics)
      run.saver.wait()
      saved = run.saver.steps()
      if saved:
        run.writer.say(
          f'The data failed after step {step}; the same command goes on from step {saved[-1]}.'
        )

  return save


def newest(workdir: str) -> dict[str, float | None]:
  """The last value of every metric in `metrics.jsonl`."""
  found = files.lines(os.path.join(workdir, metrics.FILE))
  return {name: value for line in found for name, value in line.items()}


def finish(run: Any, state: Any) -> int:
  """Waits for the last checkpoint and prints the summary; returns the exit code 0."""
  run.saver.wait()
  run.writer.close()
  run.source.close()
  if jax.process_index() == 0:
    print(summary(run.workdir, int(state.step), run.steps), flush=True)
  return 0


def summary(workdir: str, step: int, steps: int) -> str:
  """The closing lines of a run: the result, where everything lies, three commands to try next."""
  here = os.path.relpath(workdir) if not os.path.relpath(workdir).startswith('..') else workdir
  told = newest(workdir)
  bits, loss = told.get('heldout/bits_per_byte'), told.get('loss')
  right, earned = told.get('heldout/accuracy'), told.get('heldout/reward')
  classes = told.get('heldout/label_nll') is not None
  unit = '' if told.get('nats') is None else ' nats per token'
  result = '' if loss is None else f'training loss: {loss:.4f}{unit}'
  if bits is not None:
    result = f'held-out text: {bits:.3f} bits per byte'
  elif classes:
    result = f'held-out texts: {100 * right:.1f} % in the right class'
  elif right is not None:
    result = f'held-out pairs: {100 * right:.1f} % in the right order'
  elif earned is not None:
    result = f'held-out reward: {earned:.3f}'
  places = {
    'checkpoints/': 'weights, optimizer, data position',
    'metrics.jsonl': 'every number, one JSON object a line',
    'tensorboard/': f'tensorboard --logdir={here}',
    'loss.png': 'the loss curves',
    'heldout_calibration.png': 'how often the reward model is right when it is sure',
    'samples.txt': 'what the model wrote on the way',
    'config.json': 'the config this run used',
  }
  there = {n: what for n, what in places.items() if os.path.exists(os.path.join(workdir, n))}
  write = {f'llm-jax generate --workdir={here} --prompt="ROMEO:"': 'let it write'}
  commands = {
    **({} if classes else write),
    f'llm-jax train --config={here}/config.json --config.seed=1 --workdir={here}-seed1': 'again, another seed',
    'llm-jax train --config=configs/pretrain/ul2.py --workdir=runs/ul2': 'another objective',
  }
  width, wide = max(map(len, commands)), max([14, *(len(name) + 1 for name in there)])
  lines = [f'Finished: step {step} of {steps}. {result}'.rstrip(), '', f'In {here}:']
  lines += [f'  {name:{wide}}{what}' for name, what in there.items()]
  lines += [
    '',
    'Try next:',
    *(f'  {command:{width}}  # {what}' for command, what in commands.items()),
  ]
  return '\n' + '\n'.join(lines)
