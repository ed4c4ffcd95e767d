"""Comparisons that read their prompt once: the slots by hand, and that no pair is lost, cut or seen twice."""

import json
import types

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import branches, pairs
from tests.data import test_pairs
from tests.data.conftest import says

LENGTH = 240
path = test_pairs.path  # the fixture


def model(unbranched=None, **kw):
  card = dict(kind='causal', vocab=512, length=None, unbranched=unbranched) | kw
  return types.SimpleNamespace(card=types.SimpleNamespace(**card))


def example(prompt, answer):
  """A text whose first token is read and never predicted."""
  ids = [np.array(x, np.int32) for x in (prompt[1:], answer)]
  return batch_lib.Example(*ids, first=prompt[0])


def lay(*texts):
  layout = batch_lib.Layout('causal', 32, 0, True)
  return {k: v.tolist() for k, v in branches.lay([example(*t) for t in texts], layout).items()}


def test_a_pair_lies_as_the_picture_says():
  a, b, c, d, w, x, y, z, end = range(11, 20)
  assert lay(([a, b, c, d], [w, x]), ([a, b, c, d], [y, z, end])) == dict(
    inputs=[a, b, c, d, w, d, y, z],
    targets=[b, c, d, w, x, y, z, end],
    weights=[0, 0, 0, 1, 1, 1, 1, 1],
    positions=[0, 1, 2, 3, 4, 3, 4, 5],
    branches=[0, 0, 0, 1, 1, 2, 2, 2],
  )


def test_only_what_begins_the_same_is_shared():
  """A tokenizer may write the end of a prompt otherwise before another answer, and answers may begin the same."""
  found = lay(([5, 6, 7, 8], [9, 10]), ([5, 6, 17, 8], [9, 10]))
  assert found['inputs'] == [5, 6, 7, 8, 9, 17, 8, 9]
  assert found['branches'] == [0, 0, 1, 1, 1, 2, 2, 2]
  assert found['positions'] == [0, 1, 2, 3, 4, 2, 3, 4]
  same = lay(([5, 6], [9, 10, 11]), ([5, 6], [9, 10]))
  assert same['inputs'] == [5, 6, 9, 10, 6, 9] and same['weights'] == [0, 1, 1, 1, 1, 1]
  short = lay(([5, 6], [9]), ([5, 6, 7], [9]))
  assert short['inputs'] == [5, 6, 6, 7] and short['weights'] == [0, 1, 0, 1]
  assert lay(([5], [9]), ([5], [8]))['branches'] == [1, 2]


def made(path, **kw):
  return pairs.packed(
    model(), **dict(data=test_pairs.data(path), batch=3, length=2 * LENGTH, seed=3) | kw
  )


def read(batch):
  """{number of the pair: (text of the chosen, of the rejected)} from the margins and slots of a batch."""
  words, found = test_pairs.words(), {}
  for row in range(len(batch['inputs'])):
    for k in np.flatnonzero(batch['compared'][row]):
      own = batch['segments'][row] == k + 1
      texts = []
      for branch in (1, 2):
        inside = own & np.isin(batch['branches'][row], (0, branch))
        ids, targets = batch['inputs'][row][inside], batch['targets'][row][inside]
        first = int(np.argmax(batch['branches'][row][inside] == branch))
        joined = np.arange(len(ids) - 1) != first - 1  # the beginning's last target is the copy
        np.testing.assert_array_equal(ids[1:][joined], targets[:-1][joined])
        np.testing.assert_array_equal(batch['positions'][row][inside], np.arange(len(ids)))
        texts.append(words.decode([*ids[1:], targets[-1]]))
        assert targets[-1] == words.eos
      found[int(batch['margin'][row, k])] = tuple(texts)
  return found


def test_every_pair_is_read_whole_and_once(path):
  source = made(path)
  batches = list(source.once())
  found = {}
  for batch in batches:
    some = read(batch)
    assert not found.keys() & some.keys() and len(some) == batch['compared'].sum()
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
      k: (v.shape, v.dtype) for k, v in batches[0].items()
    }
    found |= some
  assert sorted(found) == list(range(test_pairs.COMPARED))
  for i, (chosen, rejected) in found.items():
    prompt = f'USER: question {i} ASSISTANT:'
    assert chosen.endswith(f'{prompt} good {i}') and rejected.endswith(
      f'{prompt} bad and longer {i}'
    )
  padded = list(pairs.pairs(model(), data=test_pairs.data(path), batch=8, length=LENGTH).once())
  total = lambda name, of: sum(int((b[name] > 0).sum()) for b in of)
  answers = [total(f'{side}/weights', padded) for side in pairs.SIDES]
  assert total('weights', batches) == sum(answers)
  assert total('segments', batches) == total('chosen/segments', padded) + answers[1]
  assert all(b['compared'].shape[1] >= b['compared'].sum(1).max() for b in batches)


def test_every_epoch_has_every_pair_and_resumes_anywhere(path):
  source, seen, states = made(path), [], []
  while len(seen) < 30:
    states.append(json.loads(json.dumps(source.state())))
    seen.append(source())
  source.close()
  order = [int(m) for b in seen for m in b['margin'][b['compared']]]
  count = test_pairs.COMPARED
  starts = range(0, len(order) - count + 1, count)
  assert len(starts) >= 2  # a block is an epoch here: packed as a whole
  assert all(sorted(order[i : i + count]) == list(range(count)) for i in starts)
  assert order[:count] != order[count : 2 * count]
  thirds = [made(path, process_index=i, process_count=3) for i in range(3)]
  again = made(path)
  for k in (0, 7, 20):
    for one in (*thirds, again):
      one.restore(states[k])
    whole, parts = again(), [third() for third in thirds]
    for name, value in seen[k].items():
      np.testing.assert_array_equal(whole[name], value)
      np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), value)
  for one in (*thirds, again):
    one.close()


def test_what_does_not_fit_or_cannot_branch_is_refused(path, capsys):
  longest = max(int((b['segments'] > 0).sum()) for b in made(path, batch=1, length=LENGTH).once())
  assert longest > LENGTH // 2  # one to a row
  says(
    ('pairs.jsonl:11', 'prompt and both answers have', '27 of 37 do not fit'),
    lambda: made(path, length=longest - 1),
  )
  few = made(path, length=longest - 1, left_out=0.8)
  assert sum(int(b['compared'].sum()) for b in few.once()) == 10
  assert '27 of 37 are too long and left out' in capsys.readouterr().err
  with pytest.raises(UserError, match='Mamba reads a row as one text, so its rows cannot branch'):
    pairs.packed(model('Mamba reads a row as one text'), data=test_pairs.data(path))


def test_a_row_has_room_for_as_many_as_there_can_be():
  for sizes, length in (((3, 4, 5), 12), ((3, 4, 5), 11), ((9,), 10), ((2, 2, 9, 2), 6)):
    best = 0
    for chosen in range(1 << len(sizes)):
      picked = [n for i, n in enumerate(sizes) if chosen >> i & 1]
      best = max(best, len(picked) if sum(picked) <= length else 0)
    assert branches.most(np.array(sizes), length) == best
