r"""ORPO: imitation of the chosen answer and an odds ratio in one loss, without a reference and without tuning before.

  llm-jax train --config=configs/align/orpo.py --workdir=runs/orpo
  llm-jax train --config=configs/align/orpo.py:tiny --workdir=runs/orpo-tiny

Differs from simpo.py in the objective. Tiny: held-out accuracy 0.61 of 97 pairs after 60 steps.
"""

from configs.align import simpo
from llm_jax.core.config import use
from llm_jax.objectives import preference


def get_config(text=None):
  return simpo.without_reference(text, use(preference.orpo, beta=0.1))
