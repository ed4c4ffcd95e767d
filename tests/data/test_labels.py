"""Rows of several kinds of text: each has the label of its source, and says where its class is read."""

import functools

import numpy as np

from llm_jax.data import batch, labels, pipeline, tasks, vocab
from tests.data.conftest import model, says

V = functools.partial(vocab.bytes_, extra_ids=0, modes=())
NAMES = ('books', 'stories')


def text(name, **more):
  task = functools.partial(tasks.domain, name=name, vocab=V)
  return functools.partial(pipeline.make, task=task, rows=batch.pad, **more)


def test_rows_have_the_label_of_their_source():
  source = labels.kinds(model(), sources=tuple(map(text, NAMES)), batch=6, length=20)
  alone = [text(name)(model(), batch=3, length=20) for name in NAMES]
  first, wanted = source(), [one() for one in alone]
  state = source.state()
  for row in range(6):
    own = {name: x[row % 3] for name, x in wanted[row // 3].items()}
    assert all((first[name][row] == x).all() for name, x in own.items())
    assert first['label'][row] == row // 3
    assert first['at'][row] == np.flatnonzero(own['weights'])[-1]
  second = source()
  source.restore(state)
  again = source()
  assert all((again[name] == second[name]).all() for name in second)
  assert any((second[name] != first[name]).any() for name in ('inputs', 'targets'))
  whole = labels.kinds(model('encoder'), sources=tuple(map(text, NAMES)), batch=6, length=20)
  assert not whole()['at'].any() and next(whole.once())['label'].tolist() == [0] * 3 + [1] * 3
  for one in (source, whole, *alone):
    one.close()


def test_a_batch_that_does_not_divide():
  says(
    '5 rows do not divide over 2',
    lambda: labels.kinds(model(), sources=tuple(map(text, NAMES)), batch=5),
  )
  says('two or more sources', lambda: labels.kinds(model(), sources=(text('books'),), batch=5))
