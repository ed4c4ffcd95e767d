"""`llm-jax generate` as a user runs it, on a run that was saved a moment ago, and given wrong input."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cli import generate as command
from llm_jax.cli import main
from llm_jax.core.config import build, config, to_json, use
from llm_jax.data import vocab
from llm_jax.decode import beam, generate
from llm_jax.model import attention, block, ffn, positions, transformer
from llm_jax.train import checkpoint
from llm_jax.train.state import State

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LENGTH = 48


class Source:
  """A position in the data, which every checkpoint holds."""

  def state(self):
    return {}

  def restore(self, saved):
    pass


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """What `train` leaves behind: config, vocabulary, checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp('runs') / 'tiny'
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=2, rotate=None),
    ffn=use(ffn.Gated, hidden=16),
  )
  cfg = config(
    model=use(
      transformer.causal,
      vocab=262,
      embed=8,
      layers=1,
      block=layer,
      length=LENGTH,
      positions=use(positions.Learned),
    ),
    steps=2,
  )
  saver = checkpoint.Saver(str(folder), keep=5)
  shapes = jax.eval_shape(build(cfg.model)().init, jax.random.key(0))
  for step in (1, 2):
    rng = np.random.default_rng(step)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)  # noqa: B023
    state = State(jnp.int32(step), params, ())
    assert saver.restore(state, Source()) is not None if step == 1 else True
    assert saver.save(step, state, {})
  saver.wait()
  (folder / 'config.json').write_text(to_json(cfg))
  vocab.bytes_(extra_ids=0).save(str(folder / 'vocab'))
  return str(folder)


@pytest.fixture
def call(workdir, capfd):
  """Runs the command in this process: (stdout, stderr)."""

  def run(*flags, expect=0, workdir=workdir):
    assert main.main(['generate', f'--workdir={workdir}', *flags]) == expect
    found = capfd.readouterr()
    assert 'Traceback' not in found.err
    return found.out, found.err

  return run


