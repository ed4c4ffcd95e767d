"""Small texts, vocabularies, and token maps."""

import itertools
import json
import types

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import materialize, vocab


def model(kind='causal', vocab=512, length=None):
  """What the pipeline looks at in a model."""
  return types.SimpleNamespace(card=types.SimpleNamespace(kind=kind, vocab=vocab, length=length))


def store(task, splits=('train', 'validation')):
  """Writes the token maps of a task's corpora into the cache."""
  for corpus, split in itertools.product(task.corpora, splits):
    materialize.tokens(corpus, task.vocab, split)
  return task


def words(n, seed):
  """n lower-case words with spaces."""
  rng = np.random.default_rng(seed)
  letters = 'etaoinshrdlu'
  return ' '.join(''.join(rng.choice(list(letters), rng.integers(1, 8))) for _ in range(n))


def says(match, call):
  """Runs `call`, which must raise one line of UserError that contains each of the texts in `match`."""
  with pytest.raises(UserError) as e:
    call()
  message = str(e.value)
  assert '\n' not in message
  for text in (match,) if isinstance(match, str) else match:
    assert text in message, message


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """A folder with short.jsonl (300 documents of 3 to 90 words) and long.txt (one of 6,000 words)."""
  path = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  records = [json.dumps({'text': words(int(rng.integers(3, 90)), seed)}) for seed in range(300)]
  (path / 'short.jsonl').write_text('\n'.join(records))
  (path / 'long.txt').write_text(words(6000, 1000))
  return path


@pytest.fixture(scope='session')
def pieces():
  """A SentencePiece vocabulary of 512 ids."""
  return vocab.sentencepiece(vocab.text_of([words(3000, 2000)]), size=512)
