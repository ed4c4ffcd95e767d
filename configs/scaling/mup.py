r"""muP: the learning rate that is best for the base model, 64 wide, is best for a wider and a deeper one.

  llm-jax train --config=configs/scaling/mup.py:width=64,rate=0.0156 --workdir=runs/mup_64
  llm-jax train --config=configs/scaling/mup.py:width=512,layers=8,rate=0.0156 --workdir=runs/mup_512

Differs from lm.py in size and AdamW, and in what muP changes (Yang et al. 2022, arXiv:2203.03466): initial values and
learning rates by axis name, the tied head's multiplier, residual branches by 1/sqrt(layers) (Depth-muP). Heads are of
32, so more of them come with the width and the scale of attention stays. experiments/mup has the curves.
"""

from configs.pretrain import lm
from llm_jax.core import widths
from llm_jax.core.config import use, variant
from llm_jax.model import heads, init, norms
from llm_jax.optim import chain, mup, rules, schedules

WIDTH, LAYERS, HEAD_DIM = 64, 2, 32
BASE = dict(
  embed=WIDTH,
  ffn=3 * WIDTH,
  heads=WIDTH // HEAD_DIM,
  groups=WIDTH // HEAD_DIM,
  layers=LAYERS,
)


def get_config(text=None):
  arg = variant(text, width=256, layers=2, rate=2.0**-6, batch=16, length=256, steps=1000)
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  c.model.embed, c.model.layers = arg.width, arg.layers
  with c.ignore_type():
    multiplier = widths.residual_multiplier(layers=arg.layers, base=LAYERS)
    c.model.block.residual = use(norms.scaled, multiplier=multiplier)
    c.model.head = use(heads.Tied, multiplier=widths.head_multiplier(embed=arg.width, base=WIDTH))
    c.model.init = use(init.mup, base=BASE)
  layer = c.model.block
  layer.mixer.heads, layer.ffn.hidden = arg.width // HEAD_DIM, 3 * arg.width
  warmup = max(1, arg.steps // 10)
  c.optimizer = use(
    chain.make,
    rule=use(rules.adamw),
    schedule=use(schedules.linear, peak=arg.rate, steps=arg.steps, warmup=warmup, floor=0.0),
    weight_decay=0.1,
    scaling=use(mup.adam, base=BASE),
  )
  return c
