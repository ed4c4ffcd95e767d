"""Tokenizers of other people's models: the ids of the libraries they come from, and every place that asks for ids."""

import json

import jax
import numpy as np
import pytest
import sentencepiece as spm
import tokenizers

from llm_jax.core.errors import UserError
from llm_jax.data import batch, denoise, tokenizer, vocab
from llm_jax.interop import gguf_tokenizer
from tests.data.conftest import words
from tests.data.test_vocab import ODD, TEXT

CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


@pytest.fixture(scope='module')
def trained():
  """A byte-level BPE of the `tokenizers` library whose first ids are control tokens, and its pieces and merges."""
  theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
  theirs.train_from_iterator(TEXT, vocab_size=400, special_tokens=CONTROL, show_progress=False)
  model = json.loads(theirs.to_str())['model']
  pieces = sorted(model['vocab'], key=model['vocab'].get)
  return theirs, pieces, [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]


@pytest.fixture(scope='module')
def made(trained):
  """The same from GGUF metadata, as SmolLM2 has them: padding is the end of a turn, nothing stands before a text."""
  _, pieces, merges = trained
  told = dict(model='gpt2', pre='gpt-2', tokens=pieces, merges=merges, add_bos_token=False)
  told |= dict(token_type=[3] * 3 + [1] * (len(pieces) - 3))
  told |= dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0, padding_token_id=2)
  template = {'tokenizer.chat_template': '{{ bos_token }}{{ messages[0].content }}'}
  return gguf_tokenizer.read({f'tokenizer.ggml.{k}': x for k, x in told.items()} | template)


def test_byte_level_ids_are_the_librarys(trained, made):
  for text in (*ODD, *TEXT):
    ids = made.encode(text)
    assert ids == trained[0].encode(text).ids
    assert made.decode(ids) == text and made.piece_bytes[ids].sum() == len(text.encode())
    assert b''.join(made.pieces[i] for i in ids) == text.encode()


def test_sentencepieces_ids_are_sentencepieces(tmp_path):
  """A BPE model with byte fallback and a space in front, as LLaMA's is."""
  for prefix in (True, False):
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter([line for text in TEXT for line in text.split('\n')]),
      model_prefix=str(tmp_path / 'm'), model_type='bpe', vocab_size=360, byte_fallback=True,
      add_dummy_prefix=prefix, normalization_rule_name='identity', remove_extra_whitespaces=False,
      minloglevel=2,
    )  # fmt: skip
    p = spm.SentencePieceProcessor(model_file=str(tmp_path / 'm.model'))
    kind = lambda i: 2 if p.is_unknown(i) else 3 if p.is_control(i) else 6 if p.is_byte(i) else 1  # noqa: B023
    n = range(p.get_piece_size())
    described = gguf_tokenizer.sentencepiece(
      [p.id_to_piece(i) for i in n],
      [p.get_score(i) for i in n],
      [kind(i) for i in n],
      prefix=prefix,
    )
    ours = tokenizer.Tokenizer(described, roles=dict(bos=1, start=1, eos=2, unk=0))
    for text in (*ODD, *TEXT):
      if '\u2581' not in text and '<0x41>' not in text and '</s>' not in text:
        ids = ours.encode(text)
        assert ids == p.encode(text) and ours.decode(ids) == text
        assert ours.piece_bytes[ids].sum() == len(text.encode()) + (prefix and text != '')
        front = b' ' * (prefix and text != '')
        assert b''.join(ours.pieces[i] for i in ids) == front + text.encode()
    # the scores that are written back are an order of the same merges
    again = gguf_tokenizer.read(gguf_tokenizer.metadata(ours))
    assert [again.encode(t) for t in ODD] == [ours.encode(t) for t in ODD]


