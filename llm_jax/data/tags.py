"""Sentences whose tags the text itself gives: how a word was written, and which mark followed it.

    found = tags.sentences(text)                # [Sentence(words, tags)]
    known = words.frequent((one.words for one in found), 5000)
    source = tags.source(sentences=found, known=known, batch=16, length=40)

The words are told in lower case and without marks, so `case` is that of truecasing (Lita et al. 2003) and `mark` that
of restoring punctuation: what can be learned from any text without an annotator. Sentences tagged by people are
`Sentence`s too, with tasks of other names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import examples, pipeline
from llm_jax.data import words as words_lib

CASES = ('lower', 'first', 'upper', 'mixed')
MARKS = ('none', ',', '.', '?', '!', 'other')
STOPS = '.?!'


class Sentence(NamedTuple):
  """words: what is read. tags: task -> int32 [words]."""

  words: tuple[str, ...]
  tags: Mapping[str, np.ndarray]


def sentences(text: str) -> list[Sentence]:
  """Those of a text, which end after one or more of . ? !, with two tasks.

  case: 0 for no capital, 1 for the first letter alone, 2 for all letters of a word of two or more, 3 for others. mark:
  the first mark between a word and the next, of `MARKS`.
  """
  found, words, marks = [], [], []

  def close() -> None:
    if words:
      tags = dict(case=[_case(w) for w in words], mark=[_mark(m) for m in marks])
      tags = {task: np.array(ids, np.int32) for task, ids in tags.items()}
      found.append(Sentence(tuple(w.lower() for w in words), tags))
      words.clear()
      marks.clear()

  for token in words_lib.split(text):
    if token[0].isalnum() or token[0] == '_':
      if marks and marks[-1] and marks[-1][0] in STOPS:
        close()
      words.append(token)
      marks.append('')
    elif marks:
      marks[-1] += token
  close()
  return found


def source(
  model: Any = None,
  *,
  sentences: Sequence[Sentence],
  known: words_lib.Words,
  batch: int = 16,
  length: int = 40,
  shuffle: bool = True,
  seed: int = 0,
) -> pipeline.Source:
  """Batches of sentences, one a row: inputs int32 [batch, length, 1], segments int32 [batch, length] (0: padding), and
  of every task `TASK/targets` int32 and `TASK/weights` f32 [batch, length]. What is longer than `length` is cut in
  pieces. Order, `once` and resumption are those of `pipeline.Source`.
  """
  del model
  if not sentences or batch < 1 or length < 1:
    raise UserError(
      f'{len(sentences)} sentences, batch={batch}, length={length}: 1 or more of each'
    )
  names = tuple(sentences[0].tags)
  for one in sentences:
    wrong = [name for name, ids in one.tags.items() if len(ids) != len(one.words)]
    if tuple(one.tags) != names or wrong:
      raise UserError(
        f'{" ".join(one.words)!r} needs one tag a word of the tasks {", ".join(names)}'
      )
  pieces = [piece for one in sentences for piece in _cut(one, length)]

  def write(rows: Sequence[Iterator], size: int) -> dict[str, np.ndarray]:
    shape = (size, length)
    made = dict(inputs=np.zeros((*shape, 1), np.int32), segments=np.zeros(shape, np.int32))
    for name in names:
      made[f'{name}/targets'] = np.zeros(shape, np.int32)
      made[f'{name}/weights'] = np.zeros(shape, np.float32)
    for row, told in enumerate(rows):
      one = next(told)[2]
      n = len(one.words)
      made['inputs'][row, :n, 0] = known.ids(one.words)
      made['segments'][row, :n] = 1
      for name in names:
        made[f'{name}/targets'][row, :n] = one.tags[name]
        made[f'{name}/weights'][row, :n] = 1
    return made

  opened = [examples.listed(pieces)]
  order = pipeline.endless_order(opened, (1.0,), seed, shuffle)

  def block(chunks: Any) -> pipeline.Block:
    return pipeline.Block(len(chunks.sizes), lambda r: iter([(0, 0, chunks.get(r))]))

  process = pipeline.processes(None, None)
  every = lambda: (block(*units) for units in pipeline.one_pass(opened))
  return pipeline.Source(
    known, batch, length, process, None, write, lambda j: block(*order(j)), every
  )


def _cut(one: Sentence, length: int) -> Iterator[Sentence]:
  for start in range(0, len(one.words), length):
    part = slice(start, start + length)
    yield Sentence(one.words[part], {name: ids[part] for name, ids in one.tags.items()})


def _case(word: str) -> int:
  letters = [c for c in word if c.isalpha()]
  if not any(c.isupper() for c in letters):
    return 0
  if all(c.isupper() for c in letters) and len(letters) > 1:
    return 2
  return 1 if word[0].isupper() and not any(c.isupper() for c in letters[1:]) else 3


def _mark(marks: str) -> int:
  if not marks:
    return 0
  return MARKS.index(marks[0]) if marks[0] in MARKS else len(MARKS) - 1
