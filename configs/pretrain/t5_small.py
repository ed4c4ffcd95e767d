r"""T5 v1.0 small, 60,506,624 parameters, as published (Raffel et al. 2020, arXiv:1910.10683).

  TFDS_DATA_DIR=DIR llm-jax train --config=configs/pretrain/t5_small.py --workdir=runs/t5_small
  llm-jax train --config=configs/pretrain/t5_small.py:shakespeare --config.steps=100 --workdir=runs/try

Differs from span_corruption.py in size (6 + 6 layers, 512 wide, 8 heads of 64, 2,048 ReLU units),
dropout 0.1, and in the paper's baseline recipe: 2^19 updates of 128 rows of 512 + 114 tokens,
Adafactor at 1 / sqrt(max(n, 10^4)) without warm-up, no gradient clipping, no z-loss. The text is
C4.

Expect about log 32,128 = 10.4 nats per target before the first update. Not run to the end here.
"""

from configs.pretrain import span_corruption
from llm_jax.core.config import use, variant
from llm_jax.model import attention, block, ffn, heads, init, norms, positions, stack, transformer
from llm_jax.optim import adafactor, chain, schedules

DROPOUT = 0.1


def get_config(text=None):
  arg = variant(text, data='c4')
  c = span_corruption.get_config(f'data={arg.data},batch=128,length=512,steps={2**19}')
  c.model = model()
  for source in (c.source, c.hooks.heldout.source):
    source.encoder_length, source.length = 512, 114
  if arg.data == 'c4':
    c.hooks.samples.prompts = ('The <extra_id_0> of life is <extra_id_1>.',)
  c.objective.z_loss = 0.0
  schedule = use(schedules.rsqrt, peak=0.01, hold=10_000, warmup=0)
  c.optimizer = use(chain.make, rule=use(adafactor.adafactor), schedule=schedule, clip=None)
  c.checkpoint.every, c.hooks.heldout.every, c.hooks.heldout.batches = 5000, 5000, 64
  return c


def model():
  attend = dict(heads=8, head_dim=64, scale=1.0, dropout=DROPOUT)
  self_attention = use(attention.SelfAttention, rotate=None, **attend)
  rest = dict(
    ffn=use(ffn.MLP, hidden=2048, activation=use(ffn.relu), dropout=DROPOUT),
    norm=use(norms.RMSNorm, eps=1e-6),
    residual=use(norms.pre),
    dropout=DROPOUT,
  )
  return use(
    transformer.encoder_decoder,
    vocab=32_128,
    embed=512,
    layers=6,
    encoder_layers=6,
    block=use(
      block.cross_decoder,
      mixer=self_attention,
      cross=use(attention.CrossAttention, **attend),
      **rest,
    ),
    encoder_block=use(block.decoder, mixer=self_attention, **rest),
    runner=use(stack.scan),
    norm=use(norms.RMSNorm, eps=1e-6),
    embedding=use(heads.Embedding, dropout=DROPOUT),
    bias=use(positions.Buckets, buckets=32, distance=128),
    head=use(heads.Tied, scaled=True),
    init=use(init.t5),
  )
