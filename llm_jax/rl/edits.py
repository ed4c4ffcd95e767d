"""What a revision changed, token by token: the credit that FIGA gives (arXiv:2311.04072, section 3.3).

bad, good = edits.changed([5, 6, 7], [5, 8, 7, 9])     # [0, 1, 0] and [0, 1, 0, 1]
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.rl.annotate import Annotated


def changed(before: Sequence[int], after: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Which tokens of `before` a shortest edit takes away or replaces, which of `after` it puts there, bool each.

  The edit is one of fewest insertions, deletions and substitutions (Levenshtein 1966).
  """
  n, m = len(before), len(after)
  cost = np.zeros((n + 1, m + 1), np.int32)
  cost[:, 0], cost[0] = np.arange(n + 1), np.arange(m + 1)
  for i in range(1, n + 1):
    for j in range(1, m + 1):
      swap = cost[i - 1, j - 1] + (before[i - 1] != after[j - 1])
      cost[i, j] = min(swap, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
  gone, put = np.ones(n, bool), np.ones(m, bool)
  i, j = n, m
  while i and j:
    same = before[i - 1] == after[j - 1]
    if cost[i, j] == cost[i - 1, j - 1] + (not same):
      gone[i - 1], put[j - 1] = not same, not same
      i, j = i - 1, j - 1
    elif cost[i, j] == cost[i - 1, j] + 1:
      i -= 1
    else:
      j -= 1
  return gone, put


def with_credit(
  model: Any,
  *,
  source: Callable,
  reward: float = 1.0,
  penalty: float = 0.5,
  unchanged: float = 0.0,
) -> Annotated:
  """Adds `chosen/credit` and `rejected/credit` f32 [batch, length] to pairs of a revised and an initial answer.

  reward: of tokens that the revision added or replaced with; penalty: of tokens that it took away or replaced;
  unchanged: reward of the revision's other tokens. The paper's alpha, beta and gamma.
  """

  def add(batch: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
    del state
    credit = {side: np.zeros(batch[f'{side}/weights'].shape, np.float32) for side in SIDES}
    for row in range(len(batch['chosen/weights'])):
      at = [np.flatnonzero(batch[f'{side}/weights'][row]) for side in SIDES]
      ids = [batch[f'{side}/targets'][row, i].tolist() for side, i in zip(SIDES, at, strict=True)]
      gone, put = changed(*ids)
      credit['rejected'][row, at[0]] = np.where(gone, penalty, 0)
      credit['chosen'][row, at[1]] = np.where(put, reward, unchanged)
    return batch | {f'{side}/credit': value for side, value in credit.items()}

  return Annotated(source(model), add)


SIDES = ('rejected', 'chosen')  # before and after
