r"""A prefix decoder: it reads a random part of every document in both directions and predicts the rest.

  llm-jax train --config=configs/pretrain/prefix_lm.py --workdir=runs/prefix_lm

Differs from lm.py in the architecture (transformer.prefix; the parameters are the same, so a causal checkpoint can be
trained on: --config.init.init_from=runs/lm) and in the denoiser. On average half of the tokens are predicted.
"""

from configs.pretrain import lm
from llm_jax.core.config import use
from llm_jax.data import denoise
from llm_jax.model import transformer


def get_config(text=None):
  c = lm.get_config(text)
  c.model = use(transformer.prefix, **lm.settings(c.model))
  return set_denoiser(c, denoise.prefix_lm)


def set_denoiser(c, denoiser, **arguments):
  """Another denoiser, in training and on the held-out text."""
  c.source.denoiser = use(denoiser, **arguments)
  c.hooks.heldout.source.denoiser = use(denoiser, **arguments)
  return c
