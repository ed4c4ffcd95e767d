"""The watchman over a model that really learns: bigrams of Shakespeare's characters, by stochastic gradients."""

import functools
import gzip
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.core.metrics import Writer
from llm_jax.data import records
from llm_jax.scaling import fits, laws, monitor
from llm_jax.train import loop
from llm_jax.train.hooks import Run
from llm_jax.train.state import State

STEPS, BREAK, WINDOW = 200, 120, 10


class Notes:
  """A writer that keeps what it is told."""

  def __init__(self):
    self.lines, self.said = [], []

  def write(self, step, values):
    self.lines.append((step, values['watch/deviation']))

  def say(self, text):
    self.said.append(text)


@functools.cache
def text():
  with gzip.open(records.bundled('tinyshakespeare/input.txt.gz')) as f:
    return np.frombuffer(f.read(300_000), np.uint8).astype(np.int32)


@functools.cache
def trainer(factor):
  """An update whose learning rate is `factor` times as high after step BREAK."""
  tx = optax.adam(lambda step: 0.1 * jnp.where(step < BREAK, 1.0, factor))

  def objective(params, x):
    logits = params['table'][x[:, :-1]]  # [pieces, characters, 128]
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, 1:]).mean()

  def update(state, batch, key):
    loss, gradient = jax.value_and_grad(objective)(state.params, batch['x'])
    moves, inner = tx.update(gradient, state.opt_state)
    return State(state.step + 1, optax.apply_updates(state.params, moves), inner), dict(loss=loss)

  params = dict(table=jnp.zeros((128, 128)))
  start = State(jnp.zeros((), jnp.int32), params, tx.init(params))
  return jax.jit(update), start


def train(*hooks, seed=0, factor=1.0):
  """The losses of a run of 64 pieces of 16 characters per step."""
  rng, (update, start), seen = np.random.default_rng(seed), trainer(factor), []

  def source(state):
    at = rng.integers(len(text()) - 17, size=64)
    return dict(x=text()[at[:, None] + np.arange(17)])

  def keep(step, state, metrics):
    if metrics:
      seen.append(float(metrics['loss']))

  loop.train(start, source, update, steps=STEPS, key=jax.random.key(0), hooks=[keep, *hooks])
  return np.array(seen)


@functools.cache
def before():
  """The curve of a run before, of another seed."""
  losses = train(seed=7)
  law = fits.offset(np.arange(31, STEPS + 1), losses[30:]).law
  return functools.partial(monitor.falling, **law._asdict())


def watched(curve=None, **changes):
  notes = Notes()
  run = Run(None, None, None, notes, '', STEPS)
  settings = dict(tolerance=0.03, window=WINDOW, start=40) | changes
  return notes, monitor.watch(run, curve=curve or before(), **settings)


@pytest.mark.parametrize('seed', range(2))
def test_no_alarm_on_a_clean_run(seed):
  notes, hook = watched()
  train(hook, seed=seed)
  assert notes.lines == notes.said == []


@pytest.mark.parametrize('seed', range(2))
def test_ten_times_the_learning_rate_is_told_within_a_window(seed):
  notes, hook = watched()
  losses = train(hook, seed=seed, factor=10.0)
  step, deviation = notes.lines[0]
  assert BREAK < step <= BREAK + WINDOW + 2
  assert deviation > 0.03
  assert losses[BREAK + 3] < 1.25 * losses[BREAK - 1]  # not a spike that a guard would have seen
  assert f'step {step}: the loss is' in notes.said[0]
  assert '% above what was predicted' in notes.said[0]


def test_back_again_too_good_and_rewound():
  notes, hook = watched(curve=lambda step: 2.0, tolerance=0.1, window=2, start=1)
  shown = [2, 2, 3, 3, 2, 2, 1, 1, 2, 2, float('nan'), 2]
  for step, loss in enumerate(shown, 1):
    hook(step, None, dict(loss=np.float32(loss)))
  hook(13, None, {})
  assert [step for step, _ in notes.lines] == [3, 6, 7, 10, 11]
  assert ['above', 'predicted again', 'below', 'predicted again', 'above'] == [
    next(word for word in ('above', 'below', 'predicted again') if word in text)
    for text in notes.said
  ]
  # a run that was sent back is looked at from the step it is at
  notes, hook = watched(curve=lambda step: 2.0, window=2, start=1)
  for step, loss in ((1, 2), (2, 9), (1, 2), (2, 2), (3, 2), (4, 2)):
    hook(step, None, dict(loss=np.float32(loss)))
  assert notes.lines == []


def test_the_last_step_counts():
  notes, hook = watched(curve=lambda step: 2.0, window=1, start=STEPS)
  hook(STEPS - 1, None, dict(loss=np.float32(5)))
  hook(STEPS, None, dict(loss=np.float32(5)))
  assert notes.lines == [(STEPS, pytest.approx(np.log(2.5)))]


def test_curves(tmp_path):
  law = laws.Offset(1.5, 40.0, 0.4)
  writer = Writer(str(tmp_path), every=1)
  for step in range(1, 301, 3):
    writer.write(step, dict(loss=laws.offset(law, step)))
  writer.write(300, {'heldout/nats_per_token': 2.0})
  writer.close()
  cfg = use(
    monitor.watch, curve=use(monitor.like, workdir=str(tmp_path), skip=20)
  )  # as a config has it
  found = build(cfg).keywords['curve']
  assert found(1000) == pytest.approx(float(laws.offset(law, 1000)), rel=1e-4)
  by_law = functools.partial(
    monitor.chinchilla, law=laws.BESIROGLU, parameters=1e9, tokens_per_step=4e6
  )
  assert by_law(1000) == pytest.approx(float(laws.chinchilla(laws.BESIROGLU, 1e9, 4e9)))
  with pytest.raises(UserError, match='no run to compare with'):
    monitor.like(1, workdir=str(tmp_path / 'none'))
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(dict(step=100, loss=2.0)) + '\n')
  with pytest.raises(UserError, match='has 1 values'):
    monitor.like(1, workdir=str(tmp_path))


def test_wrong_settings():
  with pytest.raises(UserError, match='tolerance=0'):
    monitor.watch(types.SimpleNamespace(), curve=None, tolerance=0)
