"""The experiment on InstructGPT's three steps, small: what is exact is exact, and every method gains."""

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments.instruct_gpt import run as study
from llm_jax.core import mesh
from llm_jax.rl import toy

SHIPPED = pathlib.Path(study.__file__).with_name('result.json')


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(mesh.make(data=1)):
    yield


@pytest.fixture(scope='module')
def begun():
  """(tuned policy, Exact, pairs) after the first two steps."""
  with jax.set_mesh(mesh.make(data=1)):
    tuned, judge, pairs, _, held = study.first_two(study.QUICK, 0)
    return tuned, study.Exact(tuned, judge, held), pairs


def test_tuning_learns_what_was_shown(begun):
  """Demonstrations have a to f with 60 % and one to four letters with 10 to 40 %: their gold reward is 0.5."""
  _, exact, _ = begun
  found = exact.point(exact.logp)
  assert abs(found.gold - 0.5) < 0.08 and found.kl == 0 and abs(found.proxy) < 1e-9
  p = np.exp(exact.logp[0])
  share = [p[[len(t) == n for t in exact.texts]].sum() for n in range(5)]
  np.testing.assert_allclose(share, [0, 0.1, 0.2, 0.3, 0.4], atol=0.1)


def test_all_labels_but_the_noise_are_the_gold_rewards(begun):
  """Ties aside, `noise` of them are turned round: 20 % of about 500 here."""
  _, _, pairs = begun
  gold = {s: toy.gold(None, pairs[s], [{}] * len(pairs[s])) for s in ('chosen', 'rejected')}
  apart = gold['chosen'] - gold['rejected']
  wrong = (apart < 0).sum() / (apart != 0).sum()
  assert abs(wrong - study.QUICK.noise) < 4 * np.sqrt(0.16 / (apart != 0).sum())


@pytest.mark.parametrize('n', [1, 4, 16, 64])
def test_best_of_n_costs_the_formula_within_its_slack(begun, n):
  """log n - (n - 1) / n is an upper bound of the exact divergence, and no further from it than `best_of_n_slack`."""
  _, exact, _ = begun
  point, told = study.best_of_n(exact, n)
  assert told['formula'] - told['slack'] - 1e-9 <= point.kl <= told['formula'] + 1e-9
  assert n > 16 or told['slack'] <= 0.05 * told['formula'] + 1e-9
  assert (point.gold > exact.point(exact.logp).gold + 0.1) == (n > 1)


def test_the_reward_function_gives_what_the_list_has(begun):
  _, exact, _ = begun
  chosen = [0, 1, 77, 3000, 30940]
  texts = [exact.texts[i] for i in chosen]
  prompt = exact._prompts[0]
  found = exact.reward([prompt] * len(texts), texts, [{}] * len(texts))
  np.testing.assert_allclose(found, exact.proxy[0, chosen], atol=1e-4)


@pytest.mark.slow
def test_every_method_raises_the_gold_reward(tmp_path):
  study.main(['--seeds=1', '--quick', f'--out={tmp_path}'])
  told = json.loads((tmp_path / 'result.json').read_text())
  rows = {m: [r for r in told['rows'] if r['method'] == m] for m in ('SFT', *study.LOOKS)}
  for method in study.LOOKS:
    best = max(rows[method], key=lambda r: r['gold'])
    assert best['gold'] > rows['SFT'][0]['gold'] + 0.1 and 0 < best['kl'] < 4, (method, best)
  for row in told['rows']:  # nothing is above the best that a divergence can buy
    above = [r for r in told['rows'] if r['method'] == 'optimum for gold' and r['kl'] >= row['kl']]
    assert not above or row['gold'] <= above[0]['gold'] + 1e-3
  assert (tmp_path / 'frontier.png').stat().st_size > 10_000


def test_what_is_shipped_is_of_these_settings():
  told = json.loads(SHIPPED.read_text())
  assert told['settings'] == json.loads(json.dumps(study.Size()._asdict()))
  assert {r['method'] for r in told['rows']} >= set(study.LOOKS)
  assert all(len(r['gold_of_seeds']) == told['seeds'] for r in told['rows'])


def test_the_interval_is_students():
  """t(0.975, 4) = 2.776 (any table of t); the standard deviation of 1 .. 5 is sqrt(2.5)."""
  assert study.interval([1, 2, 3, 4, 5]) == pytest.approx(2.776 * np.sqrt(2.5 / 5), rel=1e-3)
  assert study.interval([3.0]) == 0