def test_roles_are_the_models_own(made):
  assert (made.start, made.first, made.eos, made.turn, made.unk, made.pad) == (
    None,
    2,
    2,
    2,
    0,
    None,
  )
  assert made.spelling == dict(
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    unk_token='<|endoftext|>',
    pad_token='<|im_end|>',
  )
  assert made.encode('<|im_start|>a')[0] == 1
  assert made.decode([1, *made.encode('a'), 2]) == '<|im_start|>a'


def test_saved_and_loaded_by_folder(made, tmp_path):
  for v in (made, made.with_markers(5, vocab.MODES)):
    v.save(str(tmp_path))
    again = vocab.load(str(tmp_path))
    assert (again.size, again.roles, again.template, again.fingerprint) == (
      v.size, v.roles, v.template, v.fingerprint,
    )  # fmt: skip
    assert again.encode('[S]a<extra_id_1>') == v.encode('[S]a<extra_id_1>')
  assert made.fingerprint != made.with_markers(5, ()).fingerprint
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='tokenizer.json is missing'):
    vocab.load(str(tmp_path))


def test_markers_come_after_the_ids_of_the_model(made):
  v = made.with_markers(4, vocab.MODES)
  n = made.size
  assert v.size == n + 7 and v.modes == {'[R]': n, '[S]': n + 1, '[X]': n + 2}
  ids = v.encode('[S]tile <extra_id_0>')
  assert ids == [n + 1, *made.encode('tile '), n + 6] and v.decode(ids) == '[S]tile <extra_id_0>'


def test_there_and_back_through_gguf_and_a_folder(made, tmp_path):
  metadata = gguf_tokenizer.metadata(made)
  again = gguf_tokenizer.read(metadata)
  assert again.roles | dict(turn=None) == made.roles and again.template == made.template
  tokenizer.write_huggingface(made, str(tmp_path))
  folder = tokenizer.from_huggingface(str(tmp_path))
  assert (folder.start, folder.eos, folder.template) == (None, 2, made.template)
  for text in ODD:
    assert again.encode(text) == folder.encode(text) == made.encode(text)


def test_a_folder_that_puts_a_start_before_a_text(made, tmp_path):
  first = tokenizer.Tokenizer(made.description, roles=made.roles | dict(start=1))
  tokenizer.write_huggingface(first, str(tmp_path))
  assert tokenizer.from_huggingface(str(tmp_path)).start == 1
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert theirs.encode('a').ids == [1, *made.encode('a')]


def test_a_folder_as_older_transformers_wrote_it(made, tmp_path):
  """Tokens as dicts, several templates by name, ids in generation_config.json."""
  (tmp_path / 'tokenizer.json').write_text(made.description)
  named = dict(eos_token=dict(content='<|im_end|>'), chat_template=[
    dict(name='tools', template='x'), dict(name='default', template='y'),
  ])  # fmt: skip
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(named))
  (tmp_path / 'generation_config.json').write_text(
    json.dumps(dict(bos_token_id=1, eos_token_id=[7, 2]))
  )
  found = tokenizer.from_huggingface(str(tmp_path))
  assert (found.eos, found.roles['bos'], found.start, found.template) == (2, 1, None, 'y')


def test_documents_end_and_begin_with_the_models_ids(made):
  v = made.with_markers(100, vocab.MODES)
  ids, rng = np.array(v.encode(words(20, 3)), np.int32), np.random.default_rng(0)
  for make in (denoise.causal, denoise.prefix_lm, denoise.span_corruption, denoise.ul2r):
    inputs, targets = make(v).apply(ids, True, 0.3, rng)
    assert targets[-1] == 2 and 1 not in (*inputs, *targets)
  layout = batch.Layout('prefix', 64, 0, True, v.first, v.eos)
  rows = batch.empty(layout, 1)
  batch.put(rows, layout, 0, 1, 0, 0, denoise.causal(v).apply(ids[:5], True, 0.0, rng))
  batch.put(rows, layout, 0, 2, 10, 0, denoise.causal(v).apply(ids[:5], True, 0.0, rng))
  assert rows['inputs'][0, [0, 10]].tolist() == [2, 2]
  assert rows['inputs'][0, 1:6].tolist() == rows['targets'][0, :5].tolist() == ids[:5].tolist()


