r"""Multi-stage instruction tuning: first tasks, then chat, with some of the tasks again so that they are not forgotten
(section 5.1.3 of the survey), and plain text beside both (OPT-IML's 5 %; Iyer et al. 2022, arXiv:2212.12017).

  make smollm2
  llm-jax train --config=configs/tune/multistage.py --workdir=runs/multistage
  llm-jax train --config=configs/tune/multistage.py:tiny,steps=300 --workdir=runs/multistage-tiny
  llm-jax train --config=configs/tune/multistage.py:tiny,steps=40,batch=2 --workdir=runs/multistage-short

Differs from chat.py in the source: its data in two stages of half the steps each, the instructions alone and then the
conversations with `replay` of the instructions, in one run with one schedule. The tiny model reads bytes, so that both
stages have one vocabulary. The short command takes the held-out loss, of conversations and instructions, from 4.88
(after six steps) to 3.29 four steps into the second stage and 3.18 nats per token at the end; the longer ones were not
measured.
"""

from configs.tune import chat
from llm_jax.core.config import use, variant
from llm_jax.data import examples, stages, tasks, vocab

REPLAY, TEXT = 0.2, 0.05


def get_config(text=None):
  arg = variant(text, size='smollm2', run='runs/smollm2', batch=8, length=512, steps=60)
  c = chat.get_config(text)
  identity, instructions = c.source.task.sets
  plain = use(examples.text, task=use(tasks.tiny_shakespeare, vocab=None))
  words = c.source.task.vocab
  if arg.size == 'tiny':
    words = use(vocab.bytes_, extra_ids=0, modes=())
    identity.left_out = instructions.left_out = 0.2
  made = lambda sets, rates: use(
    examples.make, task=use(examples.task, sets=sets, rates=rates, vocab=words)
  )
  first = made((instructions, plain), (1 - TEXT, TEXT))
  second = made(
    (identity, instructions, plain), ((1 - TEXT) * (1 - REPLAY), (1 - TEXT) * REPLAY, TEXT)
  )
  c.source = use(
    stages.make,
    sources=(first, second),
    until=(max(1, arg.steps // 2),),
    batch=arg.batch,
    length=arg.length,
  )
  c.hooks.heldout.source.task = made((identity, instructions), (1 - REPLAY, REPLAY)).task
  return c
