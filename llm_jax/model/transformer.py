"""Causal decoders, prefix decoders, encoders and encoder-decoders from the same blocks and runners, as pure functions.

The builders return a `Model`: that is all of this package that the rest of the code sees.

    model = transformer.causal(vocab=256, embed=64, layers=2, block=functools.partial(block.decoder, ...))
    params = model.init(jax.random.key(0))
    x, _, _ = model.hidden(params, dict(inputs=ids))      # [batch, length, embed]
    logits = model.logits(params, x)                      # f32 [batch, length, vocab]

The default is the recipe of the survey's section 4.2.5 (ARC-045): pre-RMSNorm, RoPE, no biases, no norm after the
embedding; its feed-forward is `ffn.Gated` (SwiGLU).
"""

from collections.abc import Callable

import jax.numpy as jnp

from llm_jax.core.errors import UserError, nearest
from llm_jax.model import assembly, heads, init, norms, stack
from llm_jax.model import positions as positions_lib
from llm_jax.model.functions import Model


def causal(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.gpt2,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """A causal decoder: every position sees those before it (Radford et al. 2018).

  vocab: ids; the table gets that many rows, rounded up to `vocab_multiple`. layers, block: see `stack.segments`.
  length: the longest context (the size of a learned position table). norm: the final one, None for post-norm blocks.
  positions: added to the embedding. bias: added to the attention logits. init: a recipe of model/init.py. dtype: of the
  computation ('float32' or 'bfloat16'); parameters, softmax, norm statistics and logits are f32.
  """
  ends = _ends(
    'causal', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  return assembly.decoder_only(
    ends, _stack('decoder', layers, block, norm, bias, runner, causal=True, bidirectional=False)
  )


def prefix(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.gpt2,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """A prefix decoder: `causal`, but the positions of batch['prefix'] are seen by all (Dong et al. 2019,
  arXiv:1905.03197).

  The parameters are those of `causal` with the same arguments, so a causal checkpoint can be trained on as a prefix
  decoder.
  """
  ends = _ends(
    'prefix', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  return assembly.decoder_only(
    ends, _stack('decoder', layers, block, norm, bias, runner, causal=True, bidirectional=True)
  )


def encoder_decoder(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  encoder_layers: int | tuple,
  encoder_block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  stem: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.t5,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """An encoder that sees all of batch['encoder/inputs'] and a causal decoder that reads its output (Vaswani et al.
  2017; T5).

  layers, block: of the decoder, made with `block.cross_decoder`. Other arguments as in `causal`, for both stacks; the
  embedding and the position table are shared. stem: of each stack, what it does to its embeddings with weights of its
  own (`heads.Stem`).
  """
  ends = _ends(
    'encoder_decoder', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  encoder = _stack(
    'encoder',
    encoder_layers,
    encoder_block,
    norm,
    bias,
    runner,
    causal=False,
    bidirectional=True,
    stem=stem,
  )
  decoder = _stack(
    'decoder', layers, block, norm, bias, runner, causal=True, bidirectional=False, stem=stem
  )
  return assembly.encoder_decoder(ends, encoder, decoder)


def encoder(
  *,
  vocab: int,
  embed: int,
  layers: int | tuple,
  block: Callable | tuple,
  length: int | None = None,
  runner: Callable = stack.scan,
  norm: Callable | None = norms.RMSNorm,
  embedding: Callable = heads.Embedding,
  positions: Callable | None = None,
  bias: Callable | None = None,
  stem: Callable | None = None,
  head: Callable = heads.Tied,
  init: Callable = init.gpt2,
  vocab_multiple: int = 1,
  dtype: str = 'float32',
) -> Model:
  """An encoder alone: every position sees all of its segment (BERT, Devlin et al. 2018, arXiv:1810.04805).

  It has no states, so it does not generate: position i of its logits is a guess at token i itself. Arguments as in
  `causal` and `encoder_decoder`; BERT's stem is `heads.Stem(types=2)`, which reads batch['types'], its head
  `heads.Masked`. `model/classes.py` puts a pooler and a classifier on it.
  """
  ends = _ends(
    'encoder', vocab, embed, length, dtype, embedding, positions, head, init, vocab_multiple
  )
  told = dict(causal=False, bidirectional=True, stem=stem)
  return assembly.encoder_only(ends, _stack('encoder', layers, block, norm, bias, runner, **told))


def _ends(
  kind, vocab, embed, length, dtype, embedding, positions, head, recipe, vocab_multiple
) -> assembly.Ends:
  known = dict(float32=jnp.float32, bfloat16=jnp.bfloat16)
  if dtype not in known:
    raise UserError(f'dtype {dtype!r}: {nearest(dtype, known)}')
  rows = -(-vocab // vocab_multiple) * vocab_multiple
  made = [None if part is None else part() for part in (embedding, positions, head)]
  if isinstance(made[1], (positions_lib.Alibi, positions_lib.Buckets)):
    name = type(made[1]).__name__
    raise UserError(
      f'positions={name} is no vector to add to the embedding: set bias={name}, and positions=None'
    )
  return assembly.Ends(kind, vocab, rows, embed, length, known[dtype], *made, recipe)


def _stack(
  name, layers, block, norm, bias, runner, *, causal, bidirectional, stem=None
) -> assembly.Stack:
  made = [None if part is None else part() for part in (norm, bias, stem)]
  if isinstance(made[1], (positions_lib.Learned, positions_lib.Sinusoidal)):
    told = type(made[1]).__name__
    raise UserError(
      f'bias={told} is nothing to add to attention logits: set positions={told}, and bias=None'
    )
  return assembly.Stack(name, stack.segments(layers, block), *made, causal, bidirectional, runner)
