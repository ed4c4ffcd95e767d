"""The strategies and the processors beside those of transformers, with the weights of tests/interop/reference.

The oracle lies in `reference.safetensors` and was written by `make_reference.py`; with LLM_JAX_REFERENCE both weights
and oracle are those of another folder (`make parity` writes a fresh one).
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.decode import beam, generate
from llm_jax.decode import logits as logits_lib
from llm_jax.interop import huggingface
from tests.decode import make_reference as reference
from tests.decode.make_reference import EOS, NEW, PROCESSORS, STRATEGIES

STORED = pathlib.Path(__file__).parent
FRESH = os.environ.get('LLM_JAX_REFERENCE')
MODELS = pathlib.Path(FRESH or STORED.parent / 'interop' / 'reference')
KEY = jax.random.key(0)
OURS = dict(repetition_penalty='repetition', no_repeat_ngram_size='no_repeat_ngram')
OURS |= dict(num_beams='beams', num_return_sequences='n', typical_p='typical')


@functools.cache
def expected():
  return load_file(pathlib.Path(FRESH or STORED) / 'reference.safetensors')


@functools.cache
def loaded(name):
  return huggingface.load(str(MODELS / name))


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('name', EOS)
def test_the_same_tokens_as_transformers(name, strategy):
  """20 prompts, all in one batch where transformers was given them one by one."""
  model, params = loaded(name)
  told = {OURS.get(k, k): v for k, v in STRATEGIES[strategy].items()}
  told |= dict(max_new=NEW, eos=EOS[name], start=0 if name == 't5' else None)
  drawn = told.pop('do_sample', False)
  prompts, lengths = reference.prompts()
  wanted = expected()[f'{name}/{strategy}/tokens']
  if 'beams' in told:
    told['length_penalty'] = functools.partial(beam.power, alpha=told['length_penalty'])
    out = beam.search(model, params, prompts, lengths, **told)
    np.testing.assert_allclose(out.scores, expected()[f'{name}/{strategy}/scores'], atol=1e-4)
  else:
    told |= dict(uniforms=reference.uniforms()) if drawn else dict(temperature=0.0)
    out = generate.generate(model, params, prompts, lengths, KEY, **told)
  found = np.asarray(out.tokens).reshape(wanted.shape)
  np.testing.assert_array_equal(found, wanted)
  assert len(np.unique(wanted[:, 0], axis=0)) > 3  # not the same text after every prompt


def test_the_ways_to_stop_early_are_told_apart():
  """The oracle's own answers differ, so the test above would notice one taken for another."""
  ways = [expected()[f'llama/{name}/tokens'] for name in ('pairs', 'pairs_early', 'pairs_never')]
  assert all((ways[i] != ways[j]).any((1, 2)).sum() > 2 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize('name', PROCESSORS)
def test_processors_are_those_of_transformers(name):
  """Each on 8 rows of random logits after a text with repetitions; temperature up to a shift of the row."""
  value, text = PROCESSORS[name][1][0], jnp.asarray(reference.text(), jnp.int32)
  sizes = jnp.full(len(text), text.shape[1])
  seen = logits_lib.Seen(jnp.pad(text, ((0, 0), (0, 3)), constant_values=-1), sizes, sizes)
  told, settings = {}, {}
  if name == 'banned':
    told['banned'] = tuple(map(tuple, value))
  elif name == 'bias':
    told['bias'] = np.zeros(reference.VOCAB, np.float32)
    for (i,), add in value.items():
      told['bias'][i] = add
  else:
    settings[name] = value
  found = logits_lib.process(
    jnp.asarray(reference.logits()), logits_lib.Sampling(**settings), seen, **told
  )
  wanted = expected()[f'processors/{name}']
  shift = wanted.max(-1, keepdims=True) if name == 'temperature' else 0
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
  np.testing.assert_allclose(found, wanted - shift, atol=1e-5)
  assert (np.asarray(found) != reference.logits()).any()
