"""Our corpora and vocabularies as SeqIO's. The one module that imports TensorFlow, itself imported lazily."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TensorFlow tells file descriptor 2 which GPUs it misses; an error in here is raised all the same."""
  sys.stderr.flush()
  saved = os.dup(2)
  with open(os.devnull, 'wb') as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)


with _quiet():
  import seqio
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # the accelerator belongs to jax


class _Vocabulary(seqio.Vocabulary):
  """A `data.vocab` vocabulary with SeqIO's interface and the same ids."""

  def __init__(self, ours: Any):
    self.ours = ours
    super().__init__(extra_ids=0)

  @property
  def eos_id(self) -> int:
    return self.ours.eos

  @property
  def unk_id(self) -> int:
    return self.ours.unk

  @property
  def _base_vocab_size(self) -> int:
    return self.ours.size

  def _encode(self, s: str) -> list[int]:
    return self.ours.encode(s)

  def _decode(self, ids: Iterable[int]) -> str:
    return self.ours.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(b: Any) -> np.ndarray:  # bytes in a graph, an array of them outside
      return np.array(self.ours.encode(np.asarray(b).item().decode()), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    return tf.numpy_function(lambda i: self.ours.decode(i.tolist()).encode(), [ids], tf.string)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Vocabulary) and self.ours.fingerprint == other.ours.fingerprint


def vocabulary(ours: Any) -> seqio.Vocabulary:
  """A `data.vocab` vocabulary with SeqIO's interface."""
  return _Vocabulary(ours)


def text_source(texts: Callable[[str], Iterator[str]], splits: Sequence[str]) -> seqio.DataSource:
  """A SeqIO source of {'text': string}, one example per document."""

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # the documents come in order; SeqIO shuffles examples, not files
    spec = tf.TensorSpec([], tf.string)
    return tf.data.Dataset.from_generator(
      lambda: (t.encode() for t in texts(split)), output_signature=spec
    ).map(lambda t: {'text': t})

  return seqio.FunctionDataSource(dataset, splits=list(splits))


def tfds_source(name: str, data_dir: str, splits: dict[str, str]) -> seqio.DataSource:
  """A SeqIO source over a prepared TFDS dataset in `data_dir`."""
  return seqio.TfdsDataSource(tfds_name=name, tfds_data_dir=data_dir, splits=splits)


def tfds_texts(source: seqio.DataSource, split: str, key: str) -> Iterator[str]:
  """The documents of one split of a TFDS source, in order."""
  for example in source.get_dataset(split, shuffle=False).as_numpy_iterator():
    if key not in example:
      raise UserError(
        f'the examples have no key {key!r} but {", ".join(sorted(example))}: set task.key'
      )
    yield example[key].decode()


def register_task(name: str, source: seqio.DataSource, key: str, ours: Any) -> None:
  """Adds a SeqIO task of {'targets': ids with end of document} unless it is there."""
  if name in seqio.TaskRegistry.names():
    return

  def rekey(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
      lambda example: {'targets': example[key]}, num_parallel_calls=tf.data.AUTOTUNE
    )

  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[rekey, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={'targets': seqio.Feature(vocabulary(ours), add_eos=True, dtype=tf.int32)},
    metric_fns=[],
  )


def register_mixture(name: str, parts: Sequence[tuple[str, float]]) -> None:
  """Adds a SeqIO mixture of registered tasks unless it is there."""
  if name not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(name, list(parts))


def examples(name: str, split: str) -> Iterator[np.ndarray]:
  """The ids of every document of a registered task, in order, end of document included."""
  task = seqio.get_mixture_or_task(name)
  dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
  for example in dataset.as_numpy_iterator():
    yield example['targets']
