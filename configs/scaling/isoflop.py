r"""IsoFLOP profiles on real text: budgets x sizes, every size trained until the budget is spent. The parent of the sweeps.

  llm-jax sweep --config=configs/scaling/isoflop.py --workdir=runs/isoflop --workers=2
  llm-jax fit --workdir=runs/isoflop --budget=1e14 --devices=8

Three domains in bytes, equally mixed; a LLaMA of 33 thousand to 1 million parameters, wider and deeper together; AdamW at a rate that
falls with the width, to zero at the end of every run, because only then losses of runs of different lengths compare. A
budget is 6 N D of all N parameters, which is what laws are fitted to; the table has the exact FLOPs beside it.
"""

from configs.pretrain import lm
from llm_jax.core.config import build, use, variant
from llm_jax.data import batch, pipeline, tasks, vocab
from llm_jax.model import count
from llm_jax.optim import chain, rules, schedules
from llm_jax.scaling import sweep

DOMAINS = ('stories', 'wikipedia', 'books')
SHAPES = ((32, 2), (48, 2), (48, 3), (64, 3), (80, 4), (96, 4), (112, 5), (128, 6))  # width, layers
BATCH, LENGTH, HEAD_DIM = 16, 128, 16


def get_config(text=None):
  arg = variant(text, budget=2.5e11, budgets=5, factor=2.0, sizes=5)
  points = []
  for i in range(arg.budgets):
    first = min(i, len(SHAPES) - arg.sizes)  # the optimum moves, and the sizes with it
    for width, layers in SHAPES[first : first + arg.sizes]:
      points.append(dict(budget=arg.budget * arg.factor**i, width=width, layers=layers))
  return sweep.cells(at_budget, points)


def at_budget(*, budget, width, layers, peak=None, rates=None):
  """A run of 6 N D = `budget` FLOPs."""
  tokens = budget / (6 * parameters(width, layers))
  return recipe(
    width=width, layers=layers, steps=max(1, round(tokens / (BATCH * LENGTH))), peak=peak, rates=rates
  )


def parameters(width, layers):
  """All parameters of a shape."""
  return count.total(build(model(width, layers))().card)


def model(width, layers):
  made = lm.model(264, LENGTH)
  made.embed, made.layers, made.vocab_multiple = width, layers, 8
  made.block.mixer.heads = width // HEAD_DIM
  made.block.ffn.hidden = -(-8 * width // 3 // 8) * 8
  return made


def recipe(*, width, layers, steps, peak=None, rates=None, batch_size=BATCH):
  """The run of one size. peak: of the learning rate, by default what is best for the width."""
  c = lm.get_config(f'steps={steps},batch={batch_size},length={LENGTH}')
  task = use(
    tasks.mixture,
    tasks=tuple(use(tasks.domain, name=name) for name in DOMAINS),
    rates=tuple(rates or (1.0,) * len(DOMAINS)),
    vocab=use(vocab.bytes_, extra_ids=0, modes=()),
  )
  c.model = model(width, layers)
  for source in (c.source, c.hooks.heldout.source):
    source.task, source.rows = task, use(batch.concatenate)
  c.optimizer = use(
    chain.make,
    rule=use(rules.adamw, b2=0.99),
    schedule=use(
      schedules.linear, peak=peak or 0.01 * 64 / width, steps=steps, warmup=max(1, steps // 10), floor=0.0
    ),
    clip=1.0,
  )
  with c.unlocked():
    c.hooks = {'heldout': c.hooks.heldout}
  c.hooks.heldout.every, c.hooks.heldout.stride = max(1, -(-steps // 6)), 4
  c.mesh.data = 1
  c.objective.z_loss, c.objective.chunk = 0.0, None
  c.checkpoint.every, c.checkpoint.keep = max(1, steps // 4), 1
  c.log_every = max(1, steps // 50)
  return c
