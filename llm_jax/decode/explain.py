"""How each token came about: the likeliest ids of the model, what every processor made of them, which one was drawn.

    for step in explain.steps(model, params, ids, key, top=8, temperature=0.7, top_p=0.9):
      step.token, step.stages, step.candidates[0].probabilities

The tokens are those of `generate` with the same key and settings.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps as steps_lib
from llm_jax.decode.prompts import START

MODEL = 'model'  # the first stage: the model's own distribution


class Candidate(NamedTuple):
  """An id with its probability after each stage; 0: ruled out."""

  token: int
  probabilities: tuple[float, ...]


class Step(NamedTuple):
  """One token. stages: MODEL and the names of the processors in their order; left: how many ids have a probability
  after each; candidates: the likeliest of the model, then of the last stage, and the token that was drawn."""

  token: int
  stages: tuple[str, ...]
  left: tuple[int, ...]
  candidates: list[Candidate]


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes."""

  model: steps_lib.Functions
  sampling: logits_lib.Sampling
  banned: tuple[tuple[int, ...], ...]


def steps(
  model: Any,
  params: Any,
  prompt: Sequence[int],
  key: jax.Array,
  *,
  top: int = 8,
  max_new: int = 20,
  eos: int | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  **sampling: float,
) -> Iterator[Step]:
  """The tokens that follow one prompt, each with the `top` likeliest ids before and after the processors.

  The other arguments: see `generate.generate`.
  """
  chosen = logits_lib.check(**sampling)
  laid = prompts_lib.lay(model, *prompts_lib.pad(model, [prompt]), max_new, start)
  rules = prompts_lib.rules(model, eos, allowed, bias, banned)
  static = _Static(steps_lib.functions(model, laid.slots), chosen, rules.banned)
  told = dict(allowed=rules.allowed, bias=rules.bias)
  names = [name for name, _ in logits_lib.processors(chosen, banned=static.banned, **told)]
  keys = prompts_lib.row_keys(key, None, 1, len(laid.last))
  seen = logits_lib.Seen.begin(laid.batch['inputs'], laid.last, max_new)
  x, states = _read(static, params, laid.batch, laid.last)
  for made in range(max_new):
    probabilities, token = _look(static, params, told, x, seen, keys, np.int32(made))
    yield _step(np.asarray(probabilities), int(token[0]), (MODEL, *names), top)
    position = laid.last + made + 1
    if int(token[0]) == eos or position[0] >= laid.slots:
      return
    seen = seen.add(token)
    x, states = _more(static, params, laid.context, token, position, states)


def _step(probabilities: np.ndarray, token: int, stages: tuple[str, ...], top: int) -> Step:
  """probabilities: [stages, vocab]."""
  best = [np.argsort(-probabilities[i], kind='stable')[:top] for i in (0, -1)]
  final = [i for i in best[1] if probabilities[-1, i] > 0]
  ids = dict.fromkeys([*best[0].tolist(), *map(int, final), token])
  candidates = [Candidate(i, tuple(map(float, probabilities[:, i]))) for i in ids]
  return Step(token, stages, tuple(map(int, (probabilities > 0).sum(-1))), candidates)


@functools.partial(jax.jit, static_argnums=0)
def _read(static: _Static, params: Any, batch: dict, last: jax.Array) -> tuple[jax.Array, Any]:
  return steps_lib.prefill(static.model, params, batch, last)


@functools.partial(jax.jit, static_argnums=0)
def _more(static: _Static, params: Any, *told: Any) -> tuple[jax.Array, Any]:
  return steps_lib.step(static.model, params, *told)


@functools.partial(jax.jit, static_argnums=0)
def _look(
  static: _Static,
  params: Any,
  told: dict,
  x: jax.Array,
  seen: logits_lib.Seen,
  keys: jax.Array,
  made: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The first row's probabilities after each stage, [stages, vocab], and the token drawn in each row."""
  logits = steps_lib.logits(static.model, params, x)
  stages = [logits]
  for _, run in logits_lib.processors(static.sampling, banned=static.banned, **told):
    stages.append(run(stages[-1], seen))
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, made)
  token = logits_lib.draw(stages[-1], keys, static.sampling.temperature)
  return steps_lib.whole(jax.nn.softmax(jnp.stack([s[0] for s in stages]))), steps_lib.whole(token)
