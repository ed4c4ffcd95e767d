"""Variants of one test: some run in `make test`, all of them in `make test` and `make slow` together."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def variants(every: Iterable[Any], fast: Collection[Any]) -> list:
  """`every` as parameters, marked slow but for those in `fast`. A tuple is one set of several arguments.

  Raises `ValueError` for a fast one that there is not.
  """
  every = list(every)
  if lost := [one for one in fast if one not in every]:
    raise ValueError(f'no variant {lost[0]!r} of this test')
  args = lambda one: one if isinstance(one, tuple) else (one,)
  return [pytest.param(*args(one), marks=() if one in fast else pytest.mark.slow) for one in every]
