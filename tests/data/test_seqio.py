"""SeqIO is the registry: our tasks through its own interface, and its ids in our maps. The one module that loads
TensorFlow.
"""

from functools import partial

import pytest

from llm_jax.data import corpus, materialize, pipeline, tasks, vocab
from tests.data.conftest import model, says, words
from tests.data.test_vocab import ODD


@pytest.fixture(scope='module')
def seqio():
  from llm_jax.data import seqio_bridge

  return seqio_bridge.seqio


@pytest.fixture(scope='module')
def task(folder, pieces):
  return tasks.jsonl(train=(str(folder / 'short.jsonl'),), heldout=0.1, vocab=lambda text: pieces)


def test_ids_are_those_of_seqios_own_vocabularies(seqio, pieces, tmp_path):
  """Same model, same sentinels: SeqIO counts our modes and sentinels as extra ids above the model's pieces."""
  pieces.save(str(tmp_path))
  theirs = seqio.SentencePieceVocabulary(str(tmp_path / 'sentencepiece.model'), extra_ids=103)
  assert theirs.vocab_size == pieces.size
  for text in [t for t in ODD if '\u2581' not in t and '[' not in t and '<extra' not in t] + [
    words(200, 7)
  ]:
    assert theirs.encode(text) == pieces.encode(text)
  for i in (0, 5, 99):
    assert theirs.tokenizer.id_to_piece(int(pieces.sentinels[i])).endswith(f'<extra_id_{i}>')
  ours, byte = vocab.bytes_(extra_ids=100, modes=()), seqio.ByteVocabulary(extra_ids=100)
  assert ours.size == byte.vocab_size
  for text in ODD:
    if '<extra' not in text:
      assert byte.encode(text) == ours.encode(text)


def test_vocabulary_as_seqios(seqio, pieces):
  import tensorflow as tf

  theirs = pieces.seqio()
  assert isinstance(theirs, seqio.Vocabulary)
  assert (theirs.vocab_size, theirs.pad_id, theirs.eos_id, theirs.unk_id) == (pieces.size, 0, 1, 2)
  for text in ODD:
    assert (
      theirs.encode(text)
      == pieces.encode(text)
      == theirs.encode_tf(tf.constant(text)).numpy().tolist()
    )
    assert theirs.decode(pieces.encode(text)) == text
  assert theirs.decode_tf(tf.constant(pieces.encode('naïve 😀'))).numpy().decode() == 'naïve 😀'
  assert theirs == pieces.seqio() and theirs != vocab.bytes_().seqio()


def test_task_in_the_registry(seqio, task, pieces):
  name = tasks.register(task)
  assert tasks.register(task) == name and name in seqio.TaskRegistry.names()
  dataset = seqio.get_mixture_or_task(name).get_dataset({'targets': 32}, 'train', shuffle=False)
  got = [e['targets'].tolist() for e in dataset.as_numpy_iterator()]
  assert got == [[*pieces.encode(t), 1][:32] for t in task.corpora[0].texts('train')]


def test_mixture_in_the_registry(seqio, folder):
  parts = (
    partial(tasks.jsonl, train=(str(folder / 'short.jsonl'),)),
    partial(tasks.text, train=(str(folder / 'long.txt'),)),
  )
  mixed = tasks.mixture(tasks=parts, rates=(3.0, 1.0), vocab=partial(vocab.bytes_, extra_ids=4))
  name = tasks.register(mixed)
  mixture = seqio.get_mixture_or_task(name)
  assert sorted(mixture.get_rate(t) for t in mixture.tasks) == [1.0, 3.0]
  dataset = seqio.get_dataset(
    name,
    task_feature_lengths={'targets': 64},
    dataset_split='train',
    feature_converter=seqio.LMFeatureConverter(pack=True),
    shuffle=False,
  )
  row = next(dataset.as_numpy_iterator())
  segments, positions = row['decoder_segment_ids'], row['decoder_positions']
  for k in range(1, segments.max() + 1):
    assert positions[segments == k].tolist() == list(range((segments == k).sum()))


def test_map_is_what_the_seqio_task_gives(seqio, task, pieces, tmp_path):
  for split in ('train', 'validation'):
    a, b = tmp_path / f'seqio_{split}', tmp_path / f'plain_{split}'
    for folder in (a, b):
      folder.mkdir()
    corpus = task.corpora[0]
    materialize.write(
      str(a), materialize.seqio_examples(corpus, pieces, split), corpus, pieces, split
    )
    materialize.run_task(str(b), corpus, pieces, split)
    for name in ('tokens.bin', 'documents.bin', 'manifest.json'):
      assert (a / name).read_bytes() == (b / name).read_bytes()


def prepare(folder, documents):
  """Writes documents (split -> texts) as TFDS stores the prepared dataset tiny:1.0.0."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  place = folder / 'tiny' / '1.0.0'
  place.mkdir(parents=True)
  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  names = tfds.core.ShardedFileTemplate(
    dataset_name='tiny', filetype_suffix='tfrecord', data_dir=str(place)
  )
  splits = []
  for split, texts in documents.items():
    records = [features.serialize_example({'text': t}) for t in texts]
    with tf.io.TFRecordWriter(str(place / f'tiny-{split}.tfrecord-00000-of-00001')) as f:
      for record in records:
        f.write(record)
    size = sum(map(len, records))
    info = tfds.core.SplitInfo(
      name=split, shard_lengths=[len(texts)], num_bytes=size, filename_template=names
    )
    splits.append(info)
  tfds.folder_dataset.write_metadata(
    data_dir=str(place),
    features=features,
    split_infos=splits,
    filename_template=names,
    check_data=False,
  )


def test_tfds_from_local_files(tmp_path):
  """A prepared dataset, read without a network, through a task, a vocabulary, a map and a source."""
  documents = {
    s: [f'{s} {words(20, i)}' for i in range(n)] for s, n in (('train', 20), ('validation', 5))
  }
  prepare(tmp_path, documents)
  words_of = partial(vocab.sentencepiece, size=400, extra_ids=10)
  make = partial(tasks.tfds, name='tiny', data_dir=str(tmp_path), vocab=words_of)
  task = make()
  assert list(task.corpora[0].texts('train')) == documents['train']
  source = pipeline.make(model(), task=make, split='validation', batch=2, length=64)
  got = ''.join(source.vocab.decode(b['targets'][r]) for b in source.once() for r in range(2))
  assert len(got) == sum(map(len, documents['validation']))
  says(
    ('no key', 'text', 'task.key'),
    lambda: list(make(key='body', vocab=vocab.bytes_).corpora[0].texts('train')),
  )
  sliced = make(train='train[:50%]', validation='train[50%:]', vocab=vocab.bytes_)
  assert list(sliced.corpora[0].texts('validation')) == documents['train'][10:]


def test_corpus_without_random_access_is_sampled_from_its_start(task):
  endless = task.corpora[0]._replace(documents=lambda split: None)
  got = list(corpus.sample(endless, 1000))
  assert got == list(endless.texts('train'))[: len(got)] and 1000 <= sum(map(len, got)) < 2000
