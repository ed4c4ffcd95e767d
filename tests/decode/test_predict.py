"""The model as a function of a text, and as a compressor of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import ngram, vocab
from llm_jax.decode import compress, predict
from llm_jax.model import block, heads, init, norms, transformer
from llm_jax.model.recurrent import nplm
from llm_jax.objectives import language
from tests.decode import kinds
from tests.variants import variants

TEXT = 'the cat sat on the mat. the dog lay on the rug. '
BYTES = vocab.bytes_(extra_ids=0, modes=())


@pytest.fixture(scope='module')
def toy():
  """(model, params) of an NPLM that knows one text by heart."""
  mixer = functools.partial(nplm.NPLM, window=12, hidden=64)
  layer = functools.partial(block.mixers, mixer=mixer, residual=norms.plain)
  model = transformer.causal(
    vocab=BYTES.size, embed=24, layers=1, block=layer, norm=None, head=heads.Untied, init=init.palm
  )
  targets = jnp.asarray([BYTES.encode(TEXT)], jnp.int32)
  batch = dict(inputs=jnp.pad(targets[:, :-1], ((0, 0), (1, 0))), targets=targets)
  tx = optax.adam(0.02)

  @jax.jit
  def train(params):
    def loss(params):
      told = language.next_token(model, params, batch, None, chunk=None)
      return told.sum / told.weight

    def update(_, now):
      params, opt = now
      steps, opt = tx.update(jax.grad(loss)(params), opt)
      return optax.apply_updates(params, steps), opt

    return jax.lax.fori_loop(0, 300, update, (params, tx.init(params)))[0]

  return model, train(model.init(jax.random.key(0)))


def test_a_learned_text_goes_on_as_it_was(toy):
  """The survey's example: from a context to the next token, here letter by letter."""
  for prompt, word in (
    ('the cat sat on the', ' mat'),
    ('the cat sat on the mat. the dog lay', ' on'),
  ):
    for letter in word:
      p = predict.predict_next(*toy, BYTES, prompt)
      assert p.shape == (BYTES.size,) and p.sum() == pytest.approx(1, abs=1e-5)
      assert BYTES.decode([int(p.argmax())]) == letter and p.max() > 0.8, prompt
      prompt += letter


@pytest.mark.parametrize('kind', variants(['causal', 'encoder_decoder'], ['causal']))
def test_it_is_the_softmax_of_one_forward(kind):
  """Against all logits of a forward without a state."""
  model, params = kinds.make(kind, vocab=BYTES.size)
  ids = BYTES.encode('on')
  wanted = kinds.read(kind, model, params, np.array([ids]), np.zeros((1, 0), np.int32))[0][0, 0]
  found = predict.predict_next(model, params, BYTES, 'on')
  np.testing.assert_allclose(found, np.exp(wanted) / np.exp(wanted).sum(), atol=1e-5)


def coded(predictor, ids):
  """The bits of a text's code, after it came back whole."""
  data = compress.encode(predictor, ids)
  assert compress.encode(predictor, ids) == data
  assert compress.decode(predictor, data, len(ids)) == list(ids)
  return 8 * len(data)


LENGTHS = [('causal', 256), ('causal', 20), ('recurrent', 20)]


@pytest.mark.parametrize(('kind', 'length'), variants(LENGTHS, [('causal', 20)]))
def test_a_code_is_as_long_as_the_model_is_surprised(kind, length):
  """-log2 p by one forward over the text, or over the pieces after which the predictor forgets."""
  model, params = kinds.make(kind)
  text = np.random.default_rng(0).integers(0, 12, 53)
  nats = 0.0
  for at in range(0, len(text), length):
    targets = text[None, at : at + length]
    logits = kinds.read(kind, model, params, np.zeros((1, 0), np.int32), targets)[0][0, :-1]
    top = logits.max(-1)
    logp = logits[np.arange(len(logits)), targets[0]] - top
    nats -= (logp - np.log(np.exp(logits - top[:, None]).sum(-1))).sum()
  bits = coded(predict.of_model(model, params, length=length), text.tolist())
  assert abs(bits - nats / math.log(2)) <= 2 + 8
  assert bits > 8


def test_a_memorised_text_is_nearly_free(toy):
  assert coded(predict.of_model(*toy), BYTES.encode(TEXT)) <= 24 < 8 * len(TEXT)


def test_counts_compress_too():
  """A trigram model from its probabilities; ids it gives 0 have a code too."""
  rng = np.random.default_rng(0)
  train, text = (rng.choice(6, n, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]) for n in (2000, 300))
  counts = ngram.count([train], order=3, vocab=7, start=6)
  katz = ngram.katz(counts)
  reader = predict.of_distribution(lambda ids: ngram.probabilities(katz, [ids])[0])
  wanted = -ngram.logp(katz, text).sum() / math.log(2)
  assert abs(coded(reader, text.tolist()) - wanted) <= 2 + 8
  plain = ngram.likeliest(counts)
  reader = predict.of_distribution(lambda ids: ngram.probabilities(plain, [ids])[0])
  assert coded(reader, [0, 6, 1, 6, 6]) > 3 * 29


@pytest.mark.parametrize('seed', range(4))
def test_codes_of_known_length(seed):
  """Distributions with exact powers of 2, so that a code of n tokens is their sum of exponents; certain tokens cost
  nothing and rare ones what they should."""
  rng = np.random.default_rng(seed)
  p = np.array([0.5, 0.25, 0.125, 2.0**-20, 0.125 - 2.0**-20])
  ids = rng.choice(4, 200, p=[0.4, 0.3, 0.2, 0.1]).tolist()
  wanted = sum((1, 2, 3, 20)[i] for i in ids)
  assert wanted <= coded(predict.of_distribution(lambda seen: p), ids) <= wanted + 2 + 8
  sure = predict.of_distribution(lambda seen: np.eye(5)[len(seen) % 5])
  assert coded(sure, [i % 5 for i in range(500)]) == 8
  assert coded(sure, []) == 8


def test_errors(toy):
  with pytest.raises(UserError, match='token 1 is 300'):
    compress.encode(predict.of_model(*toy), [5, 300])
  with pytest.raises(UserError, match='only a causal one'):
    predict.of_model(*kinds.make('encoder_decoder'))
  with pytest.raises(UserError, match='at least 1'):
    predict.of_model(*toy, length=0)
