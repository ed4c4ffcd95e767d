"""Hugging Face folders (`config.json` and safetensors), read and written.

    model, params = huggingface.load('DIR')
    huggingface.save('DIR2', params, huggingface.settings('DIR'))

What goes where is data, in `table.py` and `architectures/`; here is what obeys it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax.core import tree
from llm_jax.core.config import ConfigDict, build
from llm_jax.core.errors import UserError
from llm_jax.interop import families
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import ENCODER, LAYER, Family, Row
from llm_jax.model.functions import Model

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'


def load(folder: str) -> tuple[Model, Any]:
  """(model, parameters as f32 numpy arrays) of a folder.

  Raises `UserError` naming the key or tensor: an unknown architecture, a setting that is not supported, a tensor that
  is missing, left over, of another shape, or in a file that is cut off.
  """
  told = settings(folder)
  family = families.family(told)
  model = build(family.model(told))()
  tensors = Tensors(folder)
  return model, to_ours(family, tensors.names, tensors.read, shapes(model))


def save(folder: str, params: Any, told: Settings) -> None:
  """Writes parameters of the model that `told`, a config.json, describes. The folder appears once all is written."""
  family = families.family(told)
  flat = checked(family, params, told)
  if os.path.exists(folder):
    raise UserError(f'{folder} exists: name a new folder')
  temporary = f'{os.path.abspath(folder)}.new'
  shutil.rmtree(temporary, ignore_errors=True)
  os.makedirs(temporary)
  with open(os.path.join(temporary, CONFIG), 'w', encoding='utf-8') as f:
    json.dump(dict(told), f, indent=1)
  save_file(to_theirs(family, flat), os.path.join(temporary, WEIGHTS), metadata={'format': 'pt'})
  os.rename(temporary, folder)


def checked(family: Family, params: Any, told: Settings) -> dict[str, np.ndarray]:
  """The parameters by path as f32, if they are of the model that `told` describes."""
  wanted = {path: x.shape for path, x in shapes(build(family.model(told))()).items()}
  flat = {path: np.asarray(x, np.float32) for path, x in tree.flatten(params).items()}
  found = {path: x.shape for path, x in flat.items()}
  for path in sorted({*wanted, *found}):
    if wanted.get(path) != found.get(path):
      raise UserError(
        f'{path!r} is {found.get(path)} in the parameters, {wanted.get(path)} by the config.json: '
        'use the one they are of'
      )
  return flat


def settings(folder: str) -> dict[str, Any]:
  """The config.json of a folder."""
  path = os.path.join(folder, CONFIG)
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except OSError as e:
    raise UserError(
      f'{folder} is no Hugging Face folder: {CONFIG} cannot be read ({e.strerror.lower()})'
    ) from e
  except ValueError as e:
    raise UserError(f'{path} is not JSON ({e}): download it again') from e


def config(folder: str) -> ConfigDict:
  """The model of a folder as the `model` of a config: what a run would train on."""
  told = settings(folder)
  return families.family(told).model(told)


class Tensors:
  """The tensors of a folder by name, from one file or several with an index; read one at a time, as f32."""

  def __init__(self, folder: str):
    self._files = {}
    for file in self._all(folder):
      path = os.path.join(folder, file)
      try:
        opened = safe_open(path, framework='numpy')
      except (OSError, SafetensorError) as e:
        raise UserError(f'{path} cannot be read ({e}): download it again') from e
      self._files.update(dict.fromkeys(opened.keys(), opened))
    self.names = sorted(self._files)

  def _all(self, folder: str) -> list[str]:
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
      try:
        with open(index, encoding='utf-8') as f:
          return sorted(set(json.load(f)['weight_map'].values()))
      except (ValueError, KeyError) as e:
        raise UserError(f'{index} is no index of tensors ({e}): download it again') from e
    if not os.path.exists(os.path.join(folder, WEIGHTS)):
      raise UserError(
        f'{folder} has neither {WEIGHTS} nor {INDEX}: other formats are not read, save it as safetensors'
      )
    return [WEIGHTS]

  def read(self, name: str) -> np.ndarray:
    """One tensor."""
    return self._files[name].get_tensor(name).astype(np.float32)


def shapes(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a model's parameters by path."""
  return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))


