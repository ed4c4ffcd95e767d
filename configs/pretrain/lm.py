r"""A causal language model on tiny Shakespeare, or on C4 for those who have it. The parent of all pre-training configs.

  llm-jax train --config=configs/pretrain/lm.py --workdir=runs/lm
  TFDS_DATA_DIR=DIR llm-jax train --config=configs/pretrain/lm.py:c4 --workdir=runs/c4

The recipe of T5 and PaLM (Adafactor, inverse square root) on the architecture of LLaMA (pre-RMSNorm, SwiGLU, RoPE, no
biases). Documents are packed with segment ids, so no token sees another document.
"""

from llm_jax.core.config import config, use, variant
from llm_jax.core.mesh import ZERO3
from llm_jax.data import batch, denoise, pipeline, tasks, vocab
from llm_jax.decode import generate
from llm_jax.model import attention, block, ffn, heads, norms, stack, transformer
from llm_jax.objectives import language
from llm_jax.optim import adafactor, chain, schedules
from llm_jax.train import hooks


def get_config(text=None):
  arg = variant(text, data='shakespeare', batch=16, length=256, steps=1000)
  c4 = arg.data == 'c4'
  size = 32_128 if c4 else 1024
  words = use(vocab.sentencepiece, size=size)
  task = use(tasks.c4 if c4 else tasks.tiny_shakespeare, vocab=words)
  source = use(
    pipeline.make,
    task=task,
    batch=arg.batch,
    length=arg.length,
    denoiser=use(denoise.causal),
    rows=use(batch.pack),
  )
  return config(
    model=model(size, arg.length),
    source=source,
    objective=use(language.next_token, z_loss=1e-4),
    optimizer=optimizer(arg.steps),
    mesh=dict(data=-1, fsdp=1, expert=1, sequence=1, stage=1, tensor=1),
    axes=ZERO3,
    steps=arg.steps,
    microbatches=1,
    trainable=None,
    init=dict(init_from=None, rename=(), only=None, grow=None),
    hooks=hook_set(source, every=max(1, arg.steps // 10)),
    checkpoint=dict(every=max(1, arg.steps // 4), keep=3),
    log_every=10,
    seed=0,
  )


def model(size, length):
  layer = use(
    block.decoder,
    mixer=use(attention.SelfAttention, heads=4),
    ffn=use(ffn.Gated, hidden=512),
    norm=use(norms.RMSNorm),
    residual=use(norms.pre),
  )
  return use(
    transformer.causal,
    vocab=size,
    embed=192,
    layers=4,
    block=layer,
    length=length,
    runner=use(stack.scan),
    head=use(heads.Tied),
    vocab_multiple=128,
  )


def optimizer(steps):
  schedule = use(schedules.rsqrt, peak=0.01, warmup=max(1, steps // 20), hold=max(1, steps // 20))
  return use(chain.make, rule=use(adafactor.adafactor), schedule=schedule, clip=1.0)


def hook_set(source, every):
  heldout = use(
    pipeline.make, **{**settings(source), 'split': 'validation', 'shuffle': False, 'jitter': False}
  )
  return dict(
    heldout=use(hooks.evaluate, source=heldout, objective=use(language.next_token), every=every),
    samples=use(
      hooks.sample, generate=use(generate.text, max_new=200, temperature=0.8), prompts=('ROMEO:',)
    ),
    plot=use(hooks.plot),
  )


def settings(call):
  """The arguments of a `use`, to pass on to another."""
  return {name: value for name, value in call.items() if name != 'fn' and value is not None}
