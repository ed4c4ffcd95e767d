"""stories260K, a trained model small enough to lie here: the text that its authors publish, and PyTorch's logits."""

import json
import pathlib

import jax
import numpy as np
import pytest

from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.decode import generate
from llm_jax.interop import gguf, llama2c

REAL = pathlib.Path(__file__).parent / 'real'
EXPECTED = json.loads((REAL / 'stories260k.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def stories():
  """(model, parameters, vocabulary, what it was read from)."""
  read = llama2c.read(str(REAL / 'stories260K.bin'))
  words = llama2c.vocabulary(str(REAL / 'tok512.bin'), 512)
  return build(read.model())(), read.parameters(), words, read


def test_it_writes_the_text_that_its_authors_publish(stories):
  model, params, words, _ = stories
  said = generate.text(model, params, words, [''], jax.random.key(0), max_new=200, temperature=0)
  assert said[0] == (REAL / 'expected_greedy_200_steps.txt').read_text(encoding='utf-8')
  pieces = generate.stream_text(
    model, params, words, '', jax.random.key(0), max_new=200, temperature=0
  )
  assert ''.join(pieces) == said[0]


def test_tokens_of_the_published_text(stories):
  model, params, words, _ = stories
  out = generate.generate(
    model, params, np.zeros((1, 1), int), [0], jax.random.key(0),
    max_new=200, temperature=0, eos=words.eos, start=words.start,
  )  # fmt: skip
  assert [words.start, *out.tokens[0].tolist()] == EXPECTED['greedy_ids']


def test_ids_and_logits_of_prompts(stories):
  model, params, words, _ = stories
  for text, want in EXPECTED['prompts'].items():
    ids = [words.start, *words.encode(text)]
    assert ids == want['ids'] and words.decode(ids[1:]) == text
    logits = model.logits(params, model.hidden(params, dict(inputs=np.array([ids]))).x)[0, -1]
    for i, logit in want['top5']:
      assert abs(float(logits[i]) - logit) < 1e-4


def test_as_gguf_it_is_the_same(stories, tmp_path):
  _, params, words, read = stories
  gguf.save(str(tmp_path / 'm.gguf'), params, read.told, words, type_='f32')
  _, again, same = gguf.load(str(tmp_path / 'm.gguf'))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  for text in EXPECTED['prompts']:
    assert same.encode(text) == words.encode(text)
  assert (same.start, same.eos, same.unk, same.size) == (1, 1, 0, 512)


WRONG = {
  'cut off': (lambda b: b[:-4], 'its header asks for 1,056,540 bytes, it has 1,056,536'),
  'too long': (lambda b: b + b'\0', 'or in a newer format'),
  'no header': (lambda b: b[:10], 'impossible sizes'),
  'another file': (lambda b: b'GGUF' * 100, 'impossible sizes'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_files(case, tmp_path):
  spoil, message = WRONG[case]
  (tmp_path / 'm.bin').write_bytes(spoil((REAL / 'stories260K.bin').read_bytes()))
  with pytest.raises(UserError, match=message):
    llama2c.read(str(tmp_path / 'm.bin'))


def test_wrong_tokenizers(tmp_path):
  with pytest.raises(UserError, match='no tokenizer of 600 ids'):
    llama2c.vocabulary(str(REAL / 'tok512.bin'), 600)
  with pytest.raises(UserError, match='has more than 300 ids'):
    llama2c.vocabulary(str(REAL / 'tok512.bin'), 300)
  with pytest.raises(UserError, match='no tokenizer .*nowhere.bin'):
    llama2c.vocabulary(str(tmp_path / 'nowhere.bin'), 512)
  with pytest.raises(UserError, match='cannot be read'):
    llama2c.read(str(tmp_path / 'nowhere.bin'))
