r"""The quickstart: a small decoder on tiny Shakespeare, three to five minutes on two CPU cores.

  llm-jax train --config=configs/quickstart.py --workdir=runs/quickstart        (= make quickstart)

Differs from configs/pretrain/lm.py in size and schedule: an inverse square root that is cooled down to zero over the
last part ends lower than one that is not. The text is read about three times, too few for dropout to help. Documents
are not packed: the plays are one document, read in windows of 256 tokens. Expect 2.23 bits per byte on the held-out
tenth of the text.
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.data import batch
from llm_jax.optim import schedules


def get_config(text=None):
  arg = variant(text, steps=600, batch=8, length=256)
  c = lm.get_config(f'steps={arg.steps},batch={arg.batch},length={arg.length}')
  for source in (c.source, c.hooks.heldout.source):
    source.rows = use(batch.concatenate)
    vocab = source.task.vocab
    vocab.extra_ids, vocab.modes = 0, ()  # nothing is masked: all ids for text
  warmup = 50
  rsqrt = use(schedules.rsqrt, peak=0.05, warmup=warmup, hold=2 * warmup)
  c.optimizer.schedule = use(
    schedules.cooldown, schedule=rsqrt, steps=arg.steps, length=arg.steps // 3
  )
  c.mesh.data = 1  # one device is enough for eight sequences
  # what a part touches stays in the cache of a small machine
  c.microbatches, c.objective.chunk = 4, 128
  c.hooks.heldout.every = c.hooks.plot.every = max(1, arg.steps // 10)
  return c
