r"""Instruction tuning of an encoder-decoder: the prompt in the encoder, the answer in the decoder (Flan-T5; Chung et
al. 2022, arXiv:2210.11416).

  llm-jax train --config=configs/pretrain/span_corruption.py --workdir=runs/span_corruption
  llm-jax train --config=configs/tune/flan_t5.py --workdir=runs/flan_t5
  llm-jax train --config=configs/tune/flan_t5.py:run=none,batch=4,steps=40 --workdir=runs/flan_t5-short

Differs from sft.py in the architecture and in the data: a mixture of task collections in proportion to their sizes,
with Flan's cap on how many examples of one count, and Adafactor at a constant rate. It goes on from `run`, a run of an
encoder-decoder, and starts from scratch where there is none yet. The short command does the latter: 40 steps take the
held-out loss from 7.19 (after six) to 6.08 nats per token. The recipe in full was not measured.
"""

import os

from configs.pretrain import span_corruption
from configs.tune import sft
from llm_jax.core import config
from llm_jax.core.config import use, variant
from llm_jax.data import examples, vocab
from llm_jax.optim import adafactor, chain, schedules

CAP = 500  # of 900 instructions and 160 seeds; Flan's is 30,000 of millions


def get_config(text=None):
  arg = variant(text, run='runs/span_corruption', batch=8, length=256, steps=200)
  sizes = f'batch={arg.batch},length={2 * arg.length},steps={arg.steps}'  # of the encoder
  c = span_corruption.get_config(sizes)
  words = use(vocab.sentencepiece, size=1024)
  if os.path.isdir(arg.run):
    c.model, words = sft.trained(arg.run), use(vocab.of_run, path=arg.run)
    c.init = config.config(init_from=arg.run, rename=(), only=None, grow=None)
  told = dict(template='alpaca', left_out=0.25)
  sets = (use(examples.instructions, **told), use(examples.seeds, **told))
  c.source = sft.source(sets, words, arg.batch, arg.length, maximum=CAP)
  c.source.encoder_length = 2 * arg.length
  c = sft.finish(c, peak=1e-3, prompt=sft.PROMPTS['tiny'])
  c.optimizer = use(
    chain.make, rule=use(adafactor.adafactor), schedule=use(schedules.constant, peak=1e-3), clip=1.0
  )
  return c
