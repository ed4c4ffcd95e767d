"""Beam search: the best continuations by total log-probability, a fixed number of them grown side by side.

One compiled `lax.while_loop` over the calls of decode/steps.py, for every kind of model: a beam that goes on takes
the state of the beam it came from. Of the candidates of a step (beams x vocabulary) the best `beams` that have not
ended are grown further; those among the best `beams` that have ended go to a pool, which keeps the best by

    score = log-probability / length_penalty(length)            length: tokens of the answer, the end counted

Groups of beams that avoid each other's tokens: diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424). A
search is deterministic; `sample` draws the candidates instead of taking the best (beam sampling).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps
from llm_jax.decode.prompts import START


class Tree(NamedTuple):
  """What was considered at each step, to show it. All [batch, groups, max_new, candidates], best first; where they
  were drawn, in that order.

  tokens: int32 ids; parents: int32, the beam (of its group) that each continues; scores: f32, log-probability so far,
  -inf for none; places: int32, the beam that it became, DROPPED or ENDED.
  """

  tokens: jax.Array
  parents: jax.Array
  scores: jax.Array
  places: jax.Array


class Beams(NamedTuple):
  """The best `n` answers of each prompt, best first.

  tokens: int32 [batch, n, max_new], 0 after the end; lengths: int32 [batch, n], the end-of-text token counted, 0 where
  fewer than n answers were possible; scores: f32 [batch, n], what they are ranked by, -inf for none; logp: f32 [batch,
  n, max_new], log-probability (nats) of each token under the model itself, before penalties and bans.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array
  logp: jax.Array
  tree: Tree


DROPPED, ENDED = -1, -2


# --- length penalties: what the log-probability is divided by -----------------------------------------


def power(length: Any, *, alpha: float = 1.0) -> Any:
  """length^alpha, the survey's and transformers'; alpha 1 ranks by the mean log-probability of a token."""
  return length**alpha


def gnmt(length: Any, *, alpha: float = 0.6) -> Any:
  """((5 + length) / 6)^alpha (Wu et al. 2016, arXiv:1609.08144, eq. 14), of T5 and GPT-3."""
  return ((5 + length) / 6) ** alpha


def none(length: Any) -> Any:
  """1: the log-probability itself."""
  return np.ones(np.shape(length))


PENALTIES = dict(power=power, gnmt=gnmt, none=none)

