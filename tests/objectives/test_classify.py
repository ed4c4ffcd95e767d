"""Classes with language modelling beside them: GPT's finetuning and BERT's pre-training, against their formulas."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.core.errors import UserError
from llm_jax.interop import huggingface
from llm_jax.objectives import classify
from tests.objectives import pairs

BERT = pathlib.Path(__file__).parents[1] / 'interop/reference/bert'
CLOSE = dict(rtol=2e-5, atol=2e-5)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('lm', [0.0, 0.5])
def test_gpts_loss_is_equation_5_of_the_paper(lm):
  """-log p(label | text) - lm * (mean of log p(token)) per text, in 64 bits; the row of padding does not count."""
  rng = np.random.default_rng(3)
  batch = pairs.text(rng) | dict(
    label=rng.integers(0, 3, pairs.ROWS), at=rng.integers(0, pairs.LENGTH, pairs.ROWS)
  )
  own = dict(w=rng.normal(size=(pairs.EMBED, 3)), bias=rng.normal(size=3))
  made, params = pairs.model()
  params = params | dict(classes={k: jnp.asarray(v, jnp.float32) for k, v in own.items()})
  out = classify.labelled(made, params, batch, None, lm=lm)
  x = np.asarray(made.hidden(params, batch).x, np.float64)[np.arange(pairs.ROWS), batch['at']]
  logp = log_softmax(x @ own['w'] + own['bias'])[np.arange(pairs.ROWS), batch['label']]
  size = np.maximum(batch['weights'].sum(1), 1)
  text = (pairs.logp(batch)[0] * batch['weights']).sum(1) / size
  there = batch['weights'].sum(1) > 0
  np.testing.assert_allclose(out.sum, -(logp + lm * text)[there].sum(), **CLOSE)
  assert out.weight == there.sum() == 3 and ('nll' in out.metrics) == bool(lm)
  np.testing.assert_allclose(out.metrics['label_nll'], -logp[there].sum(), **CLOSE)


def test_berts_loss_is_that_of_the_logits_of_transformers():
  """Mean over the hidden words plus mean over the pairs, as `BertForPreTraining` adds them, from its own logits."""
  model, params = huggingface.load(str(BERT))
  expected = load_file(BERT / 'expected.safetensors')
  weights = np.zeros((2, 10), np.float32)
  weights[0, [1, 5, 7]] = weights[1, [0, 2, 9]] = 1
  batch = dict(
    inputs=expected['ids'],
    types=expected['types'],
    targets=expected['targets'],
    weights=weights,
    label=np.array([1, 0]),
    at=np.zeros(2, np.int32),
  )
  batch = {
    k: jnp.asarray(v) if k == 'weights' else jnp.asarray(v, jnp.int32) for k, v in batch.items()
  }
  out = classify.labelled(model, params, batch, None, lm=1.0)
  words = np.take_along_axis(log_softmax(expected['logits']), expected['targets'][..., None], -1)[
    ..., 0
  ]
  follows = log_softmax(expected['classes'])[[0, 1], [1, 0]]
  np.testing.assert_allclose(
    out.sum / out.weight, -words[weights > 0].mean() - follows.mean(), **CLOSE
  )


def test_wrong_models_and_numbers():
  made, params = pairs.model()
  run = functools.partial(classify.labelled, made, params, {}, None)
  with pytest.raises(UserError, match='knows no classes'):
    run()
  with pytest.raises(UserError, match='lm=-1'):
    run(lm=-1)
