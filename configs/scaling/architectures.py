r"""The same grid for three architectures: a causal decoder, a prefix decoder and an encoder-decoder at equal compute.

  llm-jax sweep --config=configs/scaling/architectures.py --workdir=runs/architectures --workers=2
  llm-jax sweep --config=configs/scaling/architectures.py:kinds=encoder_decoder,budget=2e10 --workdir=DIR
  llm-jax fit --workdir=runs/architectures

Differs from isoflop.py in that all read the text before a random place and predict the rest (prefix LM), a causal
decoder too, so that their losses are of the same targets; in the budget, which is of exact FLOPs, encoder and
cross-attention included, and not 6 N D, whose D means other things for an encoder; and in the number of cells. An
encoder-decoder has as many layers on each side, T5's buckets and initialisation. How encoder-decoders scale is an open
question of the survey (Zhao et al. 2023, arXiv:2303.18223, section 4.2.6); Wang et al. 2022 (arXiv:2204.05832) compare
these three at one size. The suite trains a cell of a few steps; the grid as a whole was not run.
"""

import functools

from configs.pretrain import lm
from configs.scaling import isoflop
from llm_jax.core.config import build, use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import batch, denoise
from llm_jax.model import attention, block, count, init, positions, transformer
from llm_jax.scaling import sweep

KINDS = ('causal', 'prefix', 'encoder_decoder')


def get_config(text=None):
  arg = variant(text, kinds='+'.join(KINDS), budget=1e11, budgets=2, factor=2.0, sizes=3)
  shapes = isoflop.SHAPES[: arg.sizes]
  points = [
    dict(kind=kind, budget=arg.budget * arg.factor**i, width=width, layers=layers)
    for kind in arg.kinds.split('+')
    for i in range(arg.budgets)
    for width, layers in shapes
  ]
  return sweep.cells(at_budget, points)


def at_budget(*, kind, budget, width, layers):
  """A run of `budget` exact FLOPs."""
  step = isoflop.ROWS * isoflop.LENGTH * flops(kind, width, layers)
  return recipe(kind=kind, width=width, layers=layers, steps=max(1, round(budget / step)))


@functools.cache
def flops(kind, width, layers):
  """Of training, per decoder token; an encoder reads as many."""
  card = build(model(kind, width, layers))().card
  return count.training_flops(card, isoflop.LENGTH, isoflop.LENGTH if card.encoder else 0)


def recipe(*, kind, width, layers, steps):
  c = isoflop.recipe(width=width, layers=layers, steps=steps)
  c.model = model(kind, width, layers)
  for source in (c.source, c.hooks.heldout.source):
    source.denoiser, source.rows = use(denoise.prefix_lm), use(batch.pack)
    if kind == 'encoder_decoder':
      source.encoder_length = isoflop.LENGTH
  return c


def model(kind, width, layers):
  made = isoflop.model(width, layers)
  if kind == 'causal':
    return made
  parts = lm.settings(made)
  if kind == 'prefix':
    return use(transformer.prefix, **parts)
  if kind != 'encoder_decoder':
    raise UserError(f'no architecture {kind!r}; {nearest(kind, KINDS)}')
  layer = parts.pop('block')
  attend = dict(heads=layer.mixer.heads, scale=1.0)
  own, cross = (
    use(attention.SelfAttention, rotate=None, **attend),
    use(attention.CrossAttention, **attend),
  )
  parts |= dict(
    encoder_layers=layers,
    encoder_block=use(block.decoder, mixer=own, ffn=layer.ffn),
    block=use(block.cross_decoder, mixer=own, cross=cross, ffn=layer.ffn),
    bias=use(positions.Buckets),
    init=use(init.t5),
  )
  return use(transformer.encoder_decoder, **parts)
