r"""A config names a function and lists its arguments.

`use(fn, **kw)` turns a call into data: a locked ConfigDict with the import path of `fn` and every
keyword argument, defaults included, so that each can be set from the command line
(`--config.model.layers=12`) and shows up in the dumped JSON. `build(cfg)` turns the data back into
`functools.partial(fn, **kw)`; arguments that are themselves `use(...)` arrive built. The import
path is the registry: nothing has to be registered.

Only `configs/`, this file and `cli/` ever hold a config; functions receive plain arguments.
"""

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from llm_jax.core.errors import UserError, nearest

ConfigDict = ml_collections.ConfigDict
FN = 'fn'  # the key that holds the import path
REQUIRED = inspect.Parameter.empty
_NONE = type(None)
_CHECKED = (
  int,
  float,
  str,
  bool,
  tuple,
  _NONE,
  Callable,
)  # the annotations whose values are checked


def path_of(fn: Callable) -> str:
  """`llm_jax.optim.schedules:rsqrt` for a module-level function or class."""
  name = getattr(fn, '__qualname__', '')
  if not name or '<' in name:
    raise UserError(f'{fn!r} has no import path: pass a function or class defined at module level')
  if fn.__module__.startswith(_FILE):
    raise UserError(
      f'{name} is defined in a config file, which cannot be imported: move it to a module'
    )
  return f'{fn.__module__}:{name}'


def load(path: str) -> Callable:
  """The function behind an import path `package.module:name`."""
  module_name, _, name = path.partition(':')
  try:
    target = module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    if not f'{module_name}.'.startswith(f'{e.name}.'):
      raise  # a dependency of the module is missing: that is another error
    raise UserError(f'config names {path!r}, but there is no module {e.name!r}') from e
  for part in name.split('.'):
    if not hasattr(target, part):
      public = [n for n, v in vars(module).items() if callable(v) and not n.startswith('_')]
      raise UserError(
        f'config names {path!r}, but {module_name} has no {name!r}; {nearest(name, public)}'
      )
    target = getattr(target, part)
  return target


