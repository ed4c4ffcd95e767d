r"""Direct preference optimisation: a model learns which of two answers people prefer. The parent of this folder.

  make smollm2
  llm-jax train --config=configs/align/dpo.py --workdir=runs/dpo
  llm-jax train --config=configs/align/dpo.py:tiny --workdir=runs/dpo-tiny

Differs from configs/pretrain/lm.py in the data (the bundled harmless pairs of HH-RLHF in the model's own chat template,
a quarter of the prompts held out; the two thirds that are longer than 128 tokens are left out), in the objective with
its reference (the run that the model begins with), and in AdamW with a small rate. Logged: heldout/accuracy, the
share of held-out pairs in the right order. The reference is at 0.5 by definition; expect 0.625 of 176 pairs (95 %
interval 0.55 to 0.69) after 66 steps of 20 s on two CPU cores. Name a tuned run with :run=runs/sft; `:tiny`
is a small model of bytes from scratch on polite and impolite answers: held-out accuracy 0.86 of 97 pairs after its 60
steps.
"""

from configs.pretrain import lm
from configs.tune import sft
from llm_jax.core import config
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import pairs, vocab
from llm_jax.objectives import preference
from llm_jax.optim import chain, rules, schedules
from llm_jax.rl import annotate
from llm_jax.train import hooks

ASKED = 'Rewrite this sentence politely: Give me the salt.'
SIZES = dict(
  smollm2=dict(run='runs/smollm2', batch=8, length=128, steps=66, peak=2e-5),
  tiny=dict(run='', batch=8, length=256, steps=60, peak=2e-3),
)


def get_config(text=None):
  c, arg = start(text)
  source = lambda **kw: reference(arg, use(pairs.pairs, **data(arg), **kw))
  return finish(c, source, use(preference.dpo, beta=0.1))


def start(text, sizes=SIZES):
  """(a config without source and objective, its arguments): size, run, batch, length, steps, peak."""
  size = (text or '').split(',')[0]
  size = size if size and '=' not in size else 'smollm2'
  if size not in sizes:
    raise UserError(f'no size {size!r}; {nearest(size, sizes)}')
  arg = variant(text, size='smollm2', **sizes[size])
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  if arg.run:
    c.model = sft.trained(arg.run)
    c.init = config.config(init_from=arg.run, rename=(), only=None, grow=None)
  else:
    c.model = lm.model(259, arg.length)
    c.model.embed, c.model.layers, c.model.block.ffn.hidden = 64, 2, 128
  schedule = use(schedules.constant, peak=arg.peak, warmup=max(1, arg.steps // 10))
  c.optimizer = use(chain.make, rule=use(rules.adamw, b2=0.99), schedule=schedule, clip=1.0)
  c.hooks.samples.prompts = (f'<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n',)
  return c, arg


def words(arg):
  """The vocabulary: that of the run."""
  return use(vocab.of_run, path=arg.run) if arg.run else use(vocab.bytes_, extra_ids=0, modes=())


def data(arg):
  """Pairs, batch and length for the sources of data/pairs.py, and the share of comparisons that may be longer."""
  if arg.run:
    made, left_out = use(pairs.hh_harmless, heldout=0.25, vocab=words(arg)), 0.8
  else:
    made, left_out = use(pairs.politeness, template='chatml', vocab=words(arg)), 0.1
  return dict(data=made, batch=arg.batch, length=arg.length, left_out=left_out)


def reference(arg, source):
  """`source` with the log-probabilities of the run that the model begins with."""
  return use(annotate.with_reference, source=source, ref=arg.run or None)


def finish(c, source, objective, heldout=None, judge=None):
  """source(**settings) -> the config of a source. heldout, judge: another source and objective to evaluate with."""
  c.source, c.objective = source(), objective
  held = (heldout or source)(split='validation', shuffle=False)
  every = max(1, c.steps // 2)
  c.hooks.heldout = use(hooks.evaluate, source=held, objective=judge or objective, every=every)
  return c
