"""Vocabularies: exact round trips, markers, byte counts, training that is the same every time."""

import io
import os

import numpy as np
import pytest
import sentencepiece as spm

from llm_jax.data import vocab
from tests.data.conftest import says, words

TEXT = [words(2000, 0) + '\n' + 'Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. ' * 5]
ODD = (
  '', ' ', '  ', '\n', '\n\n\n', '\t', 'a\tb', ' a', 'a ', '  two   spaces ', 'line\r\nline\r', 'naïve café', 'Ⅷ①ﬁ ａ',
  '😀 👩‍👩‍👧', 'e\u0301 é', '\x00', 'a\x00b', '\u2581', 'a\u2581 \u2581', '\ufeffbom', '\u2028\u2029', '\U0010ffff',
  '</s><pad><unk>', '<0x41>', ' ⁇ ', '[R', 'x[Y]', '[S]', 'a[R]b[X]', '<extra_id_0>', '<extra_id_', '<extra_id_999>',
  'x<extra_id_10>y<extra_id_1>', 'नमस्ते', '中文字', 'שלום',
)  # fmt: skip


@pytest.fixture(scope='module')
def all_kinds():
  trained = [
    vocab.sentencepiece(vocab.text_of(TEXT), size=480, model=m) for m in ('bpe', 'unigram')
  ]
  return [*trained, vocab.bytes_()]


def test_round_trip_of_odd_strings(all_kinds):
  for v in all_kinds:
    for text in ODD:
      ids = v.encode(text)
      assert v.decode(ids) == text
      assert b''.join(v.pieces[i] for i in ids) == text.encode()
      assert v.piece_bytes[ids].sum() == len(text.encode())
      assert not {v.pad, v.eos, v.unk} & set(ids)


def test_round_trip_of_random_strings(all_kinds):
  rng = np.random.default_rng(1)
  for _ in range(200):
    points = rng.integers(1, 0xD800, rng.integers(1, 30)) >> rng.integers(0, 12)
    text = ''.join(map(chr, points))
    for v in all_kinds:
      assert v.decode(v.encode(text)) == text
      assert v.piece_bytes[v.encode(text)].sum() == len(text.encode())


def test_markers_are_single_ids_at_the_end(all_kinds):
  for v in all_kinds:
    assert len(v.sentinels) == 100
    assert v.sentinels.tolist() == [
      v.size - 1 - i for i in range(100)
    ]  # <extra_id_0> is the last id
    for i in (0, 1, 10, 99):
      assert v.encode(f'<extra_id_{i}>') == [v.sentinels[i]]
    for mode in ('[R]', '[S]', '[X]'):
      assert v.encode(mode) == [v.modes[mode]]
      assert v.encode(f'x{mode}the') == [*v.encode('x'), v.modes[mode], *v.encode('the')]
    assert len(v.piece_bytes) == v.size
    assert v.text_bytes[v.base :].sum() == 0
    assert (v.text_bytes[: v.base] == v.piece_bytes[: v.base]).all()


def test_no_markers():
  v = vocab.bytes_(extra_ids=0, modes=())
  assert v.size == 259 and v.decode(v.encode('[S]<extra_id_0>')) == '[S]<extra_id_0>'


def test_bytes_are_byte_plus_three():
  assert vocab.bytes_().encode('Aé') == [65 + 3, 0xC3 + 3, 0xA9 + 3]
  assert vocab.bytes_().decode([0xC3 + 3, 1, 0]) == '\ufffd'  # half a character


def test_size_counts_every_id(pieces):
  assert pieces.size == 512 == len(pieces.piece_bytes)
  assert max(pieces.encode(words(100, 5))) < 512 - 103


def test_decode_of_padding_end_and_ids_beyond(pieces):
  ids = pieces.encode('the end')
  assert pieces.decode([*ids, 1, 0, 0]) == 'the end'
  assert (
    pieces.decode([*ids, pieces.size + 7]) == 'the end\ufffd'
  )  # a padded row of the model's table


