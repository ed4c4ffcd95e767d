r"""REINFORCE leave-one-out on additions whose answers are verified.

  llm-jax train --config=configs/tune/arithmetic.py --workdir=runs/arithmetic
  llm-jax train --config=configs/align/rloo.py --workdir=runs/rloo

Differs from configs/align/grpo.py in the objective, the baseline and a KL penalty to the start in the reward.
Expect 98 % of the held-out sums to be right with rloo.py:steps=100, from 24 %.
"""

from configs.align import grpo
from llm_jax.core.config import use
from llm_jax.objectives import policy
from llm_jax.rl import advantage, rollout


def get_config(text=None):
  c = grpo.get_config(text)
  c.source.estimate = use(advantage.leave_one_out)
  c.source.reference = use(rollout.of_run, path=c.init.init_from, vocab=c.source.vocab)
  c.source.beta = 0.005
  c.objective = use(policy.rloo)
  return c
