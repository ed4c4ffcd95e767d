r"""BERT on the bundled stories: 15 % of the words are hidden, and of two sentences the model says whether they follow
one another.

  llm-jax train --config=configs/pretrain/bert.py --workdir=runs/bert

Differs from lm.py in the architecture (an encoder alone, norms after the sublayers, learned positions, a pooler and a
classifier of two), in the data (masked.words around masked.sentences) and in the objective, the sum of both losses.

Expected after `:steps=20`: the held-out loss falls from 6.68 at step 10 to 6.48; which sentence follows is not learnt
by then (0.51 of 131). The recipe in full was not measured.
"""

from configs.pretrain import lm
from llm_jax.core.config import use
from llm_jax.data import batch, masked, pipeline, tasks, vocab
from llm_jax.model import attention, block, classes, ffn, heads, norms, transformer
from llm_jax.objectives import classify
from llm_jax.optim import chain, rules, schedules

SIZE = 1024


def get_config(text=None):
  c = lm.get_config(text)
  length, rows = c.source.length, c.source.batch
  words = use(vocab.sentencepiece, size=SIZE, extra_ids=0, modes=masked.MARKS)
  told = dict(task=use(tasks.domain, name='stories', vocab=words), batch=rows, length=length - 3)
  c.model, c.objective = model(length), use(classify.labelled, lm=1.0)
  c.source = source(**told)
  schedule = use(schedules.linear, peak=1e-3, steps=c.steps, warmup=max(1, c.steps // 10))
  rule = use(rules.adamw, b2=0.999, eps=1e-6)
  c.optimizer = use(chain.make, rule=rule, schedule=schedule, weight_decay=0.01)
  heldout = c.hooks.heldout
  heldout.source = source(**told, split='validation', shuffle=False, jitter=False)
  heldout.objective = use(classify.labelled, lm=1.0)
  with c.unlocked():
    c.hooks = dict(heldout=heldout, plot=c.hooks.plot)
  return c


def source(**told):
  texts = use(pipeline.make, rows=use(batch.pad), **told)
  return use(masked.words, source=use(masked.sentences, source=texts))


def model(length):
  norm = use(norms.LayerNorm, eps=1e-12)
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=4, bias=True, rotate=None),
    ffn=use(ffn.MLP, hidden=768, activation=use(ffn.gelu), bias=True),
    norm=norm,
    residual=use(norms.post),
  )
  encoder = use(
    transformer.encoder,
    vocab=SIZE,
    embed=192,
    layers=4,
    block=layer,
    length=length,
    norm=None,
    stem=use(heads.Stem, norm=norm, types=2),
    head=use(heads.Masked, norm=norm),
    vocab_multiple=128,
  )
  return use(classes.make, model=use(classes.make_pooled, model=encoder), count=2)
