"""`make docs` works, shows every module's docstring on the page of its package, and has no dead link.

The worked example of CONTRIBUTING.md runs.
"""

import html
import html.parser
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sys
import urllib.parse

import pdoc
import pdoc.render
import pytest

import llm_jax
from llm_jax.core import config

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = ['llm_jax', *(m.name for m in pkgutil.walk_packages(llm_jax.__path__, 'llm_jax.'))]
PACKAGES = [m.name for m in pkgutil.iter_modules(llm_jax.__path__, 'llm_jax.') if m.ispkg]


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> pathlib.Path:
  """The folder of generated pages."""
  folder = tmp_path_factory.mktemp('docs')
  pdoc.render.configure(template_directory=ROOT / 'docs', show_source=False)
  pdoc.pdoc('llm_jax', output_directory=folder)
  return folder


class Page(html.parser.HTMLParser):
  """The text and the links of a page."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.parts, self.links = [], []
    self.feed(path.read_text(encoding='utf-8'))
    self.text = ' '.join(''.join(self.parts).split())

  def handle_data(self, data):
    """Collects text."""
    self.parts.append(data)

  def handle_starttag(self, tag, attrs):
    """Collects links."""
    attrs = dict(attrs)
    self.links += [attrs['href']] if tag == 'a' and attrs.get('href') else []


@pytest.mark.parametrize('package', PACKAGES)
def test_a_package_page_holds_the_docstrings_of_its_modules(pages, package):
  text = Page(pages / (package.replace('.', '/') + '.html')).text
  for name in MODULES:
    if name.rpartition('.')[0] == package:
      doc = inspect.getdoc(__import__(name, fromlist=['x']))
      assert ' '.join(doc.split()) in text, f'{package}: the docstring of {name} is not on its page'


def test_every_module_has_a_page(pages):
  assert not [m for m in MODULES if not (pages / (m.replace('.', '/') + '.html')).is_file()]


def test_links_lead_somewhere(pages):
  read = {path: Page(path) for path in pages.rglob('*.html')}
  dead = []
  for path, page in read.items():
    for link in page.links:
      url = urllib.parse.urlparse(html.unescape(link))
      if url.scheme:
        continue
      if url.path and (path.parent / url.path).resolve() not in read:
        dead.append(f'{path.relative_to(pages)}: {link}')
  assert not dead, dead


def test_the_worked_example_runs(tmp_path, monkeypatch):
  text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
  blocks = dict(re.findall(r'^```python\n# (\S+)\n(.*?)^```$', text, re.M | re.S))
  function, recipe, test = blocks
  for path, body in blocks.items():
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(body, encoding='utf-8')

  def load(path: str, name: str):
    spec = importlib.util.spec_from_file_location(name, tmp_path / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module

  package, _, name = function.removesuffix('.py').replace('/', '.').rpartition('.')
  monkeypatch.setattr(
    importlib.import_module(package), name, load(function, f'{package}.{name}'), raising=False
  )
  config.check(config.read(str(tmp_path / recipe)))
  tests = [f for n, f in vars(load(test, 'worked_example')).items() if n.startswith('test_')]
  assert tests
  for check in tests:
    check()
