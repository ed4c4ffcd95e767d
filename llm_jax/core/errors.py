"""The one exception for what a user can put right.

Everything that can go wrong because of a flag, a config, a file or a machine raises `UserError`
with one sentence that says what is wrong and one that says what to do. The command line prints it
as one line and exits with code 2; inside Python it is an ordinary `ValueError`.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Wrong input, with the remedy in the message."""


def nearest(name: str, known: Iterable[str]) -> str:
  """`"did you mean 'batch'?"` when a known name is close, else the known names."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'known: {", ".join(known) if known else "none"}'
