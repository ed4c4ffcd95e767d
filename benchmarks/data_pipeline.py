r"""How many tokens a second the data pipeline prepares on one core, beside SeqIO doing the same.

  python -m benchmarks.data_pipeline            # about two minutes, most of it TensorFlow's start
  python -m benchmarks.data_pipeline --seconds=10

The text: tiny Shakespeare four times over, cut at random (fixed seed) into documents of 400 to 1800 characters, 4.4
MB in 4,068 documents, in a SentencePiece vocabulary of 4,096 ids, rows of 512. A token counts when it is a piece of
the text and sits in a batch: sentinels, mode tokens, ends and padding are overhead. Time is the CPU time of the
whole process, all threads.

  ul2, token maps      the hot path of training: seven denoisers, packed, for a prefix decoder
  ul2, on the fly      the same from text
  spans, token maps    T5's span corruption, packed, for an encoder-decoder
  spans, on the fly    the same from text
  spans, seqio         the same from text in SeqIO: span corruption in TensorFlow, EncDecFeatureConverter(pack=True)
"""

import argparse
import gzip
import json
import os
import tempfile
import time
import types
from functools import partial

import numpy as np
from absl import logging

from llm_jax.data import denoise, pipeline, readers, tasks, vocab

LENGTH, BATCH, SIZE = 512, 32, 4096
PLAY = os.path.join(os.path.dirname(tasks.__file__), 'bundled', 'tinyshakespeare', 'input.txt.gz')


def write_corpus(path: str) -> None:
  """Writes the documents as JSON lines."""
  with gzip.open(PLAY, 'rt', encoding='utf-8') as f:
    text = f.read()
  rng = np.random.default_rng(0)
  with open(path, 'w', encoding='utf-8') as f:
    for _ in range(4):
      at = 0
      while at < len(text):
        n = int(rng.integers(400, 1800))
        f.write(json.dumps({'text': text[at : at + n]}) + '\n')
        at += n


def measure(batches, count, seconds: float) -> tuple[float, float]:
  """(tokens per CPU-second, tokens per second) of an iterator after its first batch."""
  next(batches)
  cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
  while time.perf_counter() - wall < seconds:
    tokens += count(next(batches))
  return tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - wall)


def ours(task, kind: str, noise, read, seconds: float) -> tuple[float, float]:
  """Our source, without its thread: nothing overlaps."""
  model = types.SimpleNamespace(card=types.SimpleNamespace(kind=kind, vocab=SIZE, length=None))
  source = pipeline.make(model, task=task, batch=BATCH, length=LENGTH, denoiser=noise, read=read)
  names = ('targets', 'encoder/inputs') if kind == 'encoder_decoder' else ('targets',)
  count = lambda made: sum(pieces(made[0][n], source.vocab.base) for n in names)
  return measure(source._batches(source.state()), count, seconds)


def pieces(ids: np.ndarray, base: int) -> int:
  """How many ids are pieces of the text."""
  return int(((ids > 2) & (ids < base)).sum())


def peer(task, seconds: float) -> tuple[float, float]:
  """SeqIO with T5's preprocessors, in TensorFlow's own tokenizer and operations."""
  from llm_jax.data import seqio_bridge

  seqio, tf = seqio_bridge.seqio, seqio_bridge.tf
  words = task().vocab
  with tempfile.TemporaryDirectory() as folder:
    words.save(folder)
    theirs = seqio.SentencePieceVocabulary(
      os.path.join(folder, 'sentencepiece.model'), extra_ids=SIZE - words.base
    )
    feature = seqio.Feature(theirs, add_eos=True)
    seqio.TaskRegistry.add(
      'benchmark_spans',
      source=task().corpora[0].seqio_source(),
      preprocessors=[
        partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
        seqio.preprocessors.tokenize,
        span_corruption(seqio, tf, SIZE),
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={'inputs': feature, 'targets': feature},
      metric_fns=[],
    )
    dataset = seqio.get_dataset(
      'benchmark_spans',
      task_feature_lengths={'inputs': LENGTH, 'targets': LENGTH},
      dataset_split='train',
      shuffle=True,
      num_epochs=None,
      seed=0,
      use_cached=False,
      feature_converter=seqio.EncDecFeatureConverter(pack=True),
    ).batch(BATCH)
    names = ('encoder_input_tokens', 'decoder_target_tokens')
    return measure(
      iter(dataset.as_numpy_iterator()),
      lambda b: sum(pieces(b[n], words.base) for n in names),
      seconds,
    )


def span_corruption(seqio, tf, size: int):
  """T5's span corruption at its defaults as a SeqIO preprocessor (t5.data.preprocessors is not installable beside
  SeqIO).
  """

  def partition(items, parts, seed):
    first = tf.random.experimental.stateless_shuffle(
      tf.cast(tf.range(items - 1) < parts - 1, tf.int32), seed
    )
    group = tf.cumsum(tf.pad(first, [[1, 0]]))
    return tf.math.unsorted_segment_sum(tf.ones_like(group), group, parts)

  def mark(ids, hidden):
    first = hidden & ~tf.pad(hidden[:-1], [[1, 0]])
    marked = tf.where(first, tf.cast(size - tf.cumsum(tf.cast(first, tf.int32)), ids.dtype), ids)
    return tf.boolean_mask(marked, ~(hidden & ~first))

  @seqio.map_over_dataset(num_seeds=2)
  def corrupt(example, seeds):
    ids = example['targets'][:LENGTH]
    n = tf.size(ids)
    noise = tf.clip_by_value(
      tf.cast(tf.round(tf.cast(n, tf.float32) * 0.15), tf.int32), 1, tf.maximum(n - 1, 1)
    )
    spans = tf.maximum(tf.cast(tf.round(tf.cast(noise, tf.float32) / 3), tf.int32), 1)
    both = [partition(n - noise, spans, seeds[0]), partition(noise, spans, seeds[1])]
    starts = tf.cumsum(tf.reshape(tf.stack(both, 1), [-1]))[:-1]
    hidden = tf.cumsum(tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, n)) % 2 == 1
    return {'inputs': mark(ids, hidden), 'targets': mark(ids, ~hidden)}

  return corrupt


def main() -> None:
  """Prints one line per pipeline."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--seconds', type=float, default=5.0, help='how long to measure each pipeline'
  )
  seconds = parser.parse_args().seconds
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'corpus.jsonl')
    write_corpus(path)
    task = partial(
      tasks.jsonl, train=(path,), heldout=0.02, vocab=partial(vocab.sentencepiece, size=SIZE)
    )
    spans, ul2 = denoise.span_corruption, denoise.ul2
    runs = {
      'ul2, token maps': partial(ours, task, 'prefix', ul2, readers.mapped),
      'ul2, on the fly': partial(ours, task, 'prefix', ul2, readers.tokenized),
      'spans, token maps': partial(ours, task, 'encoder_decoder', spans, readers.mapped),
      'spans, on the fly': partial(ours, task, 'encoder_decoder', spans, readers.tokenized),
      'spans, seqio': partial(peer, task),
    }
    logging.set_verbosity(logging.ERROR)  # SeqIO warns of what it cannot know here
    found = {name: run(seconds) for name, run in runs.items()}
  base = found['spans, seqio'][0]
  print(f'load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
  print(f'{"":20}{"tokens / CPU-s":>16}{"tokens / s":>14}{"of seqio":>10}')
  for name, (cpu, wall) in found.items():
    print(f'{name:20}{cpu:16,.0f}{wall:14,.0f}{cpu / base:9.1f}x')


if __name__ == '__main__':
  main()
