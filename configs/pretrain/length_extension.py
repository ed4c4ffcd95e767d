r"""Two stages of length: a decoder trained on 64 tokens, then taken to 256 by its positions and 40 steps.

  llm-jax train --config=configs/pretrain/length_extension.py:short --workdir=runs/short
  llm-jax train --config=configs/pretrain/length_extension.py:long --workdir=runs/long
  llm-jax train --config=configs/pretrain/length_extension.py:long,method=none --workdir=runs/none

Differs from configs/quickstart.py in the length of both stages. The second starts from the weights of the first
(`start=runs/short`), a lower learning rate and other rotary positions: LLaMA-2 Long and Code LLaMA enlarge the base
(arXiv:2309.16039, arXiv:2308.12950), Chen et al. interpolate (arXiv:2306.15595); the survey's section 5.1.4 has the
others.

Expect held-out bits per byte of 2.18 after the first stage at length 64 and, at length 256,

  method          before   after 40 steps
  none            2.31     2.19
  interpolation   2.79     2.33
  base            2.25     2.17
  ntk             2.22     2.16
  yarn            2.26     2.17

"before" is `:long,steps=1` with --config.optimizer.schedule.schedule.peak=1e-9. Chen et al. train 1,000 steps after
interpolating; 40 are too few here.
"""

from configs import quickstart
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import extension, positions

LENGTH, FACTOR = 64, 4
STEPS = dict(short=600, long=40)
METHODS = dict(
  none=use(positions.rope),
  interpolation=use(positions.rope, scaling=use(extension.interpolation, factor=FACTOR)),
  base=use(positions.rope, base=500_000.0),
  ntk=use(positions.rope, scaling=use(extension.ntk, factor=FACTOR)),
  yarn=use(positions.rope, scaling=use(extension.yarn, factor=FACTOR, original_length=LENGTH)),
)


def get_config(text=None):
  # steps=0: those of the stage
  arg = variant(text, stage='short', method='ntk', steps=0, start='runs/short')
  if arg.stage not in STEPS:
    raise UserError(f'no stage {arg.stage!r}; {nearest(arg.stage, STEPS)}')
  if arg.method not in METHODS:
    raise UserError(f'no method {arg.method!r}; {nearest(arg.method, METHODS)}')
  steps = arg.steps or STEPS[arg.stage]
  if arg.stage == 'short':
    return quickstart.get_config(f'steps={steps},batch=32,length={LENGTH}')
  c = quickstart.get_config(f'steps={steps},batch=8,length={FACTOR * LENGTH}')
  c.model.block.mixer.rotate = METHODS[arg.method]
  c.init.init_from = arg.start
  c.optimizer.schedule.length = max(1, steps // 3)
  c.optimizer.schedule.schedule.peak = 0.01
  c.hooks.heldout.every = c.hooks.plot.every = steps
  return c
