"""Bad data of tuning and alignment, through `llm-jax train`: one line with file and line, before the first step."""

import json
import os

import numpy as np
import pytest

from llm_jax.data import vocab
from llm_jax.train import folders
from tests.cli import killed
from tests.cli.test_train import assert_one_line, refuse
from tests.model.test_scalar import make
from tests.rl.test_annotate import save

HERE = os.path.dirname(os.path.abspath(__file__))
SFT = os.path.join(os.path.dirname(os.path.dirname(HERE)), 'configs/tune/sft.py:tiny,length=64')
DPO = os.path.join(os.path.dirname(os.path.dirname(HERE)), 'configs/align/dpo.py:tiny')
GRPO = f'{killed.__file__}:kind=grpo'
LONG = 'long ' * 50
NAN = float('nan')
ROUNDS = []


def words(where):
  return f'{where}=llm_jax.data.vocab:bytes_', f'{where}.extra_ids=0', f'{where}.modes=()'


def tuning(path):
  sets = '--config.source.task.sets[0]'
  return (
    f'{sets}=llm_jax.data.examples:conversations', f'{sets}.path={path}', f'{sets}.template=chatml',
    *words('--config.source.task.vocab'),
    '--config.model.vocab=259',
  )  # fmt: skip


def comparisons(path):
  data = '--config.source.source.data'
  return (
    f'{data}=llm_jax.data.pairs:files', f'{data}.path={path}', f'{data}.template=chatml',
    f'{data}.format=llm_jax.data.preferences:chosen_rejected', '--config.source.source.left_out=0.0',
    f'{data}.heldout=0.0', *words(f'{data}.vocab'),
  )  # fmt: skip


def asked(path):
  return (
    '--config.source.prompts=llm_jax.rl.prompts:files', f'--config.source.prompts.path={path}',
    '--config.source.reward=tests.rl.test_rollout:nan_at',
  )  # fmt: skip


task = lambda **kw: dict(instruction='Say a.', output='a') | kw
pair = lambda **kw: dict(prompt='Hi', chosen='yes', rejected='no') | kw
without = lambda record, key: {k: v for k, v in record.items() if k != key}

# name: (config, flags, records, the line that is at fault or None, what the error says)
CASES = {
  'a missing key': (SFT, tuning, [task(), without(task(), 'output')], 2, "no key 'output'"),
  'an empty response': (SFT, tuning, [task(), task(), task(output=' ')], 3, "'output' is empty"),
  'a prompt longer than the context': (
    SFT, tuning, [task(), task(instruction=LONG)], 2, 'the prompt alone has 2'
  ),
  'a pair without an answer': (DPO, comparisons, [without(pair(), 'rejected')], 1, "no key 'rejected'"),
  'an empty answer of a pair': (DPO, comparisons, [pair(), pair(chosen='')], 2, "'chosen' is empty"),
  'two answers that are one': (DPO, comparisons, [pair(), pair(chosen='no')], 2, 'are the same text'),
  'a pair longer than the context': (
    DPO, comparisons, [pair(prompt=f'{i}') for i in range(30)] + [pair(prompt=LONG)], 31, 'the prompt alone has 2'
  ),
  'two pairs of one id': (
    DPO, comparisons, [pair(id='x'), pair(id='y'), pair(id='x')], 3, "the id 'x' is that of {path}:1 too"
  ),
  'a score that is no number': (
    DPO, comparisons, [pair(), pair(score_chosen=NAN, score_rejected=1.0)], 2, "'score_chosen' is nan"
  ),
  'a chance below a half': (DPO, comparisons, [pair(chance=0.3)], 1, "'chance' is 0.3"),
  'a record without a prompt': (GRPO, asked, [dict(prompt='1'), dict(answer='2')], 2, "no key 'prompt'"),
  'a prompt too long for the policy': (
    GRPO, lambda path: (*asked(path), '--config.source.prompt_length=4'),
    [dict(prompt='1'), dict(prompt='12345')], 2, "has 5 tokens, prompt_length is 4"
  ),
  'a reward that is nan': (GRPO, asked, [dict(prompt='1+1=')], 1, 'reward gives nan for the prompt of'),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_one_line_with_file_and_line(name, tmp_path, capfd):
  config, flags, records, line, message = CASES[name]
  path = tmp_path / 'data.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  err = refuse(capfd, tmp_path / 'run', *flags(path), config=config)
  assert_one_line(err, message.format(path=path))
  assert_one_line(err, f'{path}:{line}')
  assert not (tmp_path / 'run/metrics.jsonl').exists(), 'nothing was learned'


def seldom_nan(prompts, answers, told, *, rounds):
  """Not a number in the round after `rounds` others."""
  ROUNDS.append(len(answers))
  return np.full(len(answers), NAN if len(ROUNDS) > rounds else len(ROUNDS) % 2)


def test_a_reward_that_is_nan_in_a_later_round_is_told_and_nothing_is_lost(tmp_path, capfd):
  reward = '--config.source.reward'
  ROUNDS.clear()
  err = refuse(
    capfd, tmp_path / 'run', f'{reward}=tests.cli.test_bad_data:seldom_nan', f'{reward}.rounds=3', config=GRPO
  )  # fmt: skip
  assert_one_line(err, 'reward gives nan for the prompt')
  assert folders.steps(str(tmp_path / 'run/checkpoints')) == [2, 3], (
    'every second step, and the last'
  )


@pytest.fixture
def other(tmp_path):
  """A run whose vocabulary is not that of the recipes."""
  return save(tmp_path / 'other', make(), 0, vocab.bytes_(extra_ids=4, modes=()))


def test_a_reference_with_another_tokenizer(other, tmp_path, capfd):
  err = refuse(capfd, tmp_path / 'run', f'--config.source.ref={other}', config=DPO)
  assert_one_line(err, f'{other} has another tokenizer (263 ids) than this data (259 ids)')
  path = f'--config.source.reference.path={other}'
  err = refuse(capfd, tmp_path / 'run', path, config=f'{killed.__file__}:kind=ppo')
  assert_one_line(err, f'{other} has another tokenizer (263 ids) than this data (259 ids)')


def test_a_reward_model_with_another_tokenizer(other, tmp_path, capfd):
  config = tmp_path / 'judged.py'
  config.write_text(
    'from llm_jax.core.config import use\n'
    'from llm_jax.data import vocab\n'
    'from llm_jax.model import scalar\n'
    'from llm_jax.rl import reward\n'
    'from tests.cli import killed\n'
    'def get_config(text=None):\n'
    "  c = killed.get_config('kind=grpo')\n"
    '  words = use(vocab.bytes_, extra_ids=4, modes=())\n'
    '  model = use(scalar.make, model=c.model)\n'
    f'  told = dict(path={other!r}, vocab=words, policy_vocab=c.source.vocab)\n'
    '  c.source.reward = use(reward.learned, model=model, **told)\n'
    '  return c\n'
  )
  err = refuse(capfd, tmp_path / 'run', config=str(config))
  assert_one_line(err, 'the policy writes 259 ids of Bytes')
  assert_one_line(err, f'the reward model {other} reads 263')
