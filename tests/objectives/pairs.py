"""Small batches of pairs, answers and single texts, and their log-probabilities in float64, for the tests here."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH, ROWS, EMBED = 32, 9, 4, 8


class Hidden(NamedTuple):
  x: jax.Array
  states: object
  aux: dict


class Card(NamedTuple):
  vocab: int = VOCAB
  embed: int = EMBED


class Means:
  """A causal model that compiles at once: what is seen at a position is the mean of the embeddings so far."""

  card = Card()

  @staticmethod
  def hidden(params, batch, *, rng=None):
    x = params['table'][batch['inputs']].cumsum(1) / jnp.arange(1, LENGTH + 1)[:, None]
    return Hidden(jnp.tanh(x @ params['mix']), None, {})

  @staticmethod
  def head(params):
    return params['head']

  @staticmethod
  def logits(head, x):
    return x @ head


@functools.cache
def model():
  """(the model, its parameters, with a scalar head)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  scalar = dict(w=draw(EMBED), bias=jnp.float32(0.3))
  return Means, dict(
    table=draw(VOCAB, EMBED), mix=draw(EMBED, EMBED), head=draw(EMBED, VOCAB), scalar=scalar
  )


def text(rng, rows=ROWS, padding=True):
  """Prompts and responses of different lengths; the last row is padding."""
  ids = rng.integers(2, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
  weights = np.zeros((rows, LENGTH), np.float32)
  for row in weights[: rows - padding]:
    start = rng.integers(1, 4)
    row[start : start + rng.integers(1, 6)] = 1
  return dict(inputs=ids[:, :-1], targets=ids[:, 1:], weights=weights)


def batch(*sides, seed=0, padding=True, **more):
  """The texts called `sides`, all arrays [ROWS, ...]; `more` are added as they are."""
  rng = np.random.default_rng(seed)
  made = {f'{s}/{k}': v for s in sides for k, v in text(rng, padding=padding).items()}
  for side in sides[:2]:
    made[f'{side}/ref_logp'] = rng.normal(-20, 3, ROWS).astype(np.float32)
  return made | more


def side(batch, name):
  return {k[len(name) + 1 :]: v for k, v in batch.items() if k.startswith(f'{name}/')}


def logp(text):
  """log p of every target and of every token, float64 [rows, length] and [rows, length, vocab]."""
  made, params = model()
  logits = np.asarray(made.logits(made.head(params), made.hidden(params, text).x), np.float64)
  every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(every, text['targets'][..., None], -1)[..., 0], every


def totals(batch, *names):
  """(log p(y), |y|) of each side without the row of padding, float64."""
  found = []
  for name in names:
    told = side(batch, name)
    there = told['weights'].sum(1) > 0
    found.append(((logp(told)[0] * told['weights']).sum(1)[there], told['weights'].sum(1)[there]))
  return found


def rewards(text):
  """The scalar at the last target that counts, float64 [rows]."""
  made, params = model()
  x = np.asarray(made.hidden(params, text).x)
  at = [max(np.flatnonzero(w), default=0) for w in text['weights']]
  w, bias = (np.asarray(params['scalar'][k], np.float64) for k in ('w', 'bias'))
  return x[np.arange(len(at)), at].astype(np.float64) @ w + bias


def run(objective, batch, rng=None, **hyper):
  made, params = model()
  return jax.jit(lambda p, b: objective(made, p, b, rng, **hyper))(params, batch)
