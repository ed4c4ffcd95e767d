"""Numbers about preferences: Elo and Bradley-Terry ratings, how well rewards agree with people, people with each other.

`plot` draws the calibration and the accuracy of a reward model over the margin of its rewards.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core import files
from llm_jax.core.errors import UserError

SCALE = 400 / math.log(10)  # points of Elo per unit of Bradley-Terry's log-odds


def expected(a: float, b: float) -> float:
  """The chance that a player rated `a` beats one rated `b`: 1 / (1 + 10^((b - a) / 400))."""
  return 1 / (1 + 10 ** ((b - a) / 400))


def elo(
  games: Sequence[tuple[Hashable, Hashable, float]], *, k: float = 32.0, start: float = 1000.0
) -> dict[Hashable, float]:
  """Ratings after `games`, in their order: (a, b, what a scored: 1 won, 0.5 a tie, 0 lost).

  k: points at stake in a game. start: everybody's first rating. The sum of all ratings stays what it was.
  """
  ratings: dict[Hashable, float] = {}
  for a, b, score in games:
    _check(a, b, score)
    change = k * (score - expected(ratings.setdefault(a, start), ratings.setdefault(b, start)))
    ratings[a] += change
    ratings[b] -= change
  return ratings


def bradley_terry(
  games: Sequence[tuple[Hashable, Hashable, float]], *, mean: float = 1000.0, steps: int = 100
) -> dict[Hashable, float]:
  """The ratings under which the games were likeliest, on Elo's scale, whatever their order (Bradley and Terry 1952).

  mean: of all ratings. Newton's method, at most `steps` steps. Raises `UserError` where there is no maximum: somebody
  won or lost all games against the others.
  """
  names = list(dict.fromkeys(name for a, b, _ in games for name in (a, b)))
  at, wins = {name: i for i, name in enumerate(names)}, np.zeros((len(names),) * 2)
  for a, b, score in games:
    _check(a, b, score)
    wins[at[a], at[b]] += score
    wins[at[b], at[a]] += 1 - score
  _check_connected(wins, names)
  r, played = np.zeros(len(names)), wins + wins.T
  for _ in range(steps):
    p = 1 / (1 + np.exp(r[None] - r[:, None]))  # of the row against the column
    gradient = (wins - played * p).sum(1)
    weights = played * p * (1 - p)
    hessian = np.diag(weights.sum(1)) - weights + 1 / len(names)  # which keeps the mean at 0
    step = np.linalg.solve(hessian, gradient)
    r += step * min(1, 2 / max(np.abs(step).max(), 1e-12))
    if np.abs(step).max() < 1e-10:
      break
  return dict(zip(names, (mean + SCALE * (r - r.mean())).tolist(), strict=True))


def _check(a: Hashable, b: Hashable, score: float) -> None:
  if a == b or not 0 <= score <= 1:
    raise UserError(
      f'a game is (a, b, score of a between 0 and 1) of two players, not {(a, b, score)}'
    )


def _check_connected(wins: np.ndarray, names: list) -> None:
  """Everybody must be reachable from everybody over games that were won, or a rating is infinite."""
  reach = (wins > 0) | np.eye(len(names), dtype=bool)
  for _ in names:
    reach = (reach.astype(float) @ reach) > 0
  if not reach.all():
    i, j = np.argwhere(~reach)[0]
    raise UserError(
      f'{names[i]!r} never won against {names[j]!r}, nor against anybody who did: '
      'the likeliest rating is infinite; add games or use elo'
    )


def wilson(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
  """The interval around right / count of a proportion (Wilson 1927), 95 % with z = 1.96."""
  if count <= 0:
    return 0.0, 1.0
  p, zz = right / count, z * z / count
  middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
  return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


class Bin(NamedTuple):
  """Pairs whose margins lie together. said: the mean of what the model predicts; right: the share that it orders as
  people did, with its interval; margin: the mean absolute margin; count: how many."""

  said: float
  right: float
  low: float
  high: float
  margin: float
  count: int


def calibration(margins: Any, *, bins: int = 10) -> list[Bin]:
  """Bins with equally many pairs, by how sure the model is. margins: R(chosen) - R(rejected), [pairs].

  The model says sigmoid(|margin|) for the answer that it prefers; calibrated, that is how often people agree.
  """
  margins = np.asarray(margins, np.float64).reshape(-1)
  if not len(margins) or not np.isfinite(margins).all():
    raise UserError(
      f'calibration needs finite margins, got {len(margins)} of which '
      f'{np.count_nonzero(~np.isfinite(margins))} are not: look at the rewards'
    )
  found = []
  for part in np.array_split(margins[np.argsort(np.abs(margins), kind='stable')], bins):
    if len(part):
      right = float((part > 0).sum() + 0.5 * (part == 0).sum())
      said = float((1 / (1 + np.exp(-np.abs(part)))).mean())
      low, high = wilson(right, len(part))
      found.append(Bin(said, right / len(part), low, high, float(np.abs(part).mean()), len(part)))
  return found


def calibration_error(margins: Any, *, bins: int = 10) -> float:
  """The mean distance between what the model says and how often it is right (expected calibration error)."""
  found = calibration(margins, bins=bins)
  return sum(b.count * abs(b.said - b.right) for b in found) / sum(b.count for b in found)


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
  """Cohen's kappa of two labellers of the same items: agreement beyond chance, 1 complete, 0 none (Cohen 1960)."""
  if len(first) != len(second) or not len(first):
    raise UserError(f'kappa compares two labels of each item, got {len(first)} and {len(second)}')
  count = len(first)
  same = sum(a == b for a, b in zip(first, second, strict=True)) / count
  share = lambda labels, label: sum(one == label for one in labels) / count
  chance = sum(share(first, label) * share(second, label) for label in {*first, *second})
  return 1.0 if chance == 1 else (same - chance) / (1 - chance)


def plot(path: str, margins: Mapping[str, Any], *, bins: int = 10) -> str:
  """Draws calibration (left) and accuracy by margin (right) of reward models by name; returns `path`, a PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  left.plot([0.5, 1], [0.5, 1], color='0.6', linewidth=1)
  for name, values in margins.items():
    found = calibration(values, bins=bins)
    y = [b.right for b in found]
    off = [[b.right - b.low for b in found], [b.high - b.right for b in found]]
    style = dict(marker='o', markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2, label=name)
    left.errorbar([b.said for b in found], y, off, **style)
    right.errorbar([b.margin for b in found], y, off, **style)
  left.set_xlabel('predicted chance that the preferred answer is chosen')
  right.set_xlabel('margin of the rewards')
  left.set_ylabel('people agree')
  for panel in (left, right):
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
  right.legend(frameon=False)
  with files.whole(path, 'wb') as f:
    figure.savefig(f, format='png')
  return path
