"""Speculative decoding: a draft proposes `gamma` tokens, the model reads them at once and keeps those it agrees with.

Leviathan et al. 2022 (arXiv:2211.17192, algorithm 1), Chen et al. 2023 (arXiv:2302.01318). With p what the model draws
from and q what the draft drew from, both after temperature, truncations, penalties and bans, a proposal x is kept with
probability min(1, p(x) / q(x)); in the place of the first that is not, a token is drawn from norm(max(0, p - q)), and
after all of them one more from p. The tokens have the distribution p, whatever the draft; greedy ones are those of
greedy decoding. Reading a few tokens takes little longer than reading one, for the time goes into reading the weights.

Rows advance at speeds of their own. Attention's states are written by position, so what was rejected is overwritten.
States that cannot be taken back (recurrent, or a ring of the last positions) are kept as they were before the step,
and what was accepted is read a second time where some row rejected something: exact, but worth it only where
most is accepted.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.decode import drafts, steps
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode.logits import Seen
from llm_jax.decode.prompts import START


class Output(NamedTuple):
  """tokens, lengths, logp: as in `generate.Output`. accepted: int32 [batch, max_new], how many proposals each step
  accepted, -1 where the row took no step."""

  tokens: jax.Array
  lengths: jax.Array
  logp: jax.Array
  accepted: jax.Array

  def per_step(self) -> np.ndarray:
    """f64 [batch]: tokens per step, without the first, which the prompt gives."""
    taken = (np.asarray(self.accepted) >= 0).sum(1)
    return (np.asarray(self.lengths) - 1) / np.maximum(taken, 1)


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes. rewinds: whether the states can be overwritten."""

  model: steps.Functions
  draft: drafts.Draft  # without its arrays
  told: drafts.Told
  sampling: logits_lib.Sampling
  banned: tuple[tuple[int, ...], ...]
  max_new: int
  rewinds: bool


class _Fixed(NamedTuple):
  """What the loop reads and never changes. keys: [rows]. most: int32 [rows], tokens that the row may draw."""

  keys: jax.Array
  ends: jax.Array
  allowed: jax.Array | None
  bias: jax.Array | None
  most: jax.Array
  context: dict[str, jax.Array]


class _Carry(NamedTuple):
  """One decoding in progress. The model has read all of `seen` but the last token."""

  step: jax.Array
  seen: Seen
  added: jax.Array
  done: jax.Array
  states: Any
  draft: Any
  logp: jax.Array
  accepted: jax.Array


def generate(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  draft: drafts.Draft,
  gamma: int = 5,
  max_new: int = 100,
  eos: int | Sequence[int] | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  rows: Any = None,
  **sampling: float,
) -> Output:
  """What `generate.generate` draws from, in fewer steps. draft: one of decode/drafts.py; gamma: proposals per step.

  The other arguments are those of `generate.generate`. A row draws its token number j with keys that depend on the row
  and j alone, so neighbours change nothing; the keys are used otherwise than there, so sampled tokens differ.
  """
  chosen = logits_lib.check(**sampling)
  if gamma < 1:
    raise UserError(f'gamma must be at least 1 proposal per step, got {gamma}')
  laid = prompts_lib.lay(model, prompts, lengths, max_new, start, spare=gamma)
  batch, told = _told(model, draft, gamma, (prompts, lengths, max_new, start), laid)
  count = np.shape(prompts)[0]
  keys = prompts_lib.row_keys(key, rows, count, len(laid.last))
  rules = prompts_lib.rules(model, eos, allowed, bias, banned)
  most = np.minimum(max_new, prompts_lib.limit(model) - laid.last).astype(np.int32)
  fixed = _Fixed(keys, rules.ends, rules.allowed, rules.bias, most, laid.context)
  f = steps.functions(model, laid.slots)
  shapes = jax.eval_shape(lambda params: f.states(params, laid.batch, f.slots), params)
  how = draft._replace(params=None, model=None)
  static = _Static(f, how, told, chosen, rules.banned, max_new, _rewinds(shapes))
  both = params, draft.params
  out = _run(static, both, fixed, laid.batch, batch, laid.last, laid.live)
  return out if len(laid.last) == count else jax.tree.map(lambda x: x[:count], out)


def _told(model: Any, draft: drafts.Draft, gamma: int, given: tuple, laid: Any) -> tuple:
  """(the draft's batch, what its functions are told)."""
  if draft.model is None:
    return laid.batch, drafts.Told(None, gamma, draft.settings)
  prompts_lib.check_alike(model, draft.model, 'draft')
  theirs = prompts_lib.lay(draft.model, *given, spare=gamma)
  return theirs.batch, drafts.Told(steps.functions(draft.model, theirs.slots), gamma, None)


