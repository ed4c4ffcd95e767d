"""A language model as what it is: a function from a text to the distribution of the next token.

    p = predict.predict_next(model, params, vocab, 'The cat sat on the')      # f32 [vocab]

A `Predictor` is the same token by token, for models of any kind: also one that only counts (data/ngram.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps as steps_lib
from llm_jax.decode.prompts import START


class Predictor(NamedTuple):
  """begin() -> (p [vocab] of a text's first token, state). read(state, token) -> (p of the token after it, state)."""

  begin: Callable[[], tuple[np.ndarray, Any]]
  read: Callable[[Any, int], tuple[np.ndarray, Any]]


def predict_next(model: Any, params: Any, vocab: Any, prompt: str) -> np.ndarray:
  """f32 [vocab], p of every id after `prompt`."""
  ids = prompts_lib.encode(model, vocab, prompt)
  laid = prompts_lib.lay(model, *prompts_lib.pad(model, [ids]), 1, vocab.start)
  static = steps_lib.functions(model, laid.slots)
  return np.asarray(_after(static, model.card.vocab, params, laid.batch, laid.last))[0]


def of_model(model: Any, params: Any, *, length: int = 256, start: int = START) -> Predictor:
  """A causal model that forgets everything after `length` tokens and begins anew, so that texts may be of any length.

  start: id that it reads first (`vocab.first`). All steps run the same compiled code.
  """
  if model.card.kind != 'causal':
    raise UserError(f'the model is {model.card.kind}: only a causal one reads token by token')
  most = min(length, prompts_lib.limit(model))
  if most < 1:
    raise UserError(f'length must be at least 1 token, got {length}')
  static = steps_lib.functions(model, int(most))

  def step(token: int, at: int, states: Any) -> tuple[np.ndarray, Any]:
    told = np.array([token], np.int32), np.array([at], np.int32)
    p, states = _step(static, model.card.vocab, params, *told, states)
    return np.asarray(p), (at + 1, states)

  def begin() -> tuple[np.ndarray, Any]:
    return step(start, 0, _empty(static, params))

  def read(state: Any, token: int) -> tuple[np.ndarray, Any]:
    at, states = state
    return begin() if at >= most else step(token, at, states)

  return Predictor(begin, read)


def of_distribution(p: Callable[[Sequence[int]], Any]) -> Predictor:
  """p: the ids so far -> [vocab], such as `lambda ids: ngram.probabilities(made, [ids])[0]`."""

  def read(seen: tuple[int, ...], token: int) -> tuple[np.ndarray, Any]:
    return np.asarray(p([*seen, token])), (*seen, token)

  return Predictor(lambda: (np.asarray(p([])), ()), read)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _after(
  static: steps_lib.Functions, vocab: int, params: Any, batch: dict, last: jax.Array
) -> jax.Array:
  x, _ = steps_lib.prefill(static, params, batch, last)
  return steps_lib.whole(jax.nn.softmax(steps_lib.logits(static, params, x)[:, :vocab]))


@functools.partial(jax.jit, static_argnums=0)
def _empty(static: steps_lib.Functions, params: Any) -> Any:
  return static.states(params, dict(inputs=jnp.zeros((1, 1), jnp.int32)), static.slots)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
  static: steps_lib.Functions,
  vocab: int,
  params: Any,
  token: jax.Array,
  at: jax.Array,
  states: Any,
) -> tuple[jax.Array, Any]:
  x, states = steps_lib.step(static, params, {}, token, at, states)
  logits = steps_lib.logits(static, params, x)[0, :vocab]
  return steps_lib.whole(jax.nn.softmax(logits)), states
