"""A run of a few seconds for the tests: two layers, bytes, a small text. `get_config('length=16')` and so on."""

import os

from llm_jax.core.config import config, use, variant
from llm_jax.core.mesh import ZERO3
from llm_jax.data import pipeline, tasks, vocab
from llm_jax.decode import generate
from llm_jax.model import attention, block, ffn, transformer
from llm_jax.objectives import language
from llm_jax.optim import adafactor, chain, schedules
from llm_jax.train import hooks

TEXT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tiny.txt')


def get_config(text=None):
  arg = variant(text, steps=8, every=2, batch=4, length=16)
  words = use(vocab.bytes_, extra_ids=0)
  task = use(tasks.text, train=(TEXT,), heldout=0.2, vocab=words)
  source = use(pipeline.make, task=task, batch=arg.batch, length=arg.length)
  heldout = use(pipeline.make, task=task, batch=arg.batch, length=arg.length, split='validation')
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=2),
    ffn=use(ffn.Gated, hidden=32),
    dropout=0.1,
  )
  return config(
    model=use(
      transformer.causal,
      vocab=262,
      embed=16,
      layers=2,
      block=layer,
      length=arg.length,
      vocab_multiple=8,
    ),
    source=source,
    objective=use(language.next_token, z_loss=1e-4),
    optimizer=use(
      chain.make, rule=use(adafactor.adafactor), schedule=use(schedules.rsqrt, peak=0.01, hold=10)
    ),
    mesh=dict(data=1, fsdp=1, expert=1, sequence=1, stage=1, tensor=1),
    axes=ZERO3,
    steps=arg.steps,
    microbatches=1,
    trainable=None,
    init=dict(init_from=None, rename=(), only=None),
    hooks=dict(
      heldout=use(hooks.evaluate, source=heldout, objective=use(language.next_token), every=4),
      samples=use(hooks.sample, generate=use(generate.text, max_new=8), prompts=('A',)),
    ),
    checkpoint=dict(every=arg.every, keep=3),
    log_every=1,
    seed=0,
  )
