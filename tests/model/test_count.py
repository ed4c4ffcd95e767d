"""Closed forms against the numbers that the papers print, the trees that init makes, and what XLA counts."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from llm_jax.core import tree, weights
from llm_jax.core.errors import UserError
from llm_jax.model import (
  attention,
  block,
  count,
  ffn,
  heads,
  init,
  masks,
  norms,
  param,
  positions,
  stack,
  transformer,
)
from llm_jax.model.recurrent import lstm, mamba, mamba2, nplm, retnet, rwkv

part = functools.partial
DAY = 24 * 3600
A100, V100, TPU3, TPU4 = 312e12, 125e12, 123e12, 275e12  # dense 16-bit peaks, FLOP/s

RELU, GEGLU = part(ffn.MLP, activation=ffn.relu), part(ffn.Gated, activation=ffn.gelu_tanh)


def gpt3(layers, embed, heads):
  layer_norm = part(norms.LayerNorm)
  return transformer.causal(
    vocab=50257,
    embed=embed,
    layers=layers,
    length=2048,
    positions=positions.Learned,
    norm=layer_norm,
    block=part(
      block.decoder,
      mixer=part(attention.SelfAttention, heads=heads, bias=True, rotate=None),
      ffn=part(ffn.MLP, hidden=4 * embed, bias=True),
      norm=layer_norm,
    ),
  )


def llama(layers, embed, query_heads, hidden, groups=None, vocab=32000):
  return transformer.causal(
    vocab=vocab,
    embed=embed,
    layers=layers,
    head=heads.Untied,
    block=part(
      block.decoder,
      mixer=part(attention.SelfAttention, heads=query_heads, groups=groups),
      ffn=part(ffn.Gated, hidden=hidden),
    ),
  )


def t5(
  layers,
  embed,
  query_heads,
  head_dim,
  hidden,
  unit=RELU,
  head=heads.Tied,
):
  own = part(attention.SelfAttention, heads=query_heads, head_dim=head_dim, rotate=None, scale=1.0)
  cross = part(attention.CrossAttention, heads=query_heads, head_dim=head_dim, scale=1.0)
  unit = part(unit, hidden=hidden)
  return transformer.encoder_decoder(
    vocab=32128,
    embed=embed,
    layers=layers,
    encoder_layers=layers,
    block=part(block.cross_decoder, mixer=own, cross=cross, ffn=unit),
    encoder_block=part(block.decoder, mixer=own, ffn=unit),
    bias=positions.Buckets,
    head=head,
  )


# layers, embed, heads, all parameters, Kaplan's N, forward FLOPs per token at 2,048 (survey checklist, part 5a)
GPT3 = {
  'small': (12, 768, 12, 125_226_240, 84_934_656, 207_618_048),
  'medium': (24, 1024, 16, 355_871_744, 301_989_888, 704_643_072),
  'large': (24, 1536, 16, 760_300_032, 679_477_248, 1_509_949_440),
  'xl': (24, 2048, 16, 1_315_723_264, 1_207_959_552, 2_617_245_696),
  '2.7b': (32, 2560, 32, 2_651_553_280, 2_516_582_400, 5_368_709_120),
  '6.7b': (32, 4096, 32, 6_658_404_352, 6_442_450_944, 13_421_772_800),
  '13b': (40, 5120, 40, 12_853_386_240, 12_582_912_000, 26_004_684_800),
  '175b': (96, 12288, 96, 174_604_259_328, 173_946_175_488, 352_724_189_184),
}
# layers, embed, heads, hidden, parameters, and the size in the paper's table (part 5b)
LLAMA = {
  '7b': (32, 4096, 32, 11008, 6_738_415_616, 6.7),
  '13b': (40, 5120, 40, 13824, 13_015_864_320, 13.0),
  '33b': (60, 6656, 52, 17920, 32_528_943_616, 32.5),
  '65b': (80, 8192, 64, 22016, 65_285_660_672, 65.2),
}
T5 = {
  'small': (t5, (6, 512, 8, 64, 2048), 60_506_624),
  'base': (t5, (12, 768, 12, 64, 3072), 222_903_552),
  'large': (t5, (24, 1024, 16, 64, 4096), 737_668_096),
  '3b': (t5, (24, 1024, 32, 128, 16384), 2_851_598_336),
  '11b': (t5, (24, 1024, 128, 128, 65536), 11_307_321_344),
  'v1.1 small': (t5, (8, 512, 6, 64, 1024, GEGLU, heads.Untied), 76_961_152),
  'v1.1 xxl': (t5, (24, 4096, 64, 64, 10240, GEGLU, heads.Untied), 11_135_332_352),
}
MORE = {
  'llama 2 70b': (llama, (80, 8192, 64, 28672, 8), 68_976_648_192),
  'llama 3 8b': (llama, (32, 4096, 32, 14336, 8, 128256), 8_030_261_248),
}


def in_the_tree(model):
  """Parameters of what init makes, without making it."""
  return tree.count(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize('size', GPT3)
def test_gpt3_ladder(size):
  layers, embed, query_heads, all_of_them, inner, flops = GPT3[size]
  model = gpt3(layers, embed, query_heads)
  assert count.total(model.card) == in_the_tree(model) == all_of_them
  head_dim = embed // query_heads
  sizes = dict(embed=embed, layers=layers, attention=query_heads * head_dim, ffn=4 * embed)
  assert count.non_embedding(**sizes) == inner
  assert count.kaplan_table(**sizes, vocab=50257, context=2048)['total'] == (inner, flops)
  exact = count.forward_flops(model.card, 2048)
  assert sum(exact.values()) - exact['head'] == 2048 * flops


@pytest.mark.parametrize('size', LLAMA)
def test_llama_ladder(size):
  layers, embed, query_heads, hidden, all_of_them, printed = LLAMA[size]
  model = llama(layers, embed, query_heads, hidden)
  assert ffn.llama_hidden(embed) == hidden
  assert count.total(model.card) == in_the_tree(model) == all_of_them
  assert math.floor(all_of_them / 1e8) / 10 == printed  # the paper cuts: 65.29 is printed as 65.2


@pytest.mark.parametrize('name', [*T5, *MORE])
def test_published_sizes(name):
  make, sizes, want = (T5 | MORE)[name]
  model = make(*sizes)
  assert count.total(model.card) == in_the_tree(model) == want


def test_every_cell_of_kaplans_table():
  d, layers, attn, hidden, vocab, context = (
    3,
    5,
    7,
    11,
    13,
    17,
  )  # primes: no two cells agree by chance
  got = count.kaplan_table(
    embed=d, layers=layers, attention=attn, ffn=hidden, vocab=vocab, context=context
  )
  n = 2 * d * layers * (2 * attn + hidden)
  assert got == dict(
    embed=((vocab + context) * d, 4 * d),
    qkv=(layers * d * 3 * attn, 2 * layers * d * 3 * attn),
    mask=(0, 2 * layers * context * attn),
    project=(layers * attn * d, 2 * layers * attn * d),
    feedforward=(layers * 2 * d * hidden, 2 * layers * 2 * d * hidden),
    deembed=(0, 2 * d * vocab),
    total=(n, 2 * n + 2 * layers * context * attn),
  )


GRID = dict(
  norm=[norms.RMSNorm, norms.LayerNorm, part(norms.LayerNorm, bias=False)],
  residual=[norms.pre, norms.post, norms.sandwich, norms.parallel],
  bias=[False, True],
  unit=[ffn.MLP, ffn.Gated],
)


@pytest.mark.parametrize('values', [*itertools.product(*GRID.values())])
def test_blocks_of_every_kind(values):
  norm, residual, bias, unit = values
  mixer = part(attention.SelfAttention, heads=4, groups=2, head_dim=5, bias=bias)
  made = part(
    block.decoder, mixer=mixer, ffn=part(unit, hidden=24, bias=bias), norm=norm, residual=residual
  )
  final = None if residual is norms.post else norm
  model = transformer.causal(vocab=37, embed=16, layers=3, block=made, norm=final)
  assert count.total(model.card) == in_the_tree(model)


ENDS = dict(
  head=[heads.Tied, heads.Untied],
  where=[
    {},
    dict(positions=positions.Learned, length=11),
    dict(positions=positions.Sinusoidal),
    dict(bias=positions.Buckets),
    dict(bias=positions.Alibi, positions=positions.Learned, length=5),
  ],
  kind=['causal', 'prefix', 'encoder_decoder'],
  groups=[None, 1],
)


@pytest.mark.parametrize('values', [*itertools.product(*ENDS.values())])
def test_models_of_every_kind(values):
  head, where, kind, groups = values
  own = part(attention.SelfAttention, heads=4, groups=groups)
  unit = part(ffn.MLP, hidden=24)
  kw = dict(vocab=37, vocab_multiple=16, embed=16, layers=4, head=head, **where)
  kw['block'] = (part(block.decoder, mixer=own, ffn=unit),) * 2  # a pattern
  if kind == 'encoder_decoder':
    cross = part(attention.CrossAttention, heads=4, groups=groups)
    kw |= dict(
      block=part(block.cross_decoder, mixer=own, cross=cross, ffn=unit),
      encoder_block=kw['block'],
      encoder_layers=2,
    )
  model = getattr(transformer, kind)(**kw)
  assert count.total(model.card) == in_the_tree(model)
  parts = count.parameters(model.card)
  assert parts['embedding'] == 48 * 16 and parts['head'] == (0 if head is heads.Tied else 48 * 16)
  assert parts['positions'] == 16 * where.get('length', 0)


def tiny(kind):
  own = part(attention.SelfAttention, heads=4, head_dim=64)
  unit = part(ffn.Gated, hidden=1024)
  kw = dict(
    vocab=512, embed=256, layers=2, runner=stack.loop, init=init.gpt2
  )  # XLA counts the body of a scan once
  if kind == 'causal':
    return transformer.causal(**kw, block=part(block.decoder, mixer=own, ffn=unit))
  cross = part(attention.CrossAttention, heads=4, head_dim=64)
  made = part(block.cross_decoder, mixer=own, cross=cross, ffn=unit)
  return transformer.encoder_decoder(
    **kw, block=made, encoder_layers=2, encoder_block=part(block.decoder, mixer=own, ffn=unit)
  )


@pytest.mark.parametrize(('kind', 'encoder_length'), [('causal', 0), ('encoder_decoder', 96)])
def test_flops_are_what_xla_counts(kind, encoder_length):
  model, length = tiny(kind), 128
  params = jax.eval_shape(model.init, jax.random.key(0))
  batch = dict(inputs=jax.ShapeDtypeStruct((1, length), jnp.int32))
  if encoder_length:
    batch['encoder/inputs'] = jax.ShapeDtypeStruct((1, encoder_length), jnp.int32)

  def forward(params, batch):
    return model.logits(params, model.hidden(params, batch).x)

  def loss(params, batch):
    return (forward(params, batch) ** 2).sum()

  xla = {f: jax.jit(f).lower(params, batch).cost_analysis()['flops'] for f in (forward, loss)}
  xla['grad'] = jax.jit(jax.grad(loss)).lower(params, batch).cost_analysis()['flops']
  ours = sum(count.forward_flops(model.card, length, encoder_length, seen=1.0).values())
  assert ours <= xla[forward] <= 1.02 * ours
  trained = length * count.training_flops(model.card, length, encoder_length, seen=1.0)
  assert abs(xla['grad'] / trained - 1) < 0.02


class Routed(nn.Module):
  """Every expert computed, the first `top_k` kept: enough of a mixture of experts to be counted."""

  hidden: int
  experts: int
  top_k: int = 2

  @nn.compact
  def __call__(self, x, ctx):
    d, e, f = x.shape[-1], self.experts, self.hidden
    router = param.weight(self, 'router', (d, e), ('embed', 'expert'), 'router')
    up = param.weight(self, 'up', (e, d, f), ('expert', 'embed', 'ffn'), 'ffn_in')
    down = param.weight(self, 'down', (e, f, d), ('expert', 'ffn', 'embed'), 'ffn_out')
    bias = param.weight(self, 'bias', (e, d), ('expert', 'embed'), param.zeros)
    gate = jax.nn.softmax(weights.einsum('btd,de->bte', x, router))[..., : self.top_k]
    h = jax.nn.relu(jnp.einsum('btd,edf->btef', x, up[: self.top_k]))
    y = jnp.einsum('btef,efd->bted', h, down[: self.top_k]) + bias[: self.top_k]
    return (gate[..., None] * y).sum(2), {}


class Decayed(nn.Module):
  """Linear attention with one decay per head: a state [heads, head_dim, head_dim] instead of keys."""

  heads: int
  head_dim: int

  @nn.compact
  def __call__(self, x, ctx, state=None):
    shape, axes = (x.shape[-1], self.heads, self.head_dim), ('embed', 'heads', 'head_dim')
    q, k, v = (
      weights.einsum('btd,dhk->bthk', x, param.weight(self, n, shape, axes, n)) for n in 'qkv'
    )
    decay = param.weight(self, 'decay', (self.heads, self.head_dim), axes[1:], param.zeros)
    at = jnp.arange(x.shape[1])
    near = jnp.exp(jnp.minimum(0, at - at[:, None])) * (at <= at[:, None])
    scores = jnp.einsum('bthk,bshk->bhts', q * decay, k) * near
    out = param.weight(self, 'out', shape[1:] + shape[:1], (*axes[1:], 'embed'), 'attention_out')
    return weights.einsum('bthk,hkd->btd', jnp.einsum('bhts,bshk->bthk', scores, v), out), state

  def flops(self, length, embed):
    """Of the two products of the parallel form."""
    return 4 * self.heads * self.head_dim * length**2

  def initial(self, batch, length, embed, dtype):
    """Of the recurrent form."""
    return dict(s=jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32))

  def state_axes(self):
    return dict(s=('batch', 'heads', 'head_dim', None))


def mixed():
  """Two segments of unequal blocks: attention of two sizes, a mixture of experts, a mixer without keys."""
  attend = part(block.decoder, mixer=part(attention.SelfAttention, heads=4, groups=2))
  dense, wide = part(ffn.Gated, hidden=320), part(ffn.MLP, hidden=640, bias=True)
  routed = part(Routed, hidden=192, experts=8)
  few = part(block.decoder, mixer=part(attention.SelfAttention, heads=2, head_dim=32), ffn=wide)
  decayed = part(
    block.decoder, mixer=part(Decayed, heads=2, head_dim=64), ffn=dense, norm=norms.LayerNorm
  )
  return transformer.causal(
    vocab=256,
    embed=256,
    layers=(4, 3),
    block=((part(attend, ffn=dense), part(attend, ffn=routed)), (few, decayed, decayed)),
    runner=stack.loop,
  )


def test_unequal_blocks_are_counted_one_by_one():
  model = mixed()
  card = model.card
  parts, met = count.parameters(card), count.active(card)
  assert [kind.repeats for kind in card.decoder] == [2, 2, 1, 1, 1] and card.layers == 7
  assert sum(parts.values()) == in_the_tree(model)
  assert parts['mixer'] == 2 * (4 * 256 * 128 + 128)
  # 6 of 8 experts in two layers, with their biases
  assert parts['ffn'] - met['ffn'] == 2 * 6 * (2 * 256 * 192 + 256)
  assert {n for n in parts if parts[n] != met[n]} == {'ffn'}


def test_flops_of_unequal_blocks_are_what_xla_counts():
  model, length = mixed(), 64
  params = jax.eval_shape(model.init, jax.random.key(0))
  batch = dict(inputs=jax.ShapeDtypeStruct((1, length), jnp.int32))
  forward = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch).x))
  xla = forward.lower(params, batch).cost_analysis()['flops']
  ours = count.forward_flops(model.card, length, seen=1.0)
  assert sum(ours.values()) <= xla <= 1.03 * sum(ours.values())
  assert ours['mixer'] == 2 * length * 2 * 4 * 256 * 128 + 2 * 4 * 128 * length**2


def test_flops_of_relative_positions_are_what_xla_counts():
  mixer = part(
    attention.SelfAttention, heads=4, rotate=None, relative=part(positions.TransformerXL)
  )
  made = part(block.decoder, mixer=mixer, ffn=part(ffn.MLP, hidden=512))
  model = transformer.causal(vocab=256, embed=256, layers=2, block=made, runner=stack.loop)
  assert count.total(model.card) == in_the_tree(model)
  params, length = jax.eval_shape(model.init, jax.random.key(0)), 128
  batch = dict(inputs=jax.ShapeDtypeStruct((1, length), jnp.int32))
  forward = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch).x))
  xla = forward.lower(params, batch).cost_analysis()['flops']
  ours = count.forward_flops(model.card, length, seen=1.0)
  assert sum(ours.values()) <= xla <= 1.03 * sum(ours.values())
  assert ours['scores'] == 2 * 6 * 256 * length**2  # with keys, with distances, with values


def test_what_decoding_keeps_of_unequal_blocks():
  card, state = mixed().card, 4 * 2 * 64 * 64
  assert count.kv_bytes(card) == 2 * 2 * (4 * 2 * 64 + 1 * 2 * 32)
  for length in (1, 100):
    want = length * count.kv_bytes(card) + 2 * state
    assert count.context_bytes(card, length) == want


@pytest.mark.parametrize(('window', 'sinks'), [(1, 0), (3, 0), (16, 0), (17, 0), (None, 0), (5, 2)])
def test_a_window_limits_products_and_keys(window, sinks):
  mixer = part(attention.SelfAttention, heads=4, window=window, sinks=sinks)
  made = part(block.decoder, mixer=mixer, ffn=part(ffn.MLP, hidden=96))
  card = transformer.causal(vocab=8, embed=64, layers=2, block=made).card
  length = 16
  seen = masks.Mask(causal=True, window=window, sinks=sinks).dense(length, length)
  near = min(window + sinks if window else length, length)
  # the diagonal is a full product: half of the square is half a pair per token less than that
  products = count.forward_flops(card, length)['scores'] / (2 * 4 * 64)
  assert products == seen.sum() - near / 2
  assert count.forward_flops(card, length, seen=1.0)['scores'] == 2 * 4 * 64 * length * near
  each = count.kv_bytes(card)
  assert count.context_bytes(card, length) == each * seen.sum(-1).max()
  assert count.context_bytes(card, 2) == each * min(2, near)


def test_norms_of_queries_and_keys():
  mixer = part(attention.SelfAttention, heads=4, qk_norm=norms.RMSNorm)
  made = part(block.decoder, mixer=mixer, ffn=part(ffn.MLP, hidden=24))
  model = transformer.causal(vocab=8, embed=32, layers=3, block=made)
  assert count.parameters(model.card)['attention'] == 3 * (4 * 32 * 32 + 2 * 8)
  assert count.total(model.card) == in_the_tree(model)


RECURRENT = {
  'rwkv': part(block.mixers, mixer=rwkv.TimeMix, channel=rwkv.ChannelMix),
  'mamba': part(block.mixers, mixer=mamba.Mamba),
  'mamba2': part(block.mixers, mixer=mamba2.Mamba2),
  'lstm': part(block.mixers, mixer=part(lstm.LSTM, hidden=96), residual=norms.plain),
  'nplm': part(block.mixers, mixer=nplm.NPLM, residual=norms.plain),
  'retnet': part(
    block.decoder, mixer=part(retnet.Retention, heads=4), ffn=part(ffn.Gated, hidden=96)
  ),
}


@pytest.mark.parametrize('name', RECURRENT)
def test_states_instead_of_keys(name):
  model = transformer.causal(vocab=8, embed=64, layers=3, block=RECURRENT[name])
  assert count.total(model.card) == in_the_tree(model) and count.kv_bytes(model.card) == 0
  batch = dict(inputs=jnp.zeros((1, 1), int))
  states = jax.eval_shape(lambda: model.states({}, batch, 10))
  held = {count.context_bytes(model.card, length, width=4) for length in (1, 10, 1000)}
  assert held == {tree.nbytes(states)}


@pytest.mark.parametrize('name', ['rwkv', 'mamba'])
def test_flops_of_recurrent_mixers_are_what_xla_counts(name):
  model = transformer.causal(
    vocab=256, embed=256, layers=2, block=RECURRENT[name], runner=stack.loop
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  batch = dict(inputs=jax.ShapeDtypeStruct((1, 64), jnp.int32))
  forward = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch).x))
  xla = forward.lower(params, batch).cost_analysis()['flops']
  ours = sum(count.forward_flops(model.card, 64).values())
  assert ours <= xla <= 1.06 * ours  # the recurrences themselves are no products of matrices


def test_what_cross_attention_keeps():
  card = t5(2, 64, 4, 16, 96).card
  each = count.kv_bytes(card)
  assert each == 2 * 2 * 2 * 64
  assert count.context_bytes(card, 10, 30) == 40 * each


def test_six_n_d_is_most_of_the_training_flops():
  card = gpt3(*GPT3['175b'][:3]).card
  exact = count.training_flops(card, 2048)
  assert exact == 3 * (352_724_189_184 + 2 * 50257 * 12288)
  assert 1.01 < exact / count.compute(parameters=173_946_175_488, tokens=1) < 1.02
  # PaLM's count of attention: 12 L H Q T, all of the square
  assert (
    count.training_flops(card, 2048, seen=1.0) - count.training_flops(card, 2048, seen=0.0)
    == 12 * 96 * 96 * 128 * 2048
  )


@pytest.mark.parametrize(
  ('parameters', 'tokens', 'printed'),
  [
    (175e9, 300e9, '3.15e+23'),  # GPT-3
    (65.2e9, 1.4e12, '5.48e+23'),  # LLaMA
    (280e9, 300e9, '5.04e+23'),  # Gopher
    (70e9, 1.4e12, '5.88e+23'),  # Chinchilla
    (176.247e9, 366e9, '3.87e+23'),  # BLOOM
    (70e9, 2e12, '8.40e+23'),  # Llama 2
  ],
)
def test_compute(parameters, tokens, printed):
  assert f'{count.compute(parameters=parameters, tokens=tokens):.2e}' == printed


def test_pf_days():
  assert round(count.PF_DAY) == 86_400_000_000_000_000_000
  assert round(count.pf_days(3.15e23)) == 3646  # the paper: 3,640


@pytest.mark.parametrize(
  ('parameters', 'tokens', 'chips', 'days', 'peak', 'printed'),
  [
    (65.2e9, 1.4e12, 2048, 21, A100, 0.472),  # LLaMA
    (176.247e9, 366e9, 384, 105, A100, 0.356),  # BLOOM
    (130e9, 400e9, 768, 60, A100, 0.251),  # GLM
    (82e9, 300e9, 1024, 13.4, A100, 0.399),  # HyperCLOVA
    (20e9, 1.3e12, 128, 120, A100, 0.377),  # AlexaTM
    (280e9, 300e9, 4096, 920 / 24, TPU3, 0.302),  # Gopher
    (96.6e9, 280e9, 1024, 574 / 24, TPU4, 0.279),  # GLaM, active parameters
    (137e9, 2.81e12, 1024, 57.7, TPU3, 3.68),  # LaMDA: the reported tokens cannot have been seen
    (260e9, 300e9, 2048, 28, V100, 0.756),  # ERNIE 3.0 Titan
    (175e9, 180e9, 992, 34, A100, 0.21),  # OPT, the tokens of one pass
    (175e9, 300e9, 992, 34, A100, 0.35),
    (6_738_415_616, 1e12, 1, 82_432 / 24, A100, 0.437),  # LLaMA by GPU-hours
    (13_015_864_320, 1e12, 1, 135_168 / 24, A100, 0.514),
    (32_528_943_616, 1.4e12, 1, 530_432 / 24, A100, 0.459),
    (65_285_660_672, 1.4e12, 1, 1_022_362 / 24, A100, 0.478),
  ],
)
def test_mfu(parameters, tokens, chips, days, peak, printed):
  got = count.mfu(
    count.compute(parameters=parameters, tokens=tokens),
    seconds=days * DAY,
    devices=chips,
    peak=peak,
  )
  digits = len(str(printed).partition('.')[2])
  assert round(got, digits) == printed


def test_kv_bytes():
  assert count.kv_bytes(llama(*LLAMA['13b'][:4]).card) == 819_200
  many, few, one = (count.kv_bytes(llama(80, 8192, 64, 28672, g).card) for g in (64, 8, 1))
  assert many == 8 * few == 64 * one == 2 * 2 * 80 * 64 * 128
  states = jax.eval_shape(
    lambda: llama(2, 64, 4, 96, 2, vocab=8).states({}, dict(inputs=jnp.zeros((3, 1), int)), 10)
  )
  assert tree.nbytes(states) == 3 * 10 * count.kv_bytes(
    llama(2, 64, 4, 96, 2, vocab=8).card, width=4
  )


def test_intensity_of_attention():
  assert round(count.intensity(queries=1, keys=1024, head_dim=128), 6) == 1.967339
  assert round(count.intensity(queries=1024, keys=1024, head_dim=128), 4) == 113.7778
  assert count.intensity(queries=1024, keys=1024, head_dim=128) == pytest.approx(
    1024 * 128 / (1024 + 128)
  )
  assert (
    round(count.intensity(queries=1, keys=1024, head_dim=128, flops_per_mac=2, score_bytes=4), 3)
    == 0.991
  )
  assert A100 / 2e12 == 156


def test_zero_memory_is_that_of_the_paper():
  gigabytes = [count.zero_bytes(7.5e9, devices=64, stage=s) / 1e9 for s in range(4)]
  assert [float(f'{g:.1f}') for g in gigabytes] == [120.0, 31.4, 16.6, 1.9]
  assert [count.zero_traffic(1.0, stage=s) for s in range(4)] == [2, 2, 2, 3]
  with pytest.raises(UserError, match='stages 0, 1, 2, 3, got 4'):
    count.zero_bytes(1, devices=1, stage=4)
