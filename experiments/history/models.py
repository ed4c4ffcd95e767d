"""The neural models of the study, of about as many parameters each, on bytes."""

import functools
from collections.abc import Callable

from experiments import small
from llm_jax.model import block, heads, init, norms, transformer
from llm_jax.model.functions import Model
from llm_jax.model.recurrent import lstm, nplm

partial = functools.partial
VOCAB = 259  # data/vocab.py:Bytes without markers
WINDOW = 8  # bytes that the NPLM sees


def before(mixer: Callable, layers: int, embed: int) -> Model:
  """No residual stream, no norms, a head of its own with a bias: as such models were built."""
  layer = partial(block.mixers, mixer=mixer, residual=norms.plain)
  head = partial(heads.Untied, bias=True)
  return transformer.causal(
    vocab=VOCAB, embed=embed, layers=layers, block=layer, norm=None, head=head, init=init.palm
  )


def neural(window: int) -> Model:
  """Bengio et al.'s, which sees the last `window` bytes."""
  return before(partial(nplm.NPLM, window=window, hidden=224), 1, 48)


def recurrent() -> Model:
  """One layer of an LSTM."""
  return before(partial(lstm.LSTM, hidden=142), 1, 48)


def decoder() -> Model:
  """A small LLaMA of three layers."""
  recipe = partial(init.gpt2, std=0.08)
  return small.decoder(vocab=VOCAB, embed=64, heads=2, layers=3, init=recipe)


MODELS = {'NPLM': partial(neural, WINDOW), 'LSTM': recurrent, 'Transformer': decoder}
