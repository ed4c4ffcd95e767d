"""A stand-in for `Model` small enough to be written twice: once in jax with a state, once in numpy without."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

VOCAB, EMBED = 13, 8


class Card(NamedTuple):
  kind: str
  vocab: int
  rows: int
  length: int | None
  positions: str


class Hidden(NamedTuple):
  x: Any
  states: Any
  aux: dict


class Fake(NamedTuple):
  """x[p] = sum over the slots s that p may see of table[id_s] * cos(s + 0.3 p), plus the encoder's sum."""

  card: Card
  hidden: Any
  logits: Any
  states: Any


def params(seed: int = 0, scale: float = 1.0) -> dict:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
  return dict(table=draw(VOCAB, EMBED), head=draw(EMBED, VOCAB))


def _hidden(params: dict, batch: dict, *, states: Any = None, rng: Any = None) -> Hidden:
  assert rng is None
  rows = jnp.arange(batch['inputs'].shape[0])[:, None]
  ids = states['ids'].at[rows, batch['positions']].set(batch['inputs'], mode='drop')
  slots, queries = jnp.arange(ids.shape[1]), batch['positions']
  seen = slots <= queries[..., None]
  if 'prefix' in batch:
    seen |= batch['prefix'][:, None]
  angle = slots + 0.3 * queries[..., None]
  x = jnp.einsum('bts,bsd->btd', jnp.where(seen, jnp.cos(angle), 0), params['table'][ids])
  return Hidden(x + states['encoder'][:, None], dict(states, ids=ids), {})


def _states(params: dict, batch: dict, length: int) -> dict:
  rows = batch['inputs'].shape[0]
  encoder = jnp.zeros((rows, EMBED))
  if 'encoder/inputs' in batch:
    weight = jnp.cos(1.0 + batch['encoder/positions']) * (batch['encoder/segments'] > 0)
    encoder = jnp.einsum('bs,bsd->bd', weight, params['table'][batch['encoder/inputs']])
  return dict(ids=jnp.full((rows, length), 3, jnp.int32), encoder=encoder)


def _logits(params: dict, x: Any) -> Any:
  return x @ params['head']


def model(kind: str = 'causal', length: int | None = None, positions: str = 'Learned') -> Fake:
  return Fake(Card(kind, VOCAB, VOCAB, length, positions), _hidden, _logits, _states)


def reference(weights: dict, kind: str, prompt: list[int], tokens: list[int]) -> np.ndarray:
  """Logits of the next token after `prompt` and `tokens`, in numpy, from the definition."""
  table, head = np.asarray(weights['table'], np.float64), np.asarray(weights['head'], np.float64)
  x, inputs = np.zeros(EMBED), [0, *prompt, *tokens]
  if kind == 'encoder_decoder':
    inputs = [0, *tokens]
    x = sum((np.cos(1.0 + i) * table[t] for i, t in enumerate(prompt)), x)
  last = len(inputs) - 1
  return (x + sum(np.cos(s + 0.3 * last) * table[t] for s, t in enumerate(inputs))) @ head


@pytest.fixture
def fake() -> Any:
  return model


@pytest.fixture
def weights() -> dict:
  return params()


@pytest.fixture
def next_logits() -> Any:
  return reference
