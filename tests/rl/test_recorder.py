"""The panel against numpy by hand, and faults put into the toy: each is named, clean runs are not."""

from functools import partial

import jax
import numpy as np
import pytest

from llm_jax.rl import advantage, recorder, reward, rollout, toy
from llm_jax.train import hooks
from tests.rl import toys


class Writer:
  """Keeps what is written."""

  def __init__(self):
    self.rows, self.said = [], []

  def write(self, step, values):
    self.rows.append(values)

  def say(self, text):
    self.said.append(text)

  def aside(self):
    return toys.contextlib.nullcontext()


class Saver:
  def track(self, name, part):
    self.part = part


def fly(source, method='grpo', rate=3e-3, steps=8, gold=toy.gold, **settings):
  """The names that a run of the toy is given, and what was written."""
  run = hooks.Run(toys.model(), source, Saver(), Writer(), '', steps)
  hook = recorder.record(run, gold=gold, **settings)
  with toys.world():
    toys.train(source, toys.first(method=method, rate=rate), method, rate, steps, hooks=[hook])
  named = {k.split('/')[-1] for row in run.writer.rows for k in row if '/diagnosis/' in k}
  return named, run.writer


def broken(change, method='grpo', **settings):
  """A source whose rounds `change(source, rows)` alters before anybody sees them."""
  source = toys.make_source(method=method, **settings)
  write = source._write

  def written(params):
    rows = write(params)
    change(source, rows)
    return rows

  source._write = written
  return source


def wrong_mask(source, rows):
  rows['weights'] = (rows['segments'] > 0).astype(np.float32)  # the prompt counts too


def short_mask(source, rows):
  rows['weights'] = rows['weights'] * (rows['targets'] != 1)  # the end does not count


def stale(source, rows):
  rows['old_logp'] = rows['old_logp'] + 0.5 * np.sin(np.arange(rows['old_logp'].size)).reshape(
    rows['old_logp'].shape
  ).astype(np.float32)


def turned(source, rows):
  rows['advantages'] = -rows['advantages']


def shifted(source, rows):
  rows['gap'] = rows['gap'] + 0.02


def elsewhere(source, rows):
  assert 'gap' not in rows
  few = (np.arange(len(rows['weights'])) < 2)[:, None]
  rows['old_logp'] = rows['old_logp'] + np.float32(0.02) * few * rows['weights']


def blind(source, rows):
  rows['values'] = rows['values'] + 5 * np.sin(np.arange(rows['values'].size)).reshape(
    rows['values'].shape
  ).astype(np.float32)


def by_length(prompts, answers, told):
  return np.array([len(a) for a in answers], np.float32)


def constant(prompts, answers, told):
  return np.ones(len(answers), np.float32)


def one_letter(prompts, answers, told):
  return np.array([a.count('m') - 3 * sum(c != 'm' for c in a) for a in answers], np.float32)


