"""Tokens that leave the stack early, against layers run one by one in Python."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.decode import early_exit, generate
from llm_jax.model import depth
from tests.decode.kinds import KEY, make, pad
from tests.variants import variants

PROMPTS = [[7, 2, 3, 5, 2, 3], [1], [6], [8, 8, 3]]
NEW, LAYERS = 7, 4
GREEDY = dict(max_new=NEW, temperature=0.0, eos=None)
NEVER = dict(
  softmax=early_exit.softmax(1.0),
  similar=early_exit.similar(1.0),
  schedule=early_exit.schedule(LAYERS, LAYERS, 5),
)


@pytest.mark.parametrize(
  ('kind', 'name'),
  variants(
    [('causal', 'softmax'), ('encoder_decoder', 'similar'), ('recurrent', 'schedule')],
    [('encoder_decoder', 'similar')],
  ),
)
def test_where_nothing_leaves_it_is_plain_decoding(kind, name):
  model, params = make(kind, layers=LAYERS)
  early = early_exit.early_exit(model, NEVER[name])
  out = generate.generate(early, params, *pad(PROMPTS), KEY, **GREEDY)
  plain = generate.generate(model, params, *pad(PROMPTS), KEY, **GREEDY)
  assert out.tokens.tolist() == plain.tokens.tolist()
  np.testing.assert_allclose(out.logp, plain.logp, atol=1e-4)


def step_by_step(kind, layers, params, prompt, rule):
  """(tokens, layers run) of one prompt: every layer is a call of its own on the whole text, what has left stays."""
  one = make(kind, layers=1)[0]
  cut = [
    jax.tree.map(lambda x, i=i: x[i : i + 1], params['decoder']['layers']) for i in range(layers)
  ]
  answer, run, gone = [], [], {}
  head = np.asarray(params['embedding']['table'], np.float64).T

  def normed(x):
    scale = np.asarray(params['decoder']['norm']['scale'], np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

  for _ in range(NEW):
    ids = np.array([[0, *prompt, *answer]])
    x = np.asarray(params['embedding']['table'])[ids]
    last = ids.shape[1] - 1
    for i in range(layers):
      y = np.array(_layer(one, cut[i], x))
      for place, done in gone.items():
        if i >= done:
          y[:, place] = x[:, place]
      if i + 1 < layers and last not in gone and len(answer):
        if rule(normed(y[0, last]), normed(x[0, last]), head, last, i + 1):
          gone[last] = i + 1
      x = y
    run.append(gone.get(last, layers))
    answer.append(int(np.argmax(normed(x[0, last]) @ head)))
  return answer, run


def _layer(one, params, x):
  """One block without embedding and norm, on x [1, t, embed]."""
  keep = depth.Around(lambda _: x, _replaced, lambda kept, _: kept)
  tree = dict(
    embedding=dict(table=jnp.zeros((12, 16))),
    decoder=dict(layers=params, norm=dict(scale=jnp.ones(16))),
  )
  return one.hidden(tree, dict(inputs=np.zeros(x.shape[:2], np.int32)), around=keep).aux['around']


def _replaced(apply, layer, finish):
  """Runs the block on what was carried instead of the embeddings."""

  def run(params, carry, states, index):
    y, states, aux = apply(params, carry[1], states, index)
    return (carry[0], y), states, aux

  return run


RULES = dict(
  softmax=(
    early_exit.softmax(0.08),
    lambda y, x, head, at, n: (
      np.subtract(*np.sort(np.exp(y @ head) / np.exp(y @ head).sum())[:-3:-1]) > 0.08
    ),
  ),
  similar=(
    early_exit.similar(0.8),
    lambda y, x, head, at, n: y @ x / np.linalg.norm(x) / np.linalg.norm(y) > 0.8,
  ),
  schedule=(
    early_exit.schedule(4, 1, 9),
    lambda y, x, head, at, n: n >= np.round(4 - 3 * min(at / 9, 1)),
  ),
)


BOTH = list(itertools.product(('causal', 'recurrent'), RULES))


@pytest.mark.parametrize(('kind', 'name'), variants(BOTH, [('causal', 'similar')]))
def test_tokens_leave_where_the_rule_says_and_leave_their_states_behind(kind, name):
  model, params = make(kind, layers=LAYERS)
  rule, own = RULES[name]
  early = early_exit.early_exit(model, rule)
  prompts = pad(PROMPTS[:2])
  out = generate.generate(early, params, *prompts, KEY, **GREEDY)
  found = early_exit.depths(early, params, *prompts, out.tokens)
  for row, prompt in enumerate(PROMPTS[:2]):
    tokens, run = step_by_step(kind, LAYERS, params, prompt, own)
    assert out.tokens[row].tolist() == tokens
    assert found[row].tolist() == run
  assert found[:, 0].tolist() == [LAYERS] * 2  # the prompt predicts the first token
  assert found.min() < LAYERS


def test_the_schedule_falls_with_the_position():
  model, params = make('causal', layers=LAYERS)
  early = early_exit.early_exit(model, early_exit.schedule(4, 1, 6))
  found = early_exit.depths(early, params, *pad([[3]]), [[5] * 9])
  # the prompt's last token is read in full; then position 2, 3, ...: 4 - 3 min(position / 6, 1)
  assert found[0].tolist() == [4, 3, 2, 2, 2, 1, 1, 1, 1]


WRONG = [
  (lambda m: early_exit.early_exit(m, early_exit.softmax(), layers=(4,)), 'among 1 to 3'),
  (lambda m: early_exit.schedule(1, 2, 5), '1 <= least <= most'),
  (lambda m: early_exit.depths(make('prefix')[0], None, [[1]], [1], [[1]]), 'causal models'),
]


@pytest.mark.parametrize(('run', 'message'), WRONG)
def test_wrong_settings(run, message):
  with pytest.raises(UserError, match=message):
    run(make('causal', layers=LAYERS)[0])
