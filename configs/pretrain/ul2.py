r"""UL2: one prefix decoder trained on a mixture of seven denoisers, each announced by a mode token [R], [S] or [X].

  llm-jax train --config=configs/pretrain/ul2.py --workdir=runs/ul2
  llm-jax train --config=configs/pretrain/ul2.py:encoder_decoder --workdir=runs/ul2_encdec

Differs from prefix_lm.py in the denoiser (Tay et al. 2022, arXiv:2205.05131, table 1). The S-denoiser splits at a
random pivot; `last_quarter` in llm_jax/data/denoise.py is the variant that always hides the end.
"""

from configs.pretrain import prefix_lm, span_corruption
from llm_jax.core.config import variant
from llm_jax.data import denoise


def get_config(text=None):
  arg = variant(text, layout='prefix', data='shakespeare', batch=16, length=256, steps=1000)
  rest = f'data={arg.data},batch={arg.batch},length={arg.length},steps={arg.steps}'
  c = (prefix_lm if arg.layout == 'prefix' else span_corruption).get_config(rest)
  if arg.layout != 'prefix':
    for source in (c.source, c.hooks.heldout.source):
      source.length = arg.length
  c.hooks.samples.prompts = ('[S]ROMEO:',)
  return prefix_lm.set_denoiser(c, denoise.ul2)
