"""Parameter trees by path: nested dicts whose leaves are named `'decoder/layers/block_0/mixer/q'`.

Leaf types such as `weights.LowRank` are pytree nodes: their parts are leaves one level further down
(`.../q/w`, `.../q/a`, `.../q/b`), so freezing, counting and renaming see them without special
cases.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from llm_jax.core.errors import UserError, nearest


def _name(key: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def path_of(keys: Sequence[Any]) -> str:
  """`'a/b/c'` for a jax key path."""
  return '/'.join(map(_name, keys))


def flatten(tree: Any, is_leaf: Callable | None = None) -> dict[str, Any]:
  """Every leaf by its path, in tree order. None is no leaf."""
  return {path_of(k): v for k, v in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def map_paths(
  fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable | None = None
) -> Any:
  """`jax.tree.map` whose function also gets the leaf's path first."""
  return jax.tree_util.tree_map_with_path(
    lambda k, *v: fn(path_of(k), *v), tree, *rest, is_leaf=is_leaf
  )


def match(tree: Any, rules: Iterable[tuple[str, Any]]) -> Any:
  """A tree like `tree` with the value of the first rule whose regex finds the leaf's path.

  rules: (regex, value) pairs, searched in order with `re.search`. Every leaf must match one; end
  with `('.*', default)`. Raises `UserError` naming the leaves that match none.
  """
  compiled = [(re.compile(pattern), value) for pattern, value in rules]
  missing = [path for path in flatten(tree) if not any(p.search(path) for p, _ in compiled)]
  if missing:
    raise UserError(f'no rule matches {", ".join(missing[:3])}; end the rules with (".*", default)')
  return map_paths(lambda path, _: next(value for p, value in compiled if p.search(path)), tree)


def select(tree: Any, pattern: str) -> Any:
  """A tree like `tree` of booleans: does the regex `pattern` find the leaf's path?"""
  found = map_paths(lambda path, _: bool(re.search(pattern, path)), tree)
  if not any(jax.tree.leaves(found)):
    raise UserError(
      f'the regex {pattern!r} matches no parameter; {nearest(pattern, flatten(tree))}'
    )
  return found


def split(tree: Any, chosen: Any) -> tuple[Any, Any]:
  """(chosen leaves, the others); the holes are None, which jax takes for an empty subtree."""
  yes = jax.tree.map(lambda c, x: x if c else None, chosen, tree)
  no = jax.tree.map(lambda c, x: None if c else x, chosen, tree)
  return yes, no


def merge(first: Any, second: Any) -> Any:
  """Undoes `split`: each leaf from whichever tree has it."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
  )


def is_names(x: Any) -> bool:
  """Whether `x` is a tuple of axis names, one per axis (None: no name), and not a tuple of subtrees."""
  plain = isinstance(x, tuple) and not hasattr(x, '_fields')
  return plain and all(n is None or isinstance(n, str) for n in x)


def align(axes: Any, tree: Any) -> Any:
  """The axis names of just the leaves of `tree`: the other entries of `axes` become the holes that `split` leaves.

  Raises `UserError` for a leaf without names or with another number of axes.
  """
  flat = flatten(axes, is_leaf=is_names)

  def one(path: str, leaf: Any) -> tuple:
    if path not in flat:
      raise UserError(f'parameter {path!r} has no axis names; {nearest(path, flat)}')
    if len(flat[path]) != len(leaf.shape):
      raise UserError(
        f'parameter {path!r} of shape {leaf.shape} has the axis names {flat[path]}: one for each axis'
      )
    return flat[path]

  return map_paths(one, tree)


def count(tree: Any) -> int:
  """The number of elements in all leaves (a Python int: 175B does not fit 32 bits)."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    size = 1
    for n in leaf.shape:
      size *= int(n)
    total += size
  return total


def nbytes(tree: Any) -> int:
  """Bytes of all leaves."""
  return sum(count(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def unflatten(flat: dict[str, Any]) -> dict:
  """Nested dicts from `{'a/b': x}`."""
  tree: dict = {}
  for path, value in flat.items():
    *parents, last = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def rename(flat: dict[str, Any], rules: Iterable[tuple[str, str]]) -> dict[str, Any]:
  """The paths of `flat` rewritten by (regex, replacement) pairs, all applied in order with `re.sub`.

  Raises `UserError` when two paths end up the same.
  """
  renamed: dict[str, Any] = {}
  for path, value in flat.items():
    new = path
    for pattern, replacement in rules:
      new = re.sub(pattern, replacement, new)
    if new in renamed:
      raise UserError(
        f'renaming maps two parameters to {new!r}, the second is {path!r}; narrow the regex'
      )
    renamed[new] = value
  return renamed
