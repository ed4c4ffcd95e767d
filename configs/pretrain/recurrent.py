r"""Recurrent models on tiny Shakespeare: Mamba, Mamba-2, RWKV-4, RetNet, S4, S4D, H3, Hyena, or Mamba with attention.

  llm-jax train --config=configs/pretrain/recurrent.py --workdir=runs/mamba
  llm-jax train --config=configs/pretrain/recurrent.py:rwkv --workdir=runs/rwkv
  llm-jax train --config=configs/pretrain/recurrent.py:retnet --workdir=runs/retnet
  llm-jax train --config=configs/pretrain/recurrent.py:hybrid --workdir=runs/hybrid

Differs from configs/pretrain/lm.py in its blocks. Also `:mamba2`, `:s4`, `:s4d`, `:h3`, `:hyena`, `:lstm`. The hybrid
repeats three blocks of Mamba and one of attention (the ratio of Jamba is seven to one, arXiv:2403.19887).

Expected: 3.70 held-out bits per byte after `:mamba,steps=100` (200,000 tokens, from 6.6 nats per token at step 20).
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import attention, block, ffn, norms, transformer
from llm_jax.model.recurrent import h3, hyena, lstm, mamba, mamba2, retnet, rwkv, s4

EMBED = 192


def get_config(text=None):
  arg = variant(text, mixer='mamba', batch=8, length=256, steps=300)
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  known = blocks(arg.length)
  if arg.mixer not in known:
    raise UserError(f'no mixer {arg.mixer!r}: {nearest(arg.mixer, known)}')
  c.model = use(transformer.causal, **{**lm.settings(c.model), 'block': known[arg.mixer]})
  return c


def blocks(length):
  """By name: a block, or the blocks that a pattern repeats."""
  norm = use(norms.RMSNorm)
  alone = lambda mixer, **kw: use(block.mixers, mixer=mixer, norm=norm, **kw)
  feed = lambda mixer, hidden=2 * EMBED: use(
    block.decoder, mixer=mixer, ffn=use(ffn.Gated, hidden=hidden), norm=norm
  )
  one = alone(use(mamba.Mamba))
  return dict(
    mamba=one,
    mamba2=alone(use(mamba2.Mamba2, head_dim=32, state=32)),
    rwkv=alone(use(rwkv.TimeMix), channel=use(rwkv.ChannelMix)),
    retnet=feed(use(retnet.Retention, heads=4)),
    s4=feed(use(s4.S4)),
    s4d=feed(use(s4.S4D)),
    h3=feed(use(h3.H3)),
    hyena=feed(use(hyena.Hyena, length=length)),
    lstm=feed(use(lstm.LSTM)),
    hybrid=(one, one, one, feed(use(attention.SelfAttention, heads=4))),
  )
