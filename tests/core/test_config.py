"""Configs as data: what `use` lists, `build` gives back, `override` sets, and what every mistake says."""

import collections
import copy
import functools
import textwrap
from collections.abc import Callable

import flax.linen as nn
import pytest

from llm_jax.core import config as config_lib
from llm_jax.core.config import (
  build,
  check,
  config,
  from_json,
  override,
  read,
  to_json,
  use,
  variant,
)
from llm_jax.core.errors import UserError

HERE = __name__


def constant(step, *, peak: float = 1e-2):
  return peak


def warm(step, *, peak: float = 1e-2, warmup: int = 10):
  return peak * min(1, step / warmup)


def optimizer(
  axes,
  *,
  schedule: Callable = constant,
  clip: float | None = 1.0,
  beta: float | None = None,
  names: tuple = ('a', 'b'),
):
  return schedule(5), clip, beta, names


def block(*, heads: int, warmup: int = 1, kernel: Callable | None = None, mode: int | str = 'a'):
  return heads, warmup, kernel, mode


def model(
  *,
  vocab: int,
  blocks: tuple = (),
  nested: dict | None = None,
  flag: bool = False,
  label: str = 'x',
):
  return vocab, blocks, nested, flag, label


class Layer(nn.Module):
  width: int
  bias: bool = False


def source(model, folder='positional', *, length: int | None = None):
  return model, folder, length


def full():
  """One config with everything that configs are made of."""
  return config(
    model=use(
      model,
      vocab=32,
      blocks=(use(block, heads=2), use(block, heads=4, kernel=constant)),
      nested=dict(a=1, b=use(constant)),
    ),
    optimizer=use(optimizer, schedule=use(warm)),
    mesh=dict(data=-1, fsdp=1),
    hooks=dict(evaluate=use(source)),
    steps=10,
    trainable=None,
    sizes=(1, 2, (3, 'x')),
  )


# use and build


def test_use_lists_every_argument_with_its_default():
  c = use(optimizer, clip=2.0)
  assert c.fn == f'{HERE}:optimizer'
  assert set(c.keys()) == {'fn', 'schedule', 'clip', 'beta', 'names'}
  assert (c.clip, c.beta, c.names) == (2.0, None, ('a', 'b'))
  assert dict(c.schedule) == {
    'fn': f'{HERE}:constant',
    'peak': 1e-2,
  }  # a default that is a function is a call itself


def test_build_gives_back_the_call():
  made = build(use(optimizer, schedule=use(warm, warmup=20), beta=0.5))
  assert isinstance(made, functools.partial) and made.func is optimizer
  assert made(None) == (1e-2 * 5 / 20, 1.0, 0.5, ('a', 'b'))


def test_positional_arguments_are_no_settings():
  assert set(use(source).keys()) == {'fn', 'length'}
  assert build(use(source))('m') == ('m', 'positional', None)


def test_the_fields_of_a_module_are_settings():
  c = use(Layer, width=3)
  assert set(c.keys()) == {'fn', 'width', 'bias'}
  assert build(c)() == Layer(width=3)


def test_partials_and_functions_become_calls():
  c = use(optimizer, schedule=functools.partial(warm, warmup=3))
  assert c.schedule.warmup == 3 and c.schedule.peak == 1e-2
  assert use(block, heads=1, kernel=warm).kernel.fn == f'{HERE}:warm'
  with pytest.raises(UserError, match='bound positional arguments'):
    use(optimizer, schedule=functools.partial(warm, 1))


def test_tuples_and_dicts_of_calls_are_built():
  vocab, blocks, nested, _, _ = build(full().model)()
  assert vocab == 32 and [b()[0] for b in blocks] == [2, 4]
  assert blocks[1]()[2](0) == 1e-2
  assert nested['a'] == 1 and nested['b'](0) == 1e-2


def test_a_float_argument_given_an_int_stays_a_float():
  c = use(optimizer, clip=2)
  assert type(c.clip) is float
  override(c, 'clip', '2.5')
  assert c.clip == 2.5


