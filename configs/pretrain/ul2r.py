r"""UL2R: a trained causal model goes on as a prefix decoder with UL2's denoisers (Tay et al. 2022, arXiv:2210.11399).

  make smollm2
  llm-jax train --config=configs/pretrain/ul2r.py --workdir=runs/ul2r
  llm-jax train --config=configs/pretrain/ul2r.py:run=runs/lm --workdir=runs/lm-ul2r

Differs from prefix_lm.py in where the weights come from (any run of a causal decoder: `llm-jax convert` makes one of
other people's weights), in the denoiser (50 % S, 25 % R, 25 % X), in a small constant rate, and in the vocabulary: the
run's own, with the three modes and 100 sentinels after its ids where it has none. Their rows start as the mean of all
others, so that the old text costs next to nothing more. Where there is no run yet the model is SmolLM2-135M.

The paper spends 0.1 % of the pre-training compute; this default of 200 steps is a demonstration.
"""

import os

from configs.pretrain import prefix_lm
from llm_jax.core import config
from llm_jax.core.config import use, variant
from llm_jax.data import denoise, vocab
from llm_jax.interop.architectures import llama
from llm_jax.model import transformer
from llm_jax.optim import schedules
from llm_jax.train import grow

SMOLLM2 = dict(
  vocab_size=49_152,
  hidden_size=576,
  intermediate_size=1536,
  num_hidden_layers=30,
  num_attention_heads=9,
  num_key_value_heads=3,
  rope_theta=100_000.0,
  rms_norm_eps=1e-5,
  hidden_act='silu',
  tie_word_embeddings=True,
)


def get_config(text=None):
  arg = variant(
    text, run='runs/smollm2', data='shakespeare', batch=8, length=256, steps=200, extra_ids=100
  )
  c = prefix_lm.get_config(
    f'data={arg.data},batch={arg.batch},length={arg.length},steps={arg.steps}'
  )
  trained = llama.llama(SMOLLM2)
  size = trained.vocab + arg.extra_ids + len(vocab.MODES)
  markers = dict(path=arg.run, extra_ids=arg.extra_ids, modes=vocab.MODES)
  if os.path.isdir(arg.run):
    trained = config.read(os.path.join(arg.run, 'config.json')).model
    size = max(trained.vocab, vocab.of_run(**markers).size)
  c.model = use(transformer.prefix, **prefix_lm.lm.settings(trained))
  c.model.vocab = size
  for source in (c.source, c.hooks.heldout.source):
    source.task.vocab = use(vocab.of_run, **markers)
  c.init = config.config(init_from=arg.run, rename=(), only=None, grow=use(grow.vocabulary))
  c.optimizer.schedule = use(schedules.constant, peak=1e-3)
  c.hooks.samples.prompts = ('[S]ROMEO:',)
  return prefix_lm.set_denoiser(c, denoise.ul2r)
