r"""RAFT: of the answers to each prompt the best is learned from, as if somebody had shown it.

  llm-jax train --config=configs/tune/arithmetic.py --workdir=runs/arithmetic
  llm-jax train --config=configs/align/raft.py --workdir=runs/raft

Differs from configs/align/grpo.py in what is kept of a round (one answer of sixteen), in the objective, that of
pre-training, and in size. Where the best of sixteen is wrong it is learned from as well. Expected: 24 % of the held-out
additions right at the start, 94 % after 10 steps, above 98 % after 60.
"""

from configs.align import grpo
from configs.tune import arithmetic
from llm_jax.core.config import use, variant
from llm_jax.objectives import language
from llm_jax.rl import advantage, rollout


def get_config(text=None):
  arg = variant(text, steps=60, round=128, group=16)
  c = grpo.get_config(f'steps={arg.steps},round={arg.round},group={arg.group}')
  c.source.keep = use(rollout.best)
  c.source.estimate = use(advantage.score)
  c.source.tries = 2 * arg.group  # each try keeps one answer of a group
  c.objective = use(language.next_token)
  c.optimizer = arithmetic.optimizer(1e-3, arg.steps)
  c.hooks.heldout.every = max(1, arg.steps // 6)
  return c