def to_ours(
  family: Family,
  names: Iterable[str],
  read: Callable[[str], np.ndarray],
  wanted: Mapping[str, Any],
  *,
  told: str = 'its config.json',
) -> Any:
  """Their tensors as a tree of ours.

  names: of the tensors there are. read: a name -> its values. wanted: our paths -> shapes. told: what errors call that
  which asks for these shapes.
  """
  there = {_bare(family, name): name for name in names}
  ours: dict[str, np.ndarray] = {}
  for row, paths, layers in _applying(family, wanted):
    stacks = (layers is not None) + ('#' in row.theirs)  # axes of ours that are names of theirs
    sizes = [wanted[path].shape[stacks:] for path in paths]

    def one(theirs: str, row: Row = row, sizes: list = sizes) -> list[np.ndarray]:
      if theirs not in there:
        raise UserError(f'the checkpoint has no tensor {theirs!r}, which {told} asks for')
      name = there.pop(theirs)
      return _import(row, family, name, read(name), sizes, told)

    if layers is not None:  # filled layer by layer: never two copies of a stack
      ours |= {path: np.empty(wanted[path].shape, np.float32) for path in paths}
    for i, of in enumerate(_names(row, layers, wanted[paths[0]].shape)):
      parts = _stacked([one(name) for name in of]) if '#' in row.theirs else one(of[0])
      for path, part in zip(paths, parts, strict=True):
        if layers is None:
          ours[path] = part
        else:
          ours[path][i] = part
  # a head beside a tied table: the same values, or the config is of another checkpoint
  for row in family.rows:
    name = there.get(row.theirs) if row.ours == 'head/w' and 'head/w' not in wanted else None
    if name is not None and not np.array_equal(read(name), ours['embedding/table']):
      raise UserError(
        f'the config.json ties the head to the embedding, but {name!r} has other values: '
        'set tie_word_embeddings to false in it'
      )
  missing = sorted(wanted.keys() - ours.keys())
  if missing:
    raise UserError(f'the table of this architecture has no row for {missing[0]!r}')
  left = [name for bare, name in there.items() if not bare.endswith(family.ignored)]
  if left:
    raise UserError(f'the checkpoint has the tensor {left[0]!r}, which {told} has no place for')
  return tree.unflatten(ours)


