r"""One dial: `depth` derives width, heads, batch, learning rate and steps (llm_jax/scaling/dial.py has the formulas).

  llm-jax describe --config=configs/scaling/dial.py:depth=8
  llm-jax train --config=configs/scaling/dial.py:depth=2 --workdir=runs/dial
  TFDS_DATA_DIR=DIR llm-jax train --config=configs/scaling/dial.py:depth=12,data=c4,length=1024 --workdir=DIR

Differs from lm.py in all sizes, in AdamW with a cosine to 10 % over the whole run, and in the length of the run:
`ratio` tokens per parameter, 20 unless told otherwise. Tiny Shakespeare has 0.4M tokens, so that from two layers on it
is read again and again (twelve layers: some 4,000 times); take C4 for anything that is to be good.
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.optim import chain, rules, schedules
from llm_jax.scaling import dial


def get_config(text=None):
  arg = variant(text, depth=4, data='shakespeare', length=256, ratio=20.0)
  vocab = 32_128 if arg.data == 'c4' else 1024
  d = dial.turn(arg.depth, vocab=vocab, length=arg.length, ratio=arg.ratio)
  c = lm.get_config(f'data={arg.data},batch={d.batch},length={arg.length},steps={d.steps}')
  c.model.embed, c.model.layers = d.embed, d.depth
  c.model.block.mixer.heads, c.model.block.ffn.hidden = d.heads, d.hidden
  c.optimizer = use(
    chain.make,
    rule=use(rules.adamw),
    schedule=use(schedules.cosine, peak=d.peak, steps=d.steps, warmup=d.warmup, floor=0.1),
    weight_decay=0.1,
  )
  return c
