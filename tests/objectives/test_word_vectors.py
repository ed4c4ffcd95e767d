"""word2vec and GloVe: gradients and losses by hand, and neighbours on a text where they are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import windows
from llm_jax.model import tables
from llm_jax.objectives import word_vectors
from tests.variants import variants

WORDS = 7


def logistic(x):
  return 1 / (1 + np.exp(-x))


def drawn(seed=0, biases=False):
  shapes = jax.eval_shape(tables.make(vocab=WORDS, embed=3, biases=biases).init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}


BATCH = dict(
  center=np.array([1, 4], np.int32),
  context=np.array([[2, 3, 2], [0, 6, 0]], np.int32),
  weights=np.array([[1, 1, 0], [0, 1, 0]], np.float32),
  noise=np.array([[[5, 2], [0, 0], [1, 1]], [[3, 3], [4, 5], [6, 6]]], np.int32),
)


def both(objective, params, **settings):
  """(value, gradients) of the sum."""
  batch = {k: jnp.asarray(v) for k, v in BATCH.items()}
  total = lambda params: objective(None, params, batch, None, **settings).sum
  return jax.jit(jax.value_and_grad(total))({k: jnp.asarray(v) for k, v in params.items()})


def test_skip_gram_is_equation_4_and_its_gradient():
  """-log s(u_o v) - sum log s(-u_k v), d/dv = (s(u_o v) - 1) u_o + sum s(u_k v) u_k, pair by pair in float64."""
  params = drawn()
  v, u = (params[name].astype(np.float64) for name in ('input', 'output'))
  loss, dv, du = 0.0, np.zeros_like(v), np.zeros_like(u)
  for c, o, negatives in ((1, 2, (5, 2)), (1, 3, (0, 0)), (4, 6, (4, 5))):
    for w, sign in ((o, 1), *((k, -1) for k in negatives)):
      p = logistic(sign * (u[w] @ v[c]))
      loss -= np.log(p)
      dv[c] -= sign * (1 - p) * u[w]
      du[w] -= sign * (1 - p) * v[c]
  value, found = both(word_vectors.skip_gram, params)
  assert value == pytest.approx(loss, rel=1e-5)
  np.testing.assert_allclose(found['input'], dv, atol=1e-5)
  np.testing.assert_allclose(found['output'], du, atol=1e-5)


def test_cbow_is_the_mean_of_what_is_around():
  params = drawn(1)
  v, u = (params[name].astype(np.float64) for name in ('input', 'output'))
  loss, dv, du = 0.0, np.zeros_like(v), np.zeros_like(u)
  for c, around, negatives in ((1, (2, 3), (5, 2)), (4, (6,), (3, 3))):
    mean = v[list(around)].mean(0)
    for w, sign in ((c, 1), *((k, -1) for k in negatives)):
      p = logistic(sign * (u[w] @ mean))
      loss -= np.log(p)
      du[w] -= sign * (1 - p) * mean
      for a in around:
        dv[a] -= sign * (1 - p) * u[w] / len(around)
  value, found = both(word_vectors.cbow, params)
  assert value == pytest.approx(loss, rel=1e-5)
  np.testing.assert_allclose(found['input'], dv, atol=1e-5)
  np.testing.assert_allclose(found['output'], du, atol=1e-5)


def test_glove_of_three_words_by_hand():
  """'a b a c': with a window of 2, X_ab = 2 (twice next to it), X_aa = 1 (two halves), X_ac = 1, X_bc = 1/2."""
  row, column, count = windows.cooccurrences([[0, 1, 0, 2]], vocab=3, window=2)
  x = np.zeros((3, 3))
  x[row, column] = count
  np.testing.assert_allclose(x, [[1, 2, 1], [2, 0, 0.5], [1, 0.5, 0]])
  params = dict(
    input=np.array([[1.0, 0], [0, 1], [1, 1]]), output=np.array([[1.0, 1], [1, 0], [0, 2]])
  )
  params |= dict(input_bias=np.array([0.5, 0, 0]), output_bias=np.array([0, 0, -1.0]))
  # products plus biases for the cells in order: aa 1.5, ab 1.5, ac -0.5, ba 1, bc 1, ca 2, cb 1
  logs = np.log([1, 2, 1, 2, 0.5, 1, 0.5])
  error = np.array([1.5, 1.5, -0.5, 1, 1, 2, 1]) - logs
  f = np.array([2**-0.75, 1, 2**-0.75, 1, 4**-0.75, 2**-0.75, 4**-0.75])  # top = 2
  batch = dict(row=row, column=column, count=count)
  params, batch = jax.tree.map(jnp.asarray, (params, batch))
  loss = jax.jit(lambda top: word_vectors.glove(None, params, batch, None, top=top))
  assert loss(2.0).sum == pytest.approx((f * error**2).sum(), rel=1e-5) and loss(2.0).weight == 7
  assert loss(0.1).sum == pytest.approx((error**2).sum(), rel=1e-5)


def test_noise_and_subsampling():
  """Counts 16 and 81 to the power 3/4 are 8 and 27; a word of share 1/4 stays with sqrt(0.01 / 0.25)."""
  np.testing.assert_allclose(windows.noise([16, 81, 0]), [8 / 35, 27 / 35, 0])
  np.testing.assert_allclose(windows.keep([1, 3], threshold=0.01), [0.2, 0.01**0.5 / 0.75**0.5])
  np.testing.assert_allclose(windows.keep([1, 999], threshold=0.01)[0], 1)
  texts = [np.random.default_rng(0).choice(4, 8000, p=[0.6, 0.2, 0.15, 0.05])]
  source = windows.Windows(texts, vocab=4, batch=2000, window=2, negatives=3, threshold=0.04)
  batches = [source() for _ in range(3)]
  counts = np.bincount(texts[0])
  share = counts * windows.keep(counts, 0.04)
  centers = np.bincount(np.concatenate([b['center'] for b in batches]))
  near = lambda found, p: np.abs(found / found.sum() - p).max() < 4 * np.sqrt(0.25 / found.sum())
  assert near(centers, share / share.sum()) and not near(centers, counts / counts.sum())
  drawn_noise = np.bincount(np.concatenate([b['noise'].ravel() for b in batches]))
  assert near(drawn_noise, windows.noise(counts))
  reach = np.mean([b['weights'].sum(1).mean() for b in batches])
  assert reach == pytest.approx(3, abs=0.1)  # 1 or 2 words on either side


def test_windows_hold_what_is_around_and_resume():
  """Every text counts up from its own hundred, so a window shows by itself what it should hold."""
  texts = [range(100 * i, 100 * i + 20) for i in range(5)]
  make = lambda: windows.Windows(texts, vocab=500, batch=64, window=3, negatives=2, threshold=1.0)
  source = make()
  first = source()
  for c, row, w in zip(first['center'], first['context'], first['weights']):
    near = row[w > 0]
    assert 0 < len(near) <= 6 and (np.abs(near - c) <= 3).all() and c not in near
    assert set(near // 100) == {c // 100} and len(set(near)) == len(near)
  state, second = source.state(), source()  # goes on into the next epoch
  assert state == dict(epoch=0, at=64) and source.state() == dict(epoch=1, at=28)
  both_epochs = np.concatenate([first['center'], second['center'][:36]])
  assert sorted(both_epochs) == sorted(itertools.chain(*texts))
  again = make()
  again.restore(state)
  for name, x in again().items():
    np.testing.assert_array_equal(x, second[name])


BOTH = [word_vectors.skip_gram, word_vectors.cbow]


@pytest.mark.parametrize('objective', variants(BOTH, BOTH[:1]))
def test_words_of_a_kind_are_neighbours(objective):
  """Animals do what animals do and vehicles what vehicles do, with one word in between for all."""
  rng = np.random.default_rng(0)
  kinds = dict(subject=([0, 1, 2], [3, 4, 5]), verb=([6, 7], [8, 9]), place=([10, 11], [12, 13]))
  texts = [[rng.choice(kinds[name][kind]) for name in kinds] for kind in rng.integers(0, 2, 400)]
  source = windows.Windows(texts, vocab=14, batch=256, window=2, threshold=1.0)
  model, tx = tables.make(vocab=14, embed=8), optax.adam(0.05)

  @jax.jit
  def update(params, opt, batch):
    def mean(params):
      told = objective(model, params, batch, None)
      return told.sum / told.weight

    steps, opt = tx.update(jax.grad(mean)(params), opt)
    return optax.apply_updates(params, steps), opt

  params = model.init(jax.random.key(1))
  assert jax.tree.structure(params) == jax.tree.structure(dict.fromkeys(model.axes, 0))
  opt = tx.init(params)
  for _ in range(60):
    params, opt = update(params, opt, source())
  v = np.asarray(params['input'][:6])
  v = v / np.linalg.norm(v, axis=1, keepdims=True)
  near = np.argsort(-(v @ v.T), axis=1)[:, 1:3]
  assert [set(row) for row in near] == [{0, 1, 2} - {i} for i in range(3)] + [
    {3, 4, 5} - {i} for i in range(3, 6)
  ]


@pytest.mark.slow
def test_glove_fits_its_matrix():
  """With as many numbers as the matrix has, the loss goes to 0 and w_i w~_j + b_i + b~_j to log X_ij."""
  texts = [np.random.default_rng(0).choice(6, 300, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])]
  found = windows.cooccurrences(texts, vocab=6, window=3)
  model, tx = tables.make(vocab=6, embed=6, biases=True), optax.adam(0.05)
  batch = next(windows.cells(*found, batch=100))
  assert len(batch['row']) == len(found[0]) == 36

  @jax.jit
  def fit(params):
    def update(_, now):
      params, opt = now
      grads = jax.grad(lambda p: word_vectors.glove(model, p, batch, None).sum)(params)
      steps, opt = tx.update(grads, opt)
      return optax.apply_updates(params, steps), opt

    return jax.lax.fori_loop(0, 600, update, (params, tx.init(params)))[0]

  p = fit(model.init(jax.random.key(0)))
  said = p['input'] @ p['output'].T + p['input_bias'][:, None] + p['output_bias']
  np.testing.assert_allclose(np.exp(said)[found[0], found[1]], found[2], rtol=0.02)


def test_errors():
  with pytest.raises(UserError, match='below vocab=3'):
    windows.Windows([[1, 5]], vocab=3)
  with pytest.raises(UserError, match='window=0'):
    windows.Windows([[1, 2]], vocab=3, window=0)
  with pytest.raises(UserError, match='beside'):
    windows.cooccurrences([[1]], vocab=3)
  with pytest.raises(UserError, match='at least 2 words'):
    tables.make(vocab=1)
