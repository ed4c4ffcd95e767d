r"""Chain of Hindsight: a better and a worse answer in one text, each announced; then one asks for the better kind.

  llm-jax train --config=configs/align/coh.py --workdir=runs/coh
  llm-jax train --config=configs/align/coh.py:tiny --workdir=runs/coh-tiny

Differs from dpo.py in the data, pairs written as conversations, and in the objective, language modelling of the answers
where up to 15 % of what was read is forgotten. Tiny: 3.18 nats per held-out token after 60 steps.
"""

from configs.align import dpo
from llm_jax.core.config import use
from llm_jax.data import batch, examples, hindsight
from llm_jax.objectives import feedback


def get_config(text=None):
  c, arg = dpo.start(text)
  kind, left_out = (hindsight.hh_harmless, 0.5) if arg.run else (hindsight.politeness, 0.4)
  sets = (use(kind, template=None if arg.run else 'chatml', left_out=left_out),)
  told = dict(batch=arg.batch, length=arg.length, rows=use(batch.pack))
  task = use(examples.task, sets=sets, vocab=dpo.words(arg))
  source = lambda **kw: use(examples.make, task=task, **told, **kw)
  return dpo.finish(c, source, use(feedback.hindsight))
