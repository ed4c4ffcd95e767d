r"""A small model that learns to add from a teacher who mostly counts one too many: where configs/align/grpo.py starts.

  llm-jax train --config=configs/tune/arithmetic.py --workdir=runs/arithmetic

Differs from configs/pretrain/lm.py in the source (demonstrations, loss on the answers), in size (two layers, 96 wide,
bytes) and in the optimizer. Three demonstrations of four count one too many, so the model can add but mostly does not.
Expect 24 % of the held-out sums to be right when decoded greedily.
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.data import vocab
from llm_jax.objectives import language
from llm_jax.optim import chain, rules, schedules
from llm_jax.rl import arithmetic, heldout

MAX_NEW = 4  # three digits and the end


def get_config(text=None):
  arg = variant(text, steps=2500, batch=128, wrong=0.75)
  c = lm.get_config(f'steps={arg.steps},batch={arg.batch},length=16')
  c.model.vocab, c.model.vocab_multiple = 259, 1
  c.model.embed, c.model.layers, c.model.block.ffn.hidden = 96, 2, 192
  c.source = use(
    arithmetic.demonstrations,
    vocab=use(vocab.bytes_, extra_ids=0, modes=()),
    wrong=arg.wrong,
    batch=arg.batch,
  )
  c.objective = use(language.next_token)
  c.optimizer = optimizer(3e-3, arg.steps)
  c.mesh.data = 1
  accuracy = use(
    heldout.reward,
    prompts=use(arithmetic.problems, split='heldout'),
    reward=use(arithmetic.correct),
    max_new=MAX_NEW,
    every=max(1, arg.steps // 10),
  )
  with c.unlocked():
    c.hooks = dict(heldout=accuracy)
  return c


def optimizer(peak, steps):
  schedule = use(schedules.cosine, peak=peak, steps=steps, warmup=min(20, steps // 2))
  return use(chain.make, rule=use(rules.adamw), schedule=schedule, clip=1.0)
