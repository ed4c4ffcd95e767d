r"""The size ladder of GPT-3 (Brown et al. 2020, arXiv:2005.14165, table 2.1), from 125M to 175B parameters.

  TFDS_DATA_DIR=DIR llm-jax train --config=configs/pretrain/gpt3.py:small --workdir=runs/gpt3
  llm-jax train --config=configs/pretrain/gpt3.py:175b --config.mesh.tensor=8 --config.microbatches=4 --workdir=DIR
  llm-jax train --config=configs/pretrain/gpt3.py:small,data=shakespeare --config.steps=100 --workdir=runs/try

Sizes: small, medium, large, xl, 2.7b, 6.7b, 13b, 175b. Differs from lm.py in the architecture
(learned positions, LayerNorm, biases, GELU), in AdamW with a cosine to 10 % over 260B tokens after
a warm-up of 375M, in a batch that grows from a sixteenth of its full size (32K tokens for the
smallest models), and in weights split over all devices. XL has 16 heads and 13B is 5,120 wide: the
24 and 5,140 of the paper's table do not give its own
totals. All layers are dense; `band=256` makes every other one a local band of so many tokens, as
the paper does without giving the width. The text is C4, and bf16 replaces fp16.

Not run here; the paper's fit is 2.57 C^-0.048 nats per token for C petaFLOP/s-days: 2.46 for small, 1.73 for
175B (on its text and vocabulary).
"""

from configs.pretrain import lm
from llm_jax.core.config import build, use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import kernels, presets, stack
from llm_jax.optim import batch_size, chain, rules, schedules

TOKENS, DECAY, WARMUP, LENGTH = 300 * 10**9, 260 * 10**9, 375 * 10**6, 2048
# sequences in a batch (0.5M to 3.2M tokens), peak learning rate, billions of tokens until
# the batch is that large ("4-12, depending on the model size")
SIZES = {
  'small': (256, 6.0e-4, 4),
  'medium': (256, 3.0e-4, 4),
  'large': (256, 2.5e-4, 4),
  'xl': (512, 2.0e-4, 6),
  '2.7b': (512, 1.6e-4, 6),
  '6.7b': (1024, 1.2e-4, 8),
  '13b': (1024, 1.0e-4, 8),
  '175b': (1536, 0.6e-4, 12),
}


def get_config(text=None):
  arg = variant(text, size='small', data='c4', band=0)
  batch, peak, grown = pick(arg.size, SIZES)
  start = (
    batch // 16
  )  # sixteen sizes to compile; 32K tokens for the three smallest models, as published for all
  ramp = use(batch_size.ramp, start=start, end=batch, multiple=start, over=grown * 10**9 // LENGTH)
  steps, decay, warmup = (updates(tokens, batch, build(ramp)) for tokens in (TOKENS, DECAY, WARMUP))
  c = large_run(arg.data, batch, steps, vocab=50_257)
  c.model = model(f'gpt3_{arg.size}')
  if arg.band:
    with c.ignore_type():  # a pattern of layers in the place of one
      c.model.block = alternate(c.model.block, arg.band)
  c.source.ramp = ramp
  c.optimizer = optimizer(peak, decay, warmup)
  return c


def alternate(layer, band):
  """Dense and locally banded layers by turns (section 2.1; Child et al. 2019, arXiv:1904.10509)."""
  local = layer.copy_and_resolve_references()
  local.mixer.window, local.mixer.kernel = band, use(kernels.banded)
  return (layer, local)


def pick(size, sizes):
  """The row of a size ladder."""
  if size not in sizes:
    raise UserError(f'no size {size!r} in this ladder; {nearest(size, sizes)}')
  return sizes[size]


def updates(tokens, batch, ramp):
  """The updates it takes to see `tokens` tokens while the batch grows."""
  rows, k = -(-tokens // LENGTH), 0
  while ramp(k).size < batch and ramp(k).seen < rows:
    k += 1
  return k + max(0, -(-(rows - ramp(k).seen) // batch))


def large_run(data, batch, steps, vocab):
  """lm.py with everything that depends on the size of a run: batch, vocabulary, devices, how often things happen."""
  c = lm.get_config(f'data={data},batch={batch},length={LENGTH},steps={steps}')
  if data == 'c4':
    for source in (c.source, c.hooks.heldout.source):
      source.task.vocab.size = vocab
    c.hooks.samples.prompts = ('The meaning of life is',)
  c.objective.z_loss = 0.0
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.checkpoint.every = 1000
  c.hooks.heldout.every, c.hooks.heldout.batches = (
    1000,
    64,
  )  # the held-out split of C4 has some 175M tokens
  return c


def model(name):
  """A published model, its vocabulary padded to divide over devices, layers recomputed, in bf16."""
  return presets.config(
    name,
    kernel='kernels:dot_product',
    runner=use(stack.scan, remat='full'),
    vocab_multiple=128,
    dtype='bfloat16',
  )


def optimizer(peak, steps, warmup):
  """AdamW, decaying all matrices by 0.1; `warmup` and `steps` until 10 % of the peak are counted in updates."""
  return use(
    chain.make,
    rule=use(rules.adamw, b1=0.9, b2=0.95, eps=1e-8),
    schedule=use(schedules.cosine, peak=peak, steps=steps, warmup=warmup, floor=0.1),
    clip=1.0,
    weight_decay=0.1,
    decayed=use(chain.matrices),
  )
