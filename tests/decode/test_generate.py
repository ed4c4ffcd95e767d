"""The decoding loop around a model that is known twice (conftest): order, masks, ends, batches, streams."""

import jax
import numpy as np
import pytest

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode.generate import generate, stream

KINDS = ('causal', 'prefix', 'encoder_decoder')
PROMPTS = [[5, 2, 9, 4, 7], [], [3], [11, 6, 2]]
KEY = jax.random.key(7)


def pad(prompts: list[list[int]], width: int = 5) -> tuple[np.ndarray, np.ndarray]:
  rows = [row + [12] * (width - len(row)) for row in prompts]  # padded with a real id: it must not matter
  return np.array(rows, np.int32), np.array([len(p) for p in prompts], np.int32)


def ids(out: generate_lib.Output, row: int) -> list[int]:
  return np.asarray(out.tokens)[row, : int(out.lengths[row])].tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_is_the_argmax_of_the_full_forward(kind, fake, weights, next_logits):
  out = generate(fake(kind), weights, *pad(PROMPTS), KEY, max_new=9, temperature=0.0, eos=None)
  assert out.lengths.tolist() == [9] * 4
  for row, prompt in enumerate(PROMPTS):
    tokens = []
    for step in range(9):
      logits = next_logits(weights, kind, prompt, tokens)
      tokens.append(int(np.argmax(logits)))
      logp = logits.max() - logits.max() - np.log(np.exp(logits - logits.max()).sum())
      np.testing.assert_allclose(out.logp[row, step], logp, atol=1e-4)
    assert ids(out, row) == tokens


@pytest.mark.parametrize('kind', KINDS)
def test_a_ragged_batch_is_its_rows_one_by_one(kind, fake, weights):
  settings = dict(max_new=8, temperature=1.0, top_k=6, top_p=0.95, eos=1)
  out = generate(fake(kind), weights, *pad(PROMPTS), KEY, **settings)
  for row, prompt in enumerate(PROMPTS):
    alone = generate(fake(kind), weights, *pad([prompt]), KEY, rows=[row], **settings)
    assert ids(out, row) == ids(alone, 0)
    np.testing.assert_allclose(out.logp[row], alone.logp[0], atol=1e-4)


def test_the_prefix_reaches_the_model_as_the_slots_up_to_the_prompt(fake, weights):
  batch, last, slots = generate_lib._layout(fake('prefix'), *pad([[4, 5], []], 3), 4)
  assert batch['inputs'].tolist() == [[0, 4, 5, 0], [0, 0, 0, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3]] * 2
  assert batch['prefix'].astype(int).tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
  assert last.tolist() == [2, 0] and slots == 7


def test_same_key_same_bits_and_other_keys_other_tokens(fake, weights):
  run = lambda key: generate(fake(), weights, *pad(PROMPTS), key, max_new=16, temperature=3.0, eos=None)
  first, again, other = run(KEY), run(KEY), run(jax.random.key(8))
  assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again))
  assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()
  assert len({tuple(row) for row in np.asarray(first.tokens).tolist()}) == 4


def test_identical_prompts_draw_differently_and_rows_choose_the_draw(fake, weights):
  out = generate(fake(), weights, *pad([[5]] * 3), KEY, max_new=16, temperature=3.0, eos=None)
  assert ids(out, 0) != ids(out, 1)
  same = generate(fake(), weights, *pad([[5]] * 3), KEY, max_new=16, temperature=3.0, eos=None, rows=[1, 1, 2])
  assert ids(same, 0) == ids(same, 1) == ids(out, 1) and ids(same, 2) == ids(out, 2)


def test_eos_ends_a_row_and_nothing_after_it_counts(fake, weights):
  free = generate(fake(), weights, *pad(PROMPTS), KEY, max_new=20, temperature=2.0, eos=None)
  eos = int(free.tokens[0, 3])
  out = generate(fake(), weights, *pad(PROMPTS), KEY, max_new=20, temperature=2.0, eos=eos)
  for row in range(4):
    full = np.asarray(free.tokens)[row].tolist()
    end = full.index(eos) + 1 if eos in full else 20
    assert ids(out, row) == full[:end]
    assert not np.asarray(out.tokens)[row, end:].any() and not np.asarray(out.logp)[row, end:].any()
  assert int(out.lengths[0]) <= 4


