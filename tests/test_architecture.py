"""The laws of the code base that a machine can check; CONTRIBUTING.md says why they are there."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(p.relative_to(ROOT) for p in ROOT.glob('llm_jax/**/*.py'))
FUNCTION_LINES, FILE_LINES = 80, 450
BRIDGE = 'llm_jax/data/seqio_bridge.py'  # the only file that imports TensorFlow and SeqIO

# Where a module may be imported; True: only inside functions, so that importing our module does not import it.
PLACES = {
  'flax.linen': ('llm_jax/model/', False),
  'orbax': ('llm_jax/train/checkpoint.py', False),
  'gguf': ('llm_jax/interop/gguf.py', True),
  'tokenizers': ('llm_jax/data/tokenizer.py', True),
  'llguidance': ('llm_jax/decode/constrain.py', True),
  'jinja2': ('llm_jax/data/chat.py', True),
  'pyarrow': ('llm_jax/data/records.py', True),
  'yaml': ('llm_jax/data/formats.py', True),
  'grain': ('llm_jax/data/', False),
  'fastapi': ('llm_jax/serve/', False),
  'pydantic': ('llm_jax/serve/', False),
  'uvicorn': ('llm_jax/serve/', False),
  'prometheus_client': ('llm_jax/serve/', False),
  'seqio': (BRIDGE, False),
  'tensorflow': (BRIDGE, False),
  'tensorflow_datasets': (BRIDGE, False),
  'tensorflow_text': (BRIDGE, False),
  'llm_jax.data.seqio_bridge': ('llm_jax/data/', True),
}
# Linen declares weights and nothing else: no lifted transforms, no state behind the caller's back.
BANNED_LINEN = {
  'scan',
  'remat',
  'checkpoint',
  'vmap',
  'jit',
  'while_loop',
  'cond',
  'switch',
  'intercept_methods',
}
BANNED_METHODS = {'sow', 'variable', 'perturb'}
LEFT_FOR_LATER = re.compile(
  r'\b(TODO|FIXME|XXX)\b|raise NotImplementedError(\(\))?$|pytest\.(mark\.)?skip|xfail|pragma: no cover'
)


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
  return ast.parse((ROOT / path).read_text(encoding='utf-8'))


def imports(tree: ast.Module):
  """(dotted name, line, is inside a function) of everything imported, by any spelling."""
  inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      yield name, node.lineno, id(node) in inside


def functions(tree: ast.Module):
  return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def fails(found: list[str], law: str) -> None:
  assert not found, law + ':\n  ' + '\n  '.join(found)


def test_imports_go_one_way():
  code = 'from importlinter import cli; cli.lint_imports_command()'  # in a process of its own: it replaces sys.stdout
  command = [sys.executable, '-c', code, '--no-cache', '--config', 'pyproject.toml']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('library', PLACES)
def test_library_is_imported_only_in_its_place(library):
  place, only_inside = PLACES[library]
  found = []
  for path in FILES:
    for name, line, inside in imports(parse(path)):
      if name == library or name.startswith(library + '.'):
        if not str(path).startswith(place) or (only_inside and not inside):
          found.append(f'{path}:{line} imports {name}')
  fails(found, f'{library} belongs under {place}' + ', inside functions' * only_inside)


def test_linen_only_declares_weights():
  found = []
  for path in FILES:
    for node in ast.walk(parse(path)):
      if isinstance(node, ast.Attribute):
        linen = isinstance(node.value, ast.Name) and node.value.id in ('nn', 'linen')
        own = isinstance(node.value, ast.Name) and node.value.id in ('self', 'module')
        if (linen and node.attr in BANNED_LINEN) or (own and node.attr in BANNED_METHODS):
          found.append(f'{path}:{node.lineno} {ast.unparse(node)}')
      if isinstance(node, ast.ClassDef):
        found += [
          f'{path}:{f.lineno} {node.name}.setup'
          for f in node.body
          if getattr(f, 'name', '') == 'setup'
        ]
  fails(found, 'lifted transforms, hidden state and setup() are banned; pass state as an argument')


def test_only_the_command_line_takes_a_config():
  found = []
  for path in FILES:
    if str(path) == 'llm_jax/core/config.py' or str(path).startswith('llm_jax/cli/'):
      continue
    for function in functions(parse(path)):
      a = function.args
      names = {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs]} & {'config', 'cfg'}
      found += [f'{path}:{function.lineno} {function.name}({n})' for n in names]
  fails(found, 'functions take arguments, not a config')


def test_size():
  found = []
  for path in FILES:
    lines = len((ROOT / path).read_text(encoding='utf-8').splitlines())
    if lines > FILE_LINES:
      found.append(f'{path}: {lines} lines, at most {FILE_LINES}')
    for function in functions(parse(path)):
      lines = function.end_lineno - function.lineno + 1
      if lines > FUNCTION_LINES:
        found.append(
          f'{path}:{function.lineno} {function.name}: {lines} lines, at most {FUNCTION_LINES}'
        )
  fails(found, 'split these')


def test_public_names_have_a_docstring():
  found = []
  for path in FILES:
    tree = parse(path)
    if not ast.get_docstring(tree):
      found.append(f'{path}: the module')
    for node in tree.body:
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
        if not ast.get_docstring(node):
          found.append(f'{path}:{node.lineno} {node.name}')
  fails(found, 'what a caller may use says what it does')


def test_no_file_without_a_subject():
  names = {'utils.py', 'util.py', 'helpers.py', 'misc.py', 'common.py'}
  fails([str(p) for p in FILES if p.name in names], 'put each function where its subject is')


def test_package_files_hold_a_docstring_only():
  found = []
  for path in FILES:
    if path.name == '__init__.py':
      rest = parse(path).body[1:]
      if [n for n in rest if not (isinstance(n, ast.Assign) and n.targets[0].id == '__version__')]:
        found.append(str(path))
  fails(found, 'importing a package must not import its modules')


def test_nothing_is_left_for_later():
  found = []
  for path in [
    p
    for folder in ('llm_jax', 'configs', 'tests', 'benchmarks')
    for p in ROOT.glob(f'{folder}/**/*.py')
  ]:
    if path.name != pathlib.Path(__file__).name:
      lines = path.read_text(encoding='utf-8').splitlines()
      found += [
        f'{path.relative_to(ROOT)}:{i} {x.strip()}'
        for i, x in enumerate(lines, 1)
        if LEFT_FOR_LATER.search(x)
      ]
  fails(found, 'do it or leave it out')


def loaded(modules: list[str], heavy: list[str]) -> list[str]:
  """Which of `heavy` are in sys.modules of a fresh interpreter after importing `modules`."""
  code = f'import sys\nfor m in {modules!r}: __import__(m)\nprint(*[h for h in {heavy!r} if h in sys.modules])'
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_no_code_asks_for_the_name_of_a_family():
  """Families of checkpoints are tables: a comparison with one of their names would be code for one of them."""
  from llm_jax.interop.families import FAMILIES

  wrong = []
  for file in FILES:
    for node in ast.walk(parse(file)):
      if isinstance(node, ast.Compare | ast.Match):
        names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & FAMILIES.keys()
        wrong += [f'{file}:{node.lineno}: {name}' for name in names]
  assert not wrong, wrong


def test_import_is_light():
  assert (
    loaded(
      ['llm_jax'],
      ['jax', 'numpy', 'flax', 'orbax', 'tensorflow', 'seqio', 'ml_collections', 'absl'],
    )
    == []
  )


def test_all_but_the_bridge_needs_no_tensorflow():
  names = [
    str(p.with_suffix('')).replace('/', '.').removesuffix('.__init__')
    for p in FILES
    if str(p) != BRIDGE
  ]
  heavy = [
    'tensorflow',
    'tensorflow_datasets',
    'tensorflow_text',
    'seqio',
    'clu',
    'torch',
    'transformers',
  ]
  assert loaded(names, heavy) == []
