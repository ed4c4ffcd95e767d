"""Files of records, against the libraries that write them; wrong ones are named by file and line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from llm_jax.data import records
from tests.data.conftest import says

ROWS = [dict(instruction='Say é.', n=1), dict(instruction='two\nlines', n=2), dict(n=3)]


def save_to_disk(folder, table):
  """What `datasets.save_to_disk` leaves: a stream of Arrow and state.json."""
  folder.mkdir(parents=True)
  name = 'data-00000-of-00001.arrow'
  with pa.OSFile(str(folder / name), 'wb') as f, pa.ipc.new_stream(f, table.schema) as writer:
    writer.write_table(table)
  (folder / 'state.json').write_text(json.dumps(dict(_data_files=[dict(filename=name)])))


@pytest.fixture
def files(tmp_path):
  """kind -> the path of ROWS in that format."""
  text = '\n'.join(json.dumps(r, ensure_ascii=False) for r in ROWS)
  (tmp_path / 'a.jsonl').write_text(text + '\n\n')
  (tmp_path / 'lines.json').write_text(text)
  (tmp_path / 'a.json').write_text(json.dumps(ROWS, indent=2))
  (tmp_path / 'a.json.gz').write_bytes(gzip.compress((tmp_path / 'a.json').read_bytes()))
  table = pa.Table.from_pylist(ROWS)
  pa.parquet.write_table(table, tmp_path / 'a.parquet')
  (tmp_path / 'a.parquet.gz').write_bytes(gzip.compress((tmp_path / 'a.parquet').read_bytes()))
  save_to_disk(tmp_path / 'saved', table)
  return tmp_path


@pytest.mark.parametrize(
  'name',
  ['a.jsonl', 'lines.json', 'a.json', 'a.json.gz', 'a.parquet', 'a.parquet.gz', 'saved'],
)
def test_every_format_gives_the_records(files, name):
  found = records.read(str(files / name))
  dense = [{k: v for k, v in r.fields.items() if v is not None} for r in found]
  assert dense == ROWS
  assert [records.need(r, 'n', int) for r in found] == [1, 2, 3]


def test_tables_with_and_without_a_header(tmp_path):
  (tmp_path / 'a.tsv').write_text('q\ta "quoted\nx\ty\n')
  plain = records.read(str(tmp_path / 'a.tsv'), columns=('question', 'answer'))
  assert [r.fields for r in plain] == [
    dict(question='q', answer='a "quoted'),
    dict(question='x', answer='y'),
  ]
  assert records.read(str(tmp_path / 'a.tsv'))[0].fields == {'q': 'x', 'a "quoted': 'y'}
  (tmp_path / 'a.tsv').write_text('q\ta\nx\n')
  says(('a.tsv:2: 1 columns, not the 2 of q, a',), lambda: records.read(str(tmp_path / 'a.tsv')))


def test_a_record_knows_its_line(files):
  assert [r.where for r in records.read(str(files / 'a.jsonl'))] == [
    f'{files}/a.jsonl:{i}' for i in (1, 2, 3)
  ]
  lines = (files / 'a.json').read_text().split('\n')
  begin = [i for i, line in enumerate(lines, 1) if line == '  {']
  assert [r.where for r in records.read(str(files / 'a.json'))] == [
    f'{files}/a.json:{i}' for i in begin
  ]
  both = records.read((str(files / 'a.jsonl'), str(files / '*.parquet')))
  assert [r.where.rpartition('/')[2] for r in both[2:4]] == ['a.jsonl:3', 'a.parquet:1']


def test_what_is_missing_is_named(files):
  first, _, last = records.read(str(files / 'a.jsonl'))
  says("a.jsonl:3: no key 'instruction' (it has: n)", lambda: records.need(last, 'instruction'))
  says("a.jsonl:1: 'n' holds int, not text", lambda: records.need(first, 'n'))
  says("a.jsonl:1: 'n' is empty", lambda: records.text(first._replace(fields=dict(n=' \n')), 'n'))
  told = first._replace(fields=dict(turns=[dict(a=1), 2]))
  says('a.jsonl:1 turns[1] holds int, not a record', lambda: records.inner(told, 'turns'))
  says(
    "'flag' holds bool", lambda: records.need(first._replace(fields=dict(flag=True)), 'flag', int)
  )


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', '{}\n{"a": \n', 'a.jsonl:2: not JSON'),
    ('a.jsonl', '{}\n[1]\n', 'a.jsonl:2: holds list, not a record'),
    ('a.json', '[{},\n {"a" 1}]', 'a.json:2: not JSON'),
    ('a.json', '[{}\n', 'a.json:2: not JSON'),
    ('a.json', '[{}\n7', 'a.json:2: not JSON'),
    ('a.csv', 'a,b', "no reader for '.csv'"),
    ('a.parquet', 'PAR', 'a.parquet is not Parquet'),
    ('a.arrow', 'x', 'a.arrow is not a stream of Arrow'),
    ('a.jsonl', '\n', 'no records in'),
  ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  says(message, lambda: records.read(str(tmp_path / name)))


def test_folders_that_are_not_one_split(tmp_path, files):
  says('is a folder without state.json', lambda: records.read(str(tmp_path)))
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  says(('holds the splits train, test', 'name one'), lambda: records.read(str(tmp_path)))
  says('no file', lambda: records.read(str(tmp_path / 'b.jsonl')))
