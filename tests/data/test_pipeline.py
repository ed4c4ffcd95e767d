"""The source: every token where it belongs, the same batches whatever the processes, exact resumption."""

import itertools
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from llm_jax.core import config
from llm_jax.data import batch, denoise, materialize, pipeline, readers, tasks, vocab
from llm_jax.optim import batch_size
from tests.data.conftest import model, says, store

BYTES = partial(vocab.bytes_, extra_ids=60)


@pytest.fixture(scope='module')
def short(folder):
  """300 short documents: a task function whose maps are stored."""
  task = partial(tasks.jsonl, train=(str(folder / 'short.jsonl'),), heldout=0.1, vocab=BYTES)
  store(task())
  return task


@pytest.fixture(scope='module')
def long(folder):
  """One long document."""
  task = partial(tasks.text, train=(str(folder / 'long.txt'),), heldout=0.1, vocab=BYTES)
  store(task())
  return task


@pytest.fixture(scope='module')
def mixed(folder, short, long):
  task = partial(tasks.mixture, tasks=(short, long), rates=(3.0, 1.0), vocab=BYTES)
  store(task())
  return task


def make(task, kind='causal', **kw):
  kw = dict(dict(batch=8, length=64, process_index=0, process_count=1), **kw)
  return pipeline.make(model(kind), task=task, **kw)


def take(source, n):
  batches = [source() for _ in range(n)]
  source.close()
  return batches


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert set(x) == set(y)
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], err_msg=name)


SETTINGS = {
  'lm': dict(),
  'lm windows': dict(rows=batch.concatenate),
  'ul2 prefix': dict(kind='prefix', denoiser=denoise.ul2),
  'ul2 encoder-decoder': dict(kind='encoder_decoder', denoiser=denoise.ul2, encoder_length=48),
  'spans, windows': dict(
    kind='encoder_decoder', denoiser=denoise.span_corruption, rows=batch.concatenate
  ),
  'prefix, padded': dict(kind='prefix', denoiser=denoise.prefix_lm, rows=batch.pad),
  'on the fly': dict(read=readers.tokenized, kind='prefix', denoiser=denoise.ul2),
  'on the fly, windows': dict(read=readers.tokenized, rows=batch.concatenate),
}
each = pytest.mark.parametrize('setting', SETTINGS)


