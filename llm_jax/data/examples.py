r"""Instruction data as a source: conversations with weights on what the assistant says, packed or padded, mixed, held
out.

    task = use(examples.task, sets=(use(examples.conversations, path='alpaca_data.json'),), vocab=...)
    source = use(examples.make, task=task, batch=8, length=512)

A causal decoder reads whole conversations, with the loss on every answer at once (Vicuna); a prefix decoder sees the
first prompt in both directions; for an encoder-decoder every answer is an example of its own, its prompt in the
encoder. Order, packing and resumption are those of `pipeline.py`. All is read and checked before training starts.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import formats, pipeline, readers, records, templates
from llm_jax.data import vocab as vocab_lib
from llm_jax.data.formats import Conversation


class Set(NamedTuple):
  """One kind of data. size: training examples. texts() -> what a vocabulary may be trained on.

  open(vocab, split, layout, seed) -> a Reader whose chunks are `batch.Example`s. templates: the chat templates of its
  conversations, None for the vocabulary's own; plain text has none.
  """

  name: str
  size: int
  texts: Callable[[], Iterator[str]]
  open: Callable[[Any, str, batch_lib.Layout, int], readers.Reader]
  templates: tuple[str | None, ...] = ()


class Task(NamedTuple):
  """sets: what to read; rates: how many examples of each per example drawn."""

  sets: tuple[Set, ...]
  rates: tuple[float, ...]
  vocab: Any


def conversations(
  *,
  path: str | tuple,
  format: Callable = formats.alpaca,
  template: str | None = None,
  heldout: float = 0.1,
  prepare: tuple = (),
  overlong: Callable | None = None,
  left_out: float = 0.0,
  bad: int = 0,
  columns: tuple = (),
  name: str | None = None,
) -> Set:
  """The conversations in local files.

  path, columns: see `records.read`. format: from `formats`. template: a name in `templates.ALL`, None for the
  tokenizer's own. heldout: share of the prompts, drawn by their hash, that is the validation split, so that no prompt
  is in both. prepare: functions conversation -> conversation, in order. overlong: what is tried of a conversation that
  does not fit, `trailing_turns` (the default) or `whole`. left_out: the share of conversations of which nothing may
  fit. bad: how many records may be malformed. More of either is an error that names the first; what is left out is
  counted on stderr.
  """
  program, shorter = templates.named(template), overlong or trailing_turns
  found = parsed(path, format, bad, columns)
  for change in prepare:
    found = [change(one) for one in found]
  parts = dict(zip(('train', 'validation'), held_out(found, heldout), strict=True))
  title = name or (path if isinstance(path, str) else path[0])

  def open_(vocab: Any, split: str, layout: batch_lib.Layout, seed: int) -> readers.Reader:
    del seed
    chosen = of_split(parts, split, title)
    made = fitted(vocab, chosen, program, layout, shorter, left_out, title)
    return listed(made)

  def texts() -> Iterator[str]:
    return ('\n'.join(m['content'] for m in one.messages) + '\n' for one in parts['train'])

  return Set(title, len(parts['train']), texts, open_, (program,))


def instructions(
  *,
  template: str | None = None,
  heldout: float = 0.1,
  prepare: tuple = (),
  left_out: float = 0.0,
  name: str = 'instructions',
) -> Set:
  """1,100 short English tasks with an answer, bundled. The arguments: see `conversations`."""
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  told = dict(template=template, heldout=heldout, prepare=prepare, left_out=left_out, name=name)
  return conversations(path=path, format=formats.alpaca, **told)


def seeds(
  *, template: str | None = None, heldout: float = 0.1, left_out: float = 0.0, name: str = 'seeds'
) -> Set:
  """The 175 tasks that Self-Instruct starts from, bundled. The arguments: see `conversations`."""
  path = records.bundled('self_instruct/seed_tasks.jsonl.gz')
  told = dict(template=template, heldout=heldout, left_out=left_out, name=name)
  return conversations(path=path, format=formats.self_instruct, **told)


def identity(
  *,
  assistant: str = 'llm_jax',
  developer: str = 'its user',
  template: str | None = None,
  heldout: float = 0.1,
  left_out: float = 0.0,
  name: str = 'identity',
) -> Set:
  """500 short conversations in which an assistant says its name and who developed it (section 5.1.4 of the survey),
  bundled. The arguments: see `conversations`."""
  path = records.bundled('identity/dummy_conversation.json.gz')
  names = dict(Vicuna=assistant)
  names['Large Model Systems Organization (LMSYS)'] = developer
  told = dict(template=template, heldout=heldout, left_out=left_out, name=name)
  change = functools.partial(formats.renamed, names=names)
  return conversations(path=path, format=formats.sharegpt, prepare=(change,), **told)


def text(*, task: Callable, size: int | None = None) -> Set:
  """Plain text beside the instructions, every token predicted: OPT-IML mixes in 5 % (Iyer et al. 2022,
  arXiv:2212.12017), GLM-130B does the reverse. An example is a row's worth of a document.

  task: one of `tasks`, with `vocab=None`. size: how many examples it counts for in a proportional mixture; needed
  there.
  """
  made = task()

  def open_(vocab: Any, split: str, layout: batch_lib.Layout, seed: int) -> readers.Reader:
    if layout.kind == 'encoder_decoder':
      raise UserError('plain text gives an encoder nothing to read: mix it into a decoder')
    cut = readers.Cut(layout.length, False, split == 'train', seed)
    opened = [readers.mapped(corpus, vocab, split, cut) for corpus in made.corpora]
    if len(opened) > 1:
      raise UserError(f'{made.name} is a mixture: name its parts as sets of their own')
    return opened[0]._replace(chunks=lambda *where: _plain(opened[0].chunks(*where), vocab.eos))

  def texts() -> Iterator[str]:
    return (one for corpus in made.corpora for one in corpus.texts('train'))

  return Set(made.name, size or 0, texts, open_)


def task(
  *,
  sets: tuple,
  rates: tuple | None = None,
  maximum: int | None = None,
  temperature: float = 1.0,
  vocab: Callable,
) -> Task:
  """Sets in one vocabulary, which keeps the chat template that they have in common.

  rates: how many examples of each per example drawn; None: in proportion to their sizes, see `proportional`.
  """
  made = tuple(one() for one in sets)
  if not made or (rates is not None and (len(rates) != len(made) or min(rates) <= 0)):
    raise UserError(
      f'a task needs sets and one positive rate for each, got {len(made)} sets and rates={rates}: set task.rates'
    )
  if rates is None:
    unknown = [one.name for one in made if not one.size]
    if unknown and len(made) > 1:
      raise UserError(
        f'nobody said how many examples {unknown[0]} has: set its size, or task.rates'
      )
    sizes = [one.size or 1 for one in made]
    rates = proportional(sizes, maximum=maximum, temperature=temperature)

  def read(limit: int) -> Iterator[str]:
    for one in made:
      room = limit // len(made)
      for said in one.texts():
        yield said
        room -= len(said)
        if room <= 0:
          break

  mark = hashlib.sha256(json.dumps([said for one in made for said in one.texts()]).encode())
  words = vocab(vocab_lib.Text('instructions', mark.hexdigest(), read))
  used = [template for one in made for template in one.templates]
  return Task(made, tuple(rates), templates.learned(words, used))


def proportional(
  sizes: Sequence[int], *, maximum: int | None = None, temperature: float = 1.0
) -> tuple[float, ...]:
  """Examples-proportional mixing, min(e, K)^(1/T): K caps the large sets, T > 1 evens them out (Raffel et al. 2019,
  arXiv:1910.10683, section 3.5.2; FLAN: K = 30,000)."""
  if temperature <= 0 or (maximum is not None and maximum < 1):
    raise UserError(f'maximum={maximum} and temperature={temperature} must be positive')
  return tuple(float(min(n, maximum or n)) ** (1 / temperature) for n in sizes)


def make(
  model: Any,
  *,
  task: Callable,
  split: str = 'train',
  batch: int = 8,
  length: int = 512,
  encoder_length: int | None = None,
  rows: Callable = batch_lib.pack,
  shuffle: bool = True,
  seed: int = 0,
  ramp: Callable | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> pipeline.Source:
  """The source of `batch` global rows of `length` slots for a model.

  rows: `batch.pack` or `batch.pad`. The others: see `pipeline.make`. Raises `UserError` for whatever does not fit
  together, with file and line where it is in the data, before anything is compiled.
  """
  index, count = pipeline.processes(process_index, process_count)
  card = model.card
  pipeline.check_sizes(card, batch, length, encoder_length, count)
  made, filler = task(), rows()
  if filler.windows:
    raise UserError('examples are not windows of a stream: set rows to batch.pack or batch.pad')
  pipeline.check_vocab(card, made.vocab)
  layout = pipeline.layout_of(card.kind, length, encoder_length, filler, made.vocab)
  opened = [one.open(made.vocab, split, layout, seed) for one in made.sets]
  plan = functools.partial(_plan, layout=layout, plan=filler.plan)
  order = pipeline.endless_order(opened, made.rates, seed, shuffle)
  return pipeline.Source(
    made.vocab,
    batch,
    length,
    (index, count),
    ramp,
    functools.partial(pipeline.fill, layout),
    lambda j: plan(*order(j)),
    lambda: (plan(*units) for units in pipeline.one_pass(opened)),
  )


def parsed(path: str | tuple, format: Callable, bad: int, columns: tuple = ()) -> list[Any]:
  """What `format` finds in the records of local files, of which at most `bad` may be malformed."""
  found, wrong = [], []
  for record in records.read(path, columns=columns):
    try:
      found += format(record)
    except UserError as e:
      wrong.append(e)
      if len(wrong) > bad:
        allowed = f' ({bad} malformed records were allowed, and left out)' if bad else ''
        raise UserError(f'{e}{allowed}') from e
  if wrong:
    _say(f'{len(wrong)} malformed records of {path} are left out; the first: {wrong[0]}')
  if not found:
    raise UserError(f'{path} holds nothing that this format finds: choose another')
  return found


def held_out(found: Sequence[Any], share: float) -> tuple[list, list]:
  """(training, validation): all with the same first prompt are on one side, decided by its hash.

  found: with `messages`, or with `prompt` where those come before the answers.
  """
  if not 0 <= share < 1:
    raise UserError(f'heldout={share} is a share: choose 0 <= heldout < 1')
  parts: tuple[list, list] = ([], [])
  for one in found:
    turns = one.messages if hasattr(one, 'messages') else one.prompt
    asked = next(m['content'] for m in turns if m['role'] == 'user')
    mark = int(hashlib.sha256(' '.join(asked.split()).encode()).hexdigest()[:8], 16)
    parts[mark < share * 2**32].append(one)
  return parts


def trailing_turns(messages: Sequence[dict]) -> Iterator[Sequence[dict]]:
  """Without the last turn, without the last two, and so on: every beginning that ends with an answer."""
  return (
    messages[:n] for n in range(len(messages), 0, -1) if messages[n - 1]['role'] == 'assistant'
  )


def whole(messages: Sequence[dict]) -> Iterator[Sequence[dict]]:
  """All or nothing."""
  return iter((messages,))


def fitted(
  vocab: Any,
  found: Iterable[Conversation],
  template: str | None,
  layout: batch_lib.Layout,
  shorter: Callable,
  left_out: float,
  name: str,
) -> list[batch_lib.Example]:
  """The examples of conversations, each as much as fits of what `shorter` proposes. See `conversations`."""
  made, cut, lost, total = [], 0, [], 0
  for one in found:
    total += 1
    if not any(m['role'] == 'assistant' for m in one.messages):
      raise UserError(f'{one.where}: the conversation has no answer to learn')
    tried: list[batch_lib.Example] = []
    for messages in shorter(one.messages):
      encoded = templates.encode(vocab, messages, template, first=one.first)
      parts = of(encoded, layout, vocab, one.where) if len(messages) > one.first else []
      tried = parts or tried
      if parts and all(fits(layout, part) for part in parts):
        cut += len(messages) < len(one.messages)
        made += parts
        break
    else:
      lost.append(f'{one.where}: {why(layout, tried[0])}')
  count_lost(lost, total, left_out, name)
  if cut:
    _say(f'{name}: {cut} of {total} conversations are too long and have lost their last turns')
  return made


def count_lost(lost: Sequence[str], total: int, left_out: float, name: str) -> None:
  """Says how many examples are left out because they do not fit; raises `UserError` where that is more than the share
  `left_out`. lost: what is wrong with each of them."""
  if len(lost) > left_out * total:
    raise UserError(
      f'{lost[0]}; {len(lost)} of {total} do not fit: raise length, or left_out={left_out} to do without them'
    )
  if lost:
    _say(f'{name}: {len(lost)} of {total} are too long and left out; the first: {lost[0]}')


def of(
  encoded: templates.Encoded, layout: batch_lib.Layout, vocab: Any, where: str
) -> list[batch_lib.Example]:
  """A conversation as examples: one, or for an encoder-decoder one for each answer, with all before it given."""
  ids, weights = encoded
  learned = np.flatnonzero(weights[1:] > 0) + 1
  if not len(learned):
    raise UserError(f'{where}: the template shows no answer to learn')
  if layout.kind != 'encoder_decoder':
    at = int(learned[0])
    return [batch_lib.Example(ids[1:at], ids[at:], weights[at:], int(ids[0]))]
  starts = learned[np.diff(learned, prepend=-1) > 1]
  stops = learned[np.diff(learned, append=len(ids) + 1) > 1] + 1
  skip = int(vocab.start is not None and ids[0] == vocab.start)  # the encoder reads no start
  return [batch_lib.Example(ids[skip:a], ids[a:b]) for a, b in zip(starts, stops, strict=True)]


def fits(layout: batch_lib.Layout, example: batch_lib.Example) -> bool:
  """Whether an example has room in a row."""
  own, encoder = _slots(layout, [example])
  return bool(own[0] <= layout.length and encoder[0] <= layout.encoder_length)


def listed(items: Sequence[Any]) -> readers.Reader:
  """A reader of what is in memory: one unit, one chunk, for each."""

  def chunks(units: np.ndarray, epochs: np.ndarray) -> readers.Chunks:
    del epochs
    n = len(units)
    return readers.Chunks(
      np.ones(n, np.int64), np.ones(n, bool), np.arange(n), lambda i: items[int(units[i])]
    )

  return readers.Reader(len(items), int(np.clip(len(items), 16, 2048)), chunks)


def _plan(chunks: readers.Chunks, *, layout: batch_lib.Layout, plan: Callable) -> pipeline.Block:
  examples = [chunks.get(i) for i in range(len(chunks.sizes))]
  slots = _slots(layout, examples)
  return pipeline.block_of(plan(*slots, layout.length, layout.encoder_length), examples.__getitem__)


def _slots(layout: batch_lib.Layout, examples: Sequence[batch_lib.Example]) -> tuple:
  lengths = [(len(e.inputs), len(e.targets)) for e in examples]
  return batch_lib.slots(layout, *np.array(lengths, np.int64).reshape(-1, 2).T)


def _plain(chunks: readers.Chunks, eos: int) -> readers.Chunks:
  """Chunks of text as examples without a prompt."""
  none = np.zeros(0, np.int32)

  def get(i: int) -> batch_lib.Example:
    end = [eos] if chunks.ends[i] else []
    return batch_lib.Example(none, np.append(chunks.get(i), end).astype(np.int32))

  return chunks._replace(get=get)


def why(layout: batch_lib.Layout, example: batch_lib.Example) -> str:
  """How an example is too long, in words."""
  inputs, targets = len(example.inputs), len(example.targets)
  if layout.kind == 'encoder_decoder':
    return f'a prompt of {inputs} tokens and an answer of {targets}, for {layout.encoder_length} and {layout.length}'
  if inputs >= layout.length:
    return f'the prompt alone has {inputs + 1} tokens, the context {layout.length}'
  return f'prompt and answer have {inputs + targets} tokens, the context {layout.length}'


def of_split(parts: dict[str, list], split: str, name: str) -> list:
  """What is in a split, which must exist and hold something."""
  if split not in parts:
    raise UserError(f'there is no split {split!r}; known: {", ".join(parts)}')
  if not parts[split]:
    raise UserError(f'the {split} split of {name} is empty: change heldout or give it more files')
  return parts[split]


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
