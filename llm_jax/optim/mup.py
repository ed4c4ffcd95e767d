"""Learning rates of muP: one factor for every weight from its axes, for `chain.make(scaling=...)`.

With them the best learning rate of a small base model is that of a wide one (Tensor Programs V, Yang et al. 2022,
arXiv:2203.03466, table 3). `base` and the kinds of weights are explained in core/widths.py; factors are 1 in the base
model. A base that names `layers` makes them follow the depth too, for blocks whose residual branches are multiplied
with `widths.residual_multiplier` of the same alpha.

Weight decay is independent of the width: a step takes away the fraction rate * weight_decay of every parameter,
whatever its factor. That is what the authors' package does, whose AdamW multiplies the decay by what it divides the
rate by, and what Wang & Aitchison 2024 (arXiv:2405.13698) find to transfer. Adam's eps has to stay below the gradients,
which shrink with width and depth; a global clipping norm is the same at all widths. The gate of a shared expert
(`weigh`) has one axis and is taken for a bias; give it a factor by path.
"""

from collections.abc import Mapping

from llm_jax.core import widths
from llm_jax.core.errors import UserError


def adam(names: tuple, shape: tuple, *, base: Mapping[str, int], alpha: float = 0.5) -> float:
  """1 / fan-in for hidden and output weights, 1 for the others; times depth^(alpha - 1) within the layers.

  For Adam, AdamW, Lion, and Adafactor with `min_scale=None`: rules whose steps do not depend on the size of the
  gradient. Depth: arXiv:2310.02244, table 1 (alpha 1/2), arXiv:2505.01618, table 1 (any alpha).
  """
  ratio = widths.ratios(names, shape, base)
  return ratio.depth ** (alpha - 1) / ratio.inward


def sgd(names: tuple, shape: tuple, *, base: Mapping[str, int], alpha: float = 0.5) -> float:
  """fan-out / fan-in, where an axis that does not grow counts 1: the fan-out for input weights and biases, 1 / fan-in
  for output weights, 1 for hidden ones; times depth^(2 alpha - 1) within the layers.

  base: with `norm`, the width of norms, for their scales. A norm of the heads (QK-norm) needs a factor by path.
  """
  if 'norm' in names and 'norm' not in base:
    raise UserError(
      "the step of SGD on a norm grows with its width, and base does not name it: add base['norm']"
    )
  ratio = widths.ratios(names, shape, base)
  return ratio.depth ** (2 * alpha - 1) * ratio.outward / ratio.inward


def adafactor(names: tuple, shape: tuple, *, base: Mapping[str, int], alpha: float = 0.5) -> float:
  """1 / sqrt(fan-in) for hidden weights, 1 for the others; times depth^(alpha - 1) within the layers.

  Adafactor multiplies steps by the root mean square of the weight, which muP keeps at 1 / sqrt(fan-in) for hidden and
  at 1 / fan-in for output weights: what is left of Adam's factors. It does not hold for weights below `min_scale`,
  which is the same at all widths, so not for the first steps of weights that begin at zero.
  """
  ratio = widths.ratios(names, shape, base)
  return ratio.depth ** (alpha - 1) * (1.0 if ratio.output else ratio.inward**-0.5)
