"""Tiny models for the tests of this folder."""

import functools
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.model import attention, block, ffn, heads, positions, transformer

VOCAB, EMBED, LENGTH = 40, 16, 12


def decoder_block(mixer=None, feed=None, **kw):
  mixer = functools.partial(attention.SelfAttention, heads=4, **(mixer or {}))
  feed = feed or functools.partial(ffn.Gated, hidden=24)
  return functools.partial(block.decoder, mixer=mixer, ffn=feed, **kw)


def causal(mixer=None, feed=None, blocks=None, kind=transformer.causal, **kw):
  kw = {'layers': 2, 'length': LENGTH, **kw}
  return kind(vocab=VOCAB, embed=EMBED, block=decoder_block(mixer, feed, **(blocks or {})), **kw)


def t5(**kw):
  """The shape of T5 v1.0: relative buckets, ReLU, no 1/sqrt(d), tied and scaled head."""
  sizes = dict(heads=4, scale=1.0)
  mixer = functools.partial(attention.SelfAttention, rotate=None, **sizes)
  feed = functools.partial(ffn.MLP, hidden=24, activation=ffn.relu)
  cross = functools.partial(attention.CrossAttention, **sizes)
  kw = {
    'bias': functools.partial(positions.Buckets, buckets=8, distance=10),
    'head': functools.partial(heads.Tied, scaled=True),
    **kw,
  }
  return transformer.encoder_decoder(
    vocab=VOCAB,
    embed=EMBED,
    layers=2,
    encoder_layers=2,
    length=LENGTH,
    block=functools.partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed),
    encoder_block=functools.partial(block.decoder, mixer=mixer, ffn=feed),
    **kw,
  )


@functools.cache
def _large(init):
  def one(path, x):
    if path.endswith('scale'):
      return np.ones(x.shape, x.dtype)
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return rng.normal(scale=0.3 if 'table' in path else 0.16, size=x.shape).astype(x.dtype)

  return tree.map_paths(one, jax.eval_shape(init, jax.random.key(0)))


def large(model):
  """Parameters strong enough that a leak would show, from numpy: nothing to compile."""
  return _large(model.init)


@functools.cache
def _forward(hidden, logits):
  return jax.jit(lambda params, batch: logits(params, hidden(params, batch).x))


def forward(model):
  """jit of (params, batch) -> logits, one per model."""
  return _forward(model.hidden, model.logits)


@pytest.fixture(scope='session')
def ids():
  return jnp.asarray(np.random.default_rng(9).integers(2, VOCAB, (3, LENGTH)), jnp.int32)


@pytest.fixture(scope='session')
def tiny():
  """The functions above, for tests cannot import their conftest."""
  return types.SimpleNamespace(
    causal=causal, t5=t5, large=large, forward=forward, block=decoder_block, jnp=jnp,
    VOCAB=VOCAB, EMBED=EMBED, LENGTH=LENGTH,
  )  # fmt: skip
