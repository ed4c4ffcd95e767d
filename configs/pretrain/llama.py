r"""The size ladder of LLaMA (Touvron et al. 2023, arXiv:2302.13971, table 2): 7B, 13B, 33B, 65B parameters.

  TFDS_DATA_DIR=DIR llm-jax train --config=configs/pretrain/llama.py:7b --workdir=runs/llama
  llm-jax train --config=configs/pretrain/llama.py:65b --config.mesh.tensor=8 --config.microbatches=4 --workdir=DIR

Differs from gpt3.py in the architecture (RMSNorm, RoPE, SwiGLU of width 8d/3, no biases, an output
matrix of its own), in a constant batch of 4M tokens and a warm-up of 2,000 updates; the cosine ends
with the 1.0T tokens (7b, 13b) or 1.4T (33b, 65b). The text is C4, one of the paper's seven corpora.

The paper spent 82,432 (7b) and 1,022,362 (65b) A100-hours. Not run here.
"""

from configs.pretrain import gpt3
from llm_jax.core.config import variant

BATCH = 2048  # sequences of 2,048 tokens
# peak learning rate, billions of tokens
SIZES = {
  '7b': (3.0e-4, 1000),
  '13b': (3.0e-4, 1000),
  '33b': (1.5e-4, 1400),
  '65b': (1.5e-4, 1400),
}


def get_config(text=None):
  arg = variant(text, size='7b', data='c4')
  peak, tokens = gpt3.pick(arg.size, SIZES)
  steps = tokens * 10**9 // (BATCH * gpt3.LENGTH)
  c = gpt3.large_run(arg.data, BATCH, steps, vocab=32_000)
  c.model = gpt3.model(f'llama_{arg.size}')
  c.optimizer = gpt3.optimizer(peak, steps, warmup=2000)
  return c
