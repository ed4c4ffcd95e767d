"""Tasks: which text, in which vocabulary. The function named by `source.task` in a config.

Each returns a `Task`; `register(task)` makes it a SeqIO task or mixture (Roberts et al. 2022, arXiv:2203.17189), so
`seqio.get_mixture_or_task(task.name).get_dataset(...)` works; `materialize` writes the same ids into token maps, once.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import corpus as corpus_lib
from llm_jax.data import vocab as vocab_lib

_BUNDLED = os.path.join(os.path.dirname(__file__), 'bundled')


class Task(NamedTuple):
  """corpora: what to read; rates: how many examples of each per example drawn; vocab: None inside a mixture."""

  name: str
  corpora: tuple
  rates: tuple
  vocab: Any


def text(
  *,
  train: tuple = (),
  heldout: float | tuple = 0.1,
  documents: Callable = corpus_lib.whole_file,
  vocab: Callable | None = vocab_lib.sentencepiece,
  name: str = 'text',
) -> Task:
  """UTF-8 files (paths or globs; `.gz` too). documents: `corpus.whole_file`, `corpus.lines` or `corpus.paragraphs`.

  heldout: files, or the last fraction of the characters.
  """
  cut = getattr(documents, 'func', documents)
  return _task(name, (corpus_lib.text(name, train, heldout, cut),), (1.0,), vocab)


def jsonl(
  *,
  train: tuple = (),
  heldout: float | tuple = 0.1,
  key: str = 'text',
  vocab: Callable | None = vocab_lib.sentencepiece,
  name: str = 'jsonl',
) -> Task:
  """Files of JSON lines (`.gz` too), the text of each record under `key`. heldout: files, or the last fraction of
  the records.
  """
  return _task(name, (corpus_lib.jsonl(name, train, heldout, key),), (1.0,), vocab)


def tiny_shakespeare(*, vocab: Callable | None = vocab_lib.sentencepiece) -> Task:
  """The plays in one document of 1,115,394 bytes, bundled; the last 10 % of the characters are held out, as in
  nanoGPT.
  """
  path = os.path.join(_BUNDLED, 'tinyshakespeare', 'input.txt.gz')
  return text(train=(path,), heldout=0.1, vocab=vocab, name='tiny_shakespeare')


DOMAINS = dict(
  books=(
    'alice_in_wonderland.txt.gz',
    'frankenstein.txt.gz',
    'moby_dick.txt.gz',
    'pride_and_prejudice.txt.gz',
  ),
  stories=('tiny_stories.txt.gz',),
  wikipedia=('wiki.test.raw.gz', 'wiki.valid.raw.gz'),
)


def domain(*, name: str, vocab: Callable | None = vocab_lib.sentencepiece) -> Task:
  """A kind of real text that is bundled: `books` (four novels, 2.5 MB), `wikipedia` (WikiText-2's validation and test
  files, 2.4 MB) or `stories` (TinyStories, 0.9 MB), to mix and to learn scaling laws from.

  The last 10 % of the characters of every file are held out; files are drawn in proportion to their bytes.
  """
  if name not in DOMAINS:
    raise UserError(f'no domain {name!r}; {nearest(name, DOMAINS)}')
  paths = [os.path.join(_BUNDLED, name, file) for file in DOMAINS[name]]
  corpora = tuple(corpus_lib.text(name, (path,), 0.1, corpus_lib.whole_file) for path in paths)
  return _task(name, corpora, tuple(float(len(corpus_lib.content(p))) for p in paths), vocab)


LANGUAGES = ('arb', 'cmn', 'eng', 'fra', 'rus', 'spa')


def declaration(*, language: str, vocab: Callable | None = vocab_lib.sentencepiece) -> Task:
  """The Universal Declaration of Human Rights in Arabic, Chinese, English, French, Russian or Spanish (their codes of
  ISO 639-3), bundled: 10 to 23 kB each, one document, the last 10 % of the characters held out.
  """
  if language not in LANGUAGES:
    raise UserError(f'no language {language!r}; {nearest(language, LANGUAGES)}')
  path = os.path.join(_BUNDLED, 'declaration', f'{language}.txt.gz')
  return text(train=(path,), heldout=0.1, vocab=vocab, name=f'declaration_{language}')


def tfds(
  *,
  name: str,
  key: str = 'text',
  train: str = 'train',
  validation: str = 'validation',
  data_dir: str | None = None,
  vocab: Callable | None = vocab_lib.sentencepiece,
) -> Task:
  """A dataset that TFDS has prepared in `data_dir` (default $TFDS_DATA_DIR, else ~/tensorflow_datasets).

  name: as TFDS writes it, `c4/en` or with a version `c4/en:3.1.0`. train, validation: TFDS splits, slices allowed.
  """
  folder = os.path.expanduser(
    data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  )
  name, info = _prepared(name, folder)
  splits = {'train': train, 'validation': validation}

  def source() -> Any:
    from llm_jax.data import seqio_bridge

    return seqio_bridge.tfds_source(name, folder, splits)

  def texts(split: str) -> Iterator[str]:
    from llm_jax.data import seqio_bridge

    return seqio_bridge.tfds_texts(source(), split, key)

  short = name.partition(':')[0].replace('/', '_')
  mark = corpus_lib.fingerprint([info], 'tfds', name, key, splits)
  one = corpus_lib.Corpus(short, mark, tuple(splits), texts, lambda split: None, source, key)
  return _task(short, (one,), (1.0,), vocab)


def c4(*, data_dir: str | None = None, vocab: Callable | None = vocab_lib.sentencepiece) -> Task:
  """The cleaned Common Crawl of T5, from a prepared TFDS `c4/en`."""
  return tfds(name='c4/en', data_dir=data_dir, vocab=vocab)


def wikipedia(
  *,
  snapshot: str = '20230601.en',
  data_dir: str | None = None,
  vocab: Callable | None = vocab_lib.sentencepiece,
) -> Task:
  """Wikipedia from a prepared TFDS `wikipedia/<snapshot>`; it has one split, the last 1 % of which is held out."""
  return tfds(
    name=f'wikipedia/{snapshot}',
    train='train[:99%]',
    validation='train[99%:]',
    data_dir=data_dir,
    vocab=vocab,
  )


def mixture(
  *,
  tasks: tuple,
  rates: tuple,
  vocab: Callable | None = vocab_lib.sentencepiece,
  name: str = 'mixture',
) -> Task:
  """Several tasks, examples drawn in proportion to `rates`, in one vocabulary trained on all of them.

  The `vocab` of the parts is not used: all share this one.
  """
  if len(tasks) != len(rates) or not tasks:
    raise UserError(
      f'a mixture needs one rate per task, got {len(tasks)} tasks and {len(rates)} rates: set task.rates'
    )
  if min(rates) <= 0:
    raise UserError(
      f'mixture rates must be positive, got {tuple(rates)}: leave a task out instead of giving it rate 0'
    )
  parts = [part(vocab=None) for part in tasks]
  corpora = tuple(c for part in parts for c in part.corpora)
  shares = tuple(
    rate * r / sum(part.rates) for part, rate in zip(parts, rates, strict=True) for r in part.rates
  )
  return _task(name, corpora, shares, vocab)


def register(task: Task) -> str:
  """Makes `task` known to SeqIO and returns its name there. Imports TensorFlow."""
  from llm_jax.data import seqio_bridge

  names = [register_corpus(c, task.vocab) for c in task.corpora]
  if len(names) == 1:
    return names[0]
  name = f'{task.name}_{hashlib.sha256(repr((names, task.rates)).encode()).hexdigest()[:8]}'
  seqio_bridge.register_mixture(name, list(zip(names, task.rates, strict=True)))
  return name


def register_corpus(corpus: corpus_lib.Corpus, vocab: Any) -> str:
  """Makes one corpus in one vocabulary a SeqIO task and returns its name. Imports TensorFlow."""
  from llm_jax.data import seqio_bridge

  name = identity(corpus, vocab)
  seqio_bridge.register_task(name, corpus.seqio_source(), corpus.key, vocab)
  return name


def identity(corpus: corpus_lib.Corpus, vocab: Any) -> str:
  """A name that changes when the text or the meaning of any id does."""
  digest = hashlib.sha256(f'{corpus.fingerprint}{vocab.fingerprint}'.encode()).hexdigest()
  return f'{corpus.name}_{digest[:12]}'.replace('-', '_').replace('/', '_').replace('.', '_')


def _task(name: str, corpora: tuple, rates: tuple, make_vocab: Callable | None) -> Task:
  if make_vocab is None:
    return Task(name, corpora, rates, None)

  def read(limit: int) -> Iterator[str]:
    for one in corpora:
      yield from corpus_lib.sample(one, limit // len(corpora))

  mark = hashlib.sha256(json.dumps([c.fingerprint for c in corpora]).encode()).hexdigest()
  return Task(name, corpora, rates, make_vocab(vocab_lib.Text(name, mark, read)))


def _prepared(name: str, folder: str) -> tuple[str, str]:
  """(name with its version, path of its dataset_info.json) of a dataset that TFDS has prepared in `folder`."""
  base, _, version = name.partition(':')
  found = sorted(glob.glob(os.path.join(folder, base, version or '[0-9]*', 'dataset_info.json')))
  if not found:
    known = {
      os.path.relpath(os.path.dirname(p), folder)
      for p in glob.glob(os.path.join(folder, '**', 'dataset_info.json'), recursive=True)
    }
    near = f' ({nearest(base, {os.path.dirname(k) for k in known})})' if known else ''
    raise UserError(
      f'TFDS has prepared no {name!r} in {folder}{near}: run `tfds build {base} --data_dir={folder}` where there is a '
      'network, or set task.data_dir to the folder that holds it'
    )
  return f'{base}:{os.path.basename(os.path.dirname(found[-1]))}', found[-1]
