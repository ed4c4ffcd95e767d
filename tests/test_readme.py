"""The README cannot rot: its paths, tests, commands, links and quotations are looked up."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import shlex

import pytest

from llm_jax.cli import flags, main

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
TECHNIQUE_PACKAGES = ('model', 'optim', 'data', 'objectives', 'decode')


def section(title: str) -> str:
  """The text under the heading `title`."""
  found = re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', README, re.M | re.S)
  assert found, f'the README has no section {title!r}'
  return found[1]


def tree() -> dict[str, str]:
  """path -> annotation, from the indented listing of the section on files."""
  block = re.search(r'^```text\n(.*?)^```$', section('The files'), re.M | re.S)[1]
  entries, folders = {}, []
  for line in block.splitlines():
    indent, name, note = re.match(r'( *)(\S+)\s*(.*)', line).groups()
    folders = [*folders[: len(indent) // 2], name]
    entries[''.join(folders)] = note
  return entries


def rows() -> list[tuple[str, list[str], list[str]]]:
  """(technique, files, tests) of the table of techniques, files and tests as they stand in backticks."""
  lines = [x for x in section('Techniques').splitlines() if x.startswith('| ')]
  cells = [[c.strip() for c in x.strip('|').split('|')] for x in lines]
  code = re.compile(r'`([^`]+)`')
  return [(c[0], code.findall(c[1]), code.findall(c[2])) for c in cells if code.search(c[1])]


@functools.cache
def defined(path: pathlib.Path) -> set[str]:
  """Names that the Python file defines at its top level."""
  found = set()
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      found.add(node.name)
    elif isinstance(node, ast.Assign):
      found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
  return found


def commands() -> list[list[str]]:
  """Every command of the shell blocks, split into words."""
  text = '\n'.join(body for language, body in BLOCKS if language == 'sh').replace('\\\n', ' ')
  return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_every_path_of_the_tree_exists():
  missing = [p for p in tree() if not (ROOT / p).exists()]
  assert not missing, missing


def test_every_path_of_the_tree_is_explained():
  assert not [p for p, note in tree().items() if not note]


def test_the_tree_is_complete():
  ignored = {x.rstrip('/') for x in (ROOT / '.gitignore').read_text().splitlines()} | {'.git'}
  there = {
    p.name + '/' * p.is_dir()
    for p in ROOT.iterdir()
    if p.name not in ignored and p.suffix != '.egg-info'
  }
  there |= {f'llm_jax/{p.parent.name}/' for p in ROOT.glob('llm_jax/*/__init__.py')}
  missing = there - set(tree())
  assert not missing, f'add to the file tree of the README: {sorted(missing)}'


def test_every_technique_has_its_file_and_test():
  wrong = []
  for technique, files, tests in rows():
    wrong += [] if files and tests else [f'{technique}: no file or no test']
    for entry in files + tests:
      path, _, name = entry.replace('::', ':').partition(':')
      full = ROOT / (
        path if path.startswith(('tests/', 'configs/', 'experiments/')) else f'llm_jax/{path}'
      )
      if not full.is_file():
        wrong.append(f'{technique}: no file {path}')
      elif name and name not in defined(full):
        wrong.append(f'{technique}: {path} defines no {name}')
      elif path.startswith('tests/') and not name:
        wrong.append(f'{technique}: name the test function in {path}')
  assert rows() and not wrong, wrong


def test_the_table_of_techniques_is_complete():
  listed = {entry.partition(':')[0] for _, files, _ in rows() for entry in files}
  there = {
    str(p.relative_to(ROOT / 'llm_jax'))
    for package in TECHNIQUE_PACKAGES
    for p in ROOT.glob(f'llm_jax/{package}/**/*.py')
    if p.name != '__init__.py'
  }
  assert not there - listed, (
    f'add a row to the table of techniques of the README: {sorted(there - listed)}'
  )


@pytest.mark.parametrize('words', commands(), ids=' '.join)
def test_every_command_parses(words, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  while re.fullmatch(r'[A-Z_]+=.*', words[0]):
    words = words[1:]
  program, arguments = words[0].removeprefix('.venv/bin/'), words[1:]
  if program == 'make':
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
    assert {a for a in arguments if '=' not in a} <= targets
  elif program == 'llm-jax':
    with pytest.raises(SystemExit):
      main.main([arguments[0], '--help'])
    known = set(re.findall(r'^  (--\w+)', capsys.readouterr().out, re.M))
    ours = [a for a in arguments[1:] if a.startswith(('--config=', '--config.'))]
    assert {a.partition('=')[0] for a in arguments[1:] if a not in ours} <= known
    if ours:
      (flags.read_sweep if arguments[0] == 'sweep' else flags.read_config)(ours)
  else:
    known = {e.name for e in importlib.metadata.entry_points(group='console_scripts')}
    assert program in known


def test_links_lead_somewhere():
  links = re.findall(r'\]\(([^)]+)\)', README)
  missing = [
    x
    for x in links
    if not x.startswith(('http', '#')) and not (ROOT / x.partition('#')[0]).exists()
  ]
  assert not missing, missing


def squeezed(code: str) -> str:
  """Code without the spaces and trailing commas that a formatter moves."""
  return re.sub(r',([)\]}])', r'\1', re.sub(r'\s+', '', code))


def test_quotations_are_exact():
  quoted = [body for language, body in BLOCKS if language == 'python']
  for body in quoted:
    path, text = re.fullmatch(r'# (\S+)\n(.*)', body, re.S).groups()
    source = (ROOT / path).read_text(encoding='utf-8')
    assert squeezed(text) in squeezed(source), (
      f'{path} no longer reads as the README quotes it:\n{text}'
    )
  assert quoted