def to_theirs(family: Family, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Our parameters, by path, as their tensors."""
  theirs = {}
  for row, paths, layers in _applying(family, ours):
    prefix = '' if paths[0] in ('head/w', 'head/bias') else family.prefix
    for i, of in enumerate(_names(row, layers, ours[paths[0]].shape)):
      layer = [ours[path] if layers is None else ours[path][i] for path in paths]
      for j, name in enumerate(of):
        parts = [x[j] for x in layer] if '#' in row.theirs else layer
        theirs[prefix + name] = np.ascontiguousarray(_export(row, family, parts))
  return theirs


def _bare(family: Family, name: str) -> str:
  """A name as it is called now, without the family's prefix or what a checkpoint of the bare model has of it."""
  for old, new in family.renamed:
    name = name.removesuffix(old) + new if name.endswith(old) else name
  for prefix in (family.prefix, family.prefix.partition('.')[2]):
    if prefix and name.startswith(prefix):
      return name[len(prefix) :]
  return name


def _applying(
  family: Family, wanted: Mapping[str, Any]
) -> list[tuple[Row, tuple[str, ...], list[int] | None]]:
  """The rows for these paths of ours with the numbers of the layers that a path stacks, the first row for each."""
  found, filled = [], set()
  for row in family.rows:
    ours = row.ours if isinstance(row.ours, tuple) else (row.ours,)
    stack = next((stack for stack in (LAYER, ENCODER) if ours[0].startswith(stack)), None)
    for place, layers in _places(stack, wanted) if stack else [('', None)]:
      paths = tuple(path.replace(stack or '', place) if stack else path for path in ours)
      needed = {*paths, *([row.needs.replace(stack or '', place)] if row.needs else [])}
      if needed <= wanted.keys() and not filled & {*paths}:
        found.append((row, paths, layers))
        filled |= {*paths}
  return found


def _places(stack: str, wanted: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
  """Where the layers of a stack lie, 'decoder/layers_1/block_0/', and the numbers of the layers stacked there."""
  at = re.compile(re.escape(stack.removesuffix('layer/')) + r'layers(?:_(\d+))?/block_(\d+)/')
  sizes: dict[int, dict[int, int]] = {}  # segment -> block -> repeats
  for path, x in wanted.items():
    if m := at.match(path):
      sizes.setdefault(int(m[1] or 0), {})[int(m[2])] = x.shape[0]
  found, first = [], 0
  for segment, blocks in sorted(sizes.items()):
    name = stack.removesuffix('layer/') + (f'layers_{segment}' if segment else 'layers')
    for block, repeats in sorted(blocks.items()):
      numbers = [first + block + i * len(blocks) for i in range(repeats)]
      found.append((f'{name}/block_{block}/', numbers))
    first += sum(blocks.values())
  return found


def _names(row: Row, layers: list[int] | None, shape: tuple[int, ...]) -> list[list[str]]:
  """Their names for one path of ours: by layer, then by expert."""
  experts = range(shape[layers is not None]) if '#' in row.theirs else [0]
  return [
    [row.theirs.replace('*', str(i)).replace('#', str(j)) for j in experts]
    for i in (layers if layers is not None else [0])
  ]


def _stacked(experts: list[list[np.ndarray]]) -> list[np.ndarray]:
  """The parts of every expert, each on a leading axis."""
  return [np.stack(part) for part in zip(*experts, strict=True)]


def _import(
  row: Row,
  family: Family,
  name: str,
  x: np.ndarray,
  shapes: list[tuple[int, ...]],
  told: str,
) -> list[np.ndarray]:
  """One tensor of theirs as one or several of ours."""
  left, right = row.pattern.split(' -> ')
  together, axis = isinstance(row.ours, tuple), _joined(right)
  sizes = dict(family.sizes)
  if together and axis is not None and len(group := _groups(right)[axis]) > 1:
    sizes[group[0]] = shapes[-1][axis]  # the last has one of each group
  for (*known, letter), n in zip(
    _groups(right)[together and axis is None :], shapes[0], strict=True
  ):
    sizes[letter] = n // _size(known, sizes)
  if together:
    parts = (
      [shape[axis] // _size(_groups(right)[axis][:-1], sizes) for shape in shapes]
      if axis is not None
      else []
    )
    sizes |= dict(p=len(shapes)) if axis is None else dict(n=sum(parts))
  x = x[row.skip :] + np.float32(row.add) if row.skip or row.add else x
  wanted = tuple(_size(group, sizes) for group in _groups(left))
  if x.shape != wanted:
    raise UserError(f'the tensor {name!r} has shape {x.shape}, {told} asks for {wanted}')
  if not together or axis is None:
    y = rearrange(x, row.pattern, **_used(sizes, row.pattern))
    return list(y) if together else [y]
  y = rearrange(x, f'{left} -> {_apart(right)}', **_used(sizes, row.pattern))
  cuts = np.cumsum(parts)[:-1]
  found = np.split(y, cuts, axis=_letters(_apart(right)).index('n'))
  return [part.reshape(shape) for part, shape in zip(found, shapes, strict=True)]


def _export(row: Row, family: Family, parts: list[np.ndarray]) -> np.ndarray:
  """The reverse of `_import`."""
  left, right = row.pattern.split(' -> ')
  sizes = dict(family.sizes)
  if not isinstance(row.ours, tuple):
    y = parts[0]
  elif (axis := _joined(right)) is None:
    y = np.stack(parts)
  else:
    if len(group := _groups(right)[axis]) > 1:
      sizes[group[0]] = parts[-1].shape[axis]
    right = _apart(right)
    at = _letters(right).index('n')
    split = lambda x: x.reshape(*x.shape[:axis], sizes[group[0]], -1, *x.shape[axis + 1 :])
    y = np.concatenate([split(x) if len(group) > 1 else x for x in parts], axis=at)
  x = rearrange(y, f'{right} -> {left}', **_used(sizes, right))
  return np.pad(x - np.float32(row.add), ((row.skip, 0), *((0, 0),) * (x.ndim - 1)))


def _joined(right: str) -> int | None:
  """The axis of ours on which several are put end to end; None where they are stacked."""
  return next((i for i, group in enumerate(_groups(right)) if group[-1] == 'n'), None)


def _apart(right: str) -> str:
  """The side with the groups around `n` opened: 'd (g n) k' -> 'd g n k'."""
  return re.sub(r'\(([^)]*\bn)\)', r'\1', right)


def _groups(side: str) -> list[list[str]]:
  """'(h k) d' -> [['h', 'k'], ['d']]."""
  return [group.strip('()').split() for group in re.findall(r'\([^)]*\)|\S+', side)]


def _letters(side: str) -> list[str]:
  """The axes of a side, each under the last of its letters."""
  return [group[-1] for group in _groups(side)]


def _size(group: list[str], sizes: Mapping[str, int]) -> int:
  return int(np.prod([1 if letter == '1' else sizes[letter] for letter in group]))


def _used(sizes: Mapping[str, int], pattern: str) -> dict[str, int]:
  return {letter: n for letter, n in sizes.items() if letter in re.findall(r'\w+', pattern)}