def _rewinds(states: Any) -> bool:
  """Whether all states are slots of attention, one per position, or do not change."""
  slots = ('mixer/k', 'mixer/v')
  return all(path.endswith(slots) or '/cross/' in path for path in tree.flatten(states))


# --- the compiled part --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _run(
  static: _Static,
  both: tuple,
  fixed: _Fixed,
  batch: dict,
  theirs: dict,
  last: jax.Array,
  live: jax.Array,
) -> Output:
  params, own = both
  x, states = steps.prefill(static.model, params, batch, last)
  seen = Seen.begin(batch['inputs'], last, static.max_new)
  shape = len(last), static.max_new
  raw = steps.logits(static.model, params, x)
  told = static.sampling.temperature
  drawn = logits_lib.draw(_process(static, fixed, raw, seen), _keys(fixed, seen, _DRAW), told)
  carry = _Carry(
    step=jnp.int32(0),
    seen=seen,
    added=jnp.zeros(len(last), jnp.int32),
    done=~live,
    states=states,
    draft=static.draft.start(static.told, own, theirs, last),
    logp=jnp.zeros(shape),
    accepted=jnp.full(shape, -1, jnp.int32),
  )
  carry = _add(fixed, carry, drawn[:, None], raw[:, None], jnp.ones_like(last))
  carry = jax.lax.while_loop(
    lambda carry: ~carry.done.all(), lambda carry: _step(static, both, fixed, carry), carry
  )
  seen = carry.seen
  lengths, index = seen.length - seen.prompt, jnp.arange(static.max_new)
  tokens = jnp.take_along_axis(seen.tokens, seen.prompt[:, None] + index, axis=1, mode='clip')
  tokens = jnp.where(index < lengths[:, None], tokens, 0)
  out = Output(tokens, lengths, carry.logp, carry.accepted)
  return jax.tree.map(steps.whole, out)


def _step(static: _Static, both: tuple, fixed: _Fixed, carry: _Carry) -> _Carry:
  """Proposes, checks, adds."""
  f, gamma, seen = static.model, static.told.gamma, carry.seen
  target = drafts.Target(f, both[0], fixed.context, carry.states)
  pick = functools.partial(_pick, static, fixed)
  told = both[1], target, carry.draft, seen, carry.added, pick
  proposal, draft = static.draft.propose(static.told, *told)
  index = jnp.arange(gamma + 1)
  before = jnp.take_along_axis(seen.tokens, seen.length[:, None] - 1, axis=1)
  batch = dict(inputs=jnp.concatenate([before, proposal.ids], axis=1))
  batch['positions'] = seen.length[:, None] - 1 + index
  batch = dict(fixed.context, **batch)
  hidden = f.hidden(both[0], batch, states=carry.states)
  raw = f.logits(both[0], hidden.x).astype(jnp.float32)
  tokens, kept = _accept(static, fixed, seen, proposal, raw)

  def again() -> Any:
    real = (index <= kept[:, None]).astype(jnp.int32)
    return f.hidden(both[0], dict(batch, segments=real), states=carry.states).states

  states = hidden.states
  if not static.rewinds:
    states = jax.lax.cond((carry.done | (kept == gamma)).all(), lambda: states, again)
  accepted = jnp.where(carry.done, -1, kept)[:, None]
  accepted = jax.lax.dynamic_update_slice(carry.accepted, accepted, (0, carry.step))
  carry = carry._replace(step=carry.step + 1, states=states, draft=draft, accepted=accepted)
  return _add(fixed, carry, tokens, raw, kept + 1)


