"""Records of local files, each knowing the file and line it came from, so that what is wrong can be named.

    for record in records.read('data/*.jsonl'):
      text = records.text(record, 'instruction')

JSON (a list), JSON lines, tab-separated values, Parquet, each also as `.gz`, and the folders that Hugging Face's
`datasets.save_to_disk` writes. In Parquet and Arrow files the line is the row, counted from 1.
"""

import csv
import glob
import gzip
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import corpus

_BUNDLED = os.path.join(os.path.dirname(__file__), 'bundled')
_KINDS = {str: 'text', int: 'a whole number', float: 'a number', list: 'a list', dict: 'a record'}


class Record(NamedTuple):
  """fields: name -> value. where: 'FILE:LINE'."""

  fields: dict[str, Any]
  where: str


def read(path: str | Sequence[str], *, columns: Sequence[str] = ()) -> list[Record]:
  """The records of a file, a folder of `save_to_disk`, a glob, or a tuple of them, in order.

  columns: names for the columns of `.tsv` files that have no header. Raises `UserError` for what cannot be read, naming
  file and line.
  """
  found: list[Record] = []
  for one in (path,) if isinstance(path, str) else path:
    one = os.path.expanduser(one)
    matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
    for match in matches or [one]:
      if os.path.isdir(match):
        found += _folder(match)
      else:
        found += _file(*corpus.files(match), tuple(columns))
  if not found:
    raise UserError(f'no records in {path!r}: name files that hold some')
  return found


def bundled(name: str) -> str:
  """The path of a data file that comes with the package, for instance 'self_instruct/seed_tasks.jsonl.gz'."""
  return os.path.join(_BUNDLED, name)


def need(record: Record, key: str, kind: type = str) -> Any:
  """The value under `key`. Raises `UserError` when it is missing, of another type than `kind`, or no finite number."""
  if key not in record.fields:
    have = ', '.join(map(str, record.fields)) or 'nothing'
    raise UserError(f'{record.where}: no key {key!r} (it has: {have})')
  value = record.fields[key]
  fits = isinstance(value, int | float if kind is float else kind)
  if not fits or (isinstance(value, bool) and kind is not bool):
    raise UserError(
      f'{record.where}: {key!r} holds {type(value).__name__}, not {_KINDS.get(kind, kind.__name__)}'
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'{record.where}: {key!r} is {value}: numbers must be finite')
  return value


def text(record: Record, key: str) -> str:
  """The text under `key`, which must hold more than white space."""
  value = need(record, key)
  if not value.strip():
    raise UserError(f'{record.where}: {key!r} is empty')
  return value


def inner(record: Record, key: str) -> list[Record]:
  """The records in the list under `key`; each says where it is as `FILE:LINE key[i]`."""
  found = []
  for i, value in enumerate(need(record, key, list)):
    where = f'{record.where} {key}[{i}]'
    if not isinstance(value, dict):
      raise UserError(f'{where} holds {type(value).__name__}, not a record')
    found.append(Record(value, where))
  return found


def _file(path: str, columns: tuple) -> Iterator[Record]:
  name = path.removesuffix('.gz')
  suffix = os.path.splitext(name)[1]
  if suffix == '.parquet':
    yield from _table(_parquet(path), path)
  elif suffix == '.arrow':
    yield from _table(_arrow(path), path)
  elif suffix == '.tsv':
    yield from _tsv(path, columns)
  elif suffix == '.jsonl':
    yield from _lines(path)
  elif suffix == '.json':  # many published files of JSON lines have this name
    yield from _list(path) if _text(path).lstrip()[:1] == '[' else _lines(path)
  else:
    known = ('.json', '.jsonl', '.tsv', '.parquet', '.arrow')
    raise UserError(f'{path}: no reader for {suffix!r}; {nearest(suffix, known)} (each also .gz)')


def _lines(path: str) -> Iterator[Record]:
  for number, line in enumerate(_text(path).split('\n'), 1):
    if line.strip():
      try:
        value = json.loads(line)
      except json.JSONDecodeError as e:
        raise UserError(f'{path}:{number}: not JSON ({e.msg})') from e
      yield _checked(value, f'{path}:{number}')


def _list(path: str) -> Iterator[Record]:
  """The elements of a JSON list, each with the line on which it begins."""
  whole, scan = _text(path), json.JSONDecoder().raw_decode
  at, line, counted = _skip(whole, whole.index('[') + 1), 1, 0
  try:
    while whole[at : at + 1] != ']':
      value, stop = scan(whole, at)
      line, counted = line + whole.count('\n', counted, at), at
      yield _checked(value, f'{path}:{line}')
      at = _skip(whole, stop)
      if whole[at : at + 1] == ',':
        at = _skip(whole, at + 1)
      elif whole[at : at + 1] != ']':
        raise json.JSONDecodeError('Expecting , or ]', whole, at)
  except json.JSONDecodeError as e:
    raise UserError(f'{path}:{e.lineno}: not JSON ({e.msg})') from e


def _skip(whole: str, at: int) -> int:
  """The first place from `at` on that is no white space."""
  while whole[at : at + 1].isspace():
    at += 1
  return at


def _tsv(path: str, columns: tuple) -> Iterator[Record]:
  rows = csv.reader(io.StringIO(_text(path)), delimiter='\t', quoting=csv.QUOTE_NONE)
  header = columns or tuple(next(rows, ()))
  for row in rows:
    where = f'{path}:{rows.line_num}'
    if len(row) != len(header):
      raise UserError(f'{where}: {len(row)} columns, not the {len(header)} of {", ".join(header)}')
    yield Record(dict(zip(header, row, strict=True)), where)


def _folder(path: str) -> Iterator[Record]:
  """What `datasets.save_to_disk` wrote."""
  splits = os.path.join(path, 'dataset_dict.json')
  if os.path.isfile(splits):
    names = json.loads(_text(splits))['splits']
    raise UserError(
      f'{path} holds the splits {", ".join(names)}: name one, {os.path.join(path, names[0])}'
    )
  state = os.path.join(path, 'state.json')
  if not os.path.isfile(state):
    raise UserError(
      f'{path} is a folder without state.json: name its files, {os.path.join(path, "*.jsonl")!r}'
    )
  for part in json.loads(_text(state))['_data_files']:
    yield from _file(os.path.join(path, part['filename']), ())


def _parquet(path: str) -> Any:
  import pyarrow
  import pyarrow.parquet

  try:
    with _open(path) as f:
      return pyarrow.parquet.read_table(f)
  except (pyarrow.ArrowException, OSError, EOFError) as e:
    raise UserError(f'{path} is not Parquet ({_line(e)}): fetch it again') from e


def _arrow(path: str) -> Any:
  import pyarrow
  import pyarrow.ipc

  try:
    with _open(path) as f:
      return pyarrow.ipc.open_stream(f).read_all()
  except (pyarrow.ArrowException, OSError, EOFError) as e:
    raise UserError(f'{path} is not a stream of Arrow ({_line(e)}): fetch it again') from e


def _table(table: Any, path: str) -> Iterator[Record]:
  for number, fields in enumerate(table.to_pylist(), 1):
    yield Record(fields, f'{path}:{number}')


def _open(path: str) -> Any:
  return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')


def _text(path: str) -> str:
  return bytes(corpus.load(path)).decode()


def _checked(value: Any, where: str) -> Record:
  if not isinstance(value, dict):
    raise UserError(f'{where}: holds {type(value).__name__}, not a record')
  return Record(value, where)


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split())
