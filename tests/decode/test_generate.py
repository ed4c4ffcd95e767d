"""The decoding loop around a model small enough to be written twice, in jax with a state and in numpy without."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode.generate import generate, stream

KINDS = ('causal', 'prefix', 'encoder_decoder')
PROMPTS = [[5, 2, 9, 4, 7], [], [3], [11, 6, 2]]
KEY = jax.random.key(7)
VOCAB, EMBED = 13, 8
_rng = np.random.default_rng(0)
WEIGHTS = {
  'table': _rng.normal(size=(VOCAB, EMBED)).astype(np.float32),
  'head': _rng.normal(size=(EMBED, VOCAB)).astype(np.float32),
}


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


def fake(kind: str = 'causal', length: int | None = None, positions: str = 'Learned') -> Fake:
  return Fake(Card(kind, VOCAB, VOCAB, length, positions), _hidden, _logits, _states)


def next_logits(kind: str, prompt: list[int], tokens: list[int]) -> np.ndarray:
  """Logits of the next token after `prompt` and `tokens`, in numpy, from the definition."""
  table, head = WEIGHTS['table'].astype(np.float64), WEIGHTS['head'].astype(np.float64)
  x, inputs = np.zeros(EMBED), [0, *prompt, *tokens]
  if kind == 'encoder_decoder':
    inputs = [0, *tokens]
    x = sum((np.cos(1.0 + i) * table[t] for i, t in enumerate(prompt)), x)
  last = len(inputs) - 1
  return (x + sum(np.cos(s + 0.3 * last) * table[t] for s, t in enumerate(inputs))) @ head


def pad(prompts: list[list[int]], width: int = 5) -> tuple[np.ndarray, np.ndarray]:
  rows = [
    row + [12] * (width - len(row)) for row in prompts
  ]  # padded with a real id: it must not matter
  return np.array(rows, np.int32), np.array([len(p) for p in prompts], np.int32)


def ids(out: generate_lib.Output, row: int) -> list[int]:
  return np.asarray(out.tokens)[row, : int(out.lengths[row])].tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_is_the_argmax_of_the_full_forward(kind):
  out = generate(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, temperature=0.0, eos=None)
  assert out.lengths.tolist() == [12] * 4
  for row, prompt in enumerate(PROMPTS):
    tokens = []
    for step in range(12):
      logits = next_logits(kind, prompt, tokens)
      tokens.append(int(np.argmax(logits)))
      logp = logits.max() - logits.max() - np.log(np.exp(logits - logits.max()).sum())
      np.testing.assert_allclose(out.logp[row, step], logp, atol=1e-4)
    assert ids(out, row) == tokens


@pytest.mark.parametrize('kind', KINDS)
def test_a_ragged_batch_is_its_rows_one_by_one(kind):
  settings = dict(max_new=12, temperature=1.0, top_k=6, top_p=0.95, eos=1)
  out = generate(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, **settings)
  for row, prompt in enumerate(PROMPTS):
    alone = generate(fake(kind), WEIGHTS, *pad([prompt]), KEY, rows=[row], **settings)
    assert ids(out, row) == ids(alone, 0)
    np.testing.assert_allclose(out.logp[row], alone.logp[0], atol=1e-4)


def test_the_prefix_reaches_the_model_as_the_slots_up_to_the_prompt():
  batch, last, slots, _ = prompts_lib.lay(fake('prefix'), *pad([[4, 5], []], 3), 4)
  assert batch['inputs'].tolist() == [[0, 4, 5, 0], [0, 0, 0, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3]] * 2
  assert batch['prefix'].astype(int).tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
  assert last.tolist() == [2, 0] and slots == 7


def test_same_key_same_bits_and_other_keys_other_tokens():
  run = lambda key: generate(
    fake(), WEIGHTS, *pad(PROMPTS), key, max_new=12, temperature=3.0, eos=None
  )
  first, again, other = run(KEY), run(KEY), run(jax.random.key(8))
  assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again))
  assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()
  assert len({tuple(row) for row in np.asarray(first.tokens).tolist()}) == 4


def test_identical_prompts_draw_differently_and_rows_choose_the_draw():
  out = generate(fake(), WEIGHTS, *pad([[5]] * 3), KEY, max_new=12, temperature=3.0, eos=None)
  assert ids(out, 0) != ids(out, 1)
  same = generate(
    fake(), WEIGHTS, *pad([[5]] * 3), KEY, max_new=12, temperature=3.0, eos=None, rows=[1, 1, 2]
  )
  assert ids(same, 0) == ids(same, 1) == ids(out, 1) and ids(same, 2) == ids(out, 2)


def test_eos_ends_a_row_and_nothing_after_it_counts():
  free = generate(fake(), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, temperature=3.0, eos=None)
  eos = int(free.tokens[0, 3])
  out = generate(fake(), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, temperature=3.0, eos=eos)
  for row in range(4):
    full = np.asarray(free.tokens)[row].tolist()
    end = full.index(eos) + 1 if eos in full else 12
    assert ids(out, row) == full[:end]
    assert not np.asarray(out.tokens)[row, end:].any() and not np.asarray(out.logp)[row, end:].any()
  assert int(out.lengths[0]) <= 4


def test_the_loop_stops_when_every_row_has_ended():
  free = generate(fake(), WEIGHTS, *pad([[5]]), KEY, max_new=500, temperature=0.0, eos=None)
  eos = int(free.tokens[0, 2])
  steps = sum(
    1 for _ in stream(fake(), WEIGHTS, *pad([[5]]), KEY, max_new=500, temperature=0.0, eos=eos)
  )
  assert steps == np.asarray(free.tokens)[0].tolist().index(eos) + 1


@pytest.mark.parametrize('kind', KINDS)
def test_stream_is_generate(kind):
  settings = dict(max_new=12, temperature=1.5, eos=4)
  out = generate(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, **settings)
  columns = np.stack(list(stream(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, **settings)), axis=1)
  assert columns.dtype == np.int32
  assert (columns == np.asarray(out.tokens)[:, : columns.shape[1]]).all()
  assert columns.shape[1] == max(out.lengths)


def test_compiled_once_per_shape():
  run = lambda seed: generate(
    fake(), WEIGHTS, *pad(PROMPTS), jax.random.key(seed), max_new=12, eos=3
  )
  run(0)
  before = generate_lib._prefill._cache_size(), generate_lib._advance._cache_size()
  run(1)
  list(stream(fake(), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, eos=None))
  assert (generate_lib._prefill._cache_size(), generate_lib._advance._cache_size()) == before


def test_only_allowed_ids_are_drawn():
  allowed = np.isin(np.arange(13), [2, 5, 7])
  out = generate(
    fake(), WEIGHTS, *pad(PROMPTS), KEY, max_new=30, temperature=5.0, eos=None, allowed=allowed
  )
  assert set(np.asarray(out.tokens).ravel().tolist()) == {2, 5, 7}


@pytest.mark.parametrize('kind', KINDS)
def test_decoding_ends_with_a_learned_table(kind):
  free = generate(fake(kind), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, eos=None)
  out = generate(fake(kind, length=7), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, eos=None)
  room = [7] * 4 if kind == 'encoder_decoder' else [7 - len(p) for p in PROMPTS]
  assert out.lengths.tolist() == room
  for row in range(4):
    assert ids(out, row) == ids(free, row)[: room[row]]


def test_without_a_table_decoding_goes_on_past_the_trained_length():
  out = generate(
    fake(length=7, positions='rope'), WEIGHTS, *pad(PROMPTS), KEY, max_new=12, eos=None
  )
  assert out.lengths.tolist() == [12] * 4


def test_the_longest_prompt_that_fits_yields_one_token():
  out = generate(fake(length=6), WEIGHTS, *pad([[5, 2, 9, 4, 7], [3]], 9), KEY, max_new=4, eos=None)
  assert out.lengths.tolist() == [1, 4]


@pytest.mark.parametrize('kind', KINDS)
def test_on_a_mesh(kind):
  alone = generate(fake(kind), WEIGHTS, *pad(PROMPTS[:3]), KEY, max_new=8)
  with jax.set_mesh(mesh.make()):
    out = generate(fake(kind), WEIGHTS, *pad(PROMPTS[:3]), KEY, max_new=8)
    columns = list(stream(fake(kind), WEIGHTS, *pad(PROMPTS[:3]), KEY, max_new=8))
  assert out.tokens.shape == (3, 8) and out.tokens.tolist() == alone.tokens.tolist()
  assert np.stack(columns, 1).tolist() == alone.tokens[:, : len(columns)].tolist()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (dict(max_new=0), 'max_new must be at least 1'),
    (dict(temperature=-0.1), 'temperature'),
    (dict(top_p=0.0), 'top_p'),
    (dict(top_k=-2), 'top_k'),
    (dict(allowed=np.ones(3, bool)), 'each of the 13 ids'),
    (dict(lengths=[6, 0, 1, 3]), 'lengths must be between'),
    (dict(lengths=[1, 2]), 'shapes'),
    (dict(length=5), 'prompt has 5 tokens, the model reads at most 4 .its context is 5.'),
  ],
)
def test_wrong_arguments(change, words):
  prompts, lengths = pad(PROMPTS)
  change = dict(change)
  model, lengths = fake(length=change.pop('length', None)), change.pop('lengths', lengths)
  with pytest.raises(UserError, match=words):
    generate(model, WEIGHTS, prompts, lengths, KEY, **change)