def _accept(
  static: _Static, fixed: _Fixed, seen: Seen, proposal: drafts.Proposal, raw: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(tokens [rows, gamma + 1], of which one more than `kept` [rows] count). raw: logits [rows, gamma + 1, vocab]."""
  rows, n, vocab = raw.shape
  ids, gamma, index = proposal.ids, n - 1, jnp.arange(n)
  places = jnp.arange(rows)[:, None]
  with_all = seen.tokens.at[places, seen.length[:, None] + index[:-1]].set(ids, mode='drop')
  repeat = functools.partial(jnp.repeat, repeats=n, axis=0)
  length = (seen.length[:, None] + index).reshape(-1)
  each = Seen(repeat(with_all), repeat(seen.prompt), length)
  p = _process(static, fixed, raw.reshape(-1, vocab), each)
  p = _probs(static, p).reshape(raw.shape)
  of = lambda probs: jnp.take_along_axis(probs, ids[..., None], axis=2)[..., 0]
  q = 1.0 if proposal.probs is None else of(proposal.probs)
  keys = jax.vmap(lambda i: _keys(fixed, seen._replace(length=seen.length + i), _ACCEPT))(
    index[:-1]
  )
  chance = jax.vmap(jax.vmap(jax.random.uniform))(keys).T
  kept = jnp.cumprod(chance * q < of(p[:, :-1]), axis=1).sum(1).astype(jnp.int32)
  # Of the first that was rejected, or after all of them: what p has more than q.
  more = jnp.take_along_axis(p, kept[:, None, None], axis=1)[:, 0]
  at = jnp.minimum(kept, gamma - 1)[:, None]
  if proposal.probs is None:
    less = jax.nn.one_hot(jnp.take_along_axis(ids, at, axis=1)[:, 0], vocab)
  else:
    less = jnp.take_along_axis(proposal.probs, at[..., None], axis=1)[:, 0]
  rest = jnp.maximum(more - jnp.where(kept[:, None] < gamma, less, 0), 0)
  rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, more)
  keys = _keys(fixed, seen._replace(length=seen.length + kept), _DRAW)
  drawn = logits_lib.draw(jnp.log(rest), keys, static.sampling.temperature)
  return jnp.where(index < kept[:, None], jnp.pad(ids, ((0, 0), (0, 1))), drawn[:, None]), kept


def _add(
  fixed: _Fixed, carry: _Carry, tokens: jax.Array, raw: jax.Array, count: jax.Array
) -> _Carry:
  """The first `count` [rows] of `tokens` [rows, n] become part of the text, up to where it ends."""
  seen, index = carry.seen, jnp.arange(tokens.shape[1])
  made, places = seen.length - seen.prompt, jnp.arange(len(tokens))[:, None]
  ends = (tokens[..., None] == fixed.ends).any(-1) & (index < count[:, None])
  first = jnp.where(ends.any(1), jnp.argmax(ends, axis=1) + 1, len(index) + 1)
  added = jnp.minimum(jnp.minimum(count, first), fixed.most - made)
  added = jnp.where(carry.done, 0, added)
  real = index < added[:, None]
  beyond = lambda at, width: jnp.where(real, at[:, None] + index, width)
  at = beyond(seen.length, seen.tokens.shape[1])
  seen = seen._replace(
    tokens=seen.tokens.at[places, at].set(tokens, mode='drop'), length=seen.length + added
  )
  chosen = jnp.take_along_axis(raw, tokens[..., None], axis=2)[..., 0]
  logp = chosen - jax.nn.logsumexp(raw, axis=-1)
  logp = carry.logp.at[places, beyond(made, carry.logp.shape[1])].set(logp, mode='drop')
  done = carry.done | (first <= added) | (made + added >= fixed.most)
  return carry._replace(seen=seen, added=added, done=steps.whole(done), logp=logp)


_DRAFT, _ACCEPT, _DRAW = 0, 1, 2  # what the keys of one token are used for


def _keys(fixed: _Fixed, seen: Seen, use: int) -> jax.Array:
  """[rows] keys for the token after `seen`.

  The keys of a token behind a rejected one are used again. Nothing that was kept depended on them.
  """
  own = jax.vmap(jax.random.fold_in)(fixed.keys, seen.length - seen.prompt)
  return jax.vmap(jax.random.fold_in, (0, None))(own, use)


def _pick(static: _Static, fixed: _Fixed, raw: jax.Array, seen: Seen) -> tuple:
  """The draft's token after `seen`, and what it was drawn from."""
  logits = _process(static, fixed, raw, seen)
  ids = logits_lib.draw(logits, _keys(fixed, seen, _DRAFT), static.sampling.temperature)
  return ids, _probs(static, logits)


def _process(static: _Static, fixed: _Fixed, raw: jax.Array, seen: Seen) -> jax.Array:
  told = dict(allowed=fixed.allowed, bias=fixed.bias, banned=static.banned)
  return logits_lib.process(raw, static.sampling, seen, **told)


def _probs(static: _Static, logits: jax.Array) -> jax.Array:
  """f32 [n, vocab]: what a token is drawn from; greedy: all on the largest."""
  if static.sampling.temperature == 0:
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return jax.nn.softmax(logits)
