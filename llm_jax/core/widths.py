"""Widths and depths against those of a base model, read off axis names: what muP needs to know of a weight.

Tensor Programs V (Yang et al. 2022, arXiv:2203.03466) sorts weights by which of their dimensions grow with the model.
Here `base` tells: a mapping from the names of the axes that grow to their sizes in the base model, for instance
`dict(embed=64, ffn=256, heads=4)`. An axis that it does not name (`vocab`, ...) has one size in all models.

| kind | axes that grow | examples |
|---|---|---|
| input | of the output only | embeddings, learned positions, biases, scales of norms |
| hidden | of input and output | projections of attention and feed-forwards, experts among them |
| output | of the input only | an untied head, a router, the keys of multi-query attention |

Initialisation is in model/init.py (`mup`), learning rates in optim/mup.py; the multipliers that are numbers in a
config are here: `attention_scale`, `head_multiplier`, `residual_multiplier`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_jax.core import mesh
from llm_jax.core.errors import UserError, nearest

_UNKNOWN = ('state', 'taps')  # of recurrent mixers, whose weights are not all projections


class Ratios(NamedTuple):
  """A weight against that of the base model.

  inward: of the sizes it sums over, the fan-in; outward: of those it makes; both 1 where nothing grows. depth: of the
  stack's repeats, 1 outside of it. output: the fan-in grows and what is made does not.
  """

  inward: float
  outward: float
  depth: float
  output: bool


def ratios(names: Sequence[str], shape: Sequence[int], base: Mapping[str, int]) -> Ratios:
  """How much wider and deeper than in the base model a weight of these axes is.

  What a projection sums over is `embed` where that comes first, else all but its last axis; heads and head_dim are one
  axis, and a weight of one axis is a bias or a scale, which sums over nothing. Raises `UserError` for a name in `base`
  that is no axis, and for the convolutions and states of recurrent mixers: their axes do not say what is summed.
  """
  _check(base)
  if bad := set(names) & set(_UNKNOWN):
    raise UserError(
      f'muP has no rule for a weight of the axes {tuple(names)}: {min(bad)!r} belongs to a recurrent mixer; '
      'use it with attention and feed-forwards'
    )
  front = 0
  while front < len(names) and names[front] in ('layers', 'expert'):
    front += 1
  own = list(zip(names, shape, strict=True))
  stacked, own = own[:front], own[front:]
  merged = {'heads' if n in ('groups', 'head_dim') else n for n, _ in own}
  cut = 0 if len(merged) < 2 else 1 if own[0][0] == 'embed' else len(own) - 1
  grows = lambda part: any(n in base for n, _ in part)
  inward, outward, depth = (
    _ratio(part, base) for part in (own[:cut], own[cut:], [x for x in stacked if x[0] == 'layers'])
  )
  return Ratios(inward, outward, depth, grows(own[:cut]) and not grows(own[cut:]))


def base_shape(
  names: Sequence[str], shape: Sequence[int], base: Mapping[str, int]
) -> tuple[int, ...]:
  """The shape that the weight has in the base model."""
  return tuple(base.get(name, n) for name, n in zip(names, shape, strict=True))


def attention_scale(*, head_dim: int, base: int) -> float:
  """sqrt(base) / head_dim: muP's 1/d in place of 1/sqrt(d), equal to it in the base model (definition 4.1).

  For `SelfAttention(scale=...)`. Where the number of heads grows and not their size this is 1/sqrt(head_dim).
  """
  return base**0.5 / head_dim


def head_multiplier(*, embed: int, base: int) -> float:
  """base / embed: what the logits of a tied head are multiplied with (table 8), for `Tied(multiplier=...)`.

  An untied head needs none: its initial values and learning rate are scaled in its place (table 3), which is the
  same function and the same updates (lemma J.1).
  """
  return base / embed


def residual_multiplier(*, layers: int, base: int, alpha: float = 0.5) -> float:
  """(layers / base)^-alpha: what every addition to the residual stream is multiplied with, for `norms.scaled`.

  alpha: 1/2 is Depth-muP (Yang et al. 2023, arXiv:2310.02244, table 1), 1 CompleteP (Dey et al. 2025,
  arXiv:2505.01618, table 1). The learning rates of optim/mup.py take the same alpha.
  """
  return (layers / base) ** -alpha


def _ratio(part: Sequence[tuple[str, int]], base: Mapping[str, int]) -> float:
  found = 1.0
  for name, size in part:
    found *= size / base.get(name, size)
  return found


def _check(base: Mapping[str, int]) -> None:
  for name, size in base.items():
    if name not in mesh.NAMES:
      raise UserError(f'base names the axis {name!r}; {nearest(name, mesh.NAMES)}')
    if size < 1:
      raise UserError(f'base {name}={size}: give the size of that axis in the base model')