# Settings that systems of the survey report their results with (DEC-028, DEC-029); those of sampling: decode/logits.py.
_GNMT = functools.partial(gnmt, alpha=0.6)
PRESETS = dict(
  t5_beam=dict(
    beams=4, length_penalty=_GNMT
  ),  # translation, summaries; arXiv:1910.10683, section 3.7
  gpt3_beam=dict(beams=4, length_penalty=_GNMT),  # free-form answers; arXiv:2005.14165, section 2.4
  # the survey's own evaluation: beam sampling (transformers' do_sample beside num_beams)
  survey=dict(beams=4, temperature=0.1, top_p=0.75, top_k=40, length_penalty=power, max_new=512),
)


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes."""

  model: steps.Functions
  vocab: int
  sampling: logits_lib.Sampling
  banned: tuple[tuple[int, ...], ...]
  max_new: int
  beams: int
  groups: int
  n: int
  early: bool | str


class _Fixed(NamedTuple):
  """What the loop reads and never changes. ends: int32 [n]. divisors: f32 [max_new], of the lengths 1, 2, ...
  most: int32 [batch], the longest answer of each row. diversity: f32 []. keys: [batch] keys to draw with, or None."""

  ends: jax.Array
  allowed: jax.Array | None
  bias: jax.Array | None
  context: dict[str, jax.Array]
  divisors: jax.Array
  most: jax.Array
  diversity: jax.Array
  keys: jax.Array | None


class _Answers(NamedTuple):
  """Answers, begun or ended: [..., width] and [..., width, max_new], best first."""

  scores: jax.Array
  lengths: jax.Array
  tokens: jax.Array
  logp: jax.Array


class _Group(NamedTuple):
  """One group of every row: scores of `live` are log-probabilities, those of `pool` have the penalty."""

  live: _Answers
  pool: _Answers
  done: jax.Array  # [batch]


class _Carry(NamedTuple):
  """One search in progress; the leaves of `group` are [groups, batch, ...], the rows of the others batch by beam."""

  made: jax.Array
  position: jax.Array  # [rows] where the last tokens will be fed
  group: _Group
  states: Any
  seen: logits_lib.Seen | None
  tree: Tree  # [max_new, groups, batch, candidates]


def search(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  *,
  beams: int = 4,
  max_new: int = 100,
  n: int | None = None,
  eos: int | Sequence[int] | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  length_penalty: Callable[[Any], Any] = power,
  early_stopping: bool | str = False,
  groups: int = 1,
  diversity: float = 0.0,
  repetition: float = 1.0,
  presence: float = 0.0,
  frequency: float = 0.0,
  no_repeat_ngram: int = 0,
  drawn: tuple[jax.Array, logits_lib.Sampling] | None = None,
) -> Beams:
  """The `n` (default all) best answers to each prompt that `beams` beams find. Prompts as in `generate.generate`.

  An answer ends with `eos`, after `max_new` tokens, or where the position table does. length_penalty: from the length
  to the divisor, `power`, `gnmt`, `none` or your own. early_stopping: when a prompt's search ends, its pool being full:

    True: at once
    False: when the best beam, with the penalty of its present length, is behind the worst answer of the pool; a
      heuristic, since the penalty of a greater length can still lift it
    'never': when no length can lift the best beam over the worst answer of the pool. With as many beams as there are
      prefixes this is exhaustive search (bias and presence can raise a log-probability: then it is a heuristic too)

  The three are transformers'. groups: the beams are divided into so many searches with pools of their own, one after
  the other in each step; `diversity` is subtracted from a token's log-probability for each beam of the groups before
  that has just taken it (Hamming diversity). allowed, bias, banned, repetition, presence, frequency, no_repeat_ngram:
  see `logits.processors`; they change the log-probabilities, which are not normalised again, as in transformers. drawn:
  see `sample`.

  Raises `UserError` for wrong settings and prompts that do not fit. Compiled once per shape and setting.
  """
  told = dict(repetition=repetition, presence=presence, frequency=frequency)
  drawing = dict(temperature=0.0) if drawn is None else drawn[1]._asdict()
  chosen = logits_lib.check(**drawing | told | dict(no_repeat_ngram=no_repeat_ngram))
  n = beams if n is None else n
  _check(beams, groups, n, early_stopping)
  laid = prompts_lib.lay(model, prompts, lengths, max_new, start)
  rules = prompts_lib.rules(model, eos, allowed, bias, banned)
  batch, total = np.shape(prompts)[0], len(laid.last)
  fixed = _Fixed(
    ends=rules.ends,
    allowed=rules.allowed,
    bias=rules.bias,
    context={k: np.repeat(v, beams, axis=0) for k, v in laid.context.items()},
    divisors=np.asarray(length_penalty(np.arange(1.0, max_new + 1)), np.float32),
    most=np.minimum(max_new, laid.slots - laid.last).astype(np.int32),
    diversity=np.float32(diversity),
    keys=drawn and prompts_lib.row_keys(drawn[0], None, batch, total),
  )
  functions = steps.functions(model, laid.slots)
  ways = beams, groups, n, early_stopping
  static = _Static(functions, model.card.rows, chosen, rules.banned, max_new, *ways)
  out = _search(static, params, laid.batch, laid.last, laid.live, fixed)
  return out if len(out.tokens) == batch else jax.tree.map(lambda x: x[:batch], out)


def sample(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  key: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  typical: float = 1.0,
  epsilon: float = 0.0,
  eta: float = 0.0,
  **settings: Any,
) -> Beams:
  """Beam sampling: a `search` whose candidates are drawn. settings: those of `search`.

  Of a group's beams x vocabulary candidates as many as a search would take are drawn one after the other, without
  replacement, each with a probability proportional to exp(score). As in transformers, scores are sums of
  log-probabilities after penalties over `temperature`, and -inf for a token that truncation rules out, but one more
  than there are ends is always left in; they are not normalised again; and the first `beams` drawn may end, while of
  all drawn that go on the best do. The draw is a top-k of perturbed scores (Kool et al. 2019, arXiv:1903.06059, section
  2.3). A row's draws depend on `key`, its number, and nobody else.

  Raises `UserError` as `search` does, and for a temperature of 0, which `search` is.
  """
  told = dict(min_p=min_p, typical=typical, epsilon=epsilon, eta=eta)
  chosen = logits_lib.check(temperature=temperature, top_k=top_k, top_p=top_p, **told)
  if temperature == 0:
    raise UserError('beam sampling needs a temperature above 0: with 0 it is beam.search')
  return search(model, params, prompts, lengths, drawn=(key, chosen), **settings)


def text(
  model: Any,
  params: Any,
  vocab: Any,
  prompts: Sequence[str],
  key: jax.Array | None = None,
  *,
  stop: Sequence[str] = (),
  batch: int = 16,
  n: int = 1,
  **settings: Any,
) -> list[str]:
  """The `n` best continuations of each prompt, those of the first prompt first. settings: those of `search`, or with a
  `key` those of `sample`.

  stop: a text is cut in front of the first of these; the search does not look at them.
  """
  told = dict(eos=vocab.eos, start=vocab.start, allowed=prompts_lib.drawable(model, vocab))
  ids = [prompts_lib.encode(model, vocab, prompt) for prompt in prompts]
  found: list[str] = []
  for first in range(0, len(ids), batch):
    some = ids[first : first + batch]
    own = None if key is None else jax.random.fold_in(key, first)
    find = search if own is None else functools.partial(sample, key=own)
    out = find(model, params, *prompts_lib.pad(model, some), n=n, **settings, **told)
    for prompt, rows, lengths in zip(some, np.asarray(out.tokens), out.lengths, strict=True):
      before = prompts_lib.shown(model, prompt)
      for row, length in zip(rows, np.asarray(lengths), strict=True):
        pieces = prompts_lib.pieces(vocab, before, [row[:length]], vocab.eos, stop)
        found.append(''.join(pieces))
  return found


def _check(beams: int, groups: int, n: int, early: bool | str) -> None:
  if beams < 1 or groups < 1 or beams % groups:
    raise UserError(f'beams={beams} must divide into groups={groups}: choose a multiple of it')
  if not 1 <= n <= beams:
    raise UserError(f'n must be between 1 and the number of beams, {beams}; got {n}')
  if early not in (True, False, 'never'):
    raise UserError(f"early_stopping must be True, False or 'never', got {early!r}")


# --- the compiled part --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _search(
  static: _Static, params: Any, batch: dict, last: jax.Array, live: jax.Array, fixed: _Fixed
) -> Beams:
  x, states = steps.prefill(static.model, params, batch, last)
  x, last, inputs = (steps.repeat(y, static.beams, axis=0) for y in (x, last, batch['inputs']))
  states = steps.repeat(states, static.beams)
  seen = None
  if logits_lib.needs_seen(static.sampling) or static.banned:
    seen = logits_lib.Seen.begin(inputs, last, static.max_new)
  group, tree = _empty(static, live, fixed)
  carry = _extend(static, params, fixed, _Carry(jnp.int32(0), last, group, states, seen, tree), x)

  def step(carry: _Carry) -> _Carry:
    token = jax.lax.dynamic_index_in_dim(carry.group.live.tokens, carry.made - 1, 3, keepdims=False)
    told = fixed.context, _rows(token), carry.position, carry.states
    x, states = steps.step(static.model, params, *told)
    return _extend(static, params, fixed, carry._replace(states=states), x)

  carry = jax.lax.while_loop(lambda carry: ~carry.group.done.all(), step, carry)
  flat = lambda y: jnp.moveaxis(y, 0, 1).reshape(len(live), static.beams, *y.shape[3:])
  pool = jax.tree.map(flat, carry.group.pool)
  best = _take(pool, jax.lax.top_k(pool.scores, static.n)[1])
  tree = Tree(*(jnp.moveaxis(y, (0, 1, 2), (2, 1, 0)) for y in carry.tree))
  out = Beams(best.tokens, best.lengths, best.scores, best.logp, tree)
  return jax.tree.map(steps.whole, out)


def _empty(static: _Static, live: jax.Array, fixed: _Fixed) -> tuple[_Group, Tree]:
  """Before the first token: one beam of each group is alive, so that the first candidates differ."""
  width = static.beams // static.groups
  shape = static.groups, len(live), width
  whole = *shape, static.max_new
  none = jnp.full(shape, -jnp.inf)
  empty = _Answers(none, jnp.zeros(shape, jnp.int32), jnp.zeros(whole, jnp.int32), jnp.zeros(whole))
  begun = empty._replace(scores=none.at[..., 0].set(0.0))
  done = jnp.broadcast_to(~live, shape[:2])
  kept = static.max_new, *shape[:2], _candidates(static, fixed)
  zeros = jnp.zeros(kept, jnp.int32)
  tree = Tree(zeros, zeros, jnp.full(kept, -jnp.inf), zeros + DROPPED)
  return _Group(begun, empty, done), tree


def _candidates(static: _Static, fixed: _Fixed) -> int:
  """How many of a step's are looked at: so many that `width` remain when all that can end have ended."""
  width = static.beams // static.groups
  return width * min(static.vocab, max(2, 1 + len(fixed.ends)))


