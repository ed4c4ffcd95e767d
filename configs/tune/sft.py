r"""Supervised fine-tuning: a trained causal model learns to follow instructions. The parent of all tuning configs.

  make smollm2
  llm-jax train --config=configs/tune/sft.py --workdir=runs/sft
  llm-jax train --config=configs/tune/sft.py:tiny,steps=300 --workdir=runs/sft-tiny
  llm-jax generate --workdir=runs/sft-tiny --chat --prompt="Name three primary colors."

Differs from configs/pretrain/lm.py in the data (1,100 bundled instructions as conversations in the model's own chat
template, the loss on answers alone, a tenth of the prompts held out), in where weights and vocabulary come from (a run
that was converted or trained before), and in the recipe of Alpaca: AdamW at 2e-5, a cosine with 3 % warm-up, no decay.
`tiny` is a small model from scratch in Alpaca's template, for a first look: 300 steps take its held-out loss from 6.9
to 3.70 nats per token in two and a half minutes on two CPU cores. With SmolLM2, 5 steps of 4 rows take that
of two held-out batches from 1.07 (after the first) to 0.94. For data of your own:
--config.source.task.sets[0]=llm_jax.data.examples:conversations and --config.source.task.sets[0].path=FILE.
"""

import os

from configs.pretrain import lm, ul2r
from llm_jax.core import config
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import batch, examples, vocab
from llm_jax.interop.architectures import llama
from llm_jax.objectives import language
from llm_jax.optim import chain, rules, schedules
from llm_jax.train import hooks

ASK = 'Name three primary colors.'
TASK = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
PROMPTS = dict(
  smollm2=f'<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n',
  tiny=f'{TASK}\n\n### Instruction:\n{ASK}\n\n### Response:',
)


def get_config(text=None):
  return make(variant(text, size='smollm2', run='runs/smollm2', batch=8, length=256, steps=60))


def make(arg, template='alpaca'):
  """arg: size, run, batch, length and steps. template: of the tiny model; the other has its own."""
  if arg.size not in PROMPTS:
    raise UserError(f'no size {arg.size!r}; {nearest(arg.size, PROMPTS)}')
  tiny = arg.size == 'tiny'
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  words = use(vocab.sentencepiece, size=1024, extra_ids=0, modes=())
  if not tiny:
    words = use(vocab.of_run, path=arg.run)
    c.model = trained(arg.run)
    c.init = config.config(init_from=arg.run, rename=(), only=None, grow=None)
    # a row at a time, layers computed again for the gradient: 7 instead of 10 GB with SmolLM2
    c.mesh.data, c.microbatches, c.model.runner.remat = 1, arg.batch, 'full'
  sets = (use(examples.instructions, template=template if tiny else None),)
  c.source = source(sets, words, arg.batch, arg.length)
  return finish(c, peak=1e-3 if tiny else 2e-5, prompt=PROMPTS[arg.size])


def trained(run):
  """The model of a run; SmolLM2-135M where there is none yet."""
  if os.path.isdir(run):
    return config.read(os.path.join(run, 'config.json')).model
  return llama.llama(ul2r.SMOLLM2)


def source(sets, words, rows, length, **mixing):
  """Instructions packed into rows."""
  task = use(examples.task, sets=sets, vocab=words, **mixing)
  return use(examples.make, task=task, batch=rows, length=length, rows=use(batch.pack))


def finish(c, peak, prompt):
  """The objective, the optimizer, and the hooks on the held-out prompts."""
  c.objective = use(language.next_token)
  schedule = use(
    schedules.cosine, peak=peak, steps=c.steps, warmup=max(1, c.steps * 3 // 100), floor=0.0
  )
  c.optimizer = use(chain.make, rule=use(rules.adamw, b2=0.999), schedule=schedule, clip=1.0)
  heldout = use(examples.make, **{**lm.settings(c.source), 'split': 'validation', 'shuffle': False})
  c.hooks.heldout = use(
    hooks.evaluate, source=heldout, objective=c.objective, every=max(1, c.steps // 6)
  )
  c.hooks.samples.prompts = (prompt,)
  return c
