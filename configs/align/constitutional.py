r"""Constitutional AI, the supervised stage: a model learns from its own answers, revised by principles.

  make smollm2
  .venv/bin/python experiments/constitutional/run.py --workdir=runs/smollm2 --out=runs/constitution
  llm-jax train --config=configs/align/constitutional.py --workdir=runs/constitutional
  llm-jax train --config=configs/align/constitutional.py:tiny,steps=30,batch=4 --workdir=runs/constitutional-tiny

Differs from configs/tune/sft.py in the data: the revisions that the experiment wrote, beside as many of the bundled
instructions, so that the model stays helpful (Bai et al. 2022, section 3.2, mixes so too). For the stage of preferences
learn from runs/constitution/pairs.jsonl with configs/align/dpo.py. The tiny model, with the eight revisions of the
experiment's README: held-out loss, of the instructions almost alone, 6.36 nats per token after 5 steps and 5.86 after
30. With SmolLM2 it was not measured.
"""

from configs.tune import sft
from llm_jax.core.config import use
from llm_jax.data import examples, formats

REVISIONS = 'runs/constitution/revisions.jsonl'


def get_config(text=None):
  c = sft.get_config(text)
  kept = c.source.task.sets[0]
  revised = use(
    examples.conversations, path=REVISIONS, format=formats.alpaca, template=kept.template
  )
  with c.unlocked():
    for source in (c.source, c.hooks.heldout.source):
      source.task.sets, source.task.rates = (revised, kept), (1.0, 1.0)
  return c
