"""Permutation language modelling: for every factorisation order the model is a distribution over texts."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data import batch, permuted, pipeline, tasks, vocab
from llm_jax.model import attention, block, ffn, positions, transformer
from tests.data.conftest import model, says

VOCAB, LENGTH = 4, 3  # three words and the query
MASK = VOCAB - 1


def encoder():
  """A two-layer encoder with learned positions and large weights."""
  P = functools.partial
  layer = P(
    block.decoder,
    mixer=P(attention.SelfAttention, heads=2, rotate=None),
    ffn=P(ffn.Gated, hidden=8),
  )
  made = transformer.encoder(
    vocab=VOCAB, embed=8, layers=2, block=layer, length=2 * LENGTH, positions=positions.Learned
  )
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(made.init, jax.random.key(0))
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  return made, jax.tree.map(draw, shapes)


def test_every_order_gives_a_distribution_over_all_texts():
  """The sum over all 27 texts of exp(sum of log p) is 1 for each of the 6 orders; and orders differ."""
  made, params = encoder()
  texts = np.array(list(itertools.product(range(MASK), repeat=LENGTH)), np.int32)
  whole = dict(inputs=texts, targets=texts, weights=np.ones(texts.shape, np.float32))

  @jax.jit
  def logp(told):
    logits = made.logits(params, made.hidden(params, told).x)[
      ..., :MASK
    ]  # words compete, not the query
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), told['targets'][..., None], -1)[..., 0]
    return (own * told['weights']).sum(-1)

  found = []
  for order in itertools.permutations(range(LENGTH)):
    drawn = np.broadcast_to(np.argsort(order), texts.shape)  # order[i] is the i-th position
    found.append(np.asarray(logp(permuted.two_streams(whole, drawn, MASK)), np.float64))
    np.testing.assert_allclose(np.exp(found[-1]).sum(), 1, atol=1e-5)
  assert len({round(float(x[5]), 4) for x in found}) == 6


def test_a_prediction_sees_what_comes_before_it_in_the_order_and_nothing_else():
  made, params = encoder()
  ids = np.array([[0, 1, 2]], np.int32)
  drawn = np.array([[1, 2, 0]])  # the last word, the first, the second
  f = jax.jit(lambda told: made.logits(params, made.hidden(params, told).x)[0, LENGTH:])

  def say(ids):
    told = dict(inputs=ids, targets=ids, weights=np.ones(ids.shape, np.float32))
    return np.asarray(f(permuted.two_streams(told, drawn, MASK)))

  base = say(ids)
  for changed, sees in ((2, {0, 1}), (0, {1}), (1, set())):
    other = ids.copy()
    other[0, changed] = (other[0, changed] + 1) % MASK
    moved = {i for i in range(LENGTH) if np.abs(say(other) - base)[i].max() > 1e-5}
    assert moved == sees, changed


def test_rows_of_two_streams():
  make = functools.partial(vocab.bytes_, extra_ids=0, modes=('[MASK]',))
  texts = functools.partial(
    pipeline.make,
    task=functools.partial(tasks.domain, name='stories', vocab=make),
    batch=8,
    length=30,
    rows=batch.pad,
  )
  source = permuted.orders(model('encoder'), source=texts)
  found, firsts = [source() for _ in range(40)], []
  source.close()
  for told in found:
    there = told['segments'][:, :30] > 0
    for row, n in enumerate(there.sum(1)):
      place = told['order'][row, :n] // 2
      assert sorted(place) == list(range(n))
      asked = told['weights'][row, 30:] > 0
      assert asked.sum() == max(1, round(n / 6)) and place[asked[:n]].min() == n - asked.sum()
      firsts += [place.argmin() / (n - 1)] if n > 20 else []
    assert not told['weights'][:, :30].any()
    assert (told['positions'][:, :30] == told['positions'][:, 30:]).all()
  assert abs(np.mean(firsts) - 0.5) < 4 * math.sqrt(
    1 / 12 / len(firsts)
  )  # any token may come first
  says('share=0', lambda: permuted.orders(model('encoder'), source=texts, share=0))
