"""Additions: the split, the reward, demonstrations; the configs of tuning and alignment from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import vocab
from llm_jax.rl import arithmetic
from tests.rl import toys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def words():
  return vocab.bytes_(extra_ids=0, modes=())


def test_every_pair_is_in_one_split_and_right():
  train, held = (arithmetic.problems(split=s, limit=20) for s in ('train', 'heldout'))
  prompts = [r['prompt'] for r in train + held]
  assert sorted(prompts) == sorted(f'{a}+{b}=' for a in range(20) for b in range(20))
  assert len(held) == 20 and all(eval(r['prompt'][:-1]) == int(r['answer']) for r in train + held)
  assert arithmetic.problems(count=3) == arithmetic.problems()[:3]
  told = [dict(answer='42')] * 3
  np.testing.assert_array_equal(arithmetic.correct([''] * 3, ['42', '43', '42 '], told), [1, 0, 0])
  with pytest.raises(UserError, match="no split 'test'"):
    arithmetic.problems(split='test')


def test_a_teacher_counts_one_too_many_as_often_as_told():
  model = toys.model()._replace(card=toys.model().card._replace(vocab=259))
  make = lambda: arithmetic.demonstrations(model, vocab=words, wrong=0.75, batch=2000)
  batch, off = make()(None), []
  for targets, weights in zip(batch['targets'], batch['weights']):
    prompt, answer = (words().decode(targets[w]) for w in (weights == 0, weights == 1))
    off.append(int(answer) - eval(prompt[:-1]))
    assert targets[weights == 1][-1] == 1  # the end counts
  assert set(off) == {0, 1} and abs(np.mean(off) - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
  again = make()
  again.skip(1)
  other = make()
  other.restore(again.state())
  np.testing.assert_array_equal(again(None)['targets'], other(None)['targets'])
  with pytest.raises(UserError, match='length=5 is too short for 10 tokens'):
    arithmetic.demonstrations(model, vocab=words, length=5)


def train(workdir, config, *overrides):
  command = [
    sys.executable,
    '-m',
    'llm_jax.cli.train',
    f'--config={config}',
    f'--workdir={workdir}',
  ]
  flags = (
    ['--config.model.embed=32', '--config.model.block.ffn.hidden=32'] if 'tune' in config else []
  )
  flags += ['--config.model.model.embed=32', '--config.model.model.block.ffn.hidden=32'] * (
    'ppo' in config
  )
  flags += ['--config.log_every=1', '--config.checkpoint.every=3', *overrides]
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | dict(JAX_PLATFORMS='cpu')
  done = subprocess.run(
    [*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]


def metrics(workdir):
  """{(step, name): value} of what does not depend on the clock."""
  lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  timed = ('seconds', 'tokens_per_second', 'mfu')
  return {(x['step'], k): v for x in lines for k, v in x.items() if not any(t in k for t in timed)}


@pytest.mark.slow
def test_a_run_from_the_command_line_resumes_bit_by_bit_and_gets_better(tmp_path):
  """tune/arithmetic, then align/ppo from its weights: in one go, and stopped in the middle of a round."""
  train(tmp_path / 'tuned', 'configs/tune/arithmetic.py:steps=6,batch=16')
  begin = f'--config.init.init_from={tmp_path / "tuned"}'
  path = f'--config.source.reference.path={tmp_path / "tuned"}'
  config = 'configs/align/ppo.py:steps=9,round=64,group=4'
  train(tmp_path / 'whole', config, begin, path)
  train(
    tmp_path / 'cut', config, begin, path, '--config.steps=3', '--config.optimizer.schedule.steps=9'
  )
  train(tmp_path / 'cut', config, begin, path)
  whole, cut = metrics(tmp_path / 'whole'), metrics(tmp_path / 'cut')
  stopped = {k: v for k, v in cut.items() if k in whole}
  assert stopped == whole and (9, 'heldout/reward') in whole
  assert whole[1, 'old_kl'] == 0 < whole[2, 'old_kl'] and (1, 'rl/kl') in whole