def arguments(fn: Callable) -> dict[str, inspect.Parameter]:
  """What a config may set: the keyword-only arguments of a function, the fields of a class."""
  found = inspect.signature(fn).parameters
  if isinstance(fn, type):  # a Linen module or dataclass: every field but Linen's own
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {n: p for n, p in found.items() if p.kind in kinds and n not in ('parent', 'name')}
  return {n: p for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def use(fn: Callable, **kw) -> ConfigDict:
  """A call as data: the import path of `fn` and all its keyword arguments.

  Raises `UserError` for a keyword that `fn` does not take, naming the nearest one it does. An
  argument without a default that is not given reads as None until it is set; `build` refuses it by
  name.
  """
  known = arguments(fn)
  for name in kw:
    if name not in known:
      raise UserError(f'{path_of(fn)} takes no argument {name!r}; {nearest(name, known)}')
  values = {FN: path_of(fn)}
  for name, parameter in known.items():
    value = kw.get(name, None if parameter.default is REQUIRED else parameter.default)
    values[name] = _as_config(value, parameter.annotation)
  return lock(ConfigDict(values))


def config(**kw) -> ConfigDict:
  """The top level of a config file: plain keys, values as in `use`."""
  return lock(ConfigDict({k: _as_config(v) for k, v in kw.items()}))


def lock(cfg: ConfigDict) -> ConfigDict:
  """Lock `cfg` and everything below it: from here on a new key is an error."""
  for value in cfg.values():
    for part in value if isinstance(value, tuple) else (value,):
      if isinstance(part, ConfigDict):
        lock(part)
  return cfg.lock()


def variant(text: str | None, **defaults) -> types.SimpleNamespace:
  """Reads what follows the colon in `--config=file.py:small,length=1024`.

  `variant('small,length=1024', size='base', length=512)` gives `size='small', length=1024`: a bare
  word sets the first argument, the rest is `name=value` with the type of its default.
  """
  values = dict(defaults)
  for i, part in enumerate(filter(None, (text or '').split(','))):
    name, equals, value = part.partition('=')
    if not equals:
      if i or not defaults:
        raise UserError(f'config argument {part!r} must read name=value; {nearest(part, defaults)}')
      name, value = next(iter(defaults)), part
    if name not in defaults:
      raise UserError(f'this config takes no argument {name!r}; {nearest(name, defaults)}')
    values[name] = _parse(name, value, (type(defaults[name]),))
  return types.SimpleNamespace(**values)


def build(cfg: Any, where: str = 'config') -> Any:
  """The function a config describes, with its keyword arguments bound and nested calls built.

  Raises `UserError` before anything runs for keys that the function does not take, required
  arguments that nobody set, and values of the wrong type. where: what the errors call `cfg`.
  """
  if isinstance(cfg, tuple | list):
    return tuple(build(v, f'{where}[{i}]') for i, v in enumerate(cfg))
  if not isinstance(cfg, ConfigDict):
    return cfg
  if FN not in cfg:
    return {k: build(v, f'{where}.{k}') for k, v in cfg.items()}
  fn = load(cfg[FN])
  known, kw = arguments(fn), {}
  for name, value in cfg.items():
    if name == FN:
      continue
    if name not in known:
      raise UserError(
        f'{where}.{name}: {cfg[FN]} takes no argument {name!r}; {nearest(name, known)}'
      )
    kw[name] = build(value, f'{where}.{name}')
  for name, parameter in known.items():
    if parameter.default is REQUIRED and kw.get(name) is None:
      raise UserError(
        f'{where}.{name} is required by {cfg[FN]} and not set; set --{where}.{name}=...'
      )
    options = _options(parameter.annotation)
    if name in kw and options and not _fits(kw[name], options):
      raise UserError(
        f'{where}.{name} must be {_names(options)}, got {kw[name]!r} ({type(kw[name]).__name__})'
      )
  return functools.partial(fn, **kw)


def check(cfg: ConfigDict) -> None:
  """`build` every call below `cfg` and forget the result: all config errors, none of the work."""
  build(cfg)


def override(cfg: ConfigDict, path: str, value: Any) -> None:
  """Sets `path` to `value`, which may be command-line text.

  path: `'model.layers'`, `'model.block[0].mixer.heads'`. A whole call is replaced by naming another
  function, `'llm_jax.optim.schedules:cosine'`, with that function's defaults. Raises `UserError`
  naming the nearest key.
  """
  keys: list[str | int] = []
  for part in path.split('.'):
    name, *indices = part.replace(']', '').split('[')
    keys += [name, *(int(i) if i.isdigit() else i for i in indices)]
  _set(cfg, keys[:-1] if keys[-1] == FN and len(keys) > 1 else keys, value, 'config', ())


def to_json(cfg: ConfigDict) -> str:
  """The whole config as JSON text; `from_json` gives back an equal config."""
  return json.dumps(_plain(cfg), indent=1)


def from_json(text: str) -> ConfigDict:
  """The config behind `to_json`'s text. Placeholders come back typed from the functions' signatures."""
  try:
    values = json.loads(text)
  except json.JSONDecodeError as e:
    raise UserError(
      f'the config is not JSON ({e}): restore the file or name the .py config it came from'
    ) from e
  return _unplain(values)


def read(path: str, text: str | None = None) -> ConfigDict:
  """`get_config(text)` of the Python file `path`, or the config of a dumped `.json`."""
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    files = os.listdir(folder) if os.path.isdir(folder) else []
    near = [os.path.join(os.path.dirname(path), f) for f in files if f.endswith(('.py', '.json'))]
    raise UserError(f'no config file {path!r}; {nearest(path, near)}')
  if path.endswith('.json'):
    if text:
      raise UserError(f'{path} takes no argument after the colon, got {text!r}')
    with open(path, encoding='utf-8') as f:
      return from_json(f.read())
  spec = importlib.util.spec_from_file_location(_FILE + os.path.basename(path)[:-3], path)
  if spec is None:
    raise UserError(
      f'{path} is no config: a config is a .py file with get_config(), or a dumped .json'
    )
  module = importlib.util.module_from_spec(spec)
  with _importable(os.path.dirname(os.path.abspath(path))):
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(
        f'{path} defines no get_config(); a config file is a Python file with that function'
      )
    if not inspect.signature(module.get_config).parameters:
      if text:
        raise UserError(f'{path} takes no argument after the colon, got {text!r}')
      return module.get_config()
    return module.get_config(text) if text else module.get_config()


# --- below: conversions between Python values, ConfigDicts, JSON and command-line text ---------------

_FILE = 'llm_jax_config_'  # what a config file is called as a module


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
  """Makes sibling config files importable (`from configs.pretrain import lm`) while one is read."""
  root, above = folder, folder
  for _ in range(
    3
  ):  # the folder that holds the outermost package, `configs/pretrain` being two levels deep
    if os.path.exists(os.path.join(above, '__init__.py')):
      root = os.path.dirname(above)
    above = os.path.dirname(above)
  saved = list(sys.path)
  sys.path.insert(0, root)
  try:
    yield
  finally:
    sys.path[:] = saved


def _options(annotation: Any) -> tuple[Any, ...]:
  """`(int, NoneType)` for `int | None`; () for an annotation that says nothing a config can check."""
  union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
  found = typing.get_args(annotation) if union else (annotation,)
  found = tuple(typing.get_origin(a) or a for a in found)
  return found if all(any(a is c for c in _CHECKED) for a in found) else ()


def _names(options: tuple[Any, ...]) -> str:
  names = {_NONE: 'None', Callable: 'a function'}
  return ' or '.join(names.get(o) or o.__name__ for o in options)


def _fits(value: Any, options: tuple[Any, ...]) -> bool:
  if isinstance(value, bool):  # which Python takes for an int
    return bool in options
  return isinstance(value, options) or (float in options and isinstance(value, int))


def _as_config(value: Any, annotation: Any = REQUIRED) -> Any:
  """A default or given value as a ConfigDict can hold it."""
  if isinstance(value, ConfigDict):
    return lock(copy.deepcopy(value))  # two users of one config must not share its settings
  if isinstance(value, functools.partial):
    if value.args:
      raise UserError(
        f'{path_of(value.func)} has bound positional arguments: bind keyword arguments only'
      )
    return use(value.func, **value.keywords)
  if isinstance(value, Mapping):
    return ConfigDict({k: _as_config(v) for k, v in value.items()})
  if isinstance(value, list | tuple):
    return tuple(_as_config(v) for v in value)
  if callable(value):
    return use(value)
  options = tuple(o for o in _options(annotation) if o is not _NONE)
  if value is None:
    typed = len(options) == 1 and options[0] is not Callable
    return (
      config_dict.placeholder(options[0]) if typed else None
    )  # a plain None can be set to anything
  return float(value) if type(value) is int and float in options and int not in options else value


def _set(node: Any, keys: list[str | int], value: Any, where: str, options: tuple[Any, ...]) -> Any:
  """`node` with `value` at `keys`: a group changed in place, a tuple or plain value made anew."""
  if not keys:
    return _convert(node, value, where, options)
  key, *rest = keys
  if isinstance(key, int):
    if not isinstance(node, tuple) or key >= len(node):
      raise UserError(
        f'{where} has no element [{key}]'
        + (f', only {len(node)}' if isinstance(node, tuple) else '')
      )
    return (*node[:key], _set(node[key], rest, value, f'{where}[{key}]', ()), *node[key + 1 :])
  if not isinstance(node, ConfigDict):
    raise UserError(
      f'{where} is a {type(node).__name__}, not a group of settings: it has no key {key!r}'
    )
  if key not in node or key == FN:
    raise UserError(f'{where} has no key {key!r}; {nearest(key, (k for k in node if k != FN))}')
  known = arguments(load(node[FN])) if FN in node else {}
  options = _options(known[key].annotation) if key in known else ()
  with node.ignore_type():
    node[key] = _set(node[key], rest, value, f'{where}.{key}', options)
  return node


def _convert(current: Any, value: Any, where: str, options: tuple[Any, ...]) -> Any:
  """Command-line text as the type of the value it replaces, or as its annotation says."""
  if not isinstance(value, str):
    return _as_config(value)
  if not isinstance(current, ConfigDict):
    return _parse(where, value, options or (() if current is None else (type(current),)))
  if ':' in value:
    return use(load(value))
  if value == 'None' and _NONE in options:
    return None
  names = ', '.join(f'{where}.{k}' for k in current if k != FN)
  raise UserError(
    f'{where} is a group of settings: set one of {names}'
    + (f', or {where}=module:function' if FN in current else '')
  )


def _parse(where: str, text: str, options: tuple[Any, ...]) -> Any:
  """`text` as one of the types in `options`; as the Python literal it reads as when there are none."""
  if text == 'None' and _NONE in options:
    return None
  if text.lower() in ('true', 'false') and bool in options:
    return text.lower() == 'true'
  if Callable in options and ':' in text:
    return use(load(text))
  value: Any = text
  if options == () or set(options) - {str, _NONE, Callable}:
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval(text)
  value = tuple(value) if isinstance(value, list) else value
  if (
    float in options
    and int not in options
    and (type(value) is int or text in ('inf', '-inf', 'nan'))
  ):
    return float(value)
  if not options or type(value) in options:
    return value
  if int in options and isinstance(value, float) and value.is_integer():
    return int(value)  # 1e6
  if tuple in options:
    return (value,)
  if str in options:
    return text
  raise UserError(f'{where} must be {_names(options)}, got {text!r}')


def _plain(value: Any, where: str = 'config') -> Any:
  if isinstance(value, ConfigDict):
    return {k: _plain(v, f'{where}.{k}') for k, v in value.items()}
  if isinstance(value, tuple | list):
    return [_plain(v, where) for v in value]
  if not isinstance(value, int | float | str | bool | None):
    raise UserError(
      f'{where} is {value!r}, which no config can hold: give a plain value or use(...)'
    )
  return value


def _unplain(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_unplain(v) for v in value)
  if not isinstance(value, dict):
    return value
  kw = {k: _unplain(v) for k, v in value.items()}
  path = kw.pop(FN, None)
  return config(**kw) if path is None else use(load(path), **kw)