def test_two_users_of_one_config_do_not_share_its_settings():
  schedule = use(warm)
  first, second = use(optimizer, schedule=schedule), use(optimizer, schedule=schedule)
  override(first, 'schedule.warmup', '99')
  assert (second.schedule.warmup, schedule.warmup) == (10, 10)
  one = use(block, heads=1)
  c = use(model, vocab=1, blocks=(one, one))
  override(c, 'blocks[0].heads', '7')
  assert (c.blocks[1].heads, one.heads) == (1, 1)


def test_everything_is_locked_and_typed():
  c = full()
  for node in (
    c,
    c.model,
    c.model.blocks[1],
    c.model.nested,
    c.model.nested.b,
    c.mesh,
    c.hooks.evaluate,
  ):
    assert node.is_locked
    with pytest.raises(AttributeError):
      node.foo = 1
  with pytest.raises(TypeError):
    c.optimizer.beta = 'text'  # a placeholder knows its type
  with pytest.raises(TypeError):
    c.model.vocab = 'text'
  c.optimizer.beta = 0.5
  c.optimizer = use(optimizer, clip=7.0)  # a whole call may be replaced
  assert build(c.optimizer)(None)[1] == 7.0


def test_what_has_no_import_path_is_refused():
  with pytest.raises(UserError, match='no import path'):
    use(lambda *, a=1: a)
  with pytest.raises(UserError, match='no import path'):
    use(optimizer, schedule=lambda step: 1)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (
      lambda: use(optimizer, clipp=1.0),
      r"optimizer takes no argument 'clipp'; did you mean 'clip'\?",
    ),
    (lambda: use(Layer, name='x', width=1), r"Layer takes no argument 'name'; known: bias, width"),
    (lambda: use(source, folder='x'), r"source takes no argument 'folder'"),
    (
      lambda: check(config(model=use(model))),
      r'config.model.vocab is required by .*model and not set; set --config.model.vocab=...',
    ),
    (
      lambda: check(config(m=use(model, vocab=1, blocks=(use(block),)))),
      r'config.m.blocks\[0\].heads is required',
    ),
    (
      lambda: check(config(m=use(model, vocab='x'))),
      r"config.m.vocab must be int, got 'x' \(str\)",
    ),
    (
      lambda: check(config(m=use(model, vocab=1.5))),
      r'config.m.vocab must be int, got 1.5 \(float\)',
    ),
    (
      lambda: check(config(m=use(model, vocab=True))),
      r'config.m.vocab must be int, got True \(bool\)',
    ),
    (
      lambda: check(config(m=use(model, vocab=1, flag=1))),
      r'config.m.flag must be bool, got 1 \(int\)',
    ),
    (
      lambda: check(config(m=use(model, vocab=1, label=3))),
      r'config.m.label must be str, got 3 \(int\)',
    ),
    (
      lambda: check(config(o=use(optimizer, beta='x'))),
      r"config.o.beta must be float or None, got 'x'",
    ),
    (
      lambda: check(config(b=use(block, heads=1, kernel='flash'))),
      r"config.b.kernel must be a function or None, got 'flash'",
    ),
    (lambda: check(config(hooks=dict(a=use(block)))), r'config.hooks.a.heads is required'),
  ],
)
def test_mistakes_in_a_config_name_the_remedy(wrong, message):
  with pytest.raises(UserError, match=message):
    wrong()


def changed(c, **kw):
  """`c` with keys that a newer or older version of the function may have had."""
  c = copy.deepcopy(c)
  with c.unlocked(), c.ignore_type():
    for k, v in kw.items():
      c[k] = v
  return c