def _extend(static: _Static, params: Any, fixed: _Fixed, carry: _Carry, x: jax.Array) -> _Carry:
  """One more token for every beam, from the model's output `x` [rows, embed]."""
  logp = jax.nn.log_softmax(steps.logits(static.model, params, x))
  worth = _worth(static, fixed, logp, carry.seen)
  width = static.beams // static.groups
  split = lambda y: jnp.moveaxis(y.reshape(-1, static.groups, width, y.shape[-1]), 1, 0)
  taken = jnp.zeros((len(carry.position) // static.beams, logp.shape[-1]))
  choose = functools.partial(_choose, static, fixed, carry.made)
  each = carry.group, split(logp), split(worth), jnp.arange(static.groups)
  _, (group, parents, tree) = jax.lax.scan(choose, taken, each)
  # the row in the batch of the beam that each new one comes from
  groups, batch = parents.shape[:2]
  first = jnp.arange(groups)[:, None] * width + jnp.arange(batch) * static.beams
  rows = _rows(first[..., None] + parents)
  token = jax.lax.dynamic_index_in_dim(group.live.tokens, carry.made, 3, keepdims=False)
  seen = carry.seen and steps.take(carry.seen, rows, axis=0).add(_rows(token))
  group = group._replace(done=steps.whole(group.done))
  tree = Tree(*(kept.at[carry.made].set(new) for kept, new in zip(carry.tree, tree, strict=True)))
  position = jnp.minimum(carry.position + 1, static.model.slots - 1)
  return _Carry(carry.made + 1, position, group, steps.take(carry.states, rows), seen, tree)


def _worth(static: _Static, fixed: _Fixed, logp: jax.Array, seen: Any) -> jax.Array:
  """f32 [rows, vocab]: what each token adds to the score of its beam."""
  told, chosen = dict(allowed=fixed.allowed, bias=fixed.bias, banned=static.banned), static.sampling
  worth = logits_lib.process(logp, chosen._replace(temperature=0.0), seen, **told)
  if fixed.keys is None:
    return worth
  neutral = dict(repetition=1.0, presence=0.0, frequency=0.0, no_repeat_ngram=0)
  left = logits_lib.process(worth, chosen._replace(**neutral)) > -jnp.inf
  least = min(worth.shape[1], 1 + len(fixed.ends))
  left |= worth >= jax.lax.top_k(worth, least)[0][:, -1:]
  return jnp.where(left, worth / chosen.temperature, -jnp.inf)


def _choose(
  static: _Static, fixed: _Fixed, made: jax.Array, taken: jax.Array, told: tuple
) -> tuple[jax.Array, tuple]:
  """One step of one group in every row. taken: f32 [batch, vocab], how many beams of the groups before took each token.
  told: the group, the model's log-probabilities and the tokens' worth [batch, width, vocab], the group's number."""
  group, logp, worth, number = told
  live, pool, done = group
  batch, width, vocab = worth.shape
  worth = worth - fixed.diversity * taken[:, None]
  total = (live.scores[..., None] + worth).reshape(batch, -1)
  order = total
  if fixed.keys is not None:
    fold = lambda key: jax.random.fold_in(jax.random.fold_in(key, made), number)
    order += jax.vmap(lambda key: jax.random.gumbel(fold(key), total.shape[1:]))(fixed.keys)
  index = jax.lax.top_k(order, _candidates(static, fixed))[1]
  scores = jnp.take_along_axis(total, index, axis=1)
  parents, tokens = index // vocab, index % vocab
  candidates = _take(live, parents)
  own = jnp.take_along_axis(logp.reshape(batch, -1), index, axis=1)
  candidates = _Answers(
    scores,
    jnp.broadcast_to(made + 1, index.shape),
    candidates.tokens.at[..., made].set(tokens),
    candidates.logp.at[..., made].set(own),
  )
  possible = (scores > -jnp.inf) & ~done[:, None]
  end, full = (tokens[..., None] == fixed.ends).any(-1), (made + 1 >= fixed.most)[:, None]
  kept, place = jax.lax.top_k(jnp.where(end, -jnp.inf, scores), width)
  live = _take(candidates, place)._replace(scores=jnp.where(full, -jnp.inf, kept))

  final = (end | full) & possible & (jnp.arange(index.shape[1]) < width)
  worthy = jnp.where(final, scores / fixed.divisors[made], -jnp.inf)
  both = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b], axis=1), pool, candidates._replace(scores=worthy)
  )
  pool = _take(both, jax.lax.top_k(both.scores, width)[1])

  rows, nowhere = jnp.arange(batch)[:, None], jnp.int32(max(vocab, index.shape[1]))
  going = (kept > -jnp.inf) & ~done[:, None]
  new = jnp.take_along_axis(tokens, place, axis=1)
  taken = taken.at[rows, jnp.where(going, new, nowhere)].add(1, mode='drop')
  at = jnp.where(going & ~full, place, nowhere)
  places = jnp.where(final, ENDED, DROPPED).at[rows, at].set(jnp.arange(width), mode='drop')
  done = done | (live.scores[:, 0] == -jnp.inf) | _settled(static, fixed, made + 1, live, pool)
  tree = Tree(tokens, parents, jnp.where(possible, scores, -jnp.inf), places)
  return taken, (_Group(live, pool, done), jnp.take_along_axis(parents, place, axis=1), tree)


def _settled(
  static: _Static, fixed: _Fixed, made: jax.Array, live: _Answers, pool: _Answers
) -> jax.Array:
  """bool [batch]: the pool is full and what `early_stopping` asks for has come."""
  full = pool.scores[:, -1] > -jnp.inf
  if static.early is True:
    return full
  divisor = fixed.divisors[made - 1]
  if static.early == 'never':
    length = jnp.arange(1, static.max_new + 1)
    open_ = (length >= made) & (length <= fixed.most[:, None])
    divisor = jnp.where(open_, fixed.divisors, 0).max(-1).clip(divisor)
  return full & (live.scores[:, 0] / divisor <= pool.scores[:, -1])


def _take(answers: _Answers, index: jax.Array) -> _Answers:
  """The answers at index [batch, k] of each row's [batch, width]."""
  whole = lambda x: index.reshape(*index.shape, *[1] * (x.ndim - 2))
  return jax.tree.map(lambda x: jnp.take_along_axis(x, whole(x), axis=1), answers)


def _rows(x: jax.Array) -> jax.Array:
  """[groups, batch, width] as the rows that the model reads."""
  return jnp.moveaxis(x, 0, 1).reshape(-1)
