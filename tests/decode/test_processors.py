"""Every truncation and penalty against the frequencies that its definition promises; rows with their own settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.decode import logits as logits_lib
from llm_jax.decode.generate import generate
from tests.decode.test_generate import KEY, KINDS, PROMPTS, WEIGHTS, fake, next_logits, pad

DRAWS = 20_000
PROBS = np.array([0.05, 0.3, 0.02, 0.25, 0.08, 0.2, 0.1])
TEXT, PROMPT = [3, 5, 1, 1, 3], 2  # the prompt 3 5, the answer 1 1 3
ENTROPY = -(PROBS * np.log(PROBS)).sum()


def nearest_to_entropy(mass: float) -> np.ndarray:
  """The typical set by trying every size."""
  order = np.argsort(np.abs(-np.log(PROBS) - ENTROPY), kind='stable')
  size = next(n for n in range(1, 8) if PROBS[order[:n]].sum() >= mass)
  return np.isin(np.arange(7), order[:size])


def where(*ids: int) -> np.ndarray:
  return np.isin(np.arange(7), ids)


BIAS = np.array([0, 0, 2.5, 0, 0, -1, 0], np.float32)
UP = 4.0  # added to all logits, which makes them positive and changes no probability but those of `repetition`

# settings, what the definition makes of PROBS
CASES = {
  'min_p': (dict(min_p=0.3), PROBS * (PROBS >= 0.3 * 0.3)),
  'min_p at a temperature': (dict(min_p=0.3, temperature=0.5), PROBS**2 * (PROBS**2 >= 0.3 * 0.09)),
  'typical': (dict(typical=0.6), PROBS * nearest_to_entropy(0.6)),
  'typical leaves the likeliest out': (dict(typical=0.15), PROBS * nearest_to_entropy(0.15)),
  'epsilon': (dict(epsilon=0.09), PROBS * (PROBS >= 0.09)),
  'epsilon above all': (dict(epsilon=0.5), where(1).astype(float)),
  'eta': (dict(eta=0.2), PROBS * (PROBS >= min(0.2, 0.2**0.5 * np.exp(-ENTROPY)))),
  'eta, small': (dict(eta=0.04), PROBS * (PROBS >= min(0.04, 0.04**0.5 * np.exp(-ENTROPY)))),
  'repetition': (dict(repetition=1.5), np.where(where(1, 3, 5), PROBS**1.5, PROBS)),
  'presence': (dict(presence=0.7), np.where(where(1, 3), PROBS * np.exp(-0.7), PROBS)),
  'presence, negative': (dict(presence=-1.0), np.where(where(1, 3), PROBS * np.exp(1), PROBS)),
  'frequency': (dict(frequency=0.7), PROBS * np.exp([0, -1.4, 0, -0.7, 0, 0, 0])),
  'no_repeat_ngram': (dict(no_repeat_ngram=2), PROBS * ~where(5)),
  'no token twice': (dict(no_repeat_ngram=1), PROBS * ~where(1, 3, 5)),
  'banned': (dict(banned=((4,), (1, 3, 6), (5, 3, 0), (3, 1))), PROBS * ~where(1, 4, 6)),
  'bias': (dict(bias=BIAS), PROBS * np.exp(BIAS)),
  'all at once': (
    dict(frequency=0.7, bias=BIAS, banned=((4,),), temperature=0.5, top_k=4, min_p=0.2),
    None,
  ),
}


def all_at_once() -> np.ndarray:
  p = PROBS * np.exp([0, -1.4, 0, -0.7, 0, 0, 0]) * np.exp(BIAS) * ~where(4)
  p = (p / p.sum()) ** 2
  p *= np.isin(np.arange(7), np.argsort(-p)[:4])
  return p * (p >= 0.2 * p.max())


def seen(rows: int) -> logits_lib.Seen:
  tokens = np.tile([*TEXT, -1, -1], (rows, 1)).astype(np.int32)
  return logits_lib.Seen(jnp.asarray(tokens), jnp.full(rows, PROMPT), jnp.full(rows, len(TEXT)))


def frequencies(up: float = 0.0, **settings) -> np.ndarray:
  rows = np.tile(np.log(PROBS).astype(np.float32) + np.float32(up), (DRAWS, 1))
  draw = jax.jit(lambda x, key: logits_lib.sample(x, key, seen=seen(DRAWS), **settings))
  return np.bincount(np.asarray(draw(rows, jax.random.key(1))), minlength=7)


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
  expected = expected / expected.sum()
  kept = expected > 0
  assert counts[~kept].sum() == 0
  if kept.sum() == 1:
    return True
  return stats.chisquare(counts[kept], DRAWS * expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize('name', CASES)
def test_frequencies_are_those_of_the_definition(name):
  settings, expected = CASES[name]
  expected = all_at_once() if expected is None else np.asarray(expected)
  assert fits(frequencies(**settings), expected)
  assert not np.allclose(expected / expected.sum(), PROBS)


def test_positive_logits_are_divided_by_the_repetition_penalty():
  logits = np.log(PROBS) + UP
  expected = np.exp(np.where(where(1, 3, 5), logits / 1.5, logits))
  assert (logits > 0).all() and fits(frequencies(UP, repetition=1.5), expected)


ARRAYS = dict(
  temperature=[1.0, 0.3, 2.0, 0.0, 1.0, 0.7],
  top_k=[0, 3, 1, 30, 5, 0],
  top_p=[1.0, 0.5, 0.9, 0.1, 1.0, 0.99],
  min_p=[0.0, 0.1, 0.5, 0.0, 0.9, 0.01],
  typical=[1.0, 0.5, 0.9, 0.1, 1.0, 0.99],
  epsilon=[0.0, 0.1, 0.02, 0.9, 0.0, 0.001],
  eta=[0.0, 0.1, 0.02, 0.9, 0.0, 0.001],
  repetition=[1.0, 1.5, 0.5, 1.0, 2.0, 1.1],
  presence=[0.0, 1.5, -0.5, 0.0, 2.0, 0.1],
  frequency=[0.0, 1.5, -0.5, 0.0, 2.0, 0.1],
)


def random_rows() -> tuple[jax.Array, logits_lib.Seen]:
  rng = np.random.default_rng(4)
  tokens = jnp.asarray(rng.integers(0, 12, (6, 9)), jnp.int32)
  prompt, length = jnp.asarray([0, 3, 2, 5, 1, 4]), jnp.asarray([9, 8, 2, 7, 5, 4])
  tokens = jnp.where(jnp.arange(9) < length[:, None], tokens, -1)
  logits = jnp.asarray(rng.normal(0, 2, (6, 30)), jnp.float32)
  return logits, logits_lib.Seen(tokens, prompt, length)


def probabilities(settings: dict, row: int | None = None) -> np.ndarray:
  """What is drawn from, of all rows or of one alone."""
  logits, told = random_rows()
  part = slice(None) if row is None else slice(row, row + 1)
  told = jax.tree.map(lambda x: x[part], told)
  found = logits_lib.process(logits[part], logits_lib.Sampling(**settings), told)
  return np.asarray(jax.nn.softmax(found))


@pytest.mark.parametrize('name', [*ARRAYS, 'all'])
def test_a_row_with_a_setting_of_its_own_is_that_row_alone(name):
  chosen = ARRAYS if name == 'all' else {name: ARRAYS[name]}
  together = probabilities({k: jnp.asarray(v) for k, v in chosen.items()})
  for row in range(6):
    own = {k: v[row] for k, v in chosen.items()}
    if own.get('temperature') == 0:  # a greedy row: what else is left does not matter
      assert together[row].argmax() == probabilities(own, row).argmax()
    else:
      np.testing.assert_allclose(together[row], probabilities(own, row)[0], atol=1e-6)


def test_greedy_rows_among_drawing_ones():
  logits, told = random_rows()
  settings = dict(
    temperature=jnp.asarray([0.0, 1.0, 0.0, 3.0, 0.0, 1.0]), top_k=jnp.asarray([2] * 6)
  )
  draw = lambda seed: logits_lib.sample(logits, jax.random.key(seed), seen=told, **settings)
  drawn = np.array([draw(seed) for seed in range(30)])
  assert (drawn[:, ::2] == np.argmax(logits, -1)[::2]).all()
  assert all(len(set(drawn[:, row].tolist())) == 2 for row in (1, 3, 5))


# --- uniform numbers in place of a key ----------------------------------------------------------------


def test_a_uniform_number_is_the_quantile():
  """Evenly spread numbers give the distribution to the last count; the first id of the rest is never skipped."""
  u = (np.arange(DRAWS) + 0.5) / DRAWS
  rows = np.tile(np.log(PROBS).astype(np.float32), (DRAWS, 1))
  ids = np.asarray(logits_lib.draw(jnp.asarray(rows), jnp.asarray(u, jnp.float32)))
  assert (np.diff(ids) >= 0).all()
  np.testing.assert_allclose(np.bincount(ids, minlength=7), DRAWS * PROBS, atol=2)
  logits = jnp.log(jnp.asarray([[0.0, 0.5, 0.0, 0.5, 0.0]]))
  for number, token in ((0.0, 1), (0.49, 1), (0.5, 3), (1 - 2**-24, 3)):
    assert logits_lib.draw(logits, jnp.asarray([number], jnp.float32)).tolist() == [token]


@pytest.mark.parametrize('kind', KINDS)
def test_generate_draws_from_the_numbers_that_it_is_given(kind):
  u = np.random.default_rng(9).random((4, 10), np.float32)
  settings = dict(max_new=10, eos=None, temperature=1.5, top_k=5)
  out = generate(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, uniforms=u, **settings)
  for row, prompt in enumerate(PROMPTS):
    tokens = []
    for number in u[row]:
      x = next_logits(kind, prompt, tokens) / 1.5
      x = np.where(x >= np.sort(x)[-5], x, -np.inf)
      mass = np.cumsum(np.exp(x - x.max()))
      tokens.append(int(np.searchsorted(mass / mass[-1], number, side='right')))
    assert out.tokens[row].tolist() == tokens