def test_build_refuses_keys_the_function_no_longer_takes():
  with pytest.raises(
    UserError, match=r"config.o.clp: .*optimizer takes no argument 'clp'; did you mean 'clip'\?"
  ):
    check(config(o=changed(use(optimizer), clp=1)))


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    (
      'llm_jax.core.nothing:f',
      r"names 'llm_jax.core.nothing:f', but there is no module 'llm_jax.core.nothing'",
    ),
    ('llm_jaxx.core:f', r"there is no module 'llm_jaxx'"),
    ('llm_jax.core.tree:mtach', r"llm_jax.core.tree has no 'mtach'; did you mean 'match'\?"),
    ('llm_jax.core.tree', r"llm_jax.core.tree has no ''; known: "),
  ],
)
def test_load_names_what_is_missing(path, message):
  with pytest.raises(UserError, match=message):
    config_lib.load(path)


def test_load_finds_what_path_of_names():
  for fn in (optimizer, Layer, collections.OrderedDict, nn.Dense.__call__):
    assert config_lib.load(config_lib.path_of(fn)) is fn


def test_a_missing_dependency_of_a_module_is_not_called_a_missing_module(tmp_path, monkeypatch):
  (tmp_path / 'needs_more.py').write_text('import not_installed_at_all')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match='not_installed_at_all') as e:
    config_lib.load('needs_more:f')
  assert not isinstance(e.value, UserError)


# override


@pytest.mark.parametrize(
  ('path', 'text', 'want'),
  [
    ('steps', '1e3', 1000),
    ('steps', '12', 12),
    ('steps', '1_000', 1000),
    ('mesh.data', '2', 2),
    ('model.vocab', '64', 64),
    ('model.flag', 'true', True),
    ('model.flag', 'False', False),
    ('model.label', '7', '7'),
    ('model.label', 'None', 'None'),
    ('model.nested.a', '5', 5),
    ('model.nested.b.peak', '1', 1.0),
    ('model.blocks[0].heads', '8', 8),
    ('model.blocks[1].warmup', '7', 7),
    ('model.blocks[1].kernel.peak', '.5', 0.5),
    ('model.blocks[1].mode', '3', 3),
    ('model.blocks[1].mode', 'b', 'b'),
    ('optimizer.clip', '3', 3.0),
    ('optimizer.clip', 'None', None),
    ('optimizer.clip', 'inf', float('inf')),
    ('optimizer.beta', '0.5', 0.5),
    ('optimizer.names', "('x',)", ('x',)),
    ('optimizer.names', "['x', 'y']", ('x', 'y')),
    ('optimizer.names', 'x', ('x',)),
    ('optimizer.names', '()', ()),
    ('optimizer.schedule.warmup', '20', 20),
    ('hooks.evaluate.length', '128', 128),
    ('trainable', 'norm|bias', 'norm|bias'),
    ('sizes', '(4,)', (4,)),
    ('sizes[0]', '9', 9),
    ('sizes[2][1]', 'y', 'y'),
  ],
)
def test_override_converts_text_to_the_right_type(path, text, want):
  c = full()
  override(c, path, text)
  got = c
  for key in path.replace(']', '').replace('[', '.').split('.'):
    got = got[int(key) if key.isdigit() else key]
  assert got == want and type(got) is type(want)
  check(c)
  assert from_json(to_json(c)) == c


def test_override_leaves_the_rest_alone():
  c = full()
  override(c, 'model.blocks[1].warmup', '7')
  override(c, 'sizes[2][0]', '5')
  assert c.model.blocks[0] == full().model.blocks[0] and c.model.blocks[1].heads == 4
  assert c.sizes == (1, 2, (5, 'x'))
  assert c.is_locked and c.model.blocks[1].is_locked


def test_override_takes_values_too():
  c = full()
  override(c, 'steps', 3)
  override(c, 'optimizer.schedule', use(constant, peak=1.0))
  assert c.steps == 3 and build(c.optimizer)(None)[0] == 1.0