FAULTS = {
  'wrong mask': ('mask_bug', lambda: fly(broken(wrong_mask), steps=3)),
  'mask without the end': ('mask_bug', lambda: fly(broken(short_mask), steps=3)),
  'stale policy': ('stale_policy', lambda: fly(broken(stale), steps=3)),
  'sign of the advantages': ('reward_sign', lambda: fly(broken(turned), steps=3)),
  'sampler with another temperature': ('gap', lambda: fly(broken(shifted), steps=3)),
  'the same in rounds of one update': (
    'gap', lambda: fly(broken(elsewhere, epochs=1), steps=3)
  ),
  'constant reward': ('constant_reward', lambda: fly(toys.make_source(reward=constant), steps=8)),
  'length pays': (
    'length_exploit', lambda: fly(toys.make_source(reward=by_length), steps=24, gold=None)
  ),
  'a proxy with a hole': ('reward_hacking', lambda: fly(toys.make_source(reward=toy.proxy), steps=30)),
  'a learning rate that is too high': (
    'entropy_collapse', lambda: fly(toys.make_source(reward=one_letter), rate=1e-2, steps=40, gold=None)
  ),
  'a critic of noise': ('value_collapse', lambda: fly(broken(blind, 'ppo'), 'ppo', steps=12)),
  'no penalty at all': (
    'kl_runaway', lambda: fly(toys.make_source(reward=one_letter), rate=1e-2, steps=40, gold=None,
      judge=partial(recorder.diagnose, kl=12.0)),
  ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_named(fault):
  name, run = FAULTS[fault]
  named, writer = run()
  assert name in named, (named, writer.rows[-1])
  assert any(
    name.replace('_', ' ') in text and recorder.REMEDIES[name] in text for text in writer.said
  )


@pytest.mark.parametrize('method', ['ppo', 'grpo', 'rloo'])
def test_a_clean_run_is_not(method):
  named, writer = fly(toys.make_source(method=method), method, steps=12)
  assert not named, writer.said


@pytest.mark.slow
def test_twenty_clean_seeds():
  """At most 5 %: one run of twenty may be given a name."""
  alarms = [bool(fly(toys.make_source(seed=s, method='grpo'), steps=30)[0]) for s in range(20)]
  assert sum(alarms) <= 1, alarms


def test_the_panel_by_hand():
  w = np.array([[0, 1, 1], [1, 0, 0]], np.float32)
  old = np.log(np.array([[9, 0.5, 0.25], [0.5, 9, 9]]))
  new = old + np.log(np.array([[9, 1.5, 1], [0.5, 9, 9]]))
  batch = dict(weights=w, old_logp=old, ref_logp=old - 0.1, reward=np.array([1.0, 3]))
  batch |= dict(gap=np.array([0.0, 1e-6]), advantages=np.array([[5, -1, -1], [2, 5, 5.0]]))
  batch |= dict(
    returns=np.array([[5, 1, 2], [3, 5, 5.0]]), values=np.array([[5, 1, 1], [3, 5, 5.0]])
  )
  found = recorder.panel(batch, new, np.array([[9, 1, 2], [3, 9, 9.0]]))
  expected = dict(
    entropy=2, length=1.5, reward=2, reward_std=1, gap=1e-6, sign=1, by_length=-1, clipped=2 / 3,
    kl=0.15, k3=1.5 * (np.exp(-0.1) - 1 + 0.1), old_kl=np.mean([0.5 - np.log(1.5), 0, -0.5 - np.log(0.5)]),
    explained_variance=1 - np.var([0, 1, 0]) / np.var([1, 2, 3]),
  )  # fmt: skip
  expected |= {f'ratio/p{q:02}': np.quantile([1.5, 1, 0.5], q / 100) for q in (1, 50, 99)}
  assert sorted(found) == sorted(expected)
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-4), name


def test_components_and_the_memory_are_written_and_come_back():
  length = lambda prompts, answers, told: np.array([len(a) for a in answers])
  mixed = partial(
    reward.weighted, parts=dict(gold_too=toy.gold, length=length), weights=dict(length=0.01)
  )
  source = toys.make_source(reward=mixed)
  _, writer = fly(source, steps=4)
  row = writer.rows[0]
  assert row['rl/reward/length'] > 0 and -1 < row['rl/reward/gold'] < 1 and row['rl/mask'] == 0
  want = row['rl/reward/gold_too'] + 0.01 * row['rl/reward/length']
  assert row['rl/reward'] == pytest.approx(want, rel=1e-5)
  assert row['rl/reward/gold_too'] == pytest.approx(row['rl/reward/gold'], rel=1e-5)
  texts = source.answers()[1]
  assert source.rows['reward/length'].tolist() == [len(text) for text in texts]
  history = recorder._History(3)
  for i in range(6):
    history.add(i, dict(x=float(i)))
  again = recorder._History(3)
  again.restore(history.state())
  assert [p['x'] for p in again.panels] == [0, 3, 4, 5] and again.seen == {5}
  assert rollout.every(np.zeros((2, 2))).all() and advantage.fixed(1.0, 2.0) == 1.0
  assert jax.tree.leaves(again.state())
