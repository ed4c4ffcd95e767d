r"""One size on seven mixtures of three domains. Differs from configs/scaling/isoflop.py in what is swept and evaluated.

  llm-jax sweep --config=configs/scaling/mixtures.py --workdir=runs/mixtures --workers=2
  llm-jax sweep --config=configs/scaling/mixtures.py:budget=1e12 --workdir=runs/mixtures --workers=2

The rates are those of DOMAINS in isoflop.py, doubled for one or two of them, or equal. Besides the loss on all
held-out text every cell has one for each domain, as `metrics` of its row. Expected: the larger the share of a domain,
the lower its loss, without an exception; from a fifth to a half stories fall from 1.772 to 1.641 nats per byte,
Wikipedia from 2.135 to 2.015, books from 1.996 to 1.897.
"""

import copy

from configs.scaling import isoflop
from llm_jax.core.config import use, variant
from llm_jax.data import tasks
from llm_jax.scaling import sweep

RATES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2))


def get_config(text=None):
  arg = variant(text, budget=2e11, width=32, layers=2)
  fixed = dict(budget=(arg.budget,), width=(arg.width,), layers=(arg.layers,))
  return sweep.cells(cell, sweep.grid(**fixed, rates=RATES))


def cell(*, budget, width, layers, rates):
  c = isoflop.at_budget(
    budget=budget, width=width, layers=layers, rates=tuple(float(rate) for rate in rates)
  )
  hooks = {}
  for name in ('heldout', *isoflop.DOMAINS):
    evaluate = copy.deepcopy(c.hooks.heldout)
    task = evaluate.source.task
    task.rates, evaluate.name = (1.0, 1.0, 1.0), name
    if name != 'heldout':
      task.tasks, task.rates = (use(tasks.domain, name=name),), (1.0,)
    hooks[name] = evaluate
  with c.unlocked():
    c.hooks = hooks
  return c
