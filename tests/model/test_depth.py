"""What is seen between the layers: against models that have only that many."""

import functools

import jax
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.model import depth, stack, transformer


def shorter(params, n):
  """The parameters of a model with the first n layers."""
  cut = jax.tree.map(lambda x: x[:n], params['decoder']['layers'])
  return {**params, 'decoder': {**params['decoder'], 'layers': cut}}


@pytest.mark.parametrize('runner', [stack.scan, stack.loop])
def test_exits_and_first_layers_are_shorter_models(tiny, ids, runner):
  model = tiny.causal(layers=4, runner=runner)
  params, batch = tiny.large(model), dict(inputs=ids)
  around = depth.exits((0, 1, 3, 4))
  found = jax.jit(lambda p: model.hidden(p, batch, around=around))(params)
  plain = jax.jit(lambda p: model.hidden(p, batch))(params)
  np.testing.assert_array_equal(found.x, plain.x)
  assert 'around' not in plain.aux
  kept = found.aux['around']
  for i, n in enumerate((1, 3, 4), 1):
    alone = tiny.causal(layers=n, runner=runner)
    want = jax.jit(lambda p, m=alone: m.hidden(p, batch).x)(shorter(params, n))
    np.testing.assert_allclose(kept[i], want, atol=1e-6)
    first = jax.jit(lambda p, n=n: model.hidden(p, batch, layers=n).x)(params)
    np.testing.assert_allclose(first, want, atol=1e-6)
  x = params['embedding']['table'][ids]
  norm = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(kept[0], norm * params['decoder']['norm']['scale'], atol=1e-4)


@pytest.mark.parametrize('runner', [stack.scan, stack.loop])
def test_the_first_layers_take_and_leave_their_own_states(tiny, ids, runner):
  model, alone = tiny.causal(layers=4, runner=runner), tiny.causal(layers=2, runner=runner)
  params = tiny.large(model)
  batch = dict(inputs=ids, positions=np.broadcast_to(np.arange(tiny.LENGTH), ids.shape))
  run = lambda m, p, s, k: m.hidden(p, batch, states=s, layers=k)
  full = model.states(params, batch, tiny.LENGTH)
  few = alone.states(shorter(params, 2), batch, tiny.LENGTH)
  a, b = run(model, params, full, 2), run(alone, shorter(params, 2), few, None)
  np.testing.assert_allclose(a.x, b.x, atol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.states, b.states)
  again = run(model, params, a.states, 2)  # what came back is taken too
  assert jax.tree.structure(again.states) == jax.tree.structure(few)


def test_layers_are_counted_over_segments_and_patterns(tiny, ids):
  mixed = (tiny.block(), (tiny.block(dict(groups=2)), tiny.block(dict(groups=1))))
  model = transformer.causal(vocab=tiny.VOCAB, embed=tiny.EMBED, layers=(1, 4), block=mixed)
  params, batch = tiny.large(model), dict(inputs=ids)
  found = model.hidden(params, batch, around=depth.exits((1, 3, 5)))
  kept = found.aux['around']
  np.testing.assert_array_equal(kept[2], found.x)
  for i, n in enumerate((1, 3)):
    np.testing.assert_allclose(kept[i], model.hidden(params, batch, layers=n).x, atol=1e-6)
  states = model.states(params, batch, tiny.LENGTH)
  told = dict(batch, positions=np.broadcast_to(np.arange(tiny.LENGTH), ids.shape))
  after = model.hidden(params, told, states=states, layers=1).states
  assert list(after) == ['layers']
  for wrong in (2, 6, -1):
    for told in (dict(layers=wrong), dict(around=depth.exits((wrong,)))):
      with pytest.raises(UserError, match=rf'after {wrong} layers: choose one of \[0, 1, 3, 5\]'):
        model.hidden(params, batch, **told)


def test_an_encoders_layers_are_not_counted(tiny, ids):
  model = tiny.t5()
  params, batch = tiny.large(model), {'inputs': ids, 'encoder/inputs': ids}
  run = functools.partial(model.hidden, params, batch)
  kept = run(around=depth.exits((1, 2))).aux['around']
  np.testing.assert_allclose(kept[0], run(layers=1).x, atol=1e-6)
  np.testing.assert_allclose(kept[1], run().x, atol=1e-6)
