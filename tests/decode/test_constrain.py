"""Random text under a constraint always matches it, and everything that matches can be reached."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import tokenizer, vocab
from llm_jax.decode import constrain, generate
from tests.decode.test_beam import make

KEY = jax.random.key(0)
BYTES = vocab.bytes_(extra_ids=2)
SAMPLE = [f'{{"name": "Ann {i}", "age": {i}}} é ({i})\n' for i in range(40)]


def byte_level() -> tokenizer.Tokenizer:
  """A byte-level BPE with merges that cross the borders of JSON's tokens."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  told = dict(vocab_size=330, initial_alphabet=alphabet, special_tokens=['<end>'])
  made.train_from_iterator(SAMPLE, trainers.BpeTrainer(**told))
  return tokenizer.Tokenizer(made.to_str(), roles=dict(eos=0))


def pieces() -> vocab.SentencePiece:
  return vocab.sentencepiece(vocab.text_of(SAMPLE), size=330, extra_ids=2, modes=())


VOCABS = dict(bytes=lambda: BYTES, pieces=pieces, byte_level=byte_level)


@pytest.fixture(scope='module', params=VOCABS)
def words(request):
  return VOCABS[request.param]()


def walk(guide: constrain.Guide, words, seed: int, most: int = 400) -> str | None:
  """A text whose ids are drawn evenly from what is allowed; None where it did not end."""
  rng, ids = np.random.default_rng(seed), []
  for _ in range(most):
    choices = np.flatnonzero(guide.allowed())
    assert len(choices)
    ids.append(int(rng.choice(choices)))
    guide.advance(ids[-1])
    if ids[-1] == words.eos or guide.done:
      assert guide.done
      return words.decode(i for i in ids if i != words.eos)
  return None


@pytest.mark.parametrize(
  'pattern',
  [
    r'[ab]{2,5}|é+x',
    r'\([0-9]{3}\) [0-9]{3}-[0-9]{4}',
    r'(yes|no|maybe)( and (yes|no))?',
    r'\[R\]',
  ],
)
def test_a_random_walk_matches_the_pattern(pattern, words):
  for seed in range(8):
    text = walk(constrain.regex(words, pattern), words, seed)
    assert text is None or re.fullmatch(pattern, text), text
  assert text is not None


SCHEMA = dict(
  type='object',
  properties=dict(
    name=dict(type='string', maxLength=6),
    age=dict(type='integer', minimum=0, maximum=150),
    kind=dict(enum=['cat', 'dog', None]),
    tags=dict(type='array', items=dict(type='boolean'), maxItems=3),
  ),
  required=['name', 'age', 'kind', 'tags'],
  additionalProperties=False,
)


def valid(found) -> bool:
  """Whether it is what SCHEMA says, written out by hand."""
  return (
    list(found) == ['name', 'age', 'kind', 'tags']
    and isinstance(found['name'], str)
    and len(found['name']) <= 6
    and type(found['age']) is int
    and 0 <= found['age'] <= 150
    and found['kind'] in ('cat', 'dog', None)
    and isinstance(found['tags'], list)
    and len(found['tags']) <= 3
    and all(type(tag) is bool for tag in found['tags'])
  )


def test_a_random_walk_is_json_of_the_schema(words):
  for seed in range(8):
    text = walk(constrain.json_schema(words, SCHEMA), words, seed)
    assert valid(json.loads(text)), text


@pytest.mark.parametrize(('pattern', 'letters'), [('a(b|c){0,2}', 'abc'), ('(ab|ba)+c?', 'abc')])
def test_exactly_the_language_is_reachable(pattern, letters):
  """Every sequence of up to four letters: allowed step by step, with the end, iff it matches."""
  for size in range(5):
    for text in map(''.join, itertools.product(letters, repeat=size)):
      guide, fine = constrain.regex(BYTES, pattern), True
      for token in [*BYTES.encode(text), BYTES.eos]:
        if not guide.allowed()[token]:
          fine = False
          break
        guide.advance(token)
      assert fine == bool(re.fullmatch(pattern, text)), text


