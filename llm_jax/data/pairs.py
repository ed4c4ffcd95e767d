r"""Preference data as sources: pairs, rankings of K answers, single answers marked good or bad, and bare prompts.

    pairs      chosen/* rejected/*          the arrays of `batch.py`, [batch, length] each, `weights` 1 on the
                                            answer only
               margin, chance f32 [batch]   where all the data have them
    packed     inputs targets weights ...   several comparisons to a row, each reading its prompt once (`branches.py`)
               compared, margin, chance     [batch, most]
    rankings   answer0/* ... answerK-1/*    the best first; ranked [batch, K] bool: which of them exist
    unpaired   inputs targets weights ...   one answer per row; desirable [batch] bool
    prompts    prompts [batch, length], lengths [batch], index [batch] int32; `source.prompts[index]` has the rest

One comparison per row, padded on the right, but for `packed`. On the rows that fill up the last batch of `once()` all
weights are 0. Order, resumption, and the split over processes are those of `pipeline.py`; all is read and checked at
the start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import branches, examples, pipeline, preferences, records, templates
from llm_jax.data.preferences import Messages, Pair, Ranking

SIDES = ('chosen', 'rejected')


class Data(NamedTuple):
  """splits: 'train' and 'validation' -> comparisons or conversations. template: a Jinja program, None for the
  tokenizer's."""

  name: str
  splits: dict[str, list]
  template: str | None
  vocab: Any


class Prompt(NamedTuple):
  """ids: what the model answers, to be generated from with `start=None`. text: the last message of the user. told:
  other fields of the record, for a reward to look at."""

  ids: list[int]
  text: str
  messages: Messages
  told: dict[str, Any]
  where: str


def files(
  *,
  path: str | tuple,
  format: Callable = preferences.hh_rlhf,
  template: str | None = None,
  heldout: float = 0.1,
  bad: int = 0,
  columns: tuple = (),
  vocab: Callable,
  name: str | None = None,
) -> Data:
  """Comparisons (or, for `prompts`, conversations) in local files.

  format: from `preferences`, for prompts also from `formats`. The others: see `examples.conversations`. Raises
  `UserError` where two comparisons have one id.
  """
  found = examples.parsed(path, format, bad, columns)
  preferences.check_unique(one for one in found if isinstance(one, Pair | Ranking))
  parts = dict(zip(('train', 'validation'), examples.held_out(found, heldout), strict=True))
  title = name or (path if isinstance(path, str) else path[0])
  program = templates.named(template)
  return Data(title, parts, program, templates.learned(vocab(None), [program]))


def hh_harmless(
  *, template: str | None = None, heldout: float = 0.15, vocab: Callable, name: str = 'hh_harmless'
) -> Data:
  """The harmless part of HH-RLHF's test split, bundled: 2,308 pairs, without four that have an empty answer.

  Content warning: people tried to make an assistant say harmful things (see SOURCE.md beside the file).
  """
  path = records.bundled('hh_harmless/harmless-base_test.jsonl.gz')
  found = dict(path=path, format=preferences.hh_rlhf, bad=4, name=name)
  return files(template=template, heldout=heldout, vocab=vocab, **found)


def politeness(
  *, template: str | None = None, heldout: float = 0.1, vocab: Callable, name: str = 'politeness'
) -> Data:
  """The bundled instructions, each with a polite answer (chosen) and an impolite one: 1,094 pairs, without six where
  the two are the same."""
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  found = dict(path=path, format=preferences.alpaca, bad=6, name=name)
  return files(template=template, heldout=heldout, vocab=vocab, **found)


