r"""What came before attention, on tiny Shakespeare: an LSTM, or the NPLM of 2003.

  llm-jax train --config=configs/pretrain/lstm.py --workdir=runs/lstm
  llm-jax train --config=configs/pretrain/lstm.py:nplm --workdir=runs/nplm

Differs from configs/pretrain/lm.py in the model: two layers of LSTM, or one of NPLM that sees 8 tokens; no residual
stream, no norms, a head of its own with a bias. (The LSTM in the blocks of today: configs/pretrain/recurrent.py:lstm.)

Expected: 3.57 held-out bits per byte after `:lstm,steps=100` (204,800 tokens, from 6.7 nats per token at step 10).
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import block, heads, init, norms, transformer
from llm_jax.model.recurrent import lstm, nplm


def get_config(text=None):
  arg = variant(text, mixer='lstm', batch=8, length=256, steps=300)
  c = lm.get_config(f'batch={arg.batch},length={arg.length},steps={arg.steps}')
  known = dict(lstm=(2, use(lstm.LSTM, hidden=384)), nplm=(1, use(nplm.NPLM, window=8, hidden=512)))
  if arg.mixer not in known:
    raise UserError(f'no mixer {arg.mixer!r}: {nearest(arg.mixer, known)}')
  layers, mixer = known[arg.mixer]
  told = dict(
    layers=layers,
    block=use(block.mixers, mixer=mixer, residual=use(norms.plain), norm=use(norms.RMSNorm)),
    norm=None,
    head=use(heads.Untied, bias=True),
    init=use(init.palm),
  )
  c.model = use(transformer.causal, **{**lm.settings(c.model), **told})
  return c
