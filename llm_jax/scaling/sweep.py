"""Sweeps: many trainings that differ in a few arguments, each a cell with a folder of its own.

`DIR/cells/NAME` is what `llm-jax train` makes of the cell's config, with files of ours: `lock`, held (flock) by the
process that trains the cell and freed by the system when that dies; `begun`, a byte for every attempt that nothing came
of yet; `result.json`, the cell's line of the table; `failed.json`, why there is none. A cell is done when it has a
result, whoever trained it. `DIR/results.jsonl` is made anew of all results each time there is one more, so it can hold
no cell twice. The folder may be shared by machines if their file system passes locks on (NFS does since version 4);
where it does not, give every machine its own index.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.core import files, metrics
from llm_jax.core.config import build, to_json
from llm_jax.core.errors import UserError
from llm_jax.model import count

TABLE = 'results.jsonl'
CONFIG = 'sweep.json'  # the arguments that named the config of the sweep
HELDOUT = 'heldout/nats_per_token'
DEATHS = 3  # a cell whose process has died so often without a word has failed
_WAIT = 0.5  # seconds between looks at cells that another process trains


class Cell(NamedTuple):
  """One training. arguments: those that tell it from the others; recipe: a config of `llm-jax train`."""

  name: str
  arguments: dict[str, Any]
  recipe: Any


class Sweep(NamedTuple):
  """What `get_config` of a sweep returns. optimal: (parameters, tokens, devices) -> the config of a model of that size,
  for `llm-jax fit --budget`; None where sizes are not what is swept."""

  cells: tuple[Cell, ...]
  optimal: Callable[..., Any] | None = None


def grid(**axes: Iterable) -> list[dict[str, Any]]:
  """Every combination of the values, the last axis fastest: `grid(peak=(1, 2), width=(3, 4))` has 4 points."""
  return [
    dict(zip(axes, values, strict=True)) for values in itertools.product(*map(tuple, axes.values()))
  ]


def cells(
  make: Callable[..., Any], points: Sequence[Mapping[str, Any]], optimal: Callable | None = None
) -> Sweep:
  """The sweep of `make(**point)`, a config of `llm-jax train` for each point; the point names the cell.

  The config has to evaluate `hooks.heldout`, whose nats per token are the cell's loss.
  """
  found = tuple(Cell(name_of(point), dict(point), make(**point)) for point in points)
  names = [cell.name for cell in found]
  twice = next((name for name in names if names.count(name) > 1), None)
  if not found or twice:
    raise UserError(
      f'two cells are called {twice}: give them arguments that differ'
      if twice
      else 'the sweep has no cells: give each list of its grid a value'
    )
  without = next((c.name for c in found if 'heldout' not in c.recipe.hooks), None)
  if without:
    raise UserError(
      f'the cell {without} has no loss: add hooks.heldout, an evaluation of held-out data'
    )
  return Sweep(found, optimal)


def name_of(point: Mapping[str, Any]) -> str:
  """The arguments as the name of a folder: `budget=1e+12,width=64`."""
  told = lambda x: f'{x:.6g}' if isinstance(x, float) else str(x)
  text = lambda x: '-'.join(map(told, x)) if isinstance(x, tuple | list) else told(x)
  return ','.join(f'{key}={text(value)}' for key, value in point.items()).replace('/', '_')


def flops(cell: Cell) -> float:
  """FLOPs of training a cell: forward and backward pass of every token, as `model/count.py` counts."""
  recipe = cell.recipe
  batch, length, encoder = _sizes(recipe.source)
  card = build(recipe.model)().card
  per_token = count.training_flops(card, length, (encoder or length) if card.encoder else 0)
  return per_token * recipe.steps * batch * length


def _sizes(source: Any) -> tuple[int, int, int | None]:
  """(batch, length, encoder length) of the innermost source that says them."""
  while 'source' in source:
    source = source.source
  if 'batch' not in source or 'length' not in source:
    raise UserError('the source of a cell has to say its batch and length, or FLOPs are not known')
  return source.batch, source.length, source.get('encoder_length')


# --- one folder, any number of processes ---------------------------------------------------------------


def place(folder: str, cell: Cell) -> str:
  """The folder of a cell."""
  return os.path.join(folder, 'cells', cell.name)


def state(folder: str, cell: Cell) -> str:
  """'done', 'failed', 'running' (by any process) or 'waiting'."""
  known = ended(folder, cell)
  lock = os.path.join(place(folder, cell), 'lock')
  if known or not os.path.exists(lock):
    return known or 'waiting'
  with open(lock, encoding='utf-8') as f:
    return 'waiting' if _lock(f, fcntl.LOCK_SH) else 'running'


def ended(folder: str, cell: Cell) -> str | None:
  """'done' or 'failed'; None where neither is the case yet."""
  found = lambda file: os.path.exists(os.path.join(place(folder, cell), file))
  return 'done' if found('result.json') else 'failed' if found('failed.json') else None


@contextlib.contextmanager
def claim(where: str) -> Iterator[bool]:
  """Whether the cell in this folder belongs to us for as long as the `with` lasts.

  The lock file stays: a lock on a file that somebody may remove can be had twice.
  """
  os.makedirs(where, exist_ok=True)
  with open(os.path.join(where, 'lock'), 'a', encoding='utf-8') as f:
    yield any(_lock(f, fcntl.LOCK_EX) or time.sleep(0.02) for _ in range(3))  # others only look


def _lock(file: Any, kind: int) -> bool:
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def work(
  folder: str, chosen: Sequence[Cell], train: Callable[[Any, str], Any], *, wait: bool = True
) -> None:
  """Trains what is neither done nor failed, each cell by one process alone; returns when nothing is left to do.

  train: (recipe, folder of the cell) -> None, resumes what is there. An exception fails the cell alone.
  wait: for cells that another process trains, to take them over if that one dies; else they are left to it.
  """
  while True:
    others = False
    for cell in chosen:
      if ended(folder, cell):
        continue
      with claim(place(folder, cell)) as mine:
        if mine and not ended(folder, cell):  # another may have finished it just before
          _attempt(folder, cell, train)
        others |= not mine
    if not (others and wait):
      return
    time.sleep(_WAIT)


def _attempt(folder: str, cell: Cell, train: Callable[[Any, str], Any]) -> None:
  """Trains the cell, which is ours, and writes what came of it."""
  where = place(folder, cell)
  same_config(where, cell)
  begun = os.path.join(where, 'begun')  # a byte for every time; there while nothing came of them
  with open(begun, 'ab') as f:
    f.write(b'.')
    deaths = f.tell() - 1
  try:
    if deaths >= DEATHS:
      raise UserError(f'its process died {deaths} times without a word; see {where}/log.txt')
    with _signals_as_they_were():
      train(cell.recipe, where)
    files.write(os.path.join(where, 'result.json'), json.dumps(measure(where, cell)))
  except (SystemExit, KeyboardInterrupt):  # stopped with its state saved
    os.remove(begun)
    raise
  except Exception as e:
    text = ' '.join(str(e).split()) or repr(e)
    told = text if isinstance(e, UserError) else f'{type(e).__name__}: {text}'
    files.write(os.path.join(where, 'failed.json'), json.dumps(dict(error=told[:500])))
  os.remove(begun)
  publish(folder)


@contextlib.contextmanager
def _signals_as_they_were() -> Iterator[None]:
  """A training that fails leaves its handlers of signals behind."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)


