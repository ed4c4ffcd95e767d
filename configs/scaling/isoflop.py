r"""IsoFLOP profiles on real text: budgets x sizes, each trained until the budget is spent. The parent of the sweeps.

  llm-jax sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --workers=2
  llm-jax fit --workdir=runs/isoflop --budget=1e13 --devices=8

Three domains in bytes, equally mixed; a LLaMA of 8 to 270 thousand parameters, wider and deeper together; small
batches, and AdamW at a rate that falls with the width, and to zero at the end of every run, because only then losses of
runs of different lengths compare. A budget is 6 N D of all N parameters, which is what laws are fitted to; the table
has the exact FLOPs beside it. Expected: what experiments/scaling_ladder shows.
"""

import functools
import math

from configs.pretrain import lm
from llm_jax.core.config import build, use, variant
from llm_jax.data import batch, tasks, vocab
from llm_jax.model import count, heads, init
from llm_jax.optim import chain, rules, schedules
from llm_jax.scaling import sweep

DOMAINS = ('stories', 'wikipedia', 'books')
SHAPES = (
  (16, 1),
  (24, 1),
  (24, 2),
  (32, 2),
  (40, 2),
  (48, 3),
  (64, 3),
  (72, 4),
  (96, 4),
)  # width, layers
ROWS, LENGTH = 8, 128
RATE = 0.75  # times 1 / width: the peak of the learning rate


def get_config(text=None):
  arg = variant(text, budget=1e11, budgets=5, factor=2.0, sizes=5)
  points = []
  for i in range(arg.budgets):
    first = min(
      (3 * i + 1) // 4, len(SHAPES) - arg.sizes
    )  # the best size grows, and the range with it
    for width, layers in SHAPES[first : first + arg.sizes]:
      points.append(dict(budget=arg.budget * arg.factor**i, width=width, layers=layers))
  return sweep.cells(at_budget, points, optimal)


def at_budget(*, budget, width, layers, peak=None, rates=None):
  """A run of 6 N D = `budget` FLOPs."""
  steps = max(1, round(budget / (6 * size(width, layers) * ROWS * LENGTH)))
  return recipe(width=width, layers=layers, steps=steps, peak=peak, rates=rates)


def optimal(*, parameters, tokens, devices=1):
  """The shape nearest to a number of parameters, and its run; the batch is divided among the devices."""
  shapes = [(w, max(1, round(w / 20) + i)) for w in range(32, 8192, 16) for i in (-1, 0, 1)]
  about = lambda shape: 264 * shape[0] + 12 * shape[0] ** 2 * shape[1]
  width, layers = min(shapes, key=lambda shape: abs(math.log(about(shape) / parameters)))
  rows = -(-ROWS // devices) * devices
  steps = max(1, round(tokens / (rows * LENGTH)))
  return recipe(
    width=width,
    layers=layers,
    steps=steps,
    peak=RATE / width * (rows / ROWS) ** 0.5,
    rows=rows,
    devices=devices,
  )


@functools.cache
def size(width, layers):
  """All parameters of a shape."""
  return count.total(build(model(width, layers))().card)


def model(width, layers):
  made = lm.model(264, LENGTH)
  made.embed, made.layers, made.vocab_multiple = width, layers, 8
  made.block.mixer.heads = max(1, width // 16)
  made.block.ffn.hidden = -(-8 * width // 3 // 8) * 8
  made.init, made.head = use(init.palm), use(heads.Tied, scaled=True)
  return made


def recipe(*, width, layers, steps, peak=None, rates=None, rows=ROWS, devices=1):
  """The run of one size. peak: of the learning rate; rates: of the domains."""
  c = lm.get_config(f'steps={steps},batch={rows},length={LENGTH}')
  task = use(
    tasks.mixture,
    tasks=tuple(use(tasks.domain, name=name) for name in DOMAINS),
    rates=tuple(rates or (1.0,) * len(DOMAINS)),
    vocab=use(vocab.bytes_, extra_ids=0, modes=()),
  )
  schedule = use(
    schedules.linear, peak=peak or RATE / width, steps=steps, warmup=steps // 10, floor=0.0
  )
  c.model = model(width, layers)
  c.optimizer = use(chain.make, rule=use(rules.adamw, b2=0.99), schedule=schedule, clip=1.0)
  c.objective.z_loss, c.objective.chunk = 0.0, None
  heldout = c.hooks.heldout
  for source in (c.source, heldout.source):
    source.task, source.rows = task, use(batch.concatenate)
  heldout.source.batch, heldout.every, heldout.stride = 32, max(1, -(-steps // 3)), 4
  with c.unlocked():
    c.hooks = {'heldout': heldout}
  c.mesh.data = devices
  c.checkpoint.every, c.checkpoint.keep = max(1, steps // 2), 1
  c.log_every = max(1, steps // 50)
  return c
