"""Text on disk: how it is cut and split, and what is said about text that cannot be used. Also token maps that are
damaged.
"""

import gzip
import json
import os
from functools import partial

import numpy as np
import pytest

from llm_jax.data import corpus, materialize, readers, tasks, vocab
from tests.data.conftest import says, store

BYTES = partial(vocab.bytes_, extra_ids=4)


def write(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return (str(path),)


def texts(task, split='train'):
  return list(task.corpora[0].texts(split))


@pytest.mark.parametrize(
  ('cut', 'data', 'want'),
  [
    (corpus.whole_file, 'a\n\nb\n', ['a\n\nb\n']),
    (corpus.lines, '\na\n\nb c\n', ['a', 'b c']),
    (corpus.lines, 'a\nb', ['a', 'b']),
    (corpus.paragraphs, '\n\na\nb\n\n\n\nc\n\n\nd\n', ['a\nb', 'c', 'd']),
    (corpus.paragraphs, 'a', ['a']),
  ],
)
def test_documents(cut, data, want):
  assert [data.encode()[s:e].decode() for s, e in cut(data.encode())] == want


@pytest.mark.parametrize('text', ['0123456789' * 3, 'aé😀' * 10, 'ééé'])
@pytest.mark.parametrize('fraction', [0.1, 0.5, 0.34])
def test_split_is_by_characters(tmp_path, text, fraction):
  task = tasks.text(train=write(tmp_path / 'a.txt', text), heldout=fraction, vocab=BYTES)
  n = int(len(text) * (1 - fraction))
  assert texts(task) == [text[:n]] and texts(task, 'validation') == [text[n:]]


def test_split_cuts_the_document_at_the_border(tmp_path):
  train = write(tmp_path / 'a.txt', 'aaaa\nbbbb\n') + write(tmp_path / 'b.txt', 'cccc\ndddd\n')
  task = tasks.text(train=train, heldout=0.375, documents=corpus.lines, vocab=BYTES)
  assert (texts(task), texts(task, 'validation')) == (['aaaa', 'bbbb', 'cc'], ['cc', 'dddd'])


def test_held_out_files_globs_and_gzip(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.txt.gz').write_bytes(gzip.compress(f'text {i}'.encode()))
  held = write(tmp_path / 'held.txt', 'held out')
  task = tasks.text(train=(str(tmp_path / '*.gz'),), heldout=held, vocab=BYTES)
  assert texts(task) == ['text 0', 'text 1', 'text 2'] and texts(task, 'validation') == ['held out']


@pytest.mark.parametrize(('name', 'files'), tasks.DOMAINS.items())
def test_domains_hold_out_the_end_of_every_file(name, files):
  task = tasks.domain(name=name, vocab=BYTES)
  folder = os.path.join(os.path.dirname(tasks.__file__), 'bundled', name)
  for one, rate, file in zip(task.corpora, task.rates, files, strict=True):
    text = gzip.open(os.path.join(folder, file)).read().decode()
    (train,), (held,) = one.texts('train'), one.texts('validation')
    assert (
      train + held == text and len(train) == int(0.9 * len(text)) and rate == len(text.encode())
    )
  assert {f for f in os.listdir(folder) if f.endswith('.gz')} == set(files)


def test_domain_that_does_not_exist():
  says("did you mean 'stories'", lambda: tasks.domain(name='storys', vocab=BYTES))


def test_jsonl(tmp_path):
  lines = [json.dumps(dict(body=f'doc {i}\n')) for i in range(10)]
  task = tasks.jsonl(
    train=write(tmp_path / 'a.jsonl', '\n\n'.join(lines)), heldout=0.25, key='body', vocab=BYTES
  )
  assert texts(task) == [f'doc {i}\n' for i in range(7)]
  assert texts(task, 'validation') == [f'doc {i}\n' for i in range(7, 10)]


def test_pieces_meet_at_characters(tmp_path):
  text = 'aé😀ñ\u2581' * 20
  task = tasks.text(train=write(tmp_path / 'a.txt', text), heldout=0.01, vocab=BYTES)
  documents = task.corpora[0].documents('train')
  size = int(documents.sizes[0])
  for width in range(1, 9):
    got = ''.join(documents.read(0, s, min(s + width, size)) for s in range(0, size, width))
    assert got == texts(task)[0]


def test_sample_is_spread_over_the_text(tmp_path):
  text = ''.join(chr(ord('a') + i * 26 // 3_000_000) for i in range(3_000_000))
  task = tasks.text(train=write(tmp_path / 'a.txt', text), heldout=0.001, vocab=BYTES)
  for one in (task.corpora[0],):
    got = ''.join(corpus.sample(one, 1 << 20))
    assert len(got) == 1 << 20 and set(got) >= set('abcdefghijklmnopqrstuvwxy')
    assert ''.join(corpus.sample(one, 10_000_000)) == texts(task)[0]
  records = '\n'.join(json.dumps(dict(text=f'{i:04}')) for i in range(1000))
  task = tasks.jsonl(train=write(tmp_path / 'a.jsonl', records), heldout=0.001, vocab=BYTES)
  got = [int(t) for t in corpus.sample(task.corpora[0], 1500)]
  assert 50 < len(got) < 150 and max(np.diff(got)) < 30


def test_fingerprint_follows_content(tmp_path):
  make = lambda **kw: (
    tasks.text(train=(str(tmp_path / 'a.txt'),), vocab=BYTES, **kw).corpora[0].fingerprint
  )
  write(tmp_path / 'a.txt', 'some text here')
  first = make()
  assert first == make() != make(heldout=0.2) != make(documents=corpus.lines)
  corpus.content.cache_clear()
  write(tmp_path / 'a.txt', 'some text hare')
  assert make() != first


# --- what is said about text that cannot be used ---


def bad_text(path, data, *match):
  task = lambda: texts(tasks.text(train=write(path, data), vocab=BYTES))
  says((str(path), *match), task)


def test_text_that_is_not_utf8(tmp_path):
  bad_text(tmp_path / 'a.txt', b'caf\xe9 au lait', 'byte 0xe9 at offset 3', 'iconv')
  bad_text(tmp_path / 'b.txt', 'é'.encode() * 5 + b'\xc3', 'offset 10')
  bad_text(tmp_path / 'c.txt', b'\x7fELF\0\0', 'binary file', 'offset 4')
  bad_text(tmp_path / 'd.txt', gzip.compress(b'text'), 'rename it to', '.gz')
  bad_text(tmp_path / 'e.gz', b'plain text', 'damaged')
  bad_text(tmp_path / 'f.gz', gzip.compress(b'text' * 1000)[:-20], 'damaged')


def test_offset_across_a_block_border(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, '_CHUNK', 7)
  good = 'aé😀' * 9
  bad_text(tmp_path / 'a.txt', good.encode() + b'\xff', f'offset {len(good.encode())}')
  task = tasks.text(
    train=write(tmp_path / 'b.txt', good), heldout=0.5, documents=corpus.whole_file, vocab=BYTES
  )
  assert texts(task) == [good[:13]]
  lined = tasks.text(
    train=write(tmp_path / 'c.txt', 'ab\ncdef\n\nghijklmnop\nq'),
    heldout=0.01,
    documents=corpus.lines,
    vocab=BYTES,
  )
  assert texts(lined) == ['ab', 'cdef', 'ghijklmnop']


def test_missing_files(tmp_path):
  write(tmp_path / 'train.txt', 'text')
  make = lambda *train, **kw: tasks.text(train=train, vocab=BYTES, **kw)
  says(("did you mean '", 'train.txt'), lambda: make(str(tmp_path / 'tran.txt')))
  says('does not exist', lambda: make(str(tmp_path / 'nowhere' / 'a.txt')))
  says('no file', lambda: make(str(tmp_path / '*.md')))
  says('is a folder', lambda: make(str(tmp_path)))
  says('set task.train', lambda: make())
  says('no file', lambda: make(str(tmp_path / 'train.txt'), heldout=(str(tmp_path / 'x.txt'),)))


def test_empty_corpora(tmp_path):
  empty = write(tmp_path / 'empty.txt', '')
  says(
    ('train split of text is empty', 'files with text'),
    lambda: texts(tasks.text(train=empty, vocab=BYTES)),
  )
  says('empty', lambda: tasks.text(train=empty))  # nothing to train a vocabulary on
  says('empty', lambda: texts(tasks.jsonl(train=write(tmp_path / 'a.jsonl', '\n\n'), vocab=BYTES)))
  one = tasks.jsonl(train=write(tmp_path / 'b.jsonl', '{"text": "one"}'), vocab=BYTES)
  says(('validation split', 'task.heldout'), lambda: texts(one, 'validation'))
  blank = tasks.jsonl(train=write(tmp_path / 'c.jsonl', '{"text": ""}'), vocab=BYTES)
  says('has no text', lambda: store(blank, ('train',)))


def test_records_without_text(tmp_path):
  make = lambda data, **kw: texts(
    tasks.jsonl(train=write(tmp_path / 'a.jsonl', data), heldout=0.1, vocab=BYTES, **kw)
  )
  for data, match in (
    ('{"text": "a"}\n\n{"txt": "b"}\n{"text": "c"}', ('line 3', "did you mean 'txt'?", 'task.key')),
    ('{"text": "a"}\n{"text": "b"\n{"text": "c"}', ('line 2', 'not JSON')),
    ('{"text": 3}\n{"text": "b"}', ('line 1', 'int, not text')),
    ('["text"]\n{"text": "b"}', ('line 1', 'no key')),
  ):
    corpus.content.cache_clear()
    says(match, lambda data=data: make(data))


@pytest.mark.parametrize('fraction', [0, 0.0, 1, 1.0, -0.5, 3.0])
def test_held_out_fraction(tmp_path, fraction):
  path = write(tmp_path / 'a.txt', 'text')
  for make in (tasks.text, tasks.jsonl):
    says('between 0 and 1', lambda make=make: make(train=path, heldout=fraction, vocab=BYTES))


def test_mixtures_that_do_not_add_up(tmp_path):
  part = partial(tasks.text, train=write(tmp_path / 'a.txt', 'text'))
  says(
    ('2 tasks and 1 rates', 'task.rates'), lambda: tasks.mixture(tasks=(part, part), rates=(1.0,))
  )
  says('must be positive', lambda: tasks.mixture(tasks=(part, part), rates=(1.0, 0.0)))
  says('one rate per task', lambda: tasks.mixture(tasks=(), rates=()))


def test_mixture_shares_one_vocabulary(tmp_path):
  parts = [partial(tasks.text, train=write(tmp_path / f'{c}.txt', f'{c} ' * 100)) for c in 'ab']
  inner = partial(tasks.mixture, tasks=tuple(parts), rates=(1.0, 3.0))
  task = tasks.mixture(
    tasks=(inner, parts[0]), rates=(2.0, 2.0), vocab=partial(vocab.sentencepiece, size=366)
  )
  assert task.rates == (0.5, 1.5, 2.0) and len(task.corpora) == 3
  assert all(len(task.vocab.encode(c)) == 1 for c in 'ab')


def test_data_that_tfds_has_not_prepared(tmp_path, monkeypatch):
  says(
    ("no 'c4/en'", 'tfds build c4/en', 'task.data_dir'),
    lambda: tasks.c4(data_dir=str(tmp_path), vocab=BYTES),
  )
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  says(("'wikipedia/20230601.en'", str(tmp_path)), lambda: tasks.wikipedia(vocab=BYTES))
  os.makedirs(tmp_path / 'c4' / 'en' / '3.1.0')
  (tmp_path / 'c4' / 'en' / '3.1.0' / 'dataset_info.json').write_text('{}')
  says("did you mean 'c4/en'?", lambda: tasks.tfds(name='c4/em', vocab=BYTES))
  task = tasks.c4(vocab=BYTES)
  cut = readers.Cut(8, False, False, 0)
  says(
    'use read=readers.mapped', lambda: readers.tokenized(task.corpora[0], task.vocab, 'train', cut)
  )


# --- token maps ---


@pytest.fixture
def stored(tmp_path):
  task = tasks.text(
    train=write(tmp_path / 'a.txt', 'one two\nthree\n\nfour' * 50),
    documents=corpus.lines,
    vocab=BYTES,
  )
  os.makedirs(tmp_path / 'map')
  documents = [np.array([*task.vocab.encode(t), 1]) for t in [*texts(task), '']]
  materialize.write(str(tmp_path / 'map'), documents, task.corpora[0], task.vocab, 'train')
  return task, tmp_path / 'map'


def test_map(stored):
  task, folder = stored
  found = materialize.read(str(folder), task.vocab)
  documents = texts(task)
  assert found.manifest['documents'] == len(documents)  # the empty one is left out
  assert found.manifest['bytes'] == sum(len(d.encode()) for d in documents)
  assert found.manifest['tokens'] == len(found.tokens) == found.manifest['bytes'] + len(documents)
  assert found.tokens.dtype == np.uint16
  for d, s, e in zip(documents, found.documents[:-1], found.documents[1:], strict=True):
    assert task.vocab.decode(found.tokens[s : e - 1]) == d and found.tokens[e - 1] == 1


def test_wide_map(stored, tmp_path):
  task, _ = stored
  wide = vocab.bytes_(extra_ids=70_000)
  os.makedirs(tmp_path / 'wide')
  materialize.write(
    str(tmp_path / 'wide'), [np.array([66_000, 5, 1])], task.corpora[0], wide, 'train'
  )
  assert materialize.read(str(tmp_path / 'wide'), wide).tokens.tolist() == [66_000, 5, 1]


def damage_truncated(folder):
  os.truncate(folder / 'tokens.bin', 10)


def damage_flipped(folder):
  data = bytearray((folder / 'tokens.bin').read_bytes())
  data[20] ^= 1
  (folder / 'tokens.bin').write_bytes(data)


def damage_documents(folder):
  (folder / 'documents.bin').write_bytes(bytes(os.path.getsize(folder / 'documents.bin')))


def damage_manifest(folder):
  (folder / 'manifest.json').write_text('{"format": 1')


def damage_no_manifest(folder):
  os.remove(folder / 'manifest.json')


def damage_no_tokens(folder):
  os.remove(folder / 'tokens.bin')


def damage_format(folder):
  (folder / 'manifest.json').write_text('{"format": 0}')


@pytest.mark.parametrize(
  'damage',
  [
    damage_truncated,
    damage_flipped,
    damage_documents,
    damage_manifest,
    damage_no_manifest,
    damage_no_tokens,
    damage_format,
  ],
)
def test_damaged_map_says_which_folder_to_delete(stored, damage):
  task, folder = stored
  damage(folder)
  says((str(folder), 'delete that folder'), lambda: materialize.read(str(folder), task.vocab))


def test_map_of_another_vocabulary(stored):
  says('another vocabulary', lambda: materialize.read(str(stored[1]), vocab.bytes_(extra_ids=5)))


def test_interrupted_map_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'cache'))
  task = tasks.text(train=write(tmp_path / 'a.txt', 'text ' * 100), vocab=BYTES)

  def broken(split):
    yield 'one'
    raise KeyboardInterrupt

  spoilt = task._replace(corpora=(task.corpora[0]._replace(texts=broken),))
  with pytest.raises(KeyboardInterrupt):
    store(spoilt, ('train',))
  assert not [f for f in os.listdir(tmp_path / 'cache' / 'tokens') if not f.endswith('.lock')]
  store(task, ('train',))
