r"""Two stages of length: a decoder trained on 64 tokens, then taken to 256 by its positions and a few steps.

llm-jax train --config=configs/pretrain/length_extension.py:short --workdir=runs/short
llm-jax train --config=configs/pretrain/length_extension.py:long --workdir=runs/long
llm-jax train --config=configs/pretrain/length_extension.py:long,method=none --workdir=runs/none
"""

from configs import quickstart
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import extension, positions

LENGTH, FACTOR = 64, 4
METHODS = dict(
  none=use(positions.rope),
  interpolation=use(positions.rope, scaling=use(extension.interpolation, factor=FACTOR)),
  base=use(positions.rope, base=500_000.0),
  ntk=use(positions.rope, scaling=use(extension.ntk, factor=FACTOR)),
  yarn=use(positions.rope, scaling=use(extension.yarn, factor=FACTOR, original_length=LENGTH)),
)


def get_config(text=None):
  arg = variant(text, stage='short', method='interpolation', steps=0, start='runs/short')
  if arg.stage not in ('short', 'long'):
    raise UserError(f'no stage {arg.stage!r}; {nearest(arg.stage, ("short", "long"))}')
  if arg.method not in METHODS:
    raise UserError(f'no method {arg.method!r}; {nearest(arg.method, METHODS)}')
  if arg.stage == 'short':
    return quickstart.get_config(f'steps={arg.steps or 600},batch=32,length={LENGTH}')
  c = quickstart.get_config(f'steps={arg.steps or 40},batch=8,length={FACTOR * LENGTH}')
  c.model.block.mixer.rotate = METHODS[arg.method]
  c.init.init_from = arg.start
  c.optimizer.schedule.length = max(1, c.steps // 3)
  c.optimizer.schedule.schedule.peak = 0.01
  c.hooks.heldout.every = c.hooks.plot.every = c.steps
  return c
