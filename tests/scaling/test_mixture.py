"""DoReMi against a float64 transcription of Algorithm 1 and a case whose answer is known; RegMix against known laws."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import domains, pipeline, readers, tasks, vocab
from llm_jax.objectives import language
from llm_jax.scaling import mixture
from llm_jax.train import loop
from llm_jax.train import state as state_lib
from llm_jax.train import step as step_lib
from tests.objectives.pairs import LENGTH, VOCAB, Means

ROWS = 4  # of each domain


class Letters:
  """Two domains: rows of letters drawn at random, and rows that repeat one letter."""

  batch, length, count, vocab = 2 * ROWS, LENGTH, 2, vocab.bytes_(extra_ids=0, modes=())

  def __init__(self, ragged=False):
    self.at, self._ragged = 0, ragged

  def __call__(self, state=None):
    rng = np.random.default_rng([3, self.at])
    self.at += 1
    noise = rng.integers(1, VOCAB, (ROWS, LENGTH))
    plain = np.repeat(rng.integers(1, 4, (ROWS, 1)), LENGTH, 1)
    targets = np.concatenate([noise, plain]).astype(np.int32)
    weights = np.ones(targets.shape, np.float32)
    if self._ragged:
      weights = (rng.random(targets.shape) < np.repeat([[0.9], [0.4]], ROWS, 0)).astype(np.float32)
    return dict(
      inputs=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
      targets=targets,
      weights=weights,
      domain=np.repeat(np.arange(2), ROWS).astype(np.int32),
    )

  def once(self):
    return iter([Letters()()])

  def state(self):
    return dict(at=self.at)

  def restore(self, state):
    self.at = state['at']

  def skip(self, batches):
    self.at += batches

  def close(self):
    pass


def drawn(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = dict(table=(VOCAB, 8), mix=(8, 8), head=(8, VOCAB))
  return {n: 0.5 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def losses(params, batch):
  """-log p of every target in float64."""
  table, mix, head = (np.asarray(params[n], np.float64) for n in ('table', 'mix', 'head'))
  x = np.tanh(table[batch['inputs']].cumsum(1) / np.arange(1, LENGTH + 1)[:, None] @ mix) @ head
  x = x - np.log(np.exp(x).sum(-1, keepdims=True))
  return -np.take_along_axis(x, batch['targets'][..., None], -1)[..., 0]


def test_domain_weights_follow_algorithm_1():
  """Xie et al. 2023, Algorithm 1, written down step by step; the proxy is another one in every step."""
  eta, c, ref = 1.7, 0.05, drawn(0)
  source = mixture.DoReMi(Means, Letters(ragged=True), lambda s: ref, eta=eta, smoothing=c)
  plain, alpha, history = Letters(ragged=True), np.array([0.5, 0.5]), []
  for t in range(5):
    params = drawn(t + 1)
    made, batch = source(types.SimpleNamespace(params=params)), plain()
    excess = np.maximum(losses(params, batch) - losses(ref, batch), 0) * batch['weights']
    rows = [batch['domain'] == i for i in range(2)]
    lam = np.array([excess[r].sum() / batch['weights'][r].sum() for r in rows])
    alpha = alpha * np.exp(eta * lam)
    alpha = (1 - c) * alpha / alpha.sum() + c * 0.5
    history.append(alpha)
    np.testing.assert_allclose(source.weights, alpha, rtol=2e-5)
    loss = losses(params, batch)
    means = [(loss * batch['weights'])[r].sum() / batch['weights'][r].sum() for r in rows]
    weighted = (loss * made['weights']).sum() / made['weights'].sum()
    np.testing.assert_allclose(weighted, alpha @ means, rtol=2e-5)
  np.testing.assert_allclose(source.average, np.mean(history, 0), rtol=2e-5)
  assert np.ptp(np.array(history)[:, 0]) > 0.05  # it did move
  late = mixture.DoReMi(Means, Letters(ragged=True), lambda s: ref, eta=eta, smoothing=c, burn_in=2)
  for t in range(5):
    late(types.SimpleNamespace(params=drawn(t + 1)))
  np.testing.assert_allclose(late.average, np.mean(history[2:], 0), rtol=2e-5)
  np.testing.assert_array_equal(next(source.once())['weights'], 1)


def train(source, params, steps, first=None):
  tx = optax.adam(0.05)
  update = step_lib.make(functools.partial(language.next_token, Means, chunk=None), tx)
  params = jax.tree.map(jnp.array, params)
  first = first or state_lib.State(jnp.int32(0), params, tx.init(params))
  return loop.train(first, source, update, steps=steps, key=jax.random.key(0))


def test_the_weight_goes_to_what_can_be_learned_and_a_resumed_run_is_the_same():
  """Nobody is better than log V on letters drawn at random, where the proxy begins: no excess, so no weight."""
  begin = drawn(1) | dict(head=jnp.zeros((8, VOCAB)))
  ref = train(Letters(), begin, 60).params
  make = lambda: mixture.DoReMi(Means, Letters(), lambda s: ref)
  source = make()
  last = train(source, begin, 12)
  assert source.weights[1] > 0.95 and source.average[1] > 0.9
  np.testing.assert_allclose(source.weights.sum(), 1, atol=1e-12)
  assert source.weights[0] > 4e-4  # the smoothing leaves half of 1e-3

  source = make()
  half = train(source, begin, 5)
  saved = json.loads(json.dumps(source.state()))
  resumed = make()
  resumed.restore(saved)
  again = train(resumed, None, 12, half)
  for x, y in zip(jax.tree.leaves(last), jax.tree.leaves(again)):
    np.testing.assert_array_equal(x, y)
  assert resumed.state() != saved and resumed.average[1] > 0.9
  with pytest.raises(UserError, match='DoReMi'):
    resumed.restore(dict(at=3))


def test_domains_lie_side_by_side(tmp_path):
  sources = []
  for name in 'ab':
    path = tmp_path / f'{name}.txt'
    path.write_text(name * 400)
    task = functools.partial(
      tasks.text,
      train=(str(path),),
      name=name,
      vocab=functools.partial(vocab.bytes_, extra_ids=0, modes=()),
    )
    told = dict(task=task, read=readers.tokenized, rows=batch_lib.concatenate)
    sources.append(functools.partial(pipeline.make, **told))
  card = types.SimpleNamespace(kind='causal', vocab=259, length=None)
  model = types.SimpleNamespace(card=card)
  make = lambda: domains.make(model, sources=tuple(sources), batch=4, length=16)
  made = make()
  assert made.batch == 4 and made.length == 16
  first, second = made(), made()
  assert first['domain'].tolist() == [0, 0, 1, 1] and first['inputs'].shape == (4, 16)
  letters = [{chr(i) for i in row if i > 64} for row in np.maximum(first['targets'] - 3, 0)]
  assert letters == [{'a'}, {'a'}, {'b'}, {'b'}]
  other = make()
  other()
  resumed = make()
  resumed.restore(json.loads(json.dumps(other.state())))
  np.testing.assert_array_equal(resumed()['targets'], second['targets'])
  assert [set(b['domain'].tolist()) for b in made.once()][:: len(list(made.once())) - 1] == [
    {0},
    {1},
  ]
  for one in (made, other, resumed):
    one.close()
  with pytest.raises(UserError, match='3 rows do not divide'):
    domains.make(model, sources=tuple(sources), batch=3)
  with pytest.raises(UserError, match='not the state of 2 domains'):
    made.restore(dict(block=0))
  with pytest.raises(UserError, match='share of 1'):
    mixture.doremi(model, source=make, smoothing=2.0)


def test_trace_writes_the_weights(tmp_path):
  told = []
  writer = types.SimpleNamespace(write=lambda step, values: told.append((step, values)))
  source = types.SimpleNamespace(weights=np.array([0.25, 0.75]), average=np.array([0.5, 0.5]))
  run = types.SimpleNamespace(source=source, writer=writer, steps=5)
  hook = mixture.trace(run, every=2, names=('books', 'code'))
  for step in range(6):
    hook(step, None, {})
  assert [step for step, _ in told] == [2, 4, 5]
  assert told[0][1] == {
    'domain/books': 0.25,
    'domain/books/average': 0.5,
    'domain/code': 0.75,
    'domain/code/average': 0.5,
  }
  with pytest.raises(UserError, match='2 domains'):
    mixture.trace(run, names=('books',))


# --- RegMix -------------------------------------------------------------------------------------------

PRIOR = (0.5, 0.3, 0.2)


def test_mixtures_are_drawn_around_the_prior():
  drawn = mixture.dirichlet(4000, PRIOR, least=0.05, seed=3)
  np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-12)
  assert drawn.min() >= 0.05
  np.testing.assert_allclose(drawn.mean(0), 0.05 + 0.85 * np.array(PRIOR), atol=0.02)
  # Dirichlet(s p) has variance p (1 - p) / (s + 1)
  tight = mixture.dirichlet(4000, PRIOR, strength=(9.0, 9.0), seed=4)
  np.testing.assert_allclose(tight.var(0), np.array(PRIOR) * (1 - np.array(PRIOR)) / 10, rtol=0.1)
  with pytest.raises(UserError, match='least'):
    mixture.dirichlet(5, PRIOR, least=0.4)


@pytest.mark.parametrize('features', [mixture.linear, mixture.quadratic, mixture.logarithmic])
def test_regmix_finds_the_optimum_of_a_linear_law(features):
  """loss = a r is lowest at the vertex of the smallest a."""
  a, rng = np.array([2.0, 1.5, 1.8]), np.random.default_rng(0)
  tried = mixture.dirichlet(40, PRIOR, seed=1)
  predict = mixture.regress(tried, tried @ a + rng.normal(0, 1e-3, 40), features=features)
  candidates = mixture.dirichlet(20_000, PRIOR, seed=2)
  np.testing.assert_allclose(predict(candidates), candidates @ a, atol=0.01)
  np.testing.assert_allclose(mixture.best(predict, candidates), [0, 1, 0], atol=0.02)


def test_a_quadratic_law_has_its_optimum_inside():
  best = np.array([0.2, 0.5, 0.3])
  law = lambda r: 1.0 + ((r - best) ** 2).sum(1)
  tried = mixture.dirichlet(12, (1, 1, 1), seed=5)
  predict = mixture.regress(tried, law(tried))
  candidates = mixture.dirichlet(20_000, (1, 1, 1), seed=6)
  np.testing.assert_allclose(predict(candidates), law(candidates), atol=1e-9)
  np.testing.assert_allclose(mixture.best(predict, candidates, top=20), best, atol=0.02)
  with pytest.raises(UserError, match='5 mixtures do not determine 6'):
    mixture.regress(tried[:5], law(tried[:5]))


def test_the_mixing_law_is_recovered():
  """L = c + k exp(t r), Ye et al. 2024, with the constants of no start."""
  c, k, t = 1.3, 2.1, np.array([-3.0, -0.4, 0.2])
  law = lambda r: c + k * np.exp(r @ t)
  tried = mixture.dirichlet(20, (1, 1, 1), seed=7)
  predict = mixture.exponential(tried, law(tried))
  others = mixture.dirichlet(500, (1, 1, 1), seed=8)
  np.testing.assert_allclose(predict(others), law(others), atol=1e-4)
  assert (
    np.abs(mixture.regress(tried, law(tried), features=mixture.linear)(others) - law(others)).max()
    > 0.1
  )
  with pytest.raises(UserError, match='constants'):
    mixture.exponential(tried[:3], law(tried[:3]))