def test_override_replaces_a_call_by_another_function():
  for path in ('optimizer.schedule', 'optimizer.schedule.fn'):
    c = full()
    override(c, path, f'{HERE}:constant')
    assert dict(c.optimizer.schedule) == {'fn': f'{HERE}:constant', 'peak': 1e-2}
    override(c, 'optimizer.schedule.peak', '3')
    assert build(c.optimizer)(None)[0] == 3.0
  c = full()
  override(c, 'model.blocks[0]', f'{HERE}:block')
  assert c.model.blocks[0].heads is None and c.model.blocks[1].heads == 4
  override(c, 'model.blocks[0].heads', '3')
  override(c, 'model.blocks[0].kernel', f'{HERE}:warm')  # was None
  assert build(c.model)()[1][0]()[2](5) == 1e-2 * 5 / 10
  override(c, 'model.blocks[0].kernel', 'None')
  assert build(c.model)()[1][0]()[2] is None


@pytest.mark.parametrize(
  ('path', 'text', 'message'),
  [
    ('stps', '1', r"config has no key 'stps'; did you mean 'steps'\?"),
    (
      'optimizer.schedul.peak',
      '1',
      r"config.optimizer has no key 'schedul'; did you mean 'schedule'\?",
    ),
    (
      'optimizer.schedule.pek',
      '1',
      r"config.optimizer.schedule has no key 'pek'; did you mean 'peak'\?",
    ),
    ('optimizer.schedule.peak', 'abc', r"config.optimizer.schedule.peak must be float, got 'abc'"),
    (
      'optimizer.schedule',
      '3',
      r'config.optimizer.schedule is a group of settings: set one of config.optimizer.schedule.peak, .*module:function',
    ),
    ('optimizer.schedule', f'{HERE}:cnstant', r"has no 'cnstant'; did you mean 'constant'\?"),
    ('optimizer.beta', 'x', r"config.optimizer.beta must be float or None, got 'x'"),
    (
      'mesh',
      '3',
      r'config.mesh is a group of settings: set one of config.mesh.data, config.mesh.fsdp$',
    ),
    ('mesh.data', '2.5', r"config.mesh.data must be int, got '2.5'"),
    ('steps.x', '1', r"config.steps is a int, not a group of settings: it has no key 'x'"),
    ('steps', 'None', r"config.steps must be int, got 'None'"),
    ('model.flag', '2', r"config.model.flag must be bool, got '2'"),
    ('model.vocab', '3.5', r"config.model.vocab must be int, got '3.5'"),
    ('model.blocks[2].heads', '1', r'config.model.blocks has no element \[2\], only 2'),
    (
      'model.blocks[x].heads',
      '1',
      r"config.model.blocks is a tuple, not a group of settings: it has no key 'x'",
    ),
    (
      'model.blocks[1].head',
      '1',
      r"config.model.blocks\[1\] has no key 'head'; did you mean 'heads'\?",
    ),
    ('steps[0]', '1', r'config.steps has no element \[0\]'),
    ('', '1', r"config has no key ''"),
  ],
)
def test_override_names_the_nearest_key(path, text, message):
  with pytest.raises(UserError, match=message):
    override(full(), path, text)


# JSON


def test_json_round_trip():
  c = full()
  c.model.blocks[0].kernel = use(warm)  # what was None
  c.optimizer.beta, c.trainable = 0.5, use(constant)
  again = from_json(to_json(c))
  assert again == c and again.is_locked and to_json(again) == to_json(c)
  again = from_json(to_json(full()))  # placeholders are typed again
  again.optimizer.beta = 0.25
  with pytest.raises(TypeError):
    again.optimizer.beta = 'x'
  assert build(again.model)()[:1] == (32,)


def test_json_fills_in_arguments_that_are_new():
  text = to_json(full()).replace('"warmup": 10', '"peak": 0.5')
  assert from_json(text).optimizer.schedule.warmup == 10


def test_json_mistakes():
  with pytest.raises(UserError, match='the config is not JSON'):
    from_json('{"a": ')
  with pytest.raises(UserError, match=r"optimizer takes no argument 'clp'; did you mean 'clip'\?"):
    from_json(to_json(full()).replace('"clip"', '"clp"'))
  c = full()
  with c.ignore_type():
    c.sizes = (warm,)  # assigned past `use`
  with pytest.raises(UserError, match=r'config.sizes is <function warm.*give a plain value or use'):
    to_json(c)


