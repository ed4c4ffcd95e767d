"""Decoding by contrast: what a model says less what a weaker one would say.

Three of the four need nothing but other logits, so they are functions from models to a `Model`, and whatever decodes a
model (sampling, beams, streaming, speculation) decodes them:

    expert minus amateur   `amateur`     Li et al. 2022, arXiv:2210.15097
    last minus early layer `dola`        Chuang et al. 2023, arXiv:2309.03883
    with minus without     `guidance`    Sanchez et al. 2023, arXiv:2306.17806
      prompt

Build the model once and keep it: compiled code is found again by its functions. What they return as logits are log
probabilities or differences of them, so `logp` of `generate.Output` is that of the contrast. The fourth, contrastive
search (`search`), looks one token ahead and has a loop of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps
from llm_jax.decode.prompts import START
from llm_jax.model import depth

# --- what is made of two sets of logits ---------------------------------------------------------------


def against_amateur(
  expert: jax.Array, amateur: jax.Array, *, alpha: float, temperature: float
) -> jax.Array:
  """log p - log q over the ids with p >= alpha max p, -inf elsewhere (arXiv:2210.15097, section 3).

  expert, amateur: logits [..., vocab]; q is that of the amateur at `temperature`.
  """
  p, q = jax.nn.log_softmax(expert), jax.nn.log_softmax(amateur / temperature)
  return _plausible(p, p - q, alpha)


def against_layers(final: jax.Array, early: jax.Array, *, alpha: float) -> jax.Array:
  """log p - log q_M over the ids with p >= alpha max p (arXiv:2309.03883, equations 3 to 7).

  final: logits [..., vocab]; early: [n, ..., vocab] of the candidate layers; M is the one whose distribution is
  farthest from p by the Jensen-Shannon divergence, each token for itself.
  """
  p, q = jax.nn.log_softmax(final), jax.nn.log_softmax(early)
  middle = jnp.logaddexp(p, q) - jnp.log(2.0)
  apart = lambda a: jnp.sum(jnp.exp(a) * (a - middle), axis=-1)
  chosen = jnp.argmax(0.5 * (apart(p[None]) + apart(q)), axis=0)
  q = jnp.take_along_axis(q, chosen[None, ..., None], axis=0)[0]
  return _plausible(p, p - q, alpha)


def guided(with_prompt: jax.Array, without: jax.Array, *, scale: float) -> jax.Array:
  """(1 - scale) log q + scale log p, logits [..., vocab] each (arXiv:2306.17806, equation 7)."""
  return (1 - scale) * jax.nn.log_softmax(without) + scale * jax.nn.log_softmax(with_prompt)


def _plausible(p: jax.Array, score: jax.Array, alpha: float) -> jax.Array:
  return jnp.where(p >= p.max(-1, keepdims=True) + jnp.log(alpha), score, -jnp.inf)


# --- models that contrast -----------------------------------------------------------------------------


def amateur(expert: Any, weak: Any, *, alpha: float = 0.1, temperature: float = 1.0) -> Any:
  """Contrastive decoding: the `Model` whose logits are `against_amateur` of two.

  Its parameters are dict(expert=..., amateur=...). Both read the same tokens, so kind and vocabulary must agree. Paper:
  alpha 0.1, temperature 0.5 or 1.
  """
  if not 0 < alpha <= 1 or not temperature > 0:
    raise UserError(f'alpha must be in (0, 1], temperature positive; got {alpha}, {temperature}')
  prompts_lib.check_alike(expert, weak, 'amateur')
  own, other = expert.card, weak.card
  pair = dict(expert=expert, amateur=weak)

  def hidden(params: dict, batch: dict, *, states: Any = None, rng: Any = None) -> Any:
    told = lambda name: None if states is None else states[name]
    found = {n: m.hidden(params[n], batch, states=told(n), rng=rng) for n, m in pair.items()}
    after = None if states is None else {name: one.states for name, one in found.items()}
    x = _join(found['expert'].x, found['amateur'].x)
    return found['expert']._replace(x=x, states=after)

  def logits(params: dict, x: jax.Array) -> jax.Array:
    both = zip(pair.items(), _split(x, own.embed), strict=True)
    two = (m.logits(params[name], y) for (name, m), y in both)
    return against_amateur(*two, alpha=alpha, temperature=temperature)

  def states(params: dict, batch: dict, length: int) -> dict:
    return {name: m.states(params[name], batch, length) for name, m in pair.items()}

  card = own._replace(
    length=min((c.length for c in (own, other) if c.length), default=None),
    positions=f'{own.positions}+{other.positions}',
  )
  told = dict(hidden=hidden, logits=logits, states=states, card=card)
  return expert._replace(axes={name: m.axes for name, m in pair.items()}, **told)


def dola(model: Any, *, layers: str | Sequence[int] = 'low', alpha: float = 0.1) -> Any:
  """DoLa: the `Model` whose logits are `against_layers` of its last layer and of the candidates `layers`.

  layers: numbers of layers done (0: the embeddings), or 'low' or 'high' for every other one of the lower or upper half
  (of 20 layers at most at either end); with a tied head the embeddings predict the token itself, so 'low' then begins
  at layer 2. The paper adds a penalty: `repetition=1.2` where tokens are drawn. The early layers get the final norm, as
  the last one does (transformers' version leaves it out).
  """
  if isinstance(layers, str):
    layers = buckets(model.card, layers)
  if not layers or not 0 < alpha <= 1:
    raise UserError(f'dola needs candidate layers and alpha in (0, 1], got {layers} and {alpha}')
  around = depth.exits(tuple(layers))

  def hidden(params: Any, batch: dict, *, states: Any = None, rng: Any = None) -> Any:
    found = model.hidden(params, batch, states=states, rng=rng, around=around)
    aux = dict(found.aux)
    return found._replace(x=_join(found.x, *aux.pop('around')), aux=aux)

  def logits(params: Any, x: jax.Array) -> jax.Array:
    rows, t, width = x.shape
    every = model.logits(params, x.reshape(rows, -1, model.card.embed))  # t times as many
    every = jnp.moveaxis(every.reshape(rows, t, width // model.card.embed, -1), 2, 0)
    return against_layers(every[0], every[1:], alpha=alpha)

  return model._replace(hidden=hidden, logits=logits)


def buckets(card: Any, name: str) -> tuple[int, ...]:
  """The candidate layers 'low' or 'high' of DoLa (arXiv:2309.03883, section 3.2 and appendix)."""
  if name not in ('low', 'high'):
    raise UserError(f"layers must be numbers, 'low' or 'high', got {name!r}")
  n = card.layers
  if name == 'high':
    return tuple(range(max(n // 2, n - 20), n, 2))
  first = min(2, n - 1) if card.tied else 0
  return tuple(range(first, max(min(n // 2, 20), first + 1), 2))


class Guided(NamedTuple):
  """model: for decoding. params: its parameters: those of the model and the prompt to steer away from."""

  model: Any
  params: Any


def guidance(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  *,
  scale: float = 1.5,
  start: int | None = START,
  max_new: int = 100,
) -> Guided:
  """Classifier-free guidance: `guided` by the logits after other prompts, which are read while decoding starts.

  prompts: int32 [batch, length], lengths: int32 [batch], one for each row of `generate`: negative prompts, or with
  `last_tokens` what the paper takes for no prompt at all. start, max_new: what decoding is told too. scale: 1 is the
  model alone.
  """
  if not np.isfinite(scale):
    raise UserError(f'scale must be a number, got {scale}')
  laid = prompts_lib.lay(model, prompts, lengths, max_new, start)
  other = dict(batch=laid.batch, last=laid.last)
  own = steps.functions(model, laid.slots)
  functions = _guidance(own, model.card.embed, float(scale))
  return Guided(model._replace(**functions), dict(model=params, other=other))


def last_tokens(prompts: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
  """The last token of every prompt, as prompts (arXiv:2306.17806, section 3.1)."""
  lengths = np.asarray(lengths, np.int32)
  last = np.take_along_axis(np.asarray(prompts), np.maximum(lengths - 1, 0)[:, None], axis=1)
  return last, np.minimum(lengths, 1)


@functools.lru_cache(maxsize=16)  # the same functions for the same settings: compiled once
def _guidance(model: steps.Functions, embed: int, scale: float) -> dict[str, Callable]:
  """hidden, logits and states of the `Model` that is guided.

  The states: those of `Model`, and those of the other prompt, in which a token's place is `behind` by as many as that
  is shorter. The first call finds there the output `x` of the other prompt's last token.
  """

  def states(params: dict, batch: dict, length: int) -> dict:
    told, last = params['other']['batch'], params['other']['last']
    empty = model.states(params['model'], told, model.slots)
    found = model.hidden(params['model'], told, states=empty)
    x = jnp.take_along_axis(found.x, last[:, None, None], axis=1)
    extra = dict(x=x[None], last=last[None])
    if 'prefix' in told:
      extra['prefix'] = told['prefix'][None]
    own = model.states(params['model'], batch, length)
    return dict(own=own, other=found.states, extra=extra)

  def hidden(params: dict, batch: dict, *, states: dict, rng: Any = None) -> Any:
    found = model.hidden(params['model'], batch, states=states['own'], rng=rng)
    extra, other = dict(states['extra']), states['other']
    if 'x' in extra:  # the prompts are being read
      last = jnp.max(batch['positions'] * batch.get('segments', 1), axis=1)
      x = jnp.broadcast_to(extra.pop('x')[0], found.x.shape)
      extra['behind'] = (last - extra.pop('last')[0])[None]
    else:
      told = dict(batch, positions=batch['positions'] - extra['behind'][0][:, None])
      if 'prefix' in extra:
        told['prefix'] = extra['prefix'][0]
      x, other, _ = model.hidden(params['model'], told, states=other, rng=rng)
    return found._replace(
      x=_join(found.x, x), states=dict(own=found.states, other=other, extra=extra)
    )

  def logits(params: dict, x: jax.Array) -> jax.Array:
    a, b = (model.logits(params['model'], y) for y in _split(x, embed))
    return guided(a, b, scale=scale)

  return dict(hidden=hidden, logits=logits, states=states)


def _join(*x: jax.Array) -> jax.Array:
  """What several heads read, as one array along `embed`."""
  return jnp.concatenate(x, axis=-1)


def _split(x: jax.Array, at: int) -> tuple[jax.Array, jax.Array]:
  return x[..., :at], x[..., at:]


# --- contrastive search -------------------------------------------------------------------------------


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes."""

  model: steps.Functions
  sampling: logits_lib.Sampling
  banned: tuple[tuple[int, ...], ...]
  max_new: int
  k: int


class _Carry(NamedTuple):
  """x: [rows, embed] predicts the next token; position: [rows] of the last token, which has been read. past: f32
  [rows, slots, embed], the outputs so far as unit vectors."""

  made: jax.Array
  x: jax.Array
  position: jax.Array
  done: jax.Array
  states: Any
  past: jax.Array
  seen: logits_lib.Seen
  out: generate_lib.Output


def search(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  *,
  alpha: float = 0.6,
  k: int = 4,
  max_new: int = 100,
  eos: int | Sequence[int] | None = 1,
  start: int | None = START,
  allowed: Any = None,
  bias: Any = None,
  banned: Sequence[Sequence[int]] = (),
  **sampling: float,
) -> generate_lib.Output:
  """Contrastive search (Su et al. 2022, arXiv:2202.06417, equation 5): of the `k` likeliest tokens v the one with the
  largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

  h: the model's outputs after the final norm; j runs over the prompt (of an encoder-decoder the start token) and the
  answer so far. alpha: weight of that penalty, 0 is greedy; paper: 0.6 with k from 4 to 8. Every step reads `k` tokens
  per row. The other arguments are those of `generate.generate`; `sampling` shapes p, and nothing is drawn.
  """
  chosen = logits_lib.check(**sampling)
  if not 0 <= alpha <= 1 or not 1 <= k <= model.card.vocab:
    raise UserError(f'alpha must be in [0, 1] and k in 1 to {model.card.vocab}; got {alpha}, {k}')
  laid = prompts_lib.lay(model, prompts, lengths, max_new, start, spare=1)  # the last token is read
  rules = prompts_lib.rules(model, eos, allowed, bias, banned)
  static = _Static(steps.functions(model, laid.slots), chosen, rules.banned, max_new, k)
  told = dict(allowed=rules.allowed, bias=rules.bias)
  given = laid.batch, laid.context, laid.last, laid.live
  out = _search(static, params, np.float32(alpha), rules.ends, told, *given)
  count = np.shape(prompts)[0]
  return out if len(laid.last) == count else jax.tree.map(lambda x: x[:count], out)


@functools.partial(jax.jit, static_argnums=0)
def _search(
  static: _Static,
  params: Any,
  alpha: jax.Array,
  ends: jax.Array,
  told: dict,
  batch: dict,
  context: dict,
  last: jax.Array,
  live: jax.Array,
) -> generate_lib.Output:
  f, rows = static.model, len(last)
  hidden = f.hidden(params, batch, states=f.states(params, batch, f.slots))
  x = jnp.take_along_axis(hidden.x, last[:, None, None], axis=1)[:, 0]
  past = jnp.pad(_unit(hidden.x), ((0, 0), (0, max(f.slots - hidden.x.shape[1], 0)), (0, 0)))
  carry = _Carry(
    made=jnp.int32(0),
    x=x,
    position=last,
    done=~live,
    states=hidden.states,
    past=past,
    seen=logits_lib.Seen.begin(batch['inputs'], last, static.max_new),
    out=generate_lib.Output.empty(rows, static.max_new),
  )
  context = steps.repeat(context, static.k, axis=0)
  step = functools.partial(_search_step, static, params, alpha, ends, told, context)
  go_on = lambda carry: (carry.made < static.max_new) & ~carry.done.all()
  return jax.tree.map(steps.whole, jax.lax.while_loop(go_on, step, carry).out)


def _search_step(
  static: _Static,
  params: Any,
  alpha: jax.Array,
  ends: jax.Array,
  told: dict,
  context: dict,
  carry: _Carry,
) -> _Carry:
  f, k, rows = static.model, static.k, jnp.arange(len(carry.position))
  raw = steps.logits(f, params, carry.x)
  logits = logits_lib.process(raw, static.sampling, carry.seen, banned=static.banned, **told)
  p, ids = jax.lax.top_k(jax.nn.softmax(logits), k)
  position = carry.position + 1
  ahead = ids.reshape(-1), jnp.repeat(position, k), steps.repeat(carry.states, k)
  h, states = steps.step(f, params, context, *ahead)
  h = h.reshape(len(rows), k, -1)
  alike = jnp.einsum('bkd,bsd->bks', _unit(h), carry.past)
  before = jnp.arange(carry.past.shape[1]) < position[:, None]
  alike = jnp.where(before[:, None], alike, -1).max(-1)
  alike = jnp.where((position < f.slots)[:, None], alike, 0)  # beyond the positions there are
  score = jnp.where(p > 0, (1 - alpha) * p - alpha * alike, -jnp.inf)
  best = jnp.argmax(score, axis=1)
  token, x = ids[rows, best].astype(jnp.int32), h[rows, best]
  out = carry.out.add(carry.made, token, raw, carry.done)
  seen = carry.seen.add(jnp.where(carry.done, -1, token))
  done = carry.done | (position >= f.slots) | (token[:, None] == ends).any(-1)
  return _Carry(
    made=carry.made + 1,
    x=x,
    position=jnp.minimum(position, f.slots - 1),
    done=steps.whole(done),
    states=steps.take(states, rows * k + best),
    past=carry.past.at[rows, position].set(_unit(x), mode='drop'),
    seen=seen,
    out=out,
  )


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
