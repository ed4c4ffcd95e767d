r"""RRHF: the mean log-probabilities of several answers in the order of their rewards, and imitation of the best.

  llm-jax train --config=configs/align/rrhf.py --workdir=runs/rrhf
  llm-jax train --config=configs/align/rrhf.py:tiny --workdir=runs/rrhf-tiny

Differs from dpo.py in the objective, which needs no reference, and in reading rankings: two answers to a prompt here,
more with data that have them (--config.source.answers). Tiny: held-out accuracy 0.65 of 97 pairs after 60 steps.
"""

from configs.align import dpo
from llm_jax.core.config import use
from llm_jax.data import pairs
from llm_jax.objectives import ranking


def get_config(text=None):
  c, arg = dpo.start(text)
  source = lambda **kw: use(pairs.rankings, answers=2, **dpo.data(arg), **kw)
  return dpo.finish(c, source, use(ranking.rrhf))