def test_seqio_sees_the_same_ids(made):
  theirs = made.seqio()
  text = words(5, 1)
  assert list(theirs.encode(text)) == made.encode(text) and theirs.eos_id == 2
  assert np.asarray(theirs.encode_tf(text.encode())).tolist() == made.encode(text)
  assert theirs.decode(made.encode(text)) == text and theirs.vocab_size == made.size


def test_decoding_may_draw_the_end_and_starts_with_the_prompt(made):
  """A model whose logits are a table of the last token: it goes where the table says, from the prompt's own ids."""
  import types

  from llm_jax.decode import generate

  size = made.size
  table = np.full((size, size), -9.0, np.float32)
  a, b = made.encode('a')[0], made.encode('b')[0]
  table[a, b] = table[b, 2] = 9.0

  class Hidden:
    """What the model's layers give: the ids themselves."""

    def __init__(self, x, states):
      self.x, self.states = x, states

  card = types.SimpleNamespace(kind='causal', vocab=size, rows=size, length=None, positions='rope')
  hidden = lambda params, batch, states=None: Hidden(batch['inputs'][..., None], states)
  model = types.SimpleNamespace(
    card=card,
    hidden=hidden,
    logits=lambda params, x: params[x[..., 0]],
    states=lambda params, batch, slots: (),
  )
  said = generate.text(model, table, made, ['a'], jax.random.key(0), max_new=9, temperature=0)
  assert said == ['b']


WRONG = {
  'no file': (
    lambda d: (d / 'tokenizer.json').unlink(),
    r'no tokenizer \(tokenizer.json is missing',
  ),
  'no JSON': (lambda d: (d / 'tokenizer.json').write_text('{'), 'not a tokenizer'),
  'no tokenizer': (
    lambda d: (d / 'tokenizer.json').write_text('{"model": {"vocab": {"<|im_end|>": 2}}}'),
    'cannot be read',
  ),
  'no end': (lambda d: (d / 'tokenizer_config.json').write_text('{}'), 'names no eos_token'),
  'config is no JSON': (lambda d: (d / 'tokenizer_config.json').write_text('['), 'is not JSON'),
  'latin': (lambda d: (d / 'tokenizer.json').write_bytes(b'\xe9'), 'is not UTF-8'),
  'an end that is no id': (
    lambda d: (
      (d / 'tokenizer_config.json').write_text('{}'),
      (d / 'config.json').write_text('{"eos_token_id": 4000}'),
    ),
    'eos is number 4000',
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_folders_get_one_line(case, made, tmp_path):
  spoil, message = WRONG[case]
  tokenizer.write_huggingface(made, str(tmp_path))
  spoil(tmp_path)
  with pytest.raises(UserError, match=message) as e:
    tokenizer.from_huggingface(str(tmp_path))
  assert '\n' not in str(e.value)


def test_the_vocabulary_of_a_run(made, tmp_path):
  made.save(str(tmp_path / 'vocab'))
  assert vocab.of_run(path=str(tmp_path)).size == made.size
  grown = vocab.of_run(path=str(tmp_path), extra_ids=3, modes=vocab.MODES)
  assert grown.size == made.size + 6
  grown.save(str(tmp_path / 'vocab'))
  assert vocab.of_run(path=str(tmp_path), extra_ids=3, modes=vocab.MODES).size == grown.size
  with pytest.raises(UserError, match='3 sentinels and the modes .* already'):
    vocab.of_run(path=str(tmp_path), extra_ids=9)
  vocab.bytes_(extra_ids=0, modes=()).save(str(tmp_path / 'vocab'))
  with pytest.raises(UserError, match='Bytes has its markers from the start'):
    vocab.of_run(path=str(tmp_path), extra_ids=9)
