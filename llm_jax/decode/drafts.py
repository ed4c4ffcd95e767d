"""What proposes the tokens that speculative decoding checks: another model, the text itself, the model's first layers.

What is proposed changes the speed alone, never what comes out. A draft is data: two functions, their settings, and
parameters,

    start(draft, params, batch, last) -> state                      # once, on the prompts
    propose(draft, params, target, state, seen, added, pick) -> (Proposal, state)

target: the model that checks. seen: all tokens so far, of which the target has not read the last. added: int32 [rows],
how many of them the last step added. pick(logits [rows, vocab], seen) draws the token after `seen` as the target would
from these logits: (ids [rows], the probabilities [rows, vocab] that it was drawn from).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.decode import prompts, steps
from llm_jax.decode.logits import Seen


class Proposal(NamedTuple):
  """ids: int32 [rows, gamma]. probs: f32 [rows, gamma, vocab], what each was drawn from; None where they were not."""

  ids: jax.Array
  probs: jax.Array | None


class Target(NamedTuple):
  """The model that checks, and how far it has read."""

  f: steps.Functions
  params: Any
  context: dict
  states: Any


class Draft(NamedTuple):
  """start, propose: see above. settings: hashable. params: arrays. model: another `Model`, for which the prompts that
  `start` gets are laid out; None for the target."""

  start: Callable
  propose: Callable
  settings: Any = None
  params: Any = None
  model: Any = None


class Told(NamedTuple):
  """What a draft's functions know when they are traced. f: of its own model, None without."""

  f: steps.Functions | None
  gamma: int
  settings: Any


def by_model(model: Any, params: Any) -> Draft:
  """Another model with the same vocabulary (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023,
  arXiv:2302.01318).

  Its states go up to and without what the last step added. That is read at once, then one token at a time what is
  proposed; the states after that are dropped, so it may be a recurrent model.
  """
  return Draft(_start_model, _propose_model, params=params, model=model)


def by_ngram(longest: int = 3) -> Draft:
  """What followed the last time that the text had its present end, of `longest` tokens or as many less as it takes
  (prompt lookup; Saxena 2023). No probabilities: a certain guess.

  A repetition that reaches the end of the text is continued as a cycle. The encoder's input is part of the text.
  """
  if longest < 1:
    raise UserError(f'longest must be at least 1 token, got {longest}')
  return Draft(_start_ngram, _propose_ngram, settings=longest)


def by_early_exit(layers: int) -> Draft:
  """The target's own first `layers`, the final norm and the head (Zhang et al. 2023, arXiv:2309.08168; Elhoushi et al.
  2024, arXiv:2404.16710).

  What the target keeps of these layers serves the draft too, so it reads no prompt and has no state.
  """
  if layers < 1:
    raise UserError(f'layers must be at least 1, got {layers}')
  return Draft(_start_nothing, _propose_exit, settings=layers)


# --- another model ------------------------------------------------------------------------------------


def _start_model(told: Told, params: Any, batch: dict, last: jax.Array) -> dict:
  _, states = steps.prefill(told.f, params, batch, last)
  return dict(states=states, context=prompts.context(batch))


def _propose_model(
  told: Told, params: Any, target: Target, state: dict, seen: Seen, added: jax.Array, pick: Callable
) -> tuple[Proposal, dict]:
  del target
  context, index = state['context'], jnp.arange(told.gamma + 1)
  positions = (seen.length - added)[:, None] + index
  real = index < added[:, None]
  inputs = jnp.take_along_axis(seen.tokens, positions, axis=1, mode='clip')
  batch = dict(inputs=jnp.where(real, inputs, 0), positions=positions)
  batch['segments'] = real.astype(jnp.int32)
  hidden = told.f.hidden(params, dict(context, **batch), states=state['states'])
  last = jnp.maximum(added - 1, 0)[:, None, None]
  x = jnp.take_along_axis(hidden.x, last, axis=1)[:, 0]

  def read(token: jax.Array, position: jax.Array, states: Any) -> tuple[jax.Array, Any]:
    return steps.step(told.f, params, context, token, position, states)

  head = lambda x: steps.logits(told.f, params, x)
  found = _chain(told.gamma, head, read, x, hidden.states, seen, pick)
  return found, dict(state, states=hidden.states)


def _chain(
  gamma: int, head: Callable, read: Callable, x: jax.Array, states: Any, seen: Seen, pick: Callable
) -> Proposal:
  """`gamma` tokens, each drawn from what `read` makes of the one before. x: of the last token seen."""

  def one(carry: tuple, _: None) -> tuple:
    x, states, seen = carry
    token, probs = pick(head(x), seen)
    x, states = read(token, seen.length, states)
    return (x, states, seen.add(token)), (token, probs)

  (x, _, seen), (ids, probs) = jax.lax.scan(one, (x, states, seen), length=gamma - 1)
  token, last = pick(head(x), seen)  # nobody reads the last one
  ids = jnp.concatenate([ids, token[None]])
  return Proposal(ids.T, jnp.moveaxis(jnp.concatenate([probs, last[None]]), 0, 1))


# --- the text -----------------------------------------------------------------------------------------


def _start_ngram(told: Told, params: Any, batch: dict, last: jax.Array) -> dict:
  del told, params, last
  if 'encoder/inputs' not in batch:
    return {}
  real = batch['encoder/segments'] > 0
  source = jnp.where(real, batch['encoder/inputs'], -1)
  aside = (~real).sum(1)  # padding goes in front, so that the answer follows the source
  return dict(source=jax.vmap(jnp.roll)(source, aside))


def _propose_ngram(
  told: Told, params: Any, target: Target, state: dict, seen: Seen, added: jax.Array, pick: Callable
) -> tuple[Proposal, dict]:
  del params, target, added, pick
  text, end = seen.tokens, seen.length[:, None]
  if 'source' in state:
    text = jnp.concatenate([state['source'], text], axis=1)
    end = end + state['source'].shape[1]
  first, places = end - 1, jnp.arange(text.shape[1])  # nothing found: the last token again
  for n in range(1, min(told.settings, text.shape[1] - 1) + 1):  # longer ones last: they count
    same = (places + n < end) & (end >= n)
    for i in range(n):
      token = jnp.take_along_axis(text, jnp.maximum(end - n + i, 0), axis=1)
      same &= jnp.roll(text, -i, axis=1) == token
    place = jnp.max(jnp.where(same, places, -1), axis=1, keepdims=True)
    first = jnp.where(place >= 0, place + n, first)
  index = first + jnp.arange(told.gamma) % (end - first)
  return Proposal(jnp.take_along_axis(text, index, axis=1), None), state


# --- the first layers ---------------------------------------------------------------------------------


def _start_nothing(told: Told, params: Any, batch: dict, last: jax.Array) -> dict:
  del told, params, batch, last
  return {}


def _propose_exit(
  told: Told, params: Any, target: Target, state: dict, seen: Seen, added: jax.Array, pick: Callable
) -> tuple[Proposal, dict]:
  del params, added
  f, context = target.f, target.context

  def read(token: jax.Array, position: jax.Array, states: Any) -> tuple[jax.Array, Any]:
    batch = dict(context, inputs=token[:, None], positions=position[:, None])
    hidden = f.hidden(target.params, batch, states=states, layers=told.settings)
    return hidden.x[:, 0], hidden.states

  token = jnp.take_along_axis(seen.tokens, seen.length[:, None] - 1, axis=1)[:, 0]
  x, states = read(token, seen.length - 1, target.states)
  head = lambda x: steps.logits(f, target.params, x)
  return _chain(told.gamma, head, read, x, states, seen, pick), state