def test_the_vocabularys_own_spelling_is_allowed(words):
  """Also of pieces that go over the borders of JSON's tokens."""
  text = '{"name":"Ann 1", "age": 11,"kind":"cat","tags":[true]}'
  guide = constrain.json_schema(words, SCHEMA)
  for token in [*words.encode(text), words.eos]:
    assert guide.allowed()[token]
    guide.advance(token)
  assert guide.done


def test_markers_and_padding_are_no_text():
  guide = constrain.regex(BYTES, r'(?s:.)*')
  allowed = np.flatnonzero(guide.allowed())
  assert allowed.min() == BYTES.eos and allowed.max() < BYTES.base
  assert {BYTES.pad, BYTES.unk}.isdisjoint(allowed.tolist())


def test_a_copy_goes_its_own_way():
  guide = constrain.regex(BYTES, 'a(b|c)')
  guide.advance(BYTES.encode('a')[0])
  other = guide.copy()
  guide.advance(BYTES.encode('b')[0])
  assert guide.done and not other.done
  assert other.allowed()[BYTES.encode('bc')].all()


def test_guides_in_the_decoding_loop():
  """Each row under its own constraint, whatever the model would say; the columns stop when all are done."""
  model, params = make('causal', vocab=BYTES.size)
  patterns = ['x[0-9]{3}', '(ab)+', 'no']
  guides = [constrain.regex(BYTES, p) for p in patterns]
  prompts, lengths = np.full((3, 2), 70, np.int32), np.array([2, 1, 0])
  settings = dict(max_new=25, temperature=2.0, eos=BYTES.eos)
  columns = list(generate.stream(model, params, prompts, lengths, KEY, guides=guides, **settings))
  texts = [BYTES.decode(row) for row in np.stack(columns, axis=1)]
  assert all(re.fullmatch(p, text) for p, text in zip(patterns, texts) if len(text) < 25), texts
  guide = constrain.regex(BYTES, 'x[0-9]{3}')
  text = ''.join(generate.stream_text(model, params, BYTES, 'ab', KEY, guides=[guide], max_new=9))
  assert re.fullmatch('x[0-9]{3}', text)
  with pytest.raises(UserError, match='3 rows need as many guides, got 1'):
    generate.stream(model, params, prompts, lengths, KEY, guides=guides[:1], **settings)


def test_a_constraint_does_not_change_the_draw_where_it_allows_everything():
  model, params = make('causal', vocab=BYTES.size)

  class Free:
    done = False

    def allowed(self):
      return np.ones(BYTES.size, bool)

    def advance(self, token):
      pass

  settings = dict(max_new=8, eos=BYTES.eos, temperature=1.3)
  prompt = np.array([[70, 80]]), [2]
  free = list(generate.stream(model, params, *prompt, KEY, guides=[Free()], **settings))
  assert (
    np.array(free).tolist()
    == np.array(list(generate.stream(model, params, *prompt, KEY, **settings))).tolist()
  )


@pytest.mark.parametrize(
  ('make_one', 'words'),
  [
    (lambda: constrain.regex(BYTES, 'a('), 'regex parse error.*unclosed group'),
    (lambda: constrain.json_schema(BYTES, dict(type='foo')), 'Invalid type: foo'),
    (lambda: constrain.json_schema(BYTES, '{'), 'the schema is not JSON'),
    (lambda: constrain.regex(BYTES, 'ab').advance(200), 'leaves its constraint'),
  ],
)
def test_wrong_input_gets_one_line(make_one, words):
  with pytest.raises(UserError, match=words) as e:
    make_one()
  assert '\n' not in str(e.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'llguidance', None)
  with pytest.raises(UserError, match=r'pip install llm_jax\[serve\]'):
    constrain.regex(BYTES, 'a')
