r"""T5's span corruption with an encoder-decoder: 15 % of the tokens in spans of 3 are replaced and have to be filled
in.

  llm-jax train --config=configs/pretrain/span_corruption.py --workdir=runs/span_corruption

Differs from lm.py in the architecture (an encoder of as many layers, T5's relative position buckets instead of RoPE,
its initialisation), in the denoiser, and in the decoder's length: 256 input tokens make 57 targets.
"""

from configs.pretrain import lm, prefix_lm
from llm_jax.core.config import use
from llm_jax.data import denoise
from llm_jax.model import attention, block, heads, init, positions, transformer


def get_config(text=None):
  c = lm.get_config(text)
  c.model = model(c.model)
  for source in (c.source, c.hooks.heldout.source):
    source.encoder_length, source.length = c.source.length, c.source.length // 4
  c.hooks.samples.prompts = ('ROMEO:\nWhat is <extra_id_0> my lord?',)
  return prefix_lm.set_denoiser(c, denoise.span_corruption)


def model(parent):
  """The parent's width, depth and vocabulary as an encoder-decoder in the manner of T5."""
  parts = lm.settings(parent)
  feed, depth = parts.pop('block').ffn, parts['layers']
  attend = dict(heads=4, scale=1.0)
  self_attention = use(attention.SelfAttention, rotate=None, **attend)
  return use(
    transformer.encoder_decoder,
    **parts
    | dict(
      encoder_layers=depth,
      encoder_block=use(block.decoder, mixer=self_attention, ffn=feed),
      block=use(
        block.cross_decoder,
        mixer=self_attention,
        cross=use(attention.CrossAttention, **attend),
        ffn=feed,
      ),
      bias=use(positions.Buckets),
      head=use(heads.Tied, scaled=True),
      init=use(init.t5),
    ),
  )