def pairs(
  model: Any,
  *,
  data: Callable,
  split: str = 'train',
  batch: int = 8,
  length: int = 512,
  encoder_length: int | None = None,
  left_out: float = 0.0,
  trim: int | None = None,
  shuffle: bool = True,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """Pairs, one to a row; a ranking gives all its pairs. left_out: the share of comparisons that may be too long; they
  are left out and counted. trim: cut each batch to its longest text, rounded up to a multiple of this, which gives at
  most length / trim shapes to compile; for one process. The others: see `pipeline.make`."""
  made = data()
  comparisons, told = _compared(made, split)

  def row(one: Pair, layout: batch_lib.Layout) -> dict[str, Any]:
    sides = {
      side: _laid(made, one.prompt, answer, layout, one.where)
      for side, answer in zip(SIDES, (one.chosen, one.rejected), strict=True)
    }
    return sides | {name: np.float32(getattr(one, name)) for name in told}

  sizes = (batch, length, encoder_length, left_out, shuffle, seed, process_index, process_count)
  return _source(model, made, comparisons, row, SIDES, told, *sizes, trim=trim)


def packed(
  model: Any,
  *,
  data: Callable,
  split: str = 'train',
  batch: int = 8,
  length: int = 512,
  left_out: float = 0.0,
  shuffle: bool = True,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """The same pairs, several to a row by best fit, each prompt read once: see `branches.py`. How many are in a batch
  varies, its shape does not. length: a row holds at least the prompt and both answers of the longest pair that is not
  left out. The others: see `pairs`. Raises `UserError` for a model that cannot read such rows."""
  made = data()
  branches.check(model.card)
  comparisons, told = _compared(made, split)
  layout = pipeline.layout_of(model.card.kind, length, None, batch_lib.pack(), made.vocab)
  found, lost = [], []
  for one in comparisons:
    texts = [_laid(made, one.prompt, a, layout, one.where) for a in (one.chosen, one.rejected)]
    laid = branches.lay(texts, layout)
    if len(laid['inputs']) > length:
      size = len(laid['inputs'])
      lost.append(f'{one.where}: prompt and both answers have {size} tokens, the row {length}')
    else:
      found.append((laid, {name: getattr(one, name) for name in told}))
  examples.count_lost(lost, len(comparisons), left_out, made.name)
  most = branches.most(np.array([len(laid['inputs']) for laid, _ in found]), length)

  def block(chunks: Any) -> pipeline.Block:
    items = [chunks.get(i) for i in range(len(chunks.sizes))]
    sizes = np.array([len(laid['inputs']) for laid, _ in items])
    plan = batch_lib.best_fit(sizes, np.zeros_like(sizes), length, 0)
    return pipeline.block_of(plan, items.__getitem__)

  def write(rows: Sequence[Iterator], size: int) -> dict[str, np.ndarray]:
    arrays = branches.empty(layout, size, most)
    arrays |= {name: np.zeros((size, most), np.float32) for name in told}
    for i, row in enumerate(rows):
      for number, (at, _, (laid, values)) in enumerate(row, 1):
        branches.put(arrays, i, number, at, laid)
        for name, value in values.items():
          arrays[name][i, number - 1] = value
    return arrays

  sizes = (batch, length, None, shuffle, seed, process_index, process_count)
  return _over(model, made, found, write, *sizes, block=block)


def rankings(
  model: Any,
  *,
  data: Callable,
  answers: int = 4,
  split: str = 'train',
  batch: int = 8,
  length: int = 512,
  encoder_length: int | None = None,
  left_out: float = 0.0,
  shuffle: bool = True,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """Rankings, all answers to a prompt in one row (InstructGPT), at most `answers` of them: the best, the worst, and
  those at equal distances between. A pair is a ranking of two. The others: see `pairs`."""
  if answers < 2:
    raise UserError(f'answers={answers}: a ranking has at least 2')
  made = data()
  comparisons = [
    preferences.ranking_of(one) if isinstance(one, Pair) else one
    for one in examples.of_split(made.splits, split, made.name)
  ]
  names = tuple(f'answer{k}' for k in range(answers))

  def row(one: Ranking, layout: batch_lib.Layout) -> dict[str, Any]:
    count = min(answers, len(one.answers))
    chosen = [round(x) for x in np.linspace(0, len(one.answers) - 1, count)]
    texts = [_laid(made, one.prompt, one.answers[i], layout, one.where) for i in chosen]
    return dict(zip(names, texts, strict=False)) | dict(ranked=np.arange(answers) < count)

  told = dict(ranked=np.zeros(answers, bool))
  sizes = (batch, length, encoder_length, left_out, shuffle, seed, process_index, process_count)
  return _source(model, made, comparisons, row, names, told, *sizes)


def unpaired(
  model: Any,
  *,
  data: Callable,
  split: str = 'train',
  batch: int = 8,
  length: int = 512,
  encoder_length: int | None = None,
  left_out: float = 0.0,
  shuffle: bool = True,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """Both answers of every pair on their own, marked as desirable or not (KTO). The others: see `pairs`."""
  made = data()
  comparisons = [
    (one, good)
    for ranking in examples.of_split(made.splits, split, made.name)
    for one in _pairs(ranking)
    for good in (True, False)
  ]

  def row(one: tuple[Pair, bool], layout: batch_lib.Layout) -> dict[str, Any]:
    pair, good = one
    said = pair.chosen if good else pair.rejected
    return {'': _laid(made, pair.prompt, said, layout, pair.where), 'desirable': np.bool_(good)}

  told = dict(desirable=np.bool_(False))
  sizes = (batch, length, encoder_length, left_out, shuffle, seed, process_index, process_count)
  return _source(model, made, comparisons, row, ('',), told, *sizes)


def prompts(
  model: Any,
  *,
  data: Callable,
  split: str = 'train',
  batch: int = 8,
  length: int = 256,
  encoder_length: int | None = None,
  left_out: float = 0.0,
  shuffle: bool = True,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """What is asked, without the answers: of a conversation all up to its last message of the user. length: of the
  longest prompt. The source has `prompts`, a tuple of `Prompt`, beside `vocab`. The others: see `pairs`."""
  made = data()
  found, lost = [], []
  for one in examples.of_split(made.splits, split, made.name):
    turns = list(one.prompt if hasattr(one, 'prompt') else one.messages)
    while turns and turns[-1]['role'] != 'user':
      turns.pop()
    ids = templates.prompt(made.vocab, turns, made.template)
    if len(ids) > length:
      lost.append(f'{one.where}: the prompt has {len(ids)} tokens, the context {length}')
      continue
    found.append(Prompt(ids, turns[-1]['content'], turns, getattr(one, 'told', {}), one.where))
  examples.count_lost(lost, len(lost) + len(found), left_out, made.name)

  def write(rows: Sequence[Iterator], size: int) -> dict[str, np.ndarray]:
    arrays = dict(prompts=np.zeros((size, length), np.int32))
    arrays |= {name: np.zeros(size, np.int32) for name in ('lengths', 'index')}
    for i, row in enumerate(rows):
      _, _, number = next(row)
      ids = found[number].ids
      arrays['prompts'][i, : len(ids)] = ids
      arrays['lengths'][i], arrays['index'][i] = len(ids), number
    return arrays

  sizes = (batch, length, encoder_length, shuffle, seed, process_index, process_count)
  source = _over(model, made, range(len(found)), write, *sizes)
  source.prompts = tuple(found)
  return source


def empty(
  layout: batch_lib.Layout, names: Sequence[str], told: Mapping[str, Any], size: int
) -> dict[str, np.ndarray]:
  """Arrays for `size` rows with the texts `names`, all padding. told: name -> the value of one row of padding."""
  made = {_key(side, k): v for side in names for k, v in batch_lib.empty(layout, size).items()}
  return made | {
    k: np.broadcast_to(v, (size, *np.shape(v))).astype(np.asarray(v).dtype) for k, v in told.items()
  }


def _source(
  model,
  made,
  comparisons,
  row,
  names,
  told,
  batch,
  length,
  encoder_length,
  left_out,
  *rest,
  trim=None,
) -> pipeline.Source:
  if trim is not None and (trim < 1 or pipeline.processes(*rest[-2:])[1] > 1):
    raise UserError(
      f'trim={trim}: choose a positive multiple, and None with several processes, whose batches would differ in length'
    )
  layout = pipeline.layout_of(model.card.kind, length, encoder_length, batch_lib.pad(), made.vocab)
  found, lost = [], []
  for one in comparisons:
    laid = row(one, layout)
    texts = [value for value in laid.values() if isinstance(value, batch_lib.Example)]
    long = [text for text in texts if not examples.fits(layout, text)]
    if long:
      where = one[0].where if type(one) is tuple else one.where
      lost.append(f'{where}: {examples.why(layout, long[0])}')
    else:
      found.append(laid)
  examples.count_lost(lost, len(comparisons), left_out, made.name)

  def write(rows: Sequence[Iterator], size: int) -> dict[str, np.ndarray]:
    arrays = empty(layout, names, told, size)
    for i, row in enumerate(rows):
      _, _, laid = next(row)
      for name, value in laid.items():
        if isinstance(value, batch_lib.Example):
          part = {k: arrays[_key(name, k)] for k in batch_lib.empty(layout, 0)}
          batch_lib.put(part, layout, i, 1, 0, 0, value)
        else:
          arrays[name][i] = value
    return arrays if trim is None else _trimmed(arrays, names, trim, length)

  sizes = (batch, length, encoder_length, *rest)
  return _over(model, made, found, write, *sizes, texts=len(names))


def _compared(made: Data, split: str) -> tuple[list[Pair], dict[str, np.float32]]:
  """(the pairs of a split, what all of them tell besides, as rows of padding have it)."""
  found = [p for one in examples.of_split(made.splits, split, made.name) for p in _pairs(one)]
  known = (n for n in ('margin', 'chance') if all(getattr(one, n) is not None for one in found))
  return found, {name: np.float32(0) for name in known}


def _apart(chunks: Any) -> pipeline.Block:
  """One item per row."""
  return pipeline.Block(len(chunks.sizes), lambda r: iter([(0, 0, chunks.get(r))]))


def _over(
  model,
  made,
  items,
  write,
  batch,
  length,
  encoder_length,
  shuffle,
  seed,
  *process,
  texts=1,
  block=_apart,
) -> pipeline.Source:
  """The source of items laid in rows by `block`; a row holds `texts` of `length` each."""
  process = pipeline.processes(*process)
  pipeline.check_sizes(model.card, batch, length, encoder_length, process[1])
  pipeline.check_vocab(model.card, made.vocab)
  opened = [examples.listed(items)]
  order = pipeline.endless_order(opened, (1.0,), seed, shuffle)

  return pipeline.Source(
    made.vocab,
    batch,
    length,
    process,
    None,
    write,
    lambda j: block(*order(j)),
    lambda: (block(*units) for units in pipeline.one_pass(opened)),
    texts,
  )


def _trimmed(
  arrays: dict[str, np.ndarray], names: Sequence[str], multiple: int, length: int
) -> dict[str, np.ndarray]:
  """The decoder's arrays without the slots that nobody uses, but for a multiple."""
  used = max(int((arrays[_key(side, 'segments')] > 0).sum(1).max()) for side in names)
  size = min(length, -(-max(used, 1) // multiple) * multiple)
  ours = lambda name, x: x.ndim == 2 and x.shape[1] == length and 'encoder/' not in name
  return {name: x[:, :size] if ours(name, x) else x for name, x in arrays.items()}


def _pairs(one: Pair | Ranking) -> list[Pair]:
  return [one] if isinstance(one, Pair) else preferences.pairs_of(one)


def _laid(
  made: Data, prompt: Messages, answer: Messages, layout: batch_lib.Layout, where: str
) -> batch_lib.Example:
  """A prompt and an answer as one example. For an encoder-decoder the answer is all after the prompt."""
  encoded = templates.encode(made.vocab, [*prompt, *answer], made.template, first=len(prompt))
  return examples.of(encoded, layout, made.vocab, where)[-1]


def _key(side: str, name: str) -> str:
  return f'{side}/{name}' if side else name
