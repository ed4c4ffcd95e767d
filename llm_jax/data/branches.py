r"""Comparisons that read their prompt once: a row holds several, each as one beginning and a branch for every answer.

    slot         0   1   2   3   4   5   6   7   8        prompt a b c d, chosen w x, rejected y z .
    inputs       a   b   c | d   w | d   y   z |
    targets      b   c   d | w   x | y   z   . |
    weights      0   0   0 | 1   1 | 1   1   1 |
    positions    0   1   2 | 3   4 | 3   4   5 |
    branches     0   0   0 | 1   1 | 2   2   2 |

A token attends to what comes before it in its own branch and in the beginning (`branches` 0), so its hidden state is
the one it has in a row of its own: the mask is that of a tree of two paths. Every branch begins with a copy of the
token from which its answer's first is predicted, the prompt's last; so each slot has one target, as everywhere. A pair
with P tokens of prompt takes P - 1 + |w| + |l| slots in the place of two padded rows.

    segments     [batch, length] int32    1, 2 ... per comparison in the row; 0 = padding
    compared     [batch, most] bool       whether the row has a comparison with the number of this column, from 1

Whatever is known of a comparison has the shape of `compared`. Models whose layers have no such mask are refused
(`card.unbranched`).
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib

ARRAYS = ('inputs', 'targets', 'weights', 'positions', 'branches')


def lay(texts: Sequence[batch_lib.Example], layout: batch_lib.Layout) -> dict[str, np.ndarray]:
  """Answers to one prompt as the arrays `ARRAYS` [slots].

  texts: prompt and answer each. What they share from the start, up to the token that predicts the first target that
  counts in any, is read once; texts that begin differently share less.
  """
  parts = [_alone(text, layout) for text in texts]
  starts = [int(np.argmax(part['weights'] > 0)) for part in parts]
  shared = min(_common(parts[0]['inputs'], part['inputs']) for part in parts)
  shared = min(shared, *starts)
  cut = [dict(part, branches=np.full_like(part['inputs'], k)) for k, part in enumerate(parts, 1)]
  begin = dict(cut[0], branches=np.zeros_like(cut[0]['inputs']))
  return {
    name: np.concatenate([begin[name][:shared], *(part[name][shared:] for part in cut)])
    for name in ARRAYS
  }


def most(sizes: np.ndarray, length: int) -> int:
  """How many comparisons of these numbers of slots a row of `length` can hold at most: the smallest ones."""
  return max(1, int(np.searchsorted(np.cumsum(np.sort(sizes)), length, side='right')))


def empty(layout: batch_lib.Layout, rows: int, most: int) -> dict[str, np.ndarray]:
  """Arrays for `rows` rows of padding, with room for `most` comparisons each."""
  made = batch_lib.empty(layout, rows)
  return made | dict(
    branches=np.zeros_like(made['inputs']), compared=np.zeros((rows, most), np.bool_)
  )


def put(
  batch: dict[str, np.ndarray], row: int, number: int, at: int, laid: dict[str, np.ndarray]
) -> None:
  """Writes what `lay` gave into a row from slot `at`, in place, as its comparison `number` (from 1)."""
  span = slice(at, at + len(laid['inputs']))
  for name in ARRAYS:
    batch[name][row, span] = laid[name]
  batch['segments'][row, span] = number
  batch['compared'][row, number - 1] = True


def check(card: object) -> None:
  """Raises `UserError` where a model cannot read rows that branch."""
  if card.unbranched:
    raise UserError(
      f'{card.unbranched}, so its rows cannot branch: use pairs.pairs, which gives every answer a row of its own'
    )


def _alone(text: batch_lib.Example, layout: batch_lib.Layout) -> dict[str, np.ndarray]:
  """The arrays of a text in a row of its own, without padding."""
  slots = len(text.inputs) + len(text.targets)
  made = batch_lib.empty(layout._replace(length=slots), 1)
  batch_lib.put(made, layout, 0, 1, 0, 0, text)
  return {name: value[0] for name, value in made.items()}


def _common(a: np.ndarray, b: np.ndarray) -> int:
  """How many entries are the same from the start."""
  size = min(len(a), len(b))
  differ = np.flatnonzero(a[:size] != b[:size])
  return int(differ[0]) if len(differ) else size
