r"""RAFT: of the answers to each prompt the best is learned from, as if somebody had shown it.

  llm-jax train --config=configs/tune/arithmetic.py --workdir=runs/arithmetic
  llm-jax train --config=configs/align/raft.py --workdir=runs/raft

Differs from configs/align/grpo.py in what is kept of a round and in the objective, that of pre-training. Where the best
answer is a wrong one it is learned from as well. EXPECTED
"""

from configs.align import grpo
from llm_jax.core.config import use
from llm_jax.objectives import language
from llm_jax.rl import advantage, rollout


def get_config(text=None):
  c = grpo.get_config(text)
  c.source.keep = use(rollout.best)
  c.source.estimate = use(advantage.score)
  c.source.tries = 2 * c.source.group  # each try keeps one answer of a group
  c.objective = use(language.next_token)
  return c
