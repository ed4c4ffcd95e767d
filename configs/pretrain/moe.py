r"""Mixtures of experts on tiny Shakespeare: every other layer (GLaM, Switch) or every layer (Mixtral).

  llm-jax train --config=configs/pretrain/moe.py --workdir=runs/moe
  llm-jax train --config=configs/pretrain/moe.py:mixtral --workdir=runs/mixtral
  llm-jax train --config=configs/pretrain/moe.py:switch --config.mesh.expert=4 --workdir=DIR

Differs from configs/quickstart.py in the feed-forwards, which are experts. `switch`: 8 experts, of which a token meets
one; each has places for 1.25 times an even share, and the tokens beyond pass by. `glam`: two of 8, GShard's router.
`mixtral`: two of 8, none dropped, in every layer. An expert is as wide as the dense layer, so `switch` computes as
much per token as the quickstart, and holds 6.1M parameters to its 2.0M.

MEASURED
"""

import copy

from configs import quickstart
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import dispatch, ffn, routers
from llm_jax.model.moe import MoE


def get_config(text=None):
  arg = variant(text, kind='switch', experts=8, steps=600)
  c = quickstart.get_config(f'steps={arg.steps}')
  dense = c.model.block
  routed = copy.deepcopy(dense)
  routed.ffn = mixture(arg.kind, arg.experts, dense.ffn.hidden)
  with c.model.ignore_type():
    c.model.block = routed if arg.kind == 'mixtral' else (dense, routed)
  return c


def mixture(kind, experts, hidden):
  """The feed-forward of a kind."""
  limited = use(dispatch.limited, factor=1.25, evaluation=2.0)
  kinds = dict(
    switch=dict(
      top_k=1, router=use(routers.switch), dispatch=limited, jitter=0.01, z_loss=0.001
    ),
    glam=dict(top_k=2, router=use(routers.gshard), dispatch=limited),
    mixtral=dict(top_k=2, router=use(routers.top_k_softmax)),
  )  # fmt: skip
  if kind not in kinds:
    raise UserError(f'no kind {kind!r} of mixture; {nearest(kind, kinds)}')
  expert = use(ffn.Gated, hidden=hidden)
  return use(MoE, experts=experts, expert=expert, balance=0.01, **kinds[kind])
