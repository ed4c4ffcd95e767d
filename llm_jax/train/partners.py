"""Which stored array goes where, when parameters of one run are loaded into another model."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from llm_jax.core import tree
from llm_jax.core.errors import UserError, nearest

PARAMS = 'params/'  # where a stored state has its parameters


def wanted(here: dict[str, Any], only: str | None) -> dict[str, Any]:
  """The parameters to load, by path: those the regex finds, None: all. Empty arrays have nothing to load."""
  found = {p: x for p, x in here.items() if x.size and (only is None or re.search(only, p))}
  if not found:
    raise UserError(f'only={only!r} matches no parameter; {nearest(only or "", here)}')
  return found


def renamed(
  path: str,
  stored: Iterable[str],
  wanted: dict[str, Any],
  rename: Sequence[tuple[str, str]],
  only: str | None,
) -> dict[str, str]:
  """Wanted -> stored path, after renaming. Raises `UserError` for one without a partner; path: what the error names."""
  there = {p.removeprefix(PARAMS): p for p in stored if p.startswith(PARAMS)}
  there = tree.rename(there, rename)
  missing = [p for p in wanted if p not in there]
  if missing:
    near = nearest(missing[0], there)
    raise UserError(
      f'{path} has no parameter {missing[0]!r}; {near}: see init_from, rename and only'
    )
  unused = [p for p in there if p not in wanted]
  if unused and only is None:
    raise UserError(
      f'{path} has a parameter {unused[0]!r} that this model lacks: choose the ones to load with only=REGEX'
    )
  return {p: there[p] for p in wanted}


def averaged(path: str, stored: Iterable[str], wanted: dict[str, Any]) -> dict[str, str]:
  """Wanted -> stored path, that of the moving average where there is one."""
  stored = set(stored)
  means = {
    p.partition('/ema/')[2]: p for p in stored if p.startswith('opt_state/') and '/ema/' in p
  }
  chosen = {p: means.get(p, PARAMS + p) for p in wanted}
  missing = [p for p, there in chosen.items() if there not in stored]
  if missing:
    known = [p.removeprefix(PARAMS) for p in stored if p.startswith(PARAMS)]
    near = nearest(missing[0], known)
    raise UserError(
      f'{path} has no parameter {missing[0]!r}; {near}: use the config it was trained with'
    )
  return chosen


def refresh(opt_state: Any, new: dict[str, Any]) -> Any:
  """An optimizer state whose moving average starts from the new parameters; copies, since both are donated."""

  def one(path: str, x: Any) -> Any:
    name = path.rpartition('ema/')[2] if re.search(r'(^|/)ema/', path) else ''
    return jnp.array(new[name], copy=True, device=x.sharding) if name in new else x

  return tree.map_paths(one, opt_state)
