r"""PPO as InstructGPT has it, on additions whose answers are verified.

  llm-jax train --config=configs/tune/arithmetic.py --workdir=runs/arithmetic
  llm-jax train --config=configs/align/ppo.py --workdir=runs/ppo

Differs from configs/align/grpo.py in the objective, the advantages (a critic, which is a scalar head on the policy), a
KL penalty to the start per token, and two passes of two minibatches over each round. Expect 94 % of the
held-out sums to be right with ppo.py:steps=120 (30 rounds), from 24 %.
"""

from configs.align import grpo
from llm_jax.core.config import use
from llm_jax.model import scalar
from llm_jax.objectives import policy
from llm_jax.rl import advantage, rollout


def get_config(text=None):
  c = grpo.get_config(text)
  c.model = use(scalar.make, model=c.model)
  c.source.estimate = use(advantage.gae)
  c.source.value = use(policy.value_head)
  c.source.reference = use(rollout.of_run, path=c.init.init_from, vocab=c.source.vocab)
  c.source.beta = 0.005
  c.source.batch, c.source.epochs = c.source.round // 2, 2
  c.objective = use(policy.ppo)
  c.init.only = r'^(?!scalar/)'
  return c