# variant


def test_variant():
  assert vars(variant(None, size='base', length=512)) == dict(size='base', length=512)
  assert vars(variant('small,length=1024', size='base', length=512)) == dict(
    size='small', length=1024
  )
  assert vars(
    variant('length=1e3,rate=1,on=true', size='base', length=512, rate=0.5, on=False)
  ) == dict(size='base', length=1000, rate=1.0, on=True)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('small,large', r"'large' must read name=value"),
    ('lenght=3', r"takes no argument 'lenght'; did you mean 'length'\?"),
    ('length=x', r"length must be int, got 'x'"),
  ],
)
def test_variant_mistakes(text, message):
  with pytest.raises(UserError, match=message):
    variant(text, size='base', length=512)


# files


def write(path, code):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(textwrap.dedent(code))
  return str(path)


PLAIN = f"""
  from llm_jax.core.config import config, use, variant
  from {HERE} import warm
  def get_config(text=None):
    v = variant(text, size='base', warmup=3)
    return config(schedule=use(warm, warmup=v.warmup), size=v.size)
"""


def test_read_a_file_with_and_without_arguments(tmp_path):
  path = write(tmp_path / 'one.py', PLAIN)
  assert read(path).size == 'base'
  assert (read(path, 'small,warmup=7').size, read(path, 'small,warmup=7').schedule.warmup) == (
    'small',
    7,
  )


def test_read_a_dumped_config(tmp_path):
  path = write(tmp_path / 'config.json', to_json(full()))
  assert read(path) == full()
  with pytest.raises(UserError, match='takes no argument after the colon'):
    read(path, 'small')


def test_config_files_import_their_siblings(tmp_path):
  write(tmp_path / 'recipes' / '__init__.py', '')
  write(tmp_path / 'recipes' / 'deep' / 'parent.py', PLAIN)
  for place in ('child.py', 'deep/child.py'):
    child = write(
      tmp_path / 'recipes' / place,
      """
      from recipes.deep import parent
      def get_config():
        c = parent.get_config('child')
        c.schedule.warmup = 11
        return c
      """,
    )
    c = read(child)
    assert (c.size, c.schedule.warmup) == ('child', 11)
  loose = write(
    tmp_path / 'loose' / 'child_of_sibling.py',
    """
    import sibling_of_child
    get_config = sibling_of_child.get_config
    """,
  )
  write(tmp_path / 'loose' / 'sibling_of_child.py', PLAIN)
  assert read(loose, 'x').size == 'x'


def test_reading_leaves_the_import_path_as_it_was(tmp_path):
  import sys

  before = list(sys.path)
  read(write(tmp_path / 'one.py', PLAIN))
  with pytest.raises(ZeroDivisionError):
    read(write(tmp_path / 'two.py', '1 / 0'))
  assert sys.path == before


def test_read_mistakes(tmp_path):
  write(tmp_path / 'quickstart.py', 'def get_config(): pass')
  with pytest.raises(
    UserError, match=r"no config file '.*quikstart.py'; did you mean '.*quickstart.py'\?"
  ):
    read(str(tmp_path / 'quikstart.py'))
  with pytest.raises(UserError, match="no config file 'nowhere/at/all.py'; known: none"):
    read('nowhere/at/all.py')
  with pytest.raises(UserError, match='takes no argument after the colon'):
    read(str(tmp_path / 'quickstart.py'), 'small')
  with pytest.raises(UserError, match='defines no get_config'):
    read(write(tmp_path / 'empty.py', ''))
  with pytest.raises(UserError, match='is no config: a config is a .py file'):
    read(write(tmp_path / 'model.yaml', ''))
  local = """
    from llm_jax.core.config import config, use
    def mine(*, a: int = 1): pass
    def get_config(): return config(x=use(mine))
  """
  with pytest.raises(UserError, match='mine is defined in a config file, which cannot be imported'):
    read(write(tmp_path / 'local.py', local))
