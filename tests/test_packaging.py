"""What the package says of itself agrees with what it is: dependencies, locks, versions, the Makefile."""

import ast
import importlib
import pathlib
import re
import runpy
import sys

import pytest
import setuptools
from packaging.requirements import Requirement

import llm_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The module that a requirement brings, where its name is another one.
MODULES = {'absl-py': 'absl', 'ml-collections': 'ml_collections', 'orbax-checkpoint': 'orbax'}
MODULES |= {'prometheus-client': 'prometheus_client', 'pyyaml': 'yaml'}
# Required without an import of ours: SeqIO imports them, and they have to fit our TensorFlow.
BROUGHT = {'tensorflow-datasets', 'tensorflow-text'}


@pytest.fixture(scope='module')
def setup() -> dict:
  """The arguments of `setuptools.setup` in setup.py."""
  caught = {}
  original, setuptools.setup = setuptools.setup, lambda **kw: caught.update(kw)
  try:
    runpy.run_path(str(ROOT / 'setup.py'))
  finally:
    setuptools.setup = original
  return caught


def lock(name: str) -> dict[str, Requirement]:
  """package -> pinned requirement."""
  lines = (ROOT / name).read_text().splitlines()
  found = [Requirement(x) for x in lines if x and not x.startswith(('#', ' '))]
  return {r.name: r for r in found}


def imported() -> set[str]:
  """Top-level names of the libraries that llm_jax imports."""
  names = set()
  for path in ROOT.glob('llm_jax/**/*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Import):
        names |= {a.name.partition('.')[0] for a in node.names}
      elif isinstance(node, ast.ImportFrom):
        names.add(node.module.partition('.')[0])
  return names - set(sys.stdlib_module_names) - {'llm_jax', 'configs'}


def test_what_is_imported_is_required_and_the_reverse(setup):
  names = lambda required: {Requirement(r).name for r in required} - BROUGHT
  modules = {MODULES.get(r, r) for r in names(setup['install_requires'])}
  served = {MODULES.get(r, r) for r in names(setup['extras_require']['serve'])}
  extra, missing = imported() - modules - served, modules - imported()
  assert not extra and not missing, f'not required: {extra}; not imported: {missing}'


@pytest.mark.parametrize('name', ['requirements.lock', 'requirements-dev.lock'])
def test_locks_pin_everything_and_say_nothing_of_a_machine(name):
  assert all(re.fullmatch(r'==[\w.+!]+', str(r.specifier)) for r in lock(name).values())
  assert not re.search(r'https?:|file:|index|(^| )/', (ROOT / name).read_text(), re.M)


def test_locks_satisfy_setup_and_agree(setup):
  runtime, dev = lock('requirements.lock'), lock('requirements-dev.lock')
  for text in setup['install_requires'] + setup['extras_require']['dev']:
    wanted = Requirement(text)
    version = str(dev[wanted.name].specifier).removeprefix('==')
    assert wanted.specifier.contains(version), f'{text}, but the lock has {version}: make lock'
  assert all(str(dev[name]) == str(r) for name, r in runtime.items())
  needed = setup['install_requires'] + setup['extras_require']['serve']
  assert {Requirement(r).name for r in needed} <= set(runtime)


def test_versions_agree(setup):
  assert setup['version'] == llm_jax.__version__
  newest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1]
  cited = re.search(r'^version: (\S+)', (ROOT / 'CITATION.cff').read_text(), re.M)[1]
  assert newest == cited == llm_jax.__version__


def test_the_command_exists_and_types_are_shipped(setup):
  module, _, name = setup['entry_points']['console_scripts'][0].partition(' = ')[2].partition(':')
  assert callable(getattr(importlib.import_module(module), name))
  assert (ROOT / 'llm_jax/py.typed').is_file() and 'py.typed' in setup['package_data']['llm_jax']


def test_every_data_file_is_shipped(setup):
  folder = ROOT / 'llm_jax'
  shipped = {p for pattern in setup['package_data']['llm_jax'] for p in folder.glob(pattern)}
  there = {p for p in folder.rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc')}
  assert there == shipped


def test_makefile_targets_are_phony_and_explained():
  text = (ROOT / 'Makefile').read_text()
  phony = set(re.search(r'^\.PHONY: (.*)$', text, re.M)[1].split())
  explained = set(re.findall(r'^([a-z0-9]+):.*##', text, re.M))
  assert phony == explained
  assert (ROOT / '.ci/run').stat().st_mode & 0o111
