"""The engine on a mesh against the engine on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode.logits import Sampling
from llm_jax.model import attention, block, ffn, moe, positions, transformer
from llm_jax.model.recurrent import mamba
from llm_jax.serve import placement
from llm_jax.serve.device import slot_bytes
from llm_jax.serve.engine import Engine
from llm_jax.serve.requests import Request
from tests.serve.test_engine import prompt, together
from tests.variants import variants

VOCAB, SIZES = 96, dict(rows=9, length=96, pages=60)
DRAWN = Sampling(temperature=0.9, top_p=0.95)
ASKED = [
  Request(prompt(0, 5), 12, Sampling(temperature=0.0)),
  Request(prompt(1, 70), 8, Sampling(temperature=0.0), top=3),
  Request(prompt(2, 33), 12, DRAWN, seed=3, bias=((3, 2.0), (9, -100.0))),
  Request(prompt(3, 40), 10, Sampling(repetition=1.3, presence=0.5), seed=4),
]


@functools.cache
def make(
  kind: str = 'attention', vocab: int = VOCAB, heads: int = 4, groups: int = 2, embed: int = 64
):
  """(model, its weights), random but large enough that no argmax is a near tie."""
  mixer = functools.partial(attention.SelfAttention, heads=heads, groups=groups, head_dim=16)
  feed = functools.partial(ffn.Gated, hidden=96)
  if kind == 'window':
    mixer = functools.partial(mixer, window=24, sinks=2)
  if kind == 'experts':
    feed = functools.partial(moe.MoE, 4, functools.partial(ffn.Gated, hidden=32))
  layer, build = functools.partial(block.decoder, mixer=mixer, ffn=feed), transformer.causal
  if kind == 'mamba':
    layer = functools.partial(block.mixers, mixer=mamba.Mamba)
  if kind == 'prefix':
    build = transformer.prefix
  if kind == 'encoder_decoder':
    mixer = functools.partial(mixer, rotate=None)
    cross = functools.partial(attention.CrossAttention, heads=heads, groups=groups, head_dim=16)
    one = functools.partial(block.decoder, mixer=mixer, ffn=feed)
    layer = functools.partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed)
    build = functools.partial(transformer.encoder_decoder, encoder_layers=1, encoder_block=one)
    build = functools.partial(build, bias=positions.Buckets)
  model = build(vocab=vocab, embed=embed, layers=1, length=96, block=layer)
  shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(1)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype)
  return model, jax.tree.map(draw, shapes)


def held(engine: Engine) -> int:
  """Bytes of pools and states on the first device."""
  leaves = jax.tree.leaves(engine._device._states)
  return sum(x.addressable_shards[0].data.nbytes for x in leaves)


def assert_close(found: list, wanted: list, atol: float) -> None:
  """The same tokens, and log-probabilities that differ by no more than `atol`."""
  for some, others in zip(found, wanted, strict=True):
    assert [t.id for t in some] == [t.id for t in others]
    np.testing.assert_allclose([t.logp for t in some], [t.logp for t in others], atol=atol)


CASES = {
  'attention': (dict(), 2, None),
  'int8': (dict(), 2, 'int8'),
  'fewer groups than devices': (dict(groups=1), 4, None),
  'an odd vocabulary': (dict(vocab=97), 2, None),
  'a width between': (dict(embed=256), 2, None),
  'window': (dict(kind='window'), 2, None),
  'mamba': (dict(kind='mamba'), 4, None),
  'experts': (dict(kind='experts'), 2, None),
  'prefix': (dict(kind='prefix'), 2, None),
  'encoder and decoder': (dict(kind='encoder_decoder'), 2, None),
  'encoder and decoder in int8': (dict(kind='encoder_decoder'), 2, 'int8'),
}


@pytest.mark.parametrize('case', variants(CASES, ['attention']))
def test_on_a_mesh_it_answers_as_on_one_device(case):
  """Each device holds its part of the memory, nothing is compiled later, and no answer depends on the others."""
  told, ways, kv = CASES[case]
  model, params = make(**told)
  put = lambda r: r
  if told.get('kind') == 'encoder_decoder':
    put = lambda r: r._replace(prompt=(0,), encoded=r.prompt)
  asked = [put(request) for request in ASKED]
  with Engine(model, params, kv=kv, **SIZES) as engine:
    expected, whole = together(engine, asked), held(engine)
  with jax.set_mesh(mesh.make(data=1, tensor=ways)):
    engine = Engine(model, params, kv=kv, **SIZES)
  with engine:
    alone = [engine.answer(request) for request in asked]
    crowd = [put(Request(prompt(100 + i, 3 + 9 * i), 12, DRAWN, seed=i)) for i in range(9)]
    among = together(engine, crowd[:5] + asked + crowd[5:])[5:9]
    if told.get('kind') == 'experts':  # they multiply what comes from all rows at once
      assert_close(among, alone, 2e-6)
    else:
      assert among == alone  # floats too
    assert engine.stats()['compilations_total'] == 0 and engine.stats()['blocks_used'] == 0
    split = 1 if told.get('groups') == 1 else ways
    assert held(engine) == pytest.approx(whole / split, rel=0.02)  # positions in a ring are whole
    for x in jax.tree.leaves(engine._device._params):
      assert x.sharding.device_set == set(jax.devices()[:ways])
  assert_close(alone, expected, 2e-4)


@pytest.mark.parametrize(
  ('sizes', 'words'),
  [
    (dict(data=2, tensor=2), 'got data=2, tensor=2: use tensor=4'),
    (dict(data=1, fsdp=2), 'nothing else, got fsdp=2'),
    (dict(data=1, tensor=8), r'heads \(4 does not divide by tensor=8\)'),
    (dict(data=1, tensor=2, explicit=True), 'Auto'),
  ],
)
def test_a_mesh_it_cannot_use_is_refused_before_anything_is_compiled(sizes, words):
  model, params = make()
  with jax.set_mesh(mesh.make(**sizes)), pytest.raises(UserError, match=words):
    Engine(model, params, **SIZES)


def test_the_pool_of_a_device_fits_into_its_memory():
  """Twice as many pages where each device holds half of each."""
  model, params = make()
  place = lambda: placement.find(model).entered()
  with place():
    alone = slot_bytes(model, params, None)
  with jax.set_mesh(mesh.make(data=1, tensor=2)), place():
    assert slot_bytes(model, params, None) == alone // 2