def test_in_a_process_of_its_own(workdir, call):
  """The same bytes as in this process, piece by piece, without TensorFlow."""
  code = (
    'import sys\n'
    'from llm_jax.cli.main import main\n'
    'code = main(sys.argv[1:])\n'
    'assert not {"tensorflow", "seqio"} & set(sys.modules)\n'
    'sys.exit(code)\n'
  )
  flags = ['--prompt=ROMEO:', '--max_new=12', '--seed=3']
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | dict(PYTHONPATH=ROOT)
  done = subprocess.run(
    [sys.executable, '-c', code, 'generate', f'--workdir={workdir}', *flags],
    env=env,
    capture_output=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr.decode()[-3000:]
  out = done.stdout.decode()
  assert out.startswith('ROMEO:') and out.endswith('\n') and len(out) > 10
  assert out == call(*flags)[0]


def test_several_prompts_come_as_blocks(call, tmp_path):
  (tmp_path / 'prompts.txt').write_text('second\nthird “one”\n')
  out, _ = call(
    '--prompt=first', f'--prompts_file={tmp_path}/prompts.txt', '--num=2', '--max_new=4'
  )
  blocks = [line for line in out.splitlines() if line.startswith('--- ')]
  assert [b.split(': ')[1] for b in blocks] == ["'first'", "'first'", "'second'", "'second'"] + [
    "'third “one”'"
  ] * 2
  assert blocks[0].startswith('--- 1 of 6') and '\nthird “one”' in out


def test_no_prompt_and_an_empty_prompt_start_a_new_document(call):
  assert (
    call('--max_new=6', '--seed=1')[0] == call('--prompt=', '--max_new=6', '--seed=1')[0] != '\n'
  )


def test_seed_temperature_preset_and_step_are_heard(call):
  run = lambda *flags: call('--prompt=A', '--max_new=12', *flags)[0]
  assert run() == run('--seed=0') != run('--seed=1')
  greedy = run('--temperature=0')
  assert (
    greedy
    == run('--temperature=0', '--seed=9')
    == run('--top_k=1')
    == run('--preset=llama', '--seed=2')
  )
  assert run('--preset=llama', '--temperature=5', '--seed=2') != greedy
  assert run('--temperature=0', '--step=2') == greedy != run('--temperature=0', '--step=1')


@pytest.mark.slow
def test_beams_find_no_less_likely_a_text_than_greedy(workdir, call):
  model, params, words = command.load(workdir)
  told = dict(eos=words.eos, start=words.start, max_new=8)
  ids = np.array([words.encode('A')])
  greedy = generate.generate(model, params, ids, [1], jax.random.key(0), temperature=0.0, **told)
  out = beam.search(model, params, ids, [1], length_penalty=beam.none, **told)
  assert out.scores[0, 0] >= greedy.logp[0].sum() - 1e-4
  run = lambda *flags: call('--prompt=A', '--max_new=8', *flags)[0]
  best = run('--beams=4', '--length_penalty=none')
  kept = np.asarray(out.tokens)[0, 0, : int(out.lengths[0, 0])]
  assert best == f'A{words.decode(kept)}\n'
  blocks = run('--beams=4', '--length_penalty=none', '--num=2')
  assert blocks.count('--- ') == 2 and best in blocks
  t5 = run('--preset=t5_beam')
  assert (
    t5 == run('--beams=4', '--length_penalty=gnmt:0.6') == run('--preset=gpt3_beam', '--seed=4')
  )


def test_what_the_command_line_sets_goes_over_a_preset_of_beams(call, monkeypatch):
  seen = {}
  monkeypatch.setattr(beam, 'text', lambda *_, **told: seen.update(told) or ['x'] * told['n'])
  call('--preset=t5_beam', '--length_penalty=power:2', '--early_stopping=never', '--num=2')
  assert seen['length_penalty'](3) == 9 and seen['early_stopping'] == 'never'
  assert (seen['beams'], seen['n'], seen['max_new']) == (4, 2, 200)
  call('--preset=survey', '--temperature=0', '--groups=2', '--diversity=0.5')
  assert seen['length_penalty'](3) == 3 and (seen['groups'], seen['diversity']) == (2, 0.5)
  assert seen['max_new'] == 512 and seen['early_stopping'] is False
  assert 'temperature' not in seen
  call('--preset=gpt3_beam', '--beams=8', '--max_new=5')
  assert (seen['beams'], seen['max_new']) == (8, 5) and seen['length_penalty'](7) == 2**0.6


def test_beams_are_drawn_where_something_to_draw_with_is_named(call, monkeypatch):
  heard = []
  take = lambda *given, n, **told: heard.append((len(given), told)) or ['x'] * n
  monkeypatch.setattr(beam, 'text', take)
  named = 'temperature', 'top_p', 'top_k'
  for flags, wanted in [
    (['--preset=survey'], (0.1, 0.75, 40)),
    (['--preset=survey', '--top_p=0.5'], (0.1, 0.5, 40)),
    (['--beams=2', '--top_k=3'], (0.8, 1.0, 3)),
    (['--preset=t5_beam', '--temperature=0.3'], (0.3, None, None)),
    (['--beams=2', '--preset=alpaca'], (0.7, 0.9, 50)),
  ]:
    heard.clear()
    call(*flags)
    ((given, told),) = heard
    assert given == 5 and tuple(told.get(n) for n in named) == wanted  # the fifth is the key


def test_explain_prints_a_table_for_every_token(call):
  flags = '--prompt=A', '--max_new=4', '--temperature=0.7', '--seed=5'
  out, _ = call(*flags, '--explain', '--top_k=5', '--repetition=1.5', '--presence=0.1')
  assert max(map(len, out.splitlines())) <= 100
  assert out.count('token ') == 4 == out.count('<- drawn') and "token 1, after 'A'" in out
  assert 'model' in out and 'temperature' in out and out.count('top_k') == 4
  plain = call(*flags, '--top_k=5', '--repetition=1.5', '--presence=0.1')[0]
  assert out.endswith('\n\n' + plain)


def test_a_text_under_a_constraint(call, tmp_path):
  (tmp_path / 'schema.json').write_text('{"enum": ["red", "green"]}')
  run = lambda *flags: call('--prompt=A ', '--max_new=20', '--temperature=3', *flags)[0]
  for seed in ('--seed=1', '--seed=2', '--seed=3'):
    assert re.fullmatch('A (yes|no), [0-9]{2}\n', run('--regex=(yes|no), [0-9]{2}', seed))
    assert run(f'--schema={tmp_path}/schema.json', seed) in ('A "red"\n', 'A "green"\n')


def test_the_end_of_a_position_table_is_announced(call):
  prompt = 'a' * (LENGTH - 5)
  _, err = call(f'--prompt={prompt}', '--max_new=12')
  assert f'{LENGTH} positions' in err and 'after 5 tokens' in err
  assert call('--prompt=a', '--max_new=12')[1] == ''


def test_the_checkpoint_is_the_one_that_was_saved(workdir):
  model, params, words = command.load(workdir, 1)
  rng = np.random.default_rng(1)
  for leaf in jax.tree.leaves(params):
    np.testing.assert_array_equal(leaf, rng.normal(size=leaf.shape).astype(np.float32))
  assert model.card.vocab == words.size == 262


BAD = {
  'an unknown flag': (('--tempreature=1',), "did you mean 'temperature'"),
  'a config': (('--config=configs/quickstart.py',), 'leave out --config'),
  'a stray argument': (('ROMEO:',), 'unexpected argument'),
  'a negative temperature': (('--temperature=-1',), 'temperature must be 0'),
  'a temperature that is no number': (('--temperature=hot',), 'temperature'),
  'top_p of zero': (('--top_p=0',), r'top_p must be in (0, 1]'),
  'top_p above one': (('--top_p=1.1',), r'top_p must be in (0, 1]'),
  'a negative top_k': (('--top_k=-3',), 'top_k'),
  'no new token': (('--max_new=0',), 'max_new'),
  'no sample': (('--num=0',), 'num'),
  'an unknown preset': (('--preset=alpca',), "did you mean 'alpaca'"),
  'no beam': (('--beams=0',), 'beams'),
  'beams that do not divide': (('--beams=4', '--groups=3'), 'must divide into groups=3'),
  'more texts than beams': (('--beams=2', '--num=3'), 'between 1 and the number of beams, 2'),
  'an unknown length penalty': (('--beams=2', '--length_penalty=gmnt:1'), "did you mean 'gnmt'"),
  'a length penalty of words': (('--beams=2', '--length_penalty=gnmt:a'), "'a' is no number"),
  'a number for none': (('--beams=2', '--length_penalty=none:1'), 'none takes no number'),
  'beams that draw without a temperature': (
    ('--beams=2', '--top_k=3', '--temperature=0'),
    'leave out top_k',
  ),
  'beams explained': (('--beams=2', '--explain'), 'leave out explain'),
  'a conversation explained': (('--chat', '--explain'), 'leave out --chat'),
  'a wrong pattern': (('--regex=a(',), 'the constraint cannot be used'),
  'two constraints': (('--regex=a', '--schema=b'), 'leave one of them out'),
  'a constraint on beams': (('--regex=a', '--beams=2'), 'one text that is drawn'),
  'a missing schema': (('--schema=nowhere.json',), 'nowhere.json: no such file'),
  'two prompts explained': (
    ('--explain', '--prompt=a', '--prompt=b'),
    '--explain shows one --prompt',
  ),
  'a step that was not kept': (('--step=7',), 'no checkpoint of step 7; kept: 1, 2'),
  'a prompt that is too long': (
    ('--prompt=' + 'a' * LENGTH,),
    f'{LENGTH} tokens, the model reads at most {LENGTH - 1}',
  ),
  'a missing file of prompts': (('--prompts_file=nowhere.txt',), 'nowhere.txt: no such file'),
}


def assert_one_line(err, message):
  lines = [line for line in err.splitlines() if line.startswith('llm-jax: error:')]
  assert len(lines) == 1 and message in lines[0], err


@pytest.mark.parametrize('name', BAD)
def test_wrong_input_gets_one_line(name, call):
  flags, message = BAD[name]
  out, err = call(*flags, expect=2)
  assert_one_line(err, message)
  assert out == ''


def test_an_empty_or_undecodable_file_of_prompts(call, tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  assert_one_line(call(f'--prompts_file={tmp_path}/empty.txt', expect=2)[1], 'holds no prompt')
  (tmp_path / 'latin.txt').write_bytes('déjà'.encode('latin-1'))
  assert_one_line(call(f'--prompts_file={tmp_path}/latin.txt', expect=2)[1], 'not UTF-8')


def test_a_folder_without_a_run_names_the_command_that_makes_one(call, tmp_path):
  missing = call(expect=2, workdir=tmp_path)[1]
  assert_one_line(missing, f'llm-jax train --config=configs/quickstart.py --workdir={tmp_path}')
  (tmp_path / 'config.json').write_text('{}')
  assert_one_line(
    call(expect=2, workdir=tmp_path)[1], f'--config={tmp_path}/config.json --workdir={tmp_path}'
  )
  assert_one_line(call(expect=2, workdir='')[1], 'name the run')


def test_a_run_whose_vocabulary_is_missing(call, workdir, tmp_path):
  for name in ('config.json', 'checkpoints'):
    os.symlink(os.path.join(workdir, name), tmp_path / name)
  assert_one_line(call(expect=2, workdir=tmp_path)[1], 'no vocabulary')
