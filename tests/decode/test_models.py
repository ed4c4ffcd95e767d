"""Decoding with the real models, and text in and out of real vocabularies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import config, mesh
from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode.generate import generate, stream_text, text
from llm_jax.model import attention, block, ffn, positions, transformer

KEY, VOCAB, NEW = jax.random.key(3), 40, 6
PROMPTS = np.array(
  [[7, 12, 30, 5, 9], [21, 0, 0, 0, 0], [0, 0, 0, 0, 0], [8, 8, 31, 0, 0]], np.int32
)
LENGTHS = np.array([5, 1, 0, 3], np.int32)
PLACES = dict(
  rope=(dict(), dict(length=64)),
  learned=(dict(rotate=None), dict(length=64, positions=positions.Learned)),
  alibi=(dict(rotate=None), dict(bias=positions.Alibi)),
  buckets=(dict(rotate=None), dict(bias=positions.Buckets)),
)


CASES = [('causal', 'rope'), ('causal', 'learned'), ('prefix', 'rope'), ('prefix', 'alibi')]
CASES += [('encoder_decoder', 'rope'), ('encoder_decoder', 'buckets')]


@functools.cache
def make(kind: str, place: str, vocab: int = VOCAB, multiple: int = 1, dtype: str = 'float32'):
  """A model and weights large enough that no argmax is a near tie."""
  own, outer = PLACES[place]
  mixer = functools.partial(attention.SelfAttention, heads=2, groups=1, **own)
  feed = functools.partial(ffn.Gated, hidden=24)
  settings = dict(vocab=vocab, embed=16, layers=2, vocab_multiple=multiple, dtype=dtype, **outer)
  plain = functools.partial(block.decoder, mixer=mixer, ffn=feed)
  if kind == 'encoder_decoder':
    cross = functools.partial(attention.CrossAttention, heads=2)
    both = functools.partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed)
    model = transformer.encoder_decoder(
      block=both, encoder_layers=2, encoder_block=plain, **settings
    )
  else:
    model = getattr(transformer, kind)(block=plain, **settings)
  shapes, rng = jax.eval_shape(model.init, KEY), np.random.default_rng(1)
  return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype), shapes)


def forward(kind: str, tokens: np.ndarray) -> tuple[dict, np.ndarray]:
  """The batch that training would build of prompts followed by `tokens`, and where the first of them is predicted."""
  rows = len(LENGTHS)
  if kind == 'encoder_decoder':
    seen = (np.arange(PROMPTS.shape[1]) < LENGTHS[:, None]).astype(np.int32)
    inputs = np.concatenate([np.zeros((rows, 1), np.int32), tokens], axis=1)
    return {'inputs': inputs, 'encoder/inputs': PROMPTS, 'encoder/segments': seen}, np.zeros(
      rows, int
    )
  inputs = np.zeros((rows, 1 + PROMPTS.shape[1] + tokens.shape[1]), np.int32)
  for row, n in enumerate(LENGTHS):
    inputs[row, 1 : n + 1], inputs[row, n + 1 : n + 1 + tokens.shape[1]] = (
      PROMPTS[row, :n],
      tokens[row],
    )
  batch = dict(inputs=inputs)
  if kind == 'prefix':
    batch['prefix'] = np.arange(inputs.shape[1]) <= LENGTHS[:, None]
  return batch, LENGTHS


@pytest.mark.parametrize(('kind', 'place'), CASES)
def test_cached_decoding_is_the_full_forward(kind, place):
  """Greedy tokens, and all log-probabilities, equal those of one forward without a cache over the finished text."""
  model, params = make(kind, place)
  out = generate(model, params, PROMPTS, LENGTHS, KEY, max_new=NEW, temperature=0.0, eos=None)
  batch, first = forward(kind, np.asarray(out.tokens))
  logits = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b).x))(params, batch)
  logp = np.asarray(jax.nn.log_softmax(logits))
  for row in range(4):
    if kind == 'encoder_decoder' and LENGTHS[row] == 0:
      assert np.isfinite(out.logp[row]).all()
      continue
    steps = logp[row, first[row] : first[row] + NEW]
    assert out.tokens[row].tolist() == steps.argmax(-1).tolist()
    np.testing.assert_allclose(out.logp[row], steps.max(-1), atol=2e-5)


@pytest.mark.parametrize('kind', ['causal', 'prefix', 'encoder_decoder'])
def test_a_ragged_batch_is_its_rows_one_by_one(kind):
  model, params = make(kind, 'rope')
  out = generate(model, params, PROMPTS, LENGTHS, KEY, max_new=NEW, eos=None)
  for row in range(4):
    part = slice(row, row + 1)
    alone = generate(
      model, params, PROMPTS[part], LENGTHS[part], KEY, max_new=NEW, eos=None, rows=[row]
    )
    assert out.tokens[row].tolist() == alone.tokens[0].tolist()
    np.testing.assert_allclose(out.logp[row], alone.logp[0], atol=2e-5)


def test_sharded_over_a_mesh():
  model, params = make('causal', 'rope')
  alone = generate(model, params, PROMPTS[:3], LENGTHS[:3], KEY, max_new=NEW, eos=None)
  with jax.set_mesh(mesh.make(data=2, fsdp=2, tensor=2)), mesh.rules(**_one_group()):
    placed = jax.device_put(params, mesh.shardings(model.axes, params))
    out = generate(model, placed, PROMPTS[:3], LENGTHS[:3], KEY, max_new=NEW, eos=None)
  assert out.tokens.tolist() == alone.tokens.tolist()
  np.testing.assert_allclose(out.logp, alone.logp, atol=2e-5)


def _one_group() -> dict:
  """One key head does not split over two devices."""
  return {kind: dict(rules, groups=()) for kind, rules in mesh.ZERO3.items()}


def test_in_bfloat16():
  model, params = make('causal', 'rope', dtype='bfloat16')
  out = generate(model, params, PROMPTS, LENGTHS, KEY, max_new=NEW, eos=None)
  assert np.isfinite(out.logp).all()


# --- text -------------------------------------------------------------------------------------------

SAMPLE = 'Où est né l’ours? 熊は日本で生まれた。 🐻‍❄️ e\u0301 \u2581 end\n'


@pytest.fixture(scope='module')
def pieces():
  documents = [
    ' '.join(f'word{i % 7} and the number {i}' for i in range(n, n + 40)) + '\n' for n in range(30)
  ]
  return vocab_lib.sentencepiece(vocab_lib.text_of(documents), size=300, extra_ids=5)


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_streamed_characters_are_never_cut(kind, pieces):
  words = vocab_lib.bytes_(extra_ids=5) if kind == 'bytes' else pieces
  ids = words.encode(SAMPLE)
  assert len(ids) > len(SAMPLE)  # most of it is spelt in bytes
  for cut in (0, 3, len(words.encode(SAMPLE[:9]))):
    before = words.encode(words.decode(ids[:cut]).replace('\ufffd', ''))
    found = list(
      prompts_lib.pieces(
        words, before, [[i] for i in words.encode(SAMPLE)] + [[words.eos]], words.eos
      )
    )
    assert ''.join(found) == SAMPLE
    assert not any('\ufffd' in piece for piece in found)
    assert len(found) > 30


def test_bytes_that_are_no_character_come_out_replaced_and_nothing_is_lost():
  words = vocab_lib.bytes_(extra_ids=0)
  raw = b'a\xff\xfe\xfd\xfc\xfbb\xe2\x82c\xf0\x9f'
  found = list(prompts_lib.pieces(words, [], [[b + 3] for b in raw], words.eos))
  assert ''.join(found) == raw.decode('utf-8', errors='replace')


@pytest.mark.parametrize('kind', ['causal', 'encoder_decoder'])
def test_text_is_streamed_text(kind, pieces):
  model, params = make(kind, 'rope', vocab=pieces.size, multiple=64)
  settings = dict(max_new=12, temperature=0.9)
  found = text(model, params, pieces, ['word1 <extra_id_0>'], KEY, **settings)
  assert found == [
    ''.join(stream_text(model, params, pieces, 'word1 <extra_id_0>', KEY, **settings))
  ]


def test_text_does_not_depend_on_the_size_of_its_batches(pieces):
  model, params = make('causal', 'rope', vocab=pieces.size, multiple=64)
  prompts, settings = ['word1 and', '', 'né'], dict(max_new=12, temperature=0.9)
  together = text(model, params, pieces, prompts, KEY, **settings)
  assert together == text(model, params, pieces, prompts, KEY, batch=1, **settings)
  assert len(set(together)) == 3


def test_text_draws_no_padding_and_no_id_beyond_the_vocabulary():
  words = vocab_lib.bytes_(extra_ids=0, modes=())
  model, params = make('causal', 'rope', vocab=words.size + 6, multiple=64)
  allowed = prompts_lib.drawable(model, words)
  assert not allowed[0] and not allowed[words.size :].any() and allowed[1 : words.size].all()
  settings = dict(max_new=40, temperature=30.0, eos=None, allowed=allowed)
  out = generate(model, params, PROMPTS, LENGTHS, KEY, **settings)
  assert 0 < np.min(out.tokens) and np.max(out.tokens) < words.size


def test_an_encoder_reads_the_prompt_as_training_wrote_it():
  words = vocab_lib.bytes_(extra_ids=2)
  model, _ = make('encoder_decoder', 'rope', vocab=words.size)
  encode = functools.partial(prompts_lib.encode, model, words)
  assert encode('') == [1]
  assert encode('ab') == words.encode('ab')
  assert encode('a<extra_id_0>') == [*words.encode('a<extra_id_0>'), 1]
  assert prompts_lib.encode(make('causal', 'rope', vocab=words.size)[0], words, '') == []


def test_a_vocabulary_larger_than_the_model():
  model, params = make('causal', 'rope')
  with pytest.raises(UserError, match='259 ids, the model 40'):
    text(model, params, vocab_lib.bytes_(extra_ids=0, modes=()), ['a'], KEY)


def test_a_prompt_longer_than_the_context_names_both_lengths():
  words = vocab_lib.bytes_(extra_ids=0)
  model, params = make('causal', 'learned', vocab=words.size)
  with pytest.raises(UserError, match='prompt has 64 tokens.* at most 63 .its context is 64'):
    text(model, params, words, ['a' * 64], KEY)
  assert len(text(model, params, words, ['a' * 63], KEY, max_new=5)[0]) <= 1


def test_text_is_an_argument_of_a_config():
  cfg = config.use(text, max_new=8)
  assert (cfg.max_new, cfg.temperature, cfg.top_k, cfg.top_p) == (8, 1.0, 0, 1.0)
  assert config.build(cfg).keywords['max_new'] == 8
