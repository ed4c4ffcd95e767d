"""Vectors of words from the words around them: word2vec and GloVe, over the parameters of model/tables.py."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.objectives.loss import Loss


def skip_gram(
  model: Any, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None
) -> Loss:
  """-log s(u_o . v_c) - sum_k log s(-u_k . v_c) for every word o around a word c (Mikolov et al. 2013,
  arXiv:1310.4546, eq. 4; s: the logistic function, v: input vectors, u: output vectors).

  batch: center int32 [batch], context int32 [batch, n], weights f32 [batch, n] (0 where there is no word), noise int32
  [batch, n, k] (data/windows.py).
  """
  del model, rng
  v = params['input'][batch['center']][:, None]
  return _sampled(v, params['output'], batch['context'], batch['noise'], batch['weights'])


def cbow(model: Any, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Loss:
  """The same with v the mean of the input vectors around, which predicts the word in the middle (Mikolov et al. 2013,
  arXiv:1301.3781, section 3.1).

  batch: as in `skip_gram`; of the noise the first k of each row. A row without any context weighs 0.
  """
  del model, rng
  weights = batch['weights'][..., None]
  total = (params['input'][batch['context']] * weights).sum(1, keepdims=True)
  count = weights.sum(1, keepdims=True)
  v = total / jnp.maximum(count, 1)
  there = (count[..., 0] > 0).astype(jnp.float32)
  return _sampled(v, params['output'], batch['center'][:, None], batch['noise'][:, :1], there)


def _sampled(
  v: jax.Array, table: jax.Array, targets: jax.Array, noise: jax.Array, weights: jax.Array
) -> Loss:
  """Negative sampling. v: [batch, n or 1, embed]; targets, weights: [batch, n]; noise: [batch, n, k]."""
  right = (table[targets] * v).sum(-1)
  wrong = (table[noise] * v[:, :, None]).sum(-1)
  nats = jax.nn.softplus(-right) + jax.nn.softplus(wrong).sum(-1)
  metrics = dict(accuracy=(weights * (right > wrong.max(-1))).sum())
  return Loss((weights * nats).sum(), weights.sum(), metrics)


def glove(
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rng: jax.Array | None,
  *,
  top: float = 100.0,
  power: float = 0.75,
) -> Loss:
  """f(X_ij) (w_i . w~_j + b_i + b~_j - log X_ij)^2 with f(x) = min(1, (x / top)^power) (Pennington et al. 2014, EMNLP,
  eq. 8 and 9).

  batch: row, column int32 [batch], count f32 [batch], cells X_ij > 0 of the matrix (`windows.cooccurrences`). The
  tables need biases. The paper's vectors are input + output.
  """
  del model, rng
  i, j, x = batch['row'], batch['column'], batch['count']
  product = (params['input'][i] * params['output'][j]).sum(-1)
  error = product + params['input_bias'][i] + params['output_bias'][j] - jnp.log(x)
  loss = jnp.minimum(1.0, (x / top) ** power) * error**2
  return Loss(loss.sum(), jnp.float32(len(x)), dict(squares=(error**2).sum()))
