"""A vocabulary that grows when weights are loaded, and UL2R on top of a real model."""

import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pretrain import lm
from llm_jax.cli import flags, generate, main
from llm_jax.core import config as config_lib
from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.train import grow
from tests.interop.test_stories260k import REAL

ROOT = pathlib.Path(__file__).parents[2]


def random(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ('path', 'old', 'new'),
  [('embedding/table', (7, 4), (9, 4)), ('head/w', (4, 7), (4, 9)), ('head/bias', (7,), (9,))],
)
def test_old_rows_stay_and_new_ones_are_their_mean(path, old, new):
  stored, fresh = random(old), random(new, 1)
  axis = [a != b for a, b in zip(old, new)].index(True)
  found = np.asarray(grow.vocabulary(path, stored, fresh))
  kept, more = np.split(found, [7], axis)
  np.testing.assert_array_equal(kept, stored)
  mean = np.broadcast_to(np.mean(stored, axis, keepdims=True), more.shape)
  np.testing.assert_allclose(more, mean, rtol=1e-6)
  noisy = np.split(np.asarray(grow.vocabulary(path, stored, fresh, noise=0.5)), [7], axis)[1]
  np.testing.assert_allclose(noisy - mean, 0.5 * np.split(fresh, [7], axis)[1], atol=1e-6)


def test_old_logits_stay_and_the_loss_grows_by_less_than_jensens_bound():
  table, x = random((50, 8)), random((20, 8), 1)
  grown = grow.vocabulary('embedding/table', table, random((80, 8), 2))
  before, after = x @ table.T, x @ grown.T
  np.testing.assert_allclose(after[:, :50], before, rtol=1e-5, atol=1e-5)
  more = jax.nn.logsumexp(after, -1) - jax.nn.logsumexp(before, -1)
  assert 0 < more.min() and more.max() <= math.log(1 + 30 / 50)


@pytest.mark.parametrize(
  ('path', 'old', 'new', 'message'),
  [
    ('decoder/norm/scale', (7,), (9,), "'decoder/norm/scale' has shape"),
    ('embedding/table', (7, 4), (9, 5), 'only the vocabulary can grow'),
    ('embedding/table', (9, 4), (7, 4), '9 ids there and 7 here'),
  ],
)
def test_nothing_else_grows(path, old, new, message):
  with pytest.raises(UserError, match=message):
    grow.vocabulary(path, random(old), random(new))


@pytest.fixture(scope='module')
def stories(tmp_path_factory):
  """The run that stories260K is converted to, and the text it writes, repeated, as a corpus."""
  folder = tmp_path_factory.mktemp('runs')
  source = f'--path={REAL}/stories260K.bin'
  assert main.main(['convert', '--from=llama2c', source, f'--to={folder}/stories']) == 0
  text = (REAL / 'expected_greedy_200_steps.txt').read_text(encoding='utf-8')
  (folder / 'text.txt').write_text('\n\n'.join([text] * 30), encoding='utf-8')
  return folder


def train(folder, name, recipe, steps, *more):
  words = f'--config=configs/pretrain/{recipe}.py:batch=2,length=128,steps={steps}'
  if recipe == 'ul2r':
    words += f',run={folder}/stories'
  task = '--config.source.task', '--config.hooks.heldout.source.task'
  small = [f'{t}=llm_jax.data.tasks:text' for t in task]
  small += [f'{t}.train=("{folder}/text.txt",)' for t in task]
  small += ['--config.hooks.samples.at=()', '--config.log_every=1', '--config.checkpoint.every=2']
  small += ['--config.mesh.data=1']
  assert main.main(['train', words, *small, *more, f'--workdir={folder}/{name}']) == 0
  lines = (folder / name / 'metrics.jsonl').read_text().splitlines()
  return [x['loss'] for x in map(json.loads, lines) if 'loss' in x]


def of_run(folder, extra):
  where = '--config.source.task.vocab', '--config.hooks.heldout.source.task.vocab'
  found = [f'{t}=llm_jax.data.vocab:of_run' for t in where]
  extra = dict(path=f'{folder}/stories', **extra)
  return found + [f'{t}.{k}={v}' for t in where for k, v in extra.items()]


@pytest.mark.slow
def test_ul2r_goes_on_from_a_real_model_and_resumes(stories, monkeypatch, capfd):
  monkeypatch.chdir(ROOT)
  extra = of_run(stories, dict(extra_ids=100, modes="('[R]','[S]','[X]')"))
  losses = train(stories, 'ul2r', 'ul2r', 6, *extra)
  assert (
    np.mean(losses[-2:]) < losses[0] < 10
  )  # sentinels are new to it: a guess would cost log 615 = 6.4
  assert len(losses) == 6
  model, _, words = generate.load(f'{stories}/ul2r')
  assert model.card.kind == 'prefix' and model.card.vocab == words.size == 512 + 103
  assert words.encode('[S]One') == [513, *words.encode('One')]
  # half way, killed, and on again: the same losses
  shutil.copytree(stories / 'ul2r', stories / 'half')
  for step in ('4', '6'):
    shutil.rmtree(stories / 'half' / 'checkpoints' / step, ignore_errors=True)
  assert os.listdir(stories / 'half' / 'checkpoints') == ['2']
  again = train(stories, 'half', 'ul2r', 6, *extra)
  assert again == losses


def test_the_first_loss_is_the_models_own(stories, monkeypatch, capfd):
  """Continued pre-training on the text that the model itself writes begins where the model is."""
  monkeypatch.chdir(ROOT)
  told = json.loads((stories / 'stories/config.json').read_text())['model']
  c = lm.get_config('batch=2,length=128,steps=4')
  c.model = config_lib.from_json(json.dumps(told))
  c.init.init_from = f'{stories}/stories'
  c.optimizer.schedule.peak = 1e-3
  (stories / 'continued.json').write_text(config_lib.to_json(c))
  task = '--config.source.task', '--config.hooks.heldout.source.task'
  arguments = [f'--config={stories}/continued.json']
  arguments += [f'{t}=llm_jax.data.tasks:text' for t in task]
  arguments += [f'{t}.train=("{stories}/text.txt",)' for t in task] + of_run(stories, {})
  arguments += ['--config.hooks.samples.at=()', '--config.log_every=1', '--config.mesh.data=1']
  cfg = flags.read_config(arguments)
  model, params, _ = generate.load(f'{stories}/stories')
  first = build(cfg.source)(model)(None)
  own = build(cfg.objective)(model, params, first, None)
  assert main.main(['train', *arguments, f'--workdir={stories}/more']) == 0
  lines = (stories / 'more/metrics.jsonl').read_text().splitlines()
  losses = [x['loss'] for x in map(json.loads, lines) if 'loss' in x]
  assert abs(losses[0] - float(own.sum / own.weight)) < 1e-4 and losses[-1] < losses[0]