def test_the_loop_stops_when_every_row_has_ended(fake, weights):
  free = generate(fake(), weights, *pad([[5]]), KEY, max_new=500, temperature=0.0, eos=None)
  eos = int(free.tokens[0, 2])
  steps = sum(1 for _ in stream(fake(), weights, *pad([[5]]), KEY, max_new=500, temperature=0.0, eos=eos))
  assert steps == np.asarray(free.tokens)[0].tolist().index(eos) + 1


@pytest.mark.parametrize('kind', KINDS)
def test_stream_is_generate(kind, fake, weights):
  settings = dict(max_new=12, temperature=1.5, eos=4)
  out = generate(fake(kind), weights, *pad(PROMPTS), KEY, **settings)
  columns = np.stack(list(stream(fake(kind), weights, *pad(PROMPTS), KEY, **settings)), axis=1)
  assert columns.dtype == np.int32
  assert (columns == np.asarray(out.tokens)[:, : columns.shape[1]]).all()
  assert columns.shape[1] == max(out.lengths)


def test_compiled_once_per_shape(fake, weights):
  run = lambda seed, **kw: generate(fake(), weights, *pad(PROMPTS), jax.random.key(seed), max_new=6, temperature=1.1, **kw)
  run(0)
  before = generate_lib._prefill._cache_size(), generate_lib._advance._cache_size()
  run(1)
  list(stream(fake(), weights, *pad(PROMPTS), KEY, max_new=6, temperature=1.1))
  assert (generate_lib._prefill._cache_size(), generate_lib._advance._cache_size()) == before


def test_only_allowed_ids_are_drawn(fake, weights):
  allowed = np.isin(np.arange(13), [2, 5, 7])
  out = generate(fake(), weights, *pad(PROMPTS), KEY, max_new=30, temperature=5.0, eos=None, allowed=allowed)
  assert set(np.asarray(out.tokens).ravel().tolist()) == {2, 5, 7}


@pytest.mark.parametrize('kind', KINDS)
def test_decoding_ends_with_a_learned_table(kind, fake, weights):
  free = generate(fake(kind), weights, *pad(PROMPTS), KEY, max_new=12, eos=None)
  out = generate(fake(kind, length=7), weights, *pad(PROMPTS), KEY, max_new=12, eos=None)
  room = [7] * 4 if kind == 'encoder_decoder' else [7 - len(p) for p in PROMPTS]
  assert out.lengths.tolist() == room
  for row in range(4):
    assert ids(out, row) == ids(free, row)[: room[row]]


def test_without_a_table_decoding_goes_on_past_the_trained_length(fake, weights):
  out = generate(fake(length=7, positions='rope'), weights, *pad(PROMPTS), KEY, max_new=12, eos=None)
  assert out.lengths.tolist() == [12] * 4


def test_the_longest_prompt_that_fits_yields_one_token(fake, weights):
  out = generate(fake(length=6), weights, *pad([[5, 2, 9, 4, 7], [3]], 9), KEY, max_new=4, eos=None)
  assert out.lengths.tolist() == [1, 4]


@pytest.mark.parametrize('kind', KINDS)
def test_on_a_mesh(kind, fake, weights):
  alone = generate(fake(kind), weights, *pad(PROMPTS[:3]), KEY, max_new=8)
  with jax.set_mesh(mesh.make()):
    out = generate(fake(kind), weights, *pad(PROMPTS[:3]), KEY, max_new=8)
    columns = list(stream(fake(kind), weights, *pad(PROMPTS[:3]), KEY, max_new=8))
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
def test_wrong_arguments(change, words, fake, weights):
  prompts, lengths = pad(PROMPTS)
  change = dict(change)
  model, lengths = fake(length=change.pop('length', None)), change.pop('lengths', lengths)
  with pytest.raises(UserError, match=words):
    generate(model, weights, prompts, lengths, KEY, **change)
