"""The tagger of Collobert & Weston: both networks word by word in numpy, what tasks share, 100 sentences by heart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.data import corpus, records, tags, words
from llm_jax.model import tagger
from llm_jax.objectives import classify

P = functools.partial
TABLES = ((9, 3), (4, 2))  # a word and a feature of it
TASKS = dict(case=4, mark=6)
NETWORKS = dict(
  window=P(tagger.window, width=3, hidden=5),
  sentence=P(tagger.sentence, width=3, filters=6, hidden=5, place=2, far=2),
)
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def drawn(model, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def batch(seed=1):
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.integers(1, rows, REAL.shape) for rows, _ in TABLES], -1)
  made = dict(inputs=ids, segments=REAL)
  for name, count in TASKS.items():
    made[f'{name}/targets'] = rng.integers(0, count, REAL.shape)
    made[f'{name}/weights'] = REAL.astype(np.float32)
  return made


def vector(tables, ids, j):
  """Of word j of a sentence [words, features]; outside it, of id 0."""
  found = ids[j] if 0 <= j < len(ids) else np.zeros(ids.shape[1], int)
  return np.concatenate([tables[str(k)][i] for k, i in enumerate(found)])


def window_by_hand(tables, p, ids, i):
  x = np.concatenate([vector(tables, ids, j) for j in (i - 1, i, i + 1)])
  return np.tanh(x @ p['up'] + p['up_bias'])


def sentence_by_hand(tables, p, ids, i):
  """far = 2: five places."""
  place = lambda j: p['places'][min(max(j - i, -2), 2) + 2]
  found = []
  for j in range(len(ids)):
    near = [np.concatenate([vector(tables, ids, k), place(k)]) for k in (j - 1, j, j + 1)]
    found.append(np.concatenate(near) @ p['convolution'] + p['convolution_bias'])
  return np.tanh(np.max(found, axis=0) @ p['up'] + p['up_bias'])


@pytest.mark.parametrize('name', NETWORKS)
def test_logits_and_loss_are_those_of_a_loop_over_words(name):
  """In float64; a short row is not told of what pads it. Tasks share their tables and nothing else."""
  by_hand = dict(window=window_by_hand, sentence=sentence_by_hand)[name]
  model = tagger.make(tables=TABLES, tasks=TASKS, network=NETWORKS[name])
  params, told = drawn(model), batch()
  assert tree.flatten(model.axes, is_leaf=tree.is_names).keys() == tree.flatten(params).keys()
  exact = jax.tree.map(lambda x: x.astype(np.float64), params)

  @jax.jit
  def run(params, told):
    logits = {n: t.logits(params, t.hidden(params, told).x) for n, t in model.tasks.items()}
    return logits, classify.tagged(model, params, told, None)

  logits, loss = run(params, told)
  wanted = 0.0
  for task in TASKS:
    own = exact['tasks'][task]
    for row, n in enumerate(REAL.sum(1)):
      ids = told['inputs'][row, :n]
      for i in range(n):
        y = by_hand(exact['tables'], own, ids, i) @ own['tags'] + own['tags_bias']
        np.testing.assert_allclose(logits[task][row, i], y, atol=2e-5)
        wanted += np.log(np.exp(y).sum()) - y[told[f'{task}/targets'][row, i]]
  assert loss.sum == pytest.approx(wanted, rel=1e-5) and loss.weight == len(TASKS) * REAL.sum()
  for part, moves in dict(tables=('case', 'mark'), case=('case',), mark=('mark',)).items():
    moved = lambda path, x, part=part: 2 * x if part in path.split('/') else x
    other = run(tree.map_paths(moved, params), told)[0]
    assert tuple(task for task in TASKS if (other[task] != logits[task])[REAL > 0].any()) == moves


def test_a_window_overfits_100_sentences():
  """The first of Alice in Wonderland, 2,395 words; the share of right tags after 60 steps, both tasks together."""
  path = records.bundled('books/alice_in_wonderland.txt.gz')
  found = tags.sentences(bytes(corpus.content(path)).decode())[:100]
  known = words.frequent((one.words for one in found), 10_000)
  (told,) = tags.source(sentences=found, known=known, batch=160, length=24).once()
  told = jax.tree.map(jnp.asarray, told)
  assert told['segments'].sum() == 2395
  tables, narrow = ((known.size, 16),), P(tagger.window, hidden=32)
  model, tx = tagger.make(tables=tables, tasks=TASKS, network=narrow), optax.adam(0.02)

  def loss(params):
    found = classify.tagged(model, params, told, None)
    return found.sum / found.weight, found.metrics['accuracy'] / found.weight

  @jax.jit
  def update(params, opt):
    grads, right = jax.grad(loss, has_aux=True)(params)
    steps, opt = tx.update(grads, opt)
    return optax.apply_updates(params, steps), opt, right

  params = jax.tree.map(lambda x: x / 4, drawn(model))
  opt = jax.jit(tx.init)(params)
  for _ in range(60):
    params, opt, right = update(params, opt)
  assert right > 0.99


def test_errors():
  with pytest.raises(UserError, match='width=4'):
    tagger.window(width=4)
  with pytest.raises(UserError, match='needs a table'):
    tagger.make(tables=(), tasks=TASKS)