def same_config(where: str, cell: Cell) -> None:
  """Raises `UserError` where the folder holds a cell of this name with another config: their results must not mix."""
  path = os.path.join(where, 'config.json')
  if not os.path.exists(path):
    return
  with open(path, encoding='utf-8') as f:
    there, here = _flat(json.load(f)), _flat(json.loads(to_json(cell.recipe)))
  different = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
  if different:
    key = different[0]
    raise UserError(
      f'{where} holds another cell of this name ({key} is {there.get(key)} there, {here.get(key)} here): '
      'choose another --workdir'
    )


def _flat(values: Any, path: str = '') -> dict[str, Any]:
  inner = values.items() if isinstance(values, dict) else enumerate(values)
  found: dict[str, Any] = {}
  for key, value in inner:
    name = f'{path}.{key}'.lstrip('.')
    found |= _flat(value, name) if isinstance(value, dict | list) else {name: value}
  return found


def forgive(folder: str, chosen: Sequence[Cell]) -> int:
  """Makes failed cells wait again; returns how many."""
  forgiven = 0
  for cell in chosen:
    with claim(place(folder, cell)) as mine:
      if mine and ended(folder, cell) == 'failed':
        os.remove(os.path.join(place(folder, cell), 'failed.json'))
        forgiven += 1
  return forgiven


