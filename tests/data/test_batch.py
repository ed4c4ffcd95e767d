"""Rows: layouts, packing."""

import numpy as np

from llm_jax.data import batch


def layout(kind, length=16, encoder=12, segments=True):
  return batch.Layout(kind, length, encoder if kind == 'encoder_decoder' else 0, segments)


def fill(kind, examples, length=16, encoder=12):
  """One row with all `examples`, one after the other."""
  form = layout(kind, length, encoder)
  made, at, encoder_at = batch.empty(form, 1), 0, 0
  for number, (inputs, targets) in enumerate(examples, 1):
    batch.put(
      made,
      form,
      0,
      number,
      at,
      encoder_at,
      (np.array(inputs, np.int32), np.array(targets, np.int32)),
    )
    slots = batch.slots(form, np.array([len(inputs)]), np.array([len(targets)]))
    at, encoder_at = at + int(slots[0][0]), encoder_at + int(slots[1][0])
  return {k: v[0].tolist() for k, v in made.items()}


def test_causal_row():
  row = fill('causal', [([], [5, 6, 7]), ([], [8, 1])], length=7)
  assert row == dict(
    inputs=[0, 5, 6, 0, 8, 0, 0],
    targets=[5, 6, 7, 8, 1, 0, 0],
    weights=[1, 1, 1, 1, 1, 0, 0],
    positions=[0, 1, 2, 0, 1, 0, 0],
    segments=[1, 1, 1, 2, 2, 0, 0],
  )


def test_prefix_row():
  """The prefix covers position 0 (the start) to P = len(inputs): the query there predicts the first target, and
  sees none.
  """
  row = fill('prefix', [([5, 6], [7, 1]), ([], [8, 9])], length=7)
  assert row == dict(
    inputs=[0, 5, 6, 7, 0, 8, 0],
    targets=[5, 6, 7, 1, 8, 9, 0],
    weights=[0, 0, 1, 1, 1, 1, 0],
    positions=[0, 1, 2, 3, 0, 1, 0],
    segments=[1, 1, 1, 1, 2, 2, 0],
    prefix=[True, True, True, False, True, False, False],
  )


def test_encoder_decoder_row():
  row = fill('encoder_decoder', [([5, 6, 1], [7, 1]), ([], [8])], length=4, encoder=5)
  assert row == {
    'inputs': [0, 7, 0, 0],
    'targets': [7, 1, 8, 0],
    'weights': [1, 1, 1, 0],
    'positions': [0, 1, 0, 0],
    'segments': [1, 1, 2, 0],
    'encoder/inputs': [
      5,
      6,
      1,
      1,
      0,
    ],  # an example without inputs gives the encoder end of document
    'encoder/positions': [0, 1, 2, 0, 0],
    'encoder/segments': [1, 1, 1, 2, 0],
  }


def test_weights_count_targets_and_inputs_see_no_later_token():
  rng = np.random.default_rng(0)
  for kind in ('causal', 'prefix', 'encoder_decoder'):
    examples = [
      (rng.integers(3, 90, 0 if kind == 'causal' else 3), rng.integers(3, 90, 4)) for _ in range(2)
    ]
    row = fill(kind, examples)
    assert sum(row['weights']) == 8
    weighted = [t for t, w in zip(row['targets'], row['weights'], strict=True) if w]
    assert weighted == [*examples[0][1].tolist(), *examples[1][1].tolist()]
    for i in range(1, 16):
      same = row['segments'][i] == row['segments'][i - 1] != 0
      assert row['inputs'][i] == (row['targets'][i - 1] if same else 0)


def packed(slots, encoder_slots, length, encoder_length):
  plan = batch.pack().plan(np.array(slots), np.array(encoder_slots), length, encoder_length)
  used = np.zeros((plan.rows, length), int), np.zeros((plan.rows, max(encoder_length, 1)), int)
  for r, at, encoder_at, n, m in zip(*plan[:3], slots, encoder_slots, strict=True):
    if n == 0:
      assert r == -1
      continue
    assert at + n <= length and encoder_at + m <= encoder_length
    used[0][r, at : at + n] += 1
    used[1][r, encoder_at : encoder_at + m] += 1
  assert used[0].max() == 1 and used[1].max() <= 1  # no two examples share a slot
  return plan, used[0].mean()


def best_fit_decreasing(sizes, length):
  """The textbook algorithm, by linear search."""
  bins = []
  for n in sorted(sizes, reverse=True):
    fits = [i for i, free in enumerate(bins) if free >= n]
    i = min(fits, key=lambda i: bins[i], default=len(bins))
    bins[i:i] = [length] * (i == len(bins))
    bins[i] -= n
  return len(bins)


def test_packing():
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 257, 2000)
  plan, fill_rate = packed(sizes, 0 * sizes, 256, 0)
  assert plan.rows == best_fit_decreasing(sizes.tolist(), 256) and fill_rate > 0.98
  short = rng.integers(10, 80, 3000)
  assert packed(short, 0 * short, 512, 0)[1] > 0.99
  encoder = rng.integers(1, 100, 2000)
  both, _ = packed(sizes, encoder, 256, 128)
  assert plan.rows <= both.rows < 1.3 * max(sizes.sum() / 256, encoder.sum() / 128)
  again, _ = packed(sizes, encoder, 256, 128)
  assert all((a == b).all() for a, b in zip(both[:3], again[:3], strict=True))


def test_packing_leaves_out_nothing_but_empty_examples():
  plan, rate = packed([4, 0, 4, 8, 0], [0] * 5, 8, 0)
  assert (plan.row < 0).tolist() == [False, True, False, False, True]
  assert plan.row[0] == plan.row[2] != plan.row[3] and rate == 1


def test_one_example_per_row():
  for make in (batch.concatenate, batch.pad):
    plan = make().plan(np.array([3, 0, 5]), np.array([0, 0, 0]), 8, 0)
    assert plan.row.tolist() == [0, -1, 1] and plan.rows == 2
  assert batch.concatenate().windows and not batch.pad().windows and not batch.pack().windows
