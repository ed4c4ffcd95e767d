r"""KTO: single answers, each called desirable or not, and a reference point that moves with the policy.

  llm-jax train --config=configs/align/kto.py --workdir=runs/kto
  llm-jax train --config=configs/align/kto.py:tiny --workdir=runs/kto-tiny

Differs from dpo.py in reading the two answers of a pair apart and in the objective; it is evaluated on pairs, as DPO
is. Tiny: held-out accuracy 0.75 of 97 pairs after 60 steps.
"""

from configs.align import dpo
from llm_jax.core.config import use
from llm_jax.data import pairs
from llm_jax.objectives import preference
from llm_jax.rl import annotate


def get_config(text=None):
  c, arg = dpo.start(text)
  told, ref = dpo.data(arg), arg.run or None
  single = lambda **kw: use(annotate.with_kl, source=use(pairs.unpaired, **told, **kw), ref=ref)
  held = lambda **kw: dpo.reference(arg, use(pairs.pairs, **told, **kw))
  return dpo.finish(c, single, use(preference.kto, beta=0.1), held, use(preference.dpo, beta=0.1))
