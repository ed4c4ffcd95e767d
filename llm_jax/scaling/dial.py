"""One dial: from the number of layers follows everything else that a pretraining run needs.

One function per number, each with the source of its formula; `turn` puts them together. configs/scaling/dial.py is the
run, and `llm-jax describe --config=configs/scaling/dial.py:depth=8` prints what it comes to.
"""

from typing import NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.scaling import laws


class Dial(NamedTuple):
  """A run. embed, heads, hidden: of the model; parameters: all of them; tokens: to train on; flops: 6 N D, N without
  the table; batch: in sequences; steps; peak: learning rate; warmup: in steps."""

  depth: int
  embed: int
  heads: int
  hidden: int
  parameters: int
  tokens: int
  flops: float
  batch: int
  steps: int
  peak: float
  warmup: int


def width(depth: int, *, aspect: int, head_dim: int) -> int:
  """aspect * depth, in whole heads: the loss hardly depends on it over a wide range (Kaplan et al. 2020,
  arXiv:2001.08361, figure 5); GPT-3 has 64 at its smallest and 128 at its largest (arXiv:2005.14165, table 2.1)."""
  return head_dim * -(-aspect * depth // head_dim)


def feed_forward(embed: int) -> int:
  """8/3 of the width, rounded up to a multiple of 64: three matrices for the price of two of four times the width
  (LLaMA, Touvron et al. 2023, arXiv:2302.13971, section 2.2)."""
  return 64 * -(-8 * embed // (3 * 64))


def parameters(*, depth: int, embed: int, hidden: int, vocab: int) -> int:
  """Four matrices of attention, three of SwiGLU and two norms in every layer, the last norm, and one table that is the
  head too."""
  return depth * (4 * embed * embed + 3 * embed * hidden + 2 * embed) + embed + vocab * embed


def tokens(number: int, *, ratio: float) -> int:
  """ratio * parameters: about 20 is optimal for a budget of compute (Hoffmann et al. 2022, arXiv:2203.15556,
  table 3)."""
  return round(ratio * number)


def batch(flops: float, *, length: int, multiple: int) -> int:
  """0.2920 C^0.3271 tokens (`laws.deepseek_batch`, fitted between 10^17 and 2 10^19 FLOPs) as sequences, at the nearest
  multiple of `multiple`."""
  return multiple * max(1, round(float(laws.deepseek_batch(flops)) / (length * multiple)))


def peak(flops: float) -> float:
  """0.3118 C^-0.1250 for AdamW (`laws.deepseek_rate`)."""
  return float(laws.deepseek_rate(flops))


def warmup(steps: int) -> int:
  """0.5 % of the steps (Zhao et al. 2023, arXiv:2303.18223, section 4.3.1: 0.1 to 0.5 %)."""
  return max(1, steps // 200)


def turn(
  depth: int,
  *,
  vocab: int,
  length: int,
  aspect: int = 64,
  head_dim: int = 64,
  ratio: float = 20.0,
  multiple: int = 8,
) -> Dial:
  """The run of this many layers.

  vocab: rows of the table. length: tokens in a sequence. aspect: width per layer. ratio: tokens per parameter.
  multiple: of the batch, so that it divides over devices.
  """
  for name, value in dict(depth=depth, aspect=aspect, head_dim=head_dim, ratio=ratio).items():
    if value <= 0:
      raise UserError(f'{name}={value} of the dial must be positive')
  embed = width(depth, aspect=aspect, head_dim=head_dim)
  hidden = feed_forward(embed)
  number = parameters(depth=depth, embed=embed, hidden=hidden, vocab=vocab)
  budget = tokens(number, ratio=ratio)
  flops = count.compute(parameters=number - vocab * embed, tokens=budget)
  rows = batch(flops, length=length, multiple=multiple)
  steps = -(-budget // (rows * length))
  heads = embed // head_dim
  return Dial(
    depth, embed, heads, hidden, number, budget, flops, rows, steps, peak(flops), warmup(steps)
  )