# --- results -------------------------------------------------------------------------------------------


def measure(where: str, cell: Cell) -> dict[str, Any]:
  """A cell's line of the table, from what its training wrote.

  cell, config (its arguments), parameters, non_embedding, tokens, flops (exact), loss (held-out nats per token at the
  end), curve [[tokens, loss], ...], seconds (of training, compilation and evaluation left out), metrics (the last value
  of each that hooks wrote).
  """
  batch, length, _ = _sizes(cell.recipe.source)
  sizes = count.parameters(build(cell.recipe.model)().card)
  lines, seconds, before = files.lines(os.path.join(where, metrics.FILE)), 0.0, 0.0
  curve, last = [], {}
  for line in lines:
    last |= {name: value for name, value in line.items() if '/' in name}
    if HELDOUT in line:
      curve.append([line['step'] * batch * length, line[HELDOUT]])
    if 'tokens_per_second' in line:
      seconds += (line['step'] - before) * batch * length / line['tokens_per_second']
    if 'tokens' in line:
      before = line['step']
  if not curve or curve[-1][1] is None:
    raise UserError('no held-out loss was measured at the end: is hooks.heldout an evaluation?')
  outside = sum(sizes[part] for part in ('embedding', 'positions', 'head'))
  return dict(
    cell=cell.name,
    config=cell.arguments,
    parameters=sum(sizes.values()),
    non_embedding=sum(sizes.values()) - outside,
    tokens=cell.recipe.steps * batch * length,
    flops=flops(cell),
    loss=curve[-1][1],
    curve=curve,
    seconds=round(seconds, 1),
    metrics=last,
  )


def publish(folder: str) -> str:
  """Makes the table anew of all results there are, least FLOPs first; returns its path."""
  os.makedirs(os.path.join(folder, 'cells'), exist_ok=True)
  with open(os.path.join(folder, 'lock'), 'a', encoding='utf-8') as f:
    # or the table of one who looked earlier would replace a newer one
    fcntl.flock(f, fcntl.LOCK_EX)
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), 'cells', '*', 'result.json')):
      found.append(_read(path))
    found.sort(key=lambda row: (row['flops'], row['cell']))
    return files.write(os.path.join(folder, TABLE), ''.join(json.dumps(r) + '\n' for r in found))


def results(folder: str) -> list[dict[str, Any]]:
  """The rows of the table in a folder; UserError where there is none."""
  path = os.path.join(os.path.expanduser(folder), TABLE)
  if not os.path.isfile(path):
    raise UserError(f'no {TABLE} in {folder}: name the --workdir of an llm-jax sweep')
  try:
    with open(path, encoding='utf-8') as f:
      return [json.loads(line) for line in f]
  except json.JSONDecodeError as e:
    raise UserError(f'{path} is damaged ({e}): llm-jax sweep --list makes it anew') from e


def result(folder: str, cell: Cell) -> dict[str, Any]:
  """The row of a cell that is done."""
  return _read(os.path.join(place(folder, cell), 'result.json'))


def _read(path: str) -> dict[str, Any]:
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def failures(folder: str, chosen: Sequence[Cell]) -> dict[str, str]:
  """Name -> error of the failed cells."""
  found = {}
  for cell in chosen:
    path = os.path.join(place(folder, cell), 'failed.json')
    if os.path.exists(path):
      found[cell.name] = _read(path)['error']
  return found


def fraction(folder: str, cell: Cell) -> float:
  """How much of its training a cell has behind it, as far as it has been logged."""
  lines = files.lines(os.path.join(place(folder, cell), metrics.FILE))
  return lines[-1]['step'] / cell.recipe.steps if lines else 0.0
