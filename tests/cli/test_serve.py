"""`llm-jax serve` on a run, its engine replaced by that of tests/serve/fake.py: which flags go where, and its end."""

import contextlib
import threading
import types

import httpx
import jax
import jax.numpy as jnp
import openai
import pytest

import llm_jax.serve
from llm_jax.cli import main
from llm_jax.cli import serve as command
from llm_jax.core.config import build, config, to_json, use
from llm_jax.data import vocab
from llm_jax.model import attention, block, ffn, transformer
from llm_jax.serve import server
from llm_jax.train import checkpoint
from llm_jax.train.state import State
from tests.serve import fake


class Source:
  """A position in the data, which every checkpoint holds."""

  def state(self):
    return {}


def write(folder, kind):
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=2),
    ffn=use(ffn.Gated, hidden=16),
  )
  model = use(kind, vocab=262, embed=8, layers=1, block=layer)
  return write_run(folder, model, build(model)().init(jax.random.key(0)))


def write_run(folder, model, params):
  """The workdir of a run that ended with these weights, and the bytes as its vocabulary."""
  cfg = config(model=model, steps=1)
  saver = checkpoint.Saver(str(folder))
  saver.restore(State(jnp.int32(1), params, ()), Source())
  assert saver.save(1, State(jnp.int32(1), params, ()), {})
  saver.wait()
  (folder / 'config.json').write_text(to_json(cfg))
  vocab.bytes_(extra_ids=0).save(str(folder / 'vocab'))
  return str(folder)


@pytest.fixture
def engines(monkeypatch):
  """(model, params, sizes) of the engines that were made."""
  made = []

  def engine(model, params, **sizes):
    made.append((model, params, sizes))
    return fake.Engine(fake.words(None))

  monkeypatch.setattr(llm_jax.serve, 'engine', types.SimpleNamespace(Engine=engine), raising=False)
  return made


@contextlib.contextmanager
def serving(folder, monkeypatch, *flags):
  """The address of `llm-jax serve` in a thread of its own; afterwards it has been told to end, and did with 0."""
  started, done, run = threading.Event(), [], server.run

  def told(made, sock, **more):
    done.append(made)
    started.url = f'http://127.0.0.1:{sock.getsockname()[1]}'
    started.set()
    run(made, sock, **more)

  monkeypatch.setattr(server, 'run', told)
  asked = ['serve', f'--workdir={folder}', '--port=0', *flags]
  thread = threading.Thread(target=lambda: done.append(main.main(asked)))
  thread.start()
  assert started.wait(120)
  try:
    yield started.url
  finally:
    done[0].state.server.handle_exit(15, None)
    thread.join(60)
  assert done[1] == 0


def test_it_serves_a_run_until_it_is_told_to_end(tmp_path, engines, monkeypatch, capfd):
  folder = write(tmp_path / 'tiny', transformer.causal)
  monkeypatch.setenv('LLM_JAX_API_KEY', 'sesame')
  flags = ['--rows=3', '--queue=5', '--kv=int8', '--max_tokens=7', '--max_body=5000']
  with serving(folder, monkeypatch, *flags) as url:
    client = openai.OpenAI(base_url=url + '/v1', api_key='sesame', max_retries=3)
    answer = client.completions.create(model='tiny', prompt='say:hello')
    assert answer.choices[0].text == 'hello'
    with pytest.raises(openai.BadRequestError, match='at most 7'):
      client.completions.create(model='tiny', prompt='a', max_tokens=8)
    assert httpx.get(url + '/v1/models').status_code == 401
    assert httpx.post(url + '/v1/completions', content=b' ' * 5001,
                      headers=dict(authorization='Bearer sesame')).status_code == 413  # fmt: skip
  ((model, _, sizes),) = engines
  assert model.card.vocab == 262
  allowed = sizes.pop('allowed')
  assert not allowed[0] and allowed[1:259].all()  # padding is never drawn
  assert sizes == dict(rows=3, queue=5, kv='int8', length=None, pages=None, memory=1.0)
  said = capfd.readouterr()
  assert f'llm-jax: tiny answers at {url}' in said.out and 'Traceback' not in said.err


def test_a_model_that_the_engine_does_not_take(tmp_path, engines, capfd):
  folder = write(tmp_path / 'tiny', transformer.encoder)
  assert main.main(['serve', f'--workdir={folder}', '--port=0']) == 2
  assert "of kind 'encoder' and writes nothing" in capfd.readouterr().err


def test_a_mesh_splits_what_is_loaded_and_a_wrong_one_is_refused(
  tmp_path, engines, monkeypatch, capfd
):
  folder = write(tmp_path / 'tiny', transformer.causal)
  monkeypatch.setattr(server, 'run', lambda *_, **__: None)
  for flag, words in {
    'tensor=4': 'heads (2 does not divide by tensor=4)',
    'data=2,tensor=2': 'over the mesh axis tensor and nothing else, got data=2, tensor=2',
    'tensor=99': 'needs 99 devices, this machine has 8',
    'tensr=2': "no mesh axis 'tensr'; did you mean 'tensor'?",
  }.items():
    assert main.main(['serve', f'--workdir={folder}', '--port=0', f'--mesh={flag}']) == 2
    assert words in capfd.readouterr().err and not engines
  assert main.main(['serve', f'--workdir={folder}', '--port=0', '--mesh=tensor=2']) == 0
  ((_, params, _),) = engines
  table = params['embedding']['table']
  assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, 8)


def test_ctrl_c_before_it_answers(monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(command, 'load', interrupted)
  assert main.main(['serve', '--workdir=x', '--port=0']) == 130
