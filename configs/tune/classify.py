r"""Is a line from a book, an encyclopedia or a story? A trained model learns the classes, in one of three ways.

  llm-jax train --config=configs/pretrain/lm.py --workdir=runs/lm
  llm-jax train --config=configs/tune/classify.py:way=features,run=runs/lm --workdir=runs/features
  llm-jax train --config=configs/tune/classify.py:way=output,run=runs/lm --workdir=runs/output
  llm-jax train --config=configs/tune/classify.py:way=everything,run=runs/lm --workdir=runs/everything
  llm-jax train --config=configs/tune/classify.py:lm=0.5,run=runs/lm --workdir=runs/gpt

Differs from configs/pretrain/lm.py in the data (rows of three kinds of text with their label), in the model (that of
the run, with a classifier of three), in the objective and in what is trained: `features` the classifier alone on frozen
features, `output` (finetuning I) also a pooler and the final norm, `everything` (finetuning II) all. `lm` is the weight
of language modelling beside the classes, 0.5 in GPT (Radford et al. 2018, section 3.2).

A new head on frozen features takes longer than layers that bend to it: give the first two ways steps=1000. Expected of
a model of 48 numbers and two layers after 2,000 steps of language modelling: 0.54 of the held-out rows right with
features, 0.58 with the output, 0.93 with everything (tests/configs/test_classify.py; `make slow`). With a seventh of
those steps both heads are close to chance, and their difference says nothing.
"""

from configs.pretrain import lm
from llm_jax.core import config
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import batch, labels, pipeline, tasks, vocab
from llm_jax.model import classes
from llm_jax.objectives import classify
from llm_jax.optim import chain, rules, schedules

WAYS = dict(features=classes.FEATURES, output=classes.OUTPUT, everything=classes.EVERYTHING)
KINDS = ('books', 'wikipedia', 'stories')


def get_config(text=None):
  arg = variant(text, way='everything', run='', batch=24, length=64, steps=200, lm=0.0)
  if arg.way not in WAYS:
    raise UserError(f'no way {arg.way!r} to adapt a model; {nearest(arg.way, WAYS)}')
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  words = use(vocab.bytes_, extra_ids=0, modes=())
  if arg.run:
    words = use(vocab.of_run, path=arg.run)
  c.source = source(words, arg, split='train')
  heldout = c.hooks.heldout
  heldout.source = source(words, arg, split='validation', shuffle=False, jitter=False)
  heldout.objective, heldout.batches = use(classify.labelled), 20
  c.model, c.objective = model(c.model, arg.way), use(classify.labelled, lm=arg.lm)
  c.trainable = WAYS[arg.way]
  if arg.run:
    c.init = config.config(
      init_from=arg.run, rename=(), only='^(embedding|decoder|head)', grow=None
    )
  c.optimizer = optimizer(arg.way, arg.steps)
  with c.unlocked():
    c.hooks = dict(heldout=heldout)
  return c


def model(pretrained, way):
  """With a pooler where there is something to train in it."""
  inner = pretrained if way == 'features' else use(classes.make_pooled, model=pretrained)
  return use(classes.make, model=inner, count=len(KINDS))


def source(words, arg, **told):
  texts = tuple(
    use(
      pipeline.make,
      task=use(tasks.domain, name=name, vocab=words),
      rows=use(batch.concatenate),
      **told,
    )
    for name in KINDS
  )
  return use(labels.kinds, sources=texts, batch=arg.batch, length=arg.length)


def optimizer(way, steps):
  """A new layer alone bears a larger rate than trained ones."""
  peak = 1e-3 if way == 'everything' else 1e-2
  schedule = use(schedules.linear, peak=peak, steps=steps, warmup=max(1, steps // 10), floor=0.0)
  return use(chain.make, rule=use(rules.adamw), schedule=schedule, clip=1.0)
