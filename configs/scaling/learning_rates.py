r"""Which learning rate for which width. Differs from configs/scaling/isoflop.py in what is swept.

  llm-jax sweep --config=configs/scaling/learning_rates.py --workdir=runs/rates --workers=2
  llm-jax sweep --config=configs/scaling/learning_rates.py:widths=2,rates=3 --workdir=runs/rates --workers=2

Every size gets the same tokens at each rate, the rates a factor of two apart. Expected of the second command: the rate
of isoflop.py, RATE / width, is the best: 24 wide 2.243 nats per byte, with half of it 2.275, with twice as much 2.247;
48 wide 2.026, 2.059 and 2.075. One seed. The first command was not run as a whole.
"""

from configs.scaling import isoflop
from llm_jax.core.config import variant
from llm_jax.scaling import sweep

TOKENS = 500_000


def get_config(text=None):
  arg = variant(text, widths=4, rates=5)
  points = []
  for width, layers in isoflop.SHAPES[1 :: len(isoflop.SHAPES) // arg.widths][: arg.widths]:
    for i in range(arg.rates):
      peak = isoflop.RATE / width * 2.0 ** (i - arg.rates // 2)
      points.append(dict(width=width, layers=layers, peak=peak))
  return sweep.cells(cell, points)


def cell(*, width, layers, peak):
  steps = TOKENS // (isoflop.ROWS * isoflop.LENGTH)
  return isoflop.recipe(width=width, layers=layers, steps=steps, peak=peak)
