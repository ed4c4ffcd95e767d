r"""A chat model that knows its name: conversations of several turns, all answers learned in one pass (Vicuna, 2023).

  make smollm2
  llm-jax train --config=configs/tune/chat.py --workdir=runs/chat
  llm-jax train --config=configs/tune/chat.py:tiny,steps=300 --workdir=runs/chat-tiny
  llm-jax generate --workdir=runs/chat --chat

Differs from sft.py in the data (500 bundled conversations about who the assistant is, with names of your own:
--config.source.task.sets[0].assistant=NAME, beside the instructions, at most 300 examples of each counting) and in
NEFTune's noise on the embeddings (alpha 5; Jain et al. 2023, arXiv:2310.05914). The tiny model speaks Vicuna's
template: 200 of its 300 steps take its held-out loss to 3.30 nats per token, 3.70 after 100; the rest was not measured.
"""

from configs.tune import sft
from llm_jax.core.config import use, variant
from llm_jax.data import examples

CAP, ALPHA = 300, 5.0


def get_config(text=None):
  arg = variant(text, size='smollm2', run='runs/smollm2', batch=8, length=512, steps=60)
  c = sft.make(arg, template='vicuna')
  template = c.source.task.sets[0].template
  identity = use(examples.identity, template=template)
  sets = (identity, *c.source.task.sets)
  for source in (c.source, c.hooks.heldout.source):
    source.task = use(examples.task, **sft.lm.settings(source.task) | dict(sets=sets, maximum=CAP))
  c.model.embedding.noise = ALPHA
  c.hooks.samples.prompts = tuple(
    p.replace(sft.ASK, 'Who are you?') for p in c.hooks.samples.prompts
  )
  return c
