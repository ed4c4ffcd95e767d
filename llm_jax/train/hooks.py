"""What happens around the steps: evaluation, samples, profiles, pictures. See also `guards.py` and `preemption.py`.

`name(run, *, ...)` makes a hook: `hook(step, state, metrics)` is called once before the first step of a fresh run (step
0, no metrics) and after each one. Hooks are handed all they use; they know no model, data or objective. What they
spend is counted aside from training.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import files, mesh, weights
from llm_jax.core.errors import UserError
from llm_jax.train import picture

Hook = Callable[[int, Any, Mapping[str, Any]], Any]


class Run(NamedTuple):
  """What hooks may use. workdir: where files go; steps: of the whole run."""

  model: Any
  source: Any
  saver: Any
  writer: Any
  workdir: str
  steps: int


def evaluate(
  run: Run,
  *,
  source: Callable,
  objective: Callable,
  every: int = 500,
  batches: int | None = None,
  stride: int = 1,
  name: str = 'heldout',
) -> Hook:
  """Every `every` steps, and at the last, one pass over `source(run.model).once()`, or its first `batches`.

  stride: of the pass only every `stride`-th batch, so that a part of all texts is read and not all of the first one.
  objective: (model, params, batch, None) -> Loss. Where it has a metric `nats`, it is of text: that is what counts, not
  a z-loss or smoothing. Writes, with N nats over W targets for B bytes of text (none for sentinels and modes):

    NAME/nats_per_token = N / W,  NAME/perplexity = exp(N / W),  NAME/bits_per_byte = N / (ln 2 * B)

  and the objective's other metrics per target. Of an objective without, such as one of pairs: NAME/loss and its metrics
  per pair, and NAME/count, the number of them. The moving average of the parameters is used where there is one.
  """
  if every < 1 or stride < 1 or (batches is not None and batches < 1):
    raise UserError(
      f'evaluate: every={every}, batches={batches} and stride={stride} must be at least 1'
    )
  held = source(run.model)
  score = _scorer(run.model, objective, held.vocab)
  picked = lambda found: itertools.islice(itertools.islice(found, 0, None, stride), batches)

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if step == 0 or (step % every and step != run.steps):
      return
    with run.writer.aside():
      start = time.perf_counter()
      values = _over(score, state.averaged, picked(held.once()))
      values['seconds'] = time.perf_counter() - start
      run.writer.write(step, {f'{name}/{key}': value for key, value in values.items()})
      if 'bits_per_byte' in values:
        bits, nats = values['bits_per_byte'], values['nats_per_token']
        run.writer.say(f'step {step}: {name} {bits:.4f} bits per byte, {nats:.4f} nats per token')
      elif 'loss' in values:
        told = (f'{key} {values[key]:.4f}' for key in ('loss', 'accuracy') if key in values)
        run.writer.say(f'step {step}: {name} {", ".join(told)} of {values["count"]:.0f}')

  return hook


def _scorer(model: Any, objective: Callable, vocab: Any) -> Callable:
  """(params, batch) -> sums over the batch: weight, the objective's metrics; of text nats and bytes, else loss.

  Bytes are added as integers: 32 bits hold those of one batch, Python those of all.
  """
  table = np.zeros((max(model.card.vocab, vocab.size), 1), np.int32)
  table[: vocab.size, 0] = vocab.text_bytes

  @jax.jit
  def score(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    loss = objective(model, params, batch, None)
    if 'nats' not in loss.metrics:
      return dict(loss.metrics) | dict(loss=loss.sum, weight=loss.weight)
    sizes = weights.lookup(jnp.asarray(table), batch['targets'], dtype=jnp.int32)[..., 0]
    counted = jnp.where(batch['weights'] > 0, sizes, 0) if 'weights' in batch else sizes
    return dict(loss.metrics) | dict(weight=loss.weight, bytes=counted.sum())

  return score


def _over(score: Callable, params: Any, batches: Iterable) -> dict[str, float]:
  """The metrics of one pass. Sums are fetched one batch late, so that the device has always a next one."""
  totals: dict[str, float] = {}
  waiting = None
  for batch in batches:
    sums = score(params, mesh.place(batch))
    _add(totals, waiting)
    waiting = sums
  _add(totals, waiting)
  weight = totals.pop('weight', 0.0)
  if not weight:
    raise UserError(
      'the held-out data has no target that counts: name another split or a shorter length'
    )
  if 'nats' not in totals:
    return {key: total / weight for key, total in totals.items()} | dict(count=weight)
  nats, size = totals.pop('nats'), totals.pop('bytes')
  values = dict(nats_per_token=nats / weight, perplexity=math.exp(min(nats / weight, 700.0)))
  if size:
    values['bits_per_byte'] = nats / (math.log(2) * size)
  return values | {key: total / weight for key, total in totals.items()}


def _add(totals: dict[str, float], sums: Any) -> None:
  for key, value in jax.device_get(sums or {}).items():
    totals[key] = totals.get(key, 0) + value.item()


def sample(
  run: Run,
  *,
  generate: Callable,
  prompts: tuple = ('',),
  at: tuple = (0.0, 0.1, 0.3, 1.0),
  seed: int = 0,
) -> Hook:
  """Prints what the model says and adds it to `samples.txt`, at these fractions of the run; 0 is before the first step.

  generate: (model, params, vocab, prompts, key) -> the continuation of each prompt.
  """
  if isinstance(prompts, str) or any(not 0 <= f <= 1 for f in at):
    raise UserError(
      f'sample: prompts must be a tuple of texts and at={at} fractions of the run between 0 and 1'
    )
  due = {round(f * run.steps) for f in at}
  path = os.path.join(run.workdir, 'samples.txt')

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if step not in due:
      return
    with run.writer.aside():
      key = jax.random.fold_in(jax.random.key(seed), step)
      said = generate(run.model, state.averaged, run.source.vocab, list(prompts), key)
      text = f'=== step {step} of {run.steps} ({100 * step / run.steps:.0f} %) ===\n'
      text += ''.join(
        f'{prompt}{continuation}\n---\n' for prompt, continuation in zip(prompts, said, strict=True)
      )
      if jax.process_index() == 0:
        _append(path, step, text)
      run.writer.say(f'\n{text}')

  return hook


def _append(path: str, step: int, text: str) -> None:
  """Adds a section to the samples; what a run that was resumed or rewound said from this step on is dropped."""
  before = ''
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      sections = re.split(r'^(?==== step \d+ of )', f.read(), flags=re.MULTILINE)
    before = ''.join(s for s in sections if s and int(s.split()[2]) < step)
  files.write(path, before + text)


def profile(run: Run, *, start: int = 10, steps: int = 3) -> Hook:
  """Records the `steps` steps after step `start` with jax's profiler, in the folder `profile` of the workdir.

  To be opened with `tensorboard` (profile plugin) or xprof; also holds a `perfetto` trace.
  """
  folder = os.path.join(run.workdir, 'profile')
  recording = []

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if recording and (step >= recording[0] + steps or step >= run.steps):
      jax.block_until_ready(metrics)
      jax.profiler.stop_trace()
      run.writer.say(
        f'step {step}: the profile of steps {recording.pop() + 1} to {step} is in {folder}'
      )
    elif step == start < run.steps:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(folder, create_perfetto_trace=True)
      recording.append(step)

  return hook


def plot(run: Run, *, every: int = 500, name: str = 'heldout') -> Hook:
  """Draws `loss.png` from `metrics.jsonl` every `every` steps and at the last."""

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if step > 0 and (step % every == 0 or step == run.steps):
      with run.writer.aside():
        if jax.process_index() == 0:
          picture.draw(run.workdir, name=name)

  return hook