@each
def test_processes_together_give_the_batches_of_one(mixed, setting):
  whole = take(make(mixed, **SETTINGS[setting]), 5)
  for count in (2, 4):
    shares = [
      take(make(mixed, process_index=i, process_count=count, **SETTINGS[setting]), 5)
      for i in range(count)
    ]
    assert all(len(b['targets']) == 8 // count for share in shares for b in share)
    same(
      whole, [{k: np.concatenate([s[i][k] for s in shares]) for k in whole[0]} for i in range(5)]
    )


@each
def test_resuming_anywhere_gives_the_same_batches(mixed, setting):
  source = make(mixed, **SETTINGS[setting])
  states, batches = [], []
  for _ in range(90 if setting == 'lm' else 12):
    states.append(json.dumps(source.state()))
    batches.append(source())
  source.close()
  for k in (0, 1, 7, len(states) - 3):
    again = make(mixed, **SETTINGS[setting])
    again()  # restoring a source that has run
    again.restore(json.loads(states[k]))
    same(batches[k : k + 3], take(again, 3))
    skipped = make(mixed, **SETTINGS[setting])
    skipped.skip(k)
    assert skipped.state() == json.loads(states[k])
    same(batches[k : k + 1], take(skipped, 1))
  assert len(states[-1]) < 60


def test_resuming_with_another_number_of_processes(short):
  whole = take(make(short), 9)
  first = [make(short, process_index=i, process_count=4) for i in range(4)]
  for source in first:
    for _ in range(5):
      source()
  states = [source.state() for source in first]
  assert states == [states[0]] * 4  # any process' state will do
  then = [make(short, process_index=i, process_count=2) for i in range(2)]
  for source in then:
    source.restore(states[0])
  shares = [take(source, 4) for source in then]
  same(
    whole[5:], [{k: np.concatenate([s[i][k] for s in shares]) for k in whole[0]} for i in range(4)]
  )
  for source in first:
    source.close()


def test_every_epoch_has_every_document_once_in_another_order(short):
  corpus = short().corpora[0]
  documents = [d for d in corpus.texts('train') if len(d) < 63]
  v = short().vocab
  reader = readers.mapped(corpus, v, 'train', readers.Cut(64, False, False, 0))
  order = pipeline.endless_order([reader], (1.0,), 0, True)
  blocks = [order(j)[0] for j in range(2 * reader.units // reader.block + 1)]
  drawn = [tuple(b.get(i).tolist()) for b in blocks for i in range(len(b.sizes))][
    : 2 * reader.units
  ]
  first, second = drawn[: reader.units], drawn[reader.units :]
  assert sorted(first) == sorted(second) and first != second
  assert set(documents) <= {v.decode(ids) for ids in first}
  other = pipeline.endless_order([reader], (1.0,), 1, True)
  assert other(0)[0].sizes.tolist() != blocks[0].sizes.tolist()


def test_seeds_and_batches_differ(short):
  one, two = take(make(short), 3), take(make(short, seed=1), 3)
  assert (one[0]['targets'] != one[1]['targets']).any()
  assert (one[0]['targets'] != two[0]['targets']).any()
  same(one, take(make(short), 3))


@pytest.mark.parametrize('windows', [False, True])
def test_jitter_moves_the_cuts_and_loses_nothing(long, windows):
  """In every epoch the pieces of a long document tile it; where they are cut differs."""
  corpus, v = long().corpora[0], long().vocab
  reader = readers.mapped(corpus, v, 'train', readers.Cut(50, windows, True, 3))
  text, cuts = next(iter(corpus.texts('train'))), []
  for epoch in range(3):
    got = reader.chunks(np.arange(reader.units), np.full(reader.units, epoch))
    assert v.decode(np.concatenate([got.get(i) for i in range(len(got.sizes))])) == text
    assert got.sizes.max() <= 50 and got.ends.sum() == (not windows)
    cuts.append(int(got.sizes[0]))
  assert len(set(cuts)) > 1


def test_pieces_tile_for_all_sizes():
  sizes = np.array([1, 2, 9, 10, 11, 19, 20, 21, 100])
  for jitter in (False, True):
    units, locate = readers.pieces(sizes, readers.Cut(10, False, jitter, 0))
    for epoch in range(20):
      document, start, stop = locate(np.arange(units), np.full(units, epoch))
      for d, size in enumerate(sizes):
        spans = [(a, b) for e, a, b in zip(document, start, stop, strict=True) if e == d and b > a]
        assert spans[0][0] == 0 and spans[-1][1] == size and all(b - a <= 10 for a, b in spans)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize('read', [readers.mapped, readers.tokenized])
@pytest.mark.parametrize('rows', [batch.pack, batch.concatenate, batch.pad])
def test_held_out_pass_covers_every_byte_once(short, long, rows, read):
  for task in (short, long):
    source = make(task, split='validation', rows=rows, read=read)
    corpus, got = task().corpora[0], list(source.once())
    n = sum(int(source.vocab.piece_bytes[b['targets'][b['weights'] > 0]].sum()) for b in got)
    assert n == sum(len(t.encode()) for t in corpus.texts('validation'))
    ends = sum(int(((b['targets'] == 1) & (b['weights'] > 0)).sum()) for b in got)
    assert ends == len(list(corpus.texts('validation')))
    assert all(b['targets'].shape == (8, 64) for b in got)
    same(got, list(source.once()))
    shares = [
      list(
        make(
          task, split='validation', rows=rows, read=read, process_index=i, process_count=2
        ).once()
      )
      for i in (0, 1)
    ]
    same(got, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares, strict=True)])


def test_shakespeare_split_is_nanogpts():
  task = tasks.tiny_shakespeare(vocab=BYTES)
  train, held = (''.join(task.corpora[0].texts(s)) for s in ('train', 'validation'))
  assert len(train + held) == 1_115_394 and len(train) == int(1_115_394 * 0.9) == 1_003_854
  assert train.startswith('First Citizen:\nBefore we proceed') and held.startswith(
    '?\n\nGREMIO:\nGood morrow'
  )
  store(task, ('validation',))
  source = make(
    partial(tasks.tiny_shakespeare, vocab=BYTES), split='validation', rows=batch.concatenate
  )
  got = [source.vocab.decode(b['targets'][b['weights'] > 0]) for b in source.once()]
  assert ''.join(got) == held


def test_packed_rows_hold_whole_segments(short):
  source = make(short, kind='prefix', denoiser=partial(denoise.prefix_lm, mode='[S]'), length=128)
  corpus = '\n'.join(short().corpora[0].texts('train'))
  n_targets = filled = 0
  for b in take(source, 6):
    for row in range(8):
      s = b['segments'][row]
      filled += (s > 0).sum()
      for k in range(1, s.max() + 1):
        here = np.flatnonzero(s == k)
        assert (np.diff(here) == 1).all()
        assert b['positions'][row][here].tolist() == list(range(len(here)))
        targets, weights, prefix = (b[name][row][here] for name in ('targets', 'weights', 'prefix'))
        given = int((weights == 0).sum())
        assert (weights[:given] == 0).all() and prefix.tolist() == [
          i <= given for i in range(len(here))
        ]
        assert b['inputs'][row][here].tolist() == [0, *targets[:-1].tolist()]
        text = source.vocab.decode(targets)
        assert text.startswith('[S]') and text[3:] in corpus
        n_targets += len(here) - given
      assert (b['inputs'][row][s == 0] == 0).all() and (b['targets'][row][s == 0] == 0).all()
    n_targets -= int(b['weights'].sum())
  assert n_targets == 0 and filled / (6 * 8 * 128) > 0.85


def test_encoder_and_decoder_segments_match(short):
  source = make(
    short, kind='encoder_decoder', denoiser=denoise.span_corruption, length=64, encoder_length=128
  )
  for b in take(source, 3):
    assert (b['encoder/segments'].max(1) == b['segments'].max(1)).all()
    marks = lambda x: sorted(set(x.tolist()) & set(source.vocab.sentinels.tolist()))
    for row in range(8):
      for k in range(1, b['segments'][row].max() + 1):
        inputs = b['encoder/inputs'][row][b['encoder/segments'][row] == k]
        targets = b['targets'][row][b['segments'][row] == k]
        assert marks(inputs) == marks(targets) and inputs[-1] == targets[-1] == 1


def test_windows_are_contiguous_and_carry_no_segments(long):
  source = make(long, rows=batch.concatenate)
  text = next(iter(long().corpora[0].texts('train')))
  for b in take(source, 4):
    assert set(b) == {'inputs', 'targets', 'weights'}
    for row in range(8):
      n = int(b['weights'][row].sum())
      assert source.vocab.decode(b['targets'][row][:n]) in text
      assert b['inputs'][row][:n].tolist() == [0, *b['targets'][row][: n - 1].tolist()]


def test_rows_of_the_survey(tmp_path):
  """The survey's batch of 4 x 10 (GPT-2's ids): documents delimited by one end token, cut into rows of 10."""
  rows = [
    [4342, 318, 281, 1672, 3188, 352, 4478, 617, 16326, 13],
    [16281, 3188, 362, 50256, 16281, 3188, 513, 50256, 16281, 3188],
    [1212, 318, 617, 4738, 2420, 655, 329, 1672, 50256, 1212],
    [16, 11, 17, 11, 18, 11, 19, 11, 20, 11],
  ]
  stream = np.array(rows).ravel()
  documents = np.split(stream, np.flatnonzero(stream == 50256) + 1)
  v = vocab.bytes_()
  v.size, v.piece_bytes = 50257, np.ones(50257, np.int32)
  corpus = tasks.tiny_shakespeare(vocab=lambda text: v).corpora[0]
  materialize.write(str(tmp_path), documents, corpus, v, 'train')
  stored = materialize.read(str(tmp_path), v)
  assert stored.tokens.reshape(4, 10).tolist() == rows and stored.documents.tolist() == [
    0,
    14,
    18,
    29,
    40,
  ]


def test_mixture_rates(mixed):
  """In every stretch of the stream the parts appear in proportion to their rates."""
  opened = [
    readers.mapped(c, mixed().vocab, 'train', readers.Cut(64, False, False, 0))
    for c in mixed().corpora
  ]
  spy = []
  parts = [
    r._replace(chunks=lambda u, e, i=i, r=r: spy.append((i, len(u))) or r.chunks(u, e))
    for i, r in enumerate(opened)
  ]
  order = pipeline.endless_order(parts, (3.0, 1.0), 0, True)
  order(0), order(5)
  counts = [sum(n for i, n in spy if i == k) for k in (0, 1)]
  assert abs(counts[0] / sum(counts) - 0.75) < 0.01
  got = order(2)[0]
  assert len(got.sizes) == len(got.units) and (np.diff(got.units) >= 0).all()
  assert [len(got.get(i)) for i in range(20)] == got.sizes[:20].tolist()


def test_ramp(short):
  ramp = partial(batch_size.ramp, start=2, end=8, over=40, multiple=2)
  batches = take(make(short, ramp=ramp), 12)
  assert [len(b['targets']) for b in batches] == [ramp(k).size for k in range(12)]
  whole = np.concatenate([b['targets'] for b in take(make(short), 12)])
  np.testing.assert_array_equal(
    np.concatenate([b['targets'] for b in batches]), whole[: ramp(12).seen]
  )
  source = make(short, ramp=ramp)
  source.skip(9)
  np.testing.assert_array_equal(source()['targets'], batches[9]['targets'])
  source.close()


def test_config_round_trip(short):
  c = config.use(
    pipeline.make,
    task=config.use(short.func, **short.keywords),
    denoiser=config.use(denoise.ul2),
    batch=4,
    length=64,
    ramp=config.use(batch_size.ramp, start=2, end=4, over=8, multiple=2),
  )
  config.override(c, 'denoiser.denoisers[0].rate', '0.2')
  again = config.from_json(config.to_json(c))
  made = [take(config.build(x)(model('prefix')), 3) for x in (c, again)]
  same(*made)


def test_a_failure_in_the_thread_reaches_the_caller(short):
  source = make(short)
  source._batches = lambda state: iter(
    [1 / 0] if state is None else (_ for _ in ()).throw(ValueError('disk gone'))
  )
  for _ in range(2):
    with pytest.raises(ValueError, match='disk gone'):
      source()
  source.close()


def test_close_and_go_on(short):
  source, whole = make(short), take(make(short), 4)
  got = []
  for _ in range(4):
    got.append(source())
    source.close()
  same(whole, got)


def test_local_files_never_load_tensorflow(folder, tmp_path):
  """Not even when the map is made: SeqIO is for what it alone can read."""
  code = f"""
import os
import sys
from functools import partial
from llm_jax.data import pipeline, tasks, vocab
from tests.data.conftest import model
task = partial(tasks.text, train=({str(folder / 'long.txt')!r},), vocab=partial(vocab.sentencepiece, size=400))
print(int(pipeline.make(model(), task=task, batch=2, length=64)()['targets'].sum()))
assert not [m for m in ('tensorflow', 'seqio', 'tensorflow_datasets') if m in sys.modules]
"""
  environment = dict(os.environ, LLM_JAX_CACHE=str(tmp_path))
  said = []
  for _ in range(2):
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    said.append((int(done.stdout), done.stderr[:25]))
  assert said == [(said[0][0], 'tokenising text (train), '), (said[0][0], '')]


def test_wrong_sizes_name_the_remedy(short):
  says('3 processes: choose a multiple of 3', lambda: make(short, process_index=0, process_count=3))
  says('length must be at least 2', lambda: make(short, length=1))
  says('batch of 0', lambda: make(short, batch=0))
  says(('322 ids', 'model.vocab=322'), lambda: pipeline.make(model(vocab=100), task=short))
  says(
    'longer than the 32 positions', lambda: pipeline.make(model(length=32), task=short, length=64)
  )
  says('only an encoder-decoder', lambda: make(short, encoder_length=32))
  says('use denoise.prefix_lm', lambda: make(short, kind='encoder_decoder'))
  says("no split 'test'", lambda: make(short, split='test'))
  says(
    'raise length', lambda: make(short, kind='prefix', denoiser=denoise.span_corruption, length=3)
  )
  says('not the state of a data pipeline', lambda: make(short).restore({'step': 3}))
  says('process_index and process_count', lambda: make(short, process_count=None))
  says('the ramp gives 16 rows', lambda: make(short, ramp=lambda k: batch_size.fixed(k, size=16)))
  few = partial(short, vocab=partial(vocab.bytes_, extra_ids=2))
  store(few())
  says('set vocab.extra_ids=', lambda: make(few, kind='prefix', denoiser=denoise.span_corruption))