def test_save_and_load(tmp_path, all_kinds):
  for i, v in enumerate(all_kinds):
    v.save(str(tmp_path / str(i)))
    again = vocab.load(str(tmp_path / str(i)))
    assert (again.fingerprint, again.size, again.modes) == (v.fingerprint, v.size, v.modes)
    assert again.encode(TEXT[0]) == v.encode(TEXT[0])
  assert len({v.fingerprint for v in all_kinds}) == 3


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_training_is_deterministic_and_cached(tmp_path, monkeypatch, kind):
  prints = []
  for name in ('a', 'b'):
    monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / name))
    prints.append(vocab.sentencepiece(vocab.text_of(TEXT), size=480, model=kind).fingerprint)
  assert prints[0] == prints[1]
  source = vocab.text_of(TEXT)._replace(read=lambda limit: 1 / 0)  # the text is not read again
  assert vocab.sentencepiece(source, size=480, model=kind).fingerprint == prints[0]
  assert len(os.listdir(tmp_path / 'b' / 'vocab')) == 2  # the folder and its lock


def test_normalisation():
  plain = vocab.sentencepiece(vocab.text_of(TEXT), size=480)
  folded = vocab.sentencepiece(vocab.text_of(TEXT), size=480, normalization='nmt_nfkc')
  assert plain.decode(plain.encode('①')) == '①'
  assert folded.decode(folded.encode('①')) == '1'


def test_symbols_are_one_piece():
  v = vocab.sentencepiece(vocab.text_of(TEXT), size=480, symbols=('\n', '\n\n', 'ROMEO:'))
  assert len(v.encode('ROMEO:\n\n')) == 2 and v.decode(v.encode('ROMEO:\n\n\n')) == 'ROMEO:\n\n\n'


def spm_model(**ids):
  buffer = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter([words(500, 1)]),
    model_writer=buffer,
    vocab_size=50,
    minloglevel=2,
    hard_vocab_limit=False,
    **ids,
  )
  return buffer.getvalue()


def test_model_from_a_file(tmp_path):
  path = tmp_path / 't5.model'
  path.write_bytes(spm_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
  v = vocab.file(path=str(path), extra_ids=10)
  plain = spm.SentencePieceProcessor(model_file=str(path))
  assert v.encode('the end') == plain.encode('the end')
  assert v.size == plain.get_piece_size() + 13 and v.encode('<extra_id_0>') == [v.size - 1]
  path.write_bytes(spm_model())
  says(('(-1, 2, 0)', 'train one'), lambda: vocab.file(path=str(path)))
  path.write_bytes(b'no model')
  says(('not a SentencePiece model', str(path)), lambda: vocab.file(path=str(path)))
  says(('no SentencePiece model', 't5.model'), lambda: vocab.file(path=str(tmp_path / 't5.mode')))


def test_wrong_settings_name_the_remedy():
  text = vocab.text_of(TEXT)
  says(('bpf', "did you mean 'bpe'?"), lambda: vocab.sentencepiece(text, model='bpf'))
  says("did you mean 'nmt_nfkc'?", lambda: vocab.sentencepiece(text, normalization='nfkc'))
  says(('300 is too small', 'need 364'), lambda: vocab.sentencepiece(text, size=300))
  says('between 0.98 and 1', lambda: vocab.sentencepiece(text, coverage=0.2))
  says('corpus is empty', lambda: vocab.sentencepiece(vocab.text_of(['', '\n'])))
  says('no vocabulary in /nowhere', lambda: vocab.load('/nowhere'))


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_largest_possible_size_is_named(kind):
  text = vocab.text_of(['a rose is a rose is a rose'])
  with pytest.raises(vocab.UserError, match='at most (\\d+)') as e:
    vocab.sentencepiece(text, size=5000, model=kind)
  largest = int(str(e.value).split('at most ')[1].split(',')[0])
  assert vocab.sentencepiece(text, size=largest, model=kind).size == largest


def test_smallest_possible_size_is_named():
  text = vocab.text_of([''.join(map(chr, range(0x4E00, 0x4E80)))])
  says('at least 491', lambda: vocab.sentencepiece(text, size=400))
  assert vocab.sentencepiece(text, size=491).size == 491


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'file'))
  says('LLM_JAX_CACHE', lambda: vocab.sentencepiece(vocab.text_of(TEXT), size=480))
