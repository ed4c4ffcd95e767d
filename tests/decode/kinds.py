"""Small models of every kind, and what they say of a text read at once, without a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model import attention, block, ffn, positions, transformer
from llm_jax.model.recurrent import mamba

KINDS = ('causal', 'prefix', 'encoder_decoder', 'recurrent', 'window')
KEY = jax.random.key(3)
PROMPTS = [[7, 2, 3, 5, 2, 3], [1], [], [8, 8, 3]]


@functools.cache
def make(kind: str, vocab: int = 12, layers: int = 2, seed: int = 1, length: int | None = None):
  """(model, weights large enough that no argmax is a near tie). length: of a table of learned positions."""
  partial = functools.partial
  places = dict(rotate=None) if length else dict(window=4) if kind == 'window' else {}
  mixer = partial(attention.SelfAttention, heads=2, groups=1, **places)
  feed = partial(ffn.Gated, hidden=24)
  one = partial(block.decoder, mixer=mixer, ffn=feed)
  settings = dict(vocab=vocab, embed=16, layers=layers)
  settings |= dict(length=length, positions=positions.Learned) if length else {}
  if kind == 'encoder_decoder':
    cross = partial(attention.CrossAttention, heads=2)
    both = partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed)
    model = transformer.encoder_decoder(block=both, encoder_layers=2, encoder_block=one, **settings)
  elif kind == 'recurrent':
    scan = partial(block.mixers, mixer=partial(mamba.Mamba, state=4, chunk=4))
    model = transformer.causal(block=scan, **settings)
  else:
    model = (transformer.prefix if kind == 'prefix' else transformer.causal)(block=one, **settings)
  shapes, rng = jax.eval_shape(model.init, KEY), np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype)
  params = jax.tree.map(draw, shapes)
  return model, params


def pad(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded with an id that must not matter."""
  width = max(1, *map(len, prompts))
  rows = [[*p, *[4] * (width - len(p))] for p in prompts]
  return np.array(rows, np.int32), np.array([len(p) for p in prompts], np.int32)


def text(kind: str, prompts: np.ndarray, answers: np.ndarray) -> tuple[dict, int]:
  """The batch of training for prompts [rows, n] and answers [rows, m], none padded, and where the answer's first
  token is predicted."""
  rows, n = prompts.shape
  start = np.zeros((rows, 1), np.int32)
  if kind == 'encoder_decoder':
    return {'inputs': np.concatenate([start, answers], 1), 'encoder/inputs': prompts}, 0
  batch = dict(inputs=np.concatenate([start, prompts, answers], 1))
  if kind == 'prefix':
    batch['prefix'] = np.broadcast_to(
      np.arange(n + 1 + answers.shape[1]) <= n, batch['inputs'].shape
    )
  return batch, n


@functools.cache
def _forward(hidden, logits):
  return jax.jit(lambda params, batch: (logits(params, (x := hidden(params, batch).x)), x))


def read(kind: str, model, params, prompts: np.ndarray, answers: np.ndarray) -> tuple:
  """f64 (logits [rows, m + 1, vocab] of every next token of the answers, hidden [rows, length, embed] of all)."""
  batch, first = text(kind, prompts, answers)
  logits, x = _forward(model.hidden, model.logits)(params, batch)
  return np.asarray(logits, np.float64)[:, first:], np.asarray(x, np.float64)


def next_logits(kind: str, made: tuple, prompt: list[int], answer: list[int]) -> np.ndarray:
  """f64 [vocab], after one prompt and what follows it. Read at a fixed width, so that little is compiled; causal."""
  width = 16
  tokens = np.zeros((1, width), np.int32)
  tokens[0, : len(answer)] = answer
  prompts = np.array([prompt], np.int32).reshape(1, -1)
  if kind == 'encoder_decoder' and not prompt:
    raise ValueError('an encoder without input')
  return read(kind, *made, prompts, tokens)[0][0, len(answer)]
