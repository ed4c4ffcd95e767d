r"""The quickstart: a small decoder on tiny Shakespeare, about ten minutes of CPU time.

  llm-jax train --config=configs/quickstart.py --workdir=runs/quickstart        (= make quickstart)

Differs from configs/pretrain/lm.py in size, dropout and schedule: the text is read about four times, so the model needs
dropout, and an inverse square root that is cooled down to zero over the last part ends lower than one that is not.
Documents are not packed: the plays are one document, read in windows of 256 tokens. Expect 2.39 bits per byte on the
held-out tenth of the text.
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.data import batch
from llm_jax.optim import schedules


def get_config(text=None):
  arg = variant(text, steps=800, batch=8, length=256)
  c = lm.get_config(f'steps={arg.steps},batch={arg.batch},length={arg.length}')
  c.model.block.dropout = c.model.embedding.dropout = 0.1
  for source in (c.source, c.hooks.heldout.source):
    source.rows = use(batch.concatenate)
    source.task.vocab.extra_ids, source.task.vocab.modes = (
      0,
      (),
    )  # nothing is masked: all ids for text
  warmup = 50
  rsqrt = use(schedules.rsqrt, peak=0.02, warmup=warmup, hold=2 * warmup)
  c.optimizer.schedule = use(
    schedules.cooldown, schedule=rsqrt, steps=arg.steps, length=arg.steps // 3
  )
  c.mesh.data = 1  # one device is enough for eight sequences
  c.microbatches = 2  # four sequences at a time stay in the cache of a small machine
  c.hooks.heldout.every = c.hooks.plot.every = max(1, arg.steps // 10)
  return c
