"""What happens to the next-token logits before a token is drawn: penalties, bans, temperature, truncations.

A processor is a pure function `(logits f32 [batch, vocab], seen) -> logits`; a token that is ruled out has logit -inf.
`processors` lists those that a `Sampling` asks for, in the order of Hugging Face's generate; `process` runs them.

The settings are Python numbers, known to the compiler, or arrays [batch], one for every row: the engine's rows have
settings of their own. What is neutral costs nothing (of arrays: where it is neutral in all rows).

The truncations need no sort. The border of "the k largest" or "the largest with mass p" is found by bisection over the
32 bits of the logits, read as integers in their order: 32 passes over the row, and exact.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError, nearest


class Sampling(NamedTuple):
  """How the next token is chosen; every field is neutral by default. Numbers, or arrays [batch].

  temperature: 0 takes the largest logit, of equal ones the lowest id. top_k: draw from this many, 0 from all (Fan et
  al. 2018, arXiv:1805.04833). top_p: from the fewest with this mass (nucleus; Holtzman et al. 2020, arXiv:1904.09751).
  min_p: from those with at least this part of the largest probability (Nguyen et al. 2024, arXiv:2407.01082).
  typical: from the fewest with this mass whose surprise is nearest to the entropy (Meister et al. 2022,
  arXiv:2202.00666). epsilon: from those with at least this probability; eta: with at least min(eta, sqrt(eta)
  exp(-entropy)) (both Hewitt et al. 2022, arXiv:2210.15191). repetition: logits of what stands in prompt or answer are
  divided by it where positive, multiplied where negative (CTRL; Keskar et al. 2019, arXiv:1909.05858, section 4.1).
  presence, frequency: subtracted from the logits of what stands in the answer, once and per occurrence (OpenAI's
  API). no_repeat_ngram: no n-gram of this length twice (Paulus et al. 2017, arXiv:1705.04304, section 2.5); one number
  for all rows.
  """

  temperature: Any = 1.0
  top_k: Any = 0
  top_p: Any = 1.0
  min_p: Any = 0.0
  typical: Any = 1.0
  epsilon: Any = 0.0
  eta: Any = 0.0
  repetition: Any = 1.0
  presence: Any = 0.0
  frequency: Any = 0.0
  no_repeat_ngram: int = 0


class Seen(NamedTuple):
  """The tokens so far. tokens: int32 [batch, n], prompt and answer without a gap, -1 behind them; prompt: int32
  [batch], how many of them are the prompt's; length: int32 [batch], how many there are."""

  tokens: jax.Array
  prompt: jax.Array
  length: jax.Array

  @staticmethod
  def begin(inputs: jax.Array, last: jax.Array, room: int) -> 'Seen':
    """What the decoder reads of the prompts, [rows, t] with the last token at `last` [rows], and room for an answer."""
    tokens = jnp.where(jnp.arange(inputs.shape[1]) <= last[:, None], inputs, -1)
    tokens = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=-1)
    return Seen(tokens, jnp.asarray(last) + 1, jnp.asarray(last) + 1)

  def add(self, token: jax.Array) -> 'Seen':
    """With `token` [batch] at the end; -1 adds nothing."""
    rows = jnp.arange(token.shape[0])
    at = jnp.where(token < 0, self.tokens.shape[1], self.length)
    tokens = self.tokens.at[rows, at].set(token, mode='drop')
    return self._replace(tokens=tokens, length=self.length + (token >= 0))


Processor = Callable[[jax.Array, Seen | None], jax.Array]

# Settings that systems of the survey report their results with (DEC-028, DEC-029); beam searches are in decode/beam.py.
PRESETS = dict(
  t5=dict(temperature=0.0),  # greedy; Raffel et al. 2020, arXiv:1910.10683, section 3.1.2
  alpaca=dict(temperature=0.7, top_k=50, top_p=0.9),
  llama=dict(
    temperature=0.0
  ),  # greedy on question answering; Touvron et al. 2023, arXiv:2302.13971
  llama_pass1=dict(temperature=0.1),  # HumanEval pass@1, same paper, section 3.5
  llama_pass100=dict(temperature=0.8),  # HumanEval pass@100
  openai=dict(temperature=1.0, top_p=1.0, presence=0.0, frequency=0.0),  # the API's defaults
)

_RANGES = dict(
  temperature=(0, math.inf, '0 (greedy) or a positive number'),
  top_k=(0, math.inf, '0 (off) or the number of tokens to keep'),
  top_p=(0, 1, 'in (0, 1], 1 is off'),
  min_p=(0, 1, 'in [0, 1), 0 is off'),
  typical=(0, 1, 'in (0, 1], 1 is off'),
  epsilon=(0, 1, 'in [0, 1), 0 is off'),
  eta=(0, 1, 'in [0, 1), 0 is off'),
  repetition=(0, math.inf, 'a positive number, 1 is off'),
  presence=(-math.inf, math.inf, 'a number, 0 is off'),
  frequency=(-math.inf, math.inf, 'a number, 0 is off'),
  no_repeat_ngram=(0, math.inf, '0 (off) or the length of the n-grams'),
)
_WHOLE = ('top_k', 'no_repeat_ngram')


def check(**settings: float) -> Sampling:
  """The `Sampling` of these numbers. Raises `UserError` for an unknown name or a value outside its range."""
  for name, value in settings.items():
    if name not in _RANGES:
      raise UserError(f'no sampling setting {name!r}; {nearest(name, _RANGES)}')
    low, high, words = _RANGES[name]
    number = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    opened = name in ('top_p', 'typical', 'repetition') and value == 0
    closed = name in ('min_p', 'epsilon', 'eta') and value == 1
    if not number or opened or closed or (name in _WHOLE and value != int(value)):
      raise UserError(f'{name} must be {words}, got {value}')
  return Sampling(**settings)


def needs_seen(sampling: Sampling) -> bool:
  """Whether some setting looks at the tokens so far."""
  on = (sampling.repetition, 1), (sampling.presence, 0), (sampling.frequency, 0)
  return any(_on(*pair) is not False for pair in (*on, (sampling.no_repeat_ngram, 0)))


# --- the processors -----------------------------------------------------------------------------------


def processors(
  sampling: Sampling,
  *,
  allowed: jax.Array | None = None,
  bias: jax.Array | None = None,
  banned: tuple[tuple[int, ...], ...] = (),
) -> list[tuple[str, Processor]]:
  """(name, processor) pairs in order, those that are off left out.

  allowed: bool, bias: f32, both [vocab] or [batch, vocab]. banned: sequences of ids of which the last is ruled out
  after the others.
  """
  s, found = sampling, []

  def use(name: str, neutral: Any, f: Callable[[jax.Array, Seen, Any], jax.Array]) -> None:
    value = getattr(s, name)
    on = _on(value, neutral)
    if on is False:
      return
    given = value if on is True else jnp.where(on, value, neutral)[:, None]
    run = lambda x, seen: f(x, seen, given)
    if on is True:
      found.append((name, run))
    else:  # rows for which it is off come back as they were
      kept = lambda x, seen: jnp.where(on[:, None], run(x, seen), x)
      found.append((name, lambda x, seen: jax.lax.cond(on.any(), kept, lambda x, _: x, x, seen)))

  use('repetition', 1, lambda x, seen, r: repetition(x, seen, r))
  use('presence', 0, lambda x, seen, a: x - a * (_counts(seen, x.shape[1], answer=True) > 0))
  use('frequency', 0, lambda x, seen, a: x - a * _counts(seen, x.shape[1], answer=True))
  if bias is not None:
    found.append(('bias', lambda x, _: x + bias))
  use('no_repeat_ngram', 0, lambda x, seen, n: no_repeat_ngram(x, seen, n))
  if banned:
    found.append(('banned', lambda x, seen: ban_sequences(x, seen, banned)))
  if allowed is not None:
    found.append(('allowed', lambda x, _: ban(x, allowed)))
  if _on(s.temperature, 0) is False:
    return found
  # a greedy row among others: its largest logit stays the largest, whatever follows
  use('temperature', 1, lambda x, _, t: scale(x, jnp.where(jnp.asarray(t) == 0, 1, t)))
  use('top_k', 0, lambda x, _, k: keep_top_k(x, k))
  use('top_p', 1, lambda x, _, p: keep_top_p(x, p))
  use('min_p', 0, lambda x, _, p: keep_min_p(x, p))
  use('typical', 1, lambda x, _, p: keep_typical(x, p))
  use('epsilon', 0, lambda x, _, e: keep_epsilon(x, e))
  use('eta', 0, lambda x, _, e: keep_eta(x, e))
  return found


def process(
  logits: jax.Array, sampling: Sampling, seen: Seen | None = None, **told: Any
) -> jax.Array:
  """The logits that the token is drawn from. told: `allowed`, `bias`, `banned` of `processors`."""
  for _, run in processors(sampling, **told):
    logits = run(logits, seen)
  return logits


def repetition(logits: jax.Array, seen: Seen, penalty: Any) -> jax.Array:
  """Divides the positive and multiplies the negative logits of all tokens seen (CTRL)."""
  there = _counts(seen, logits.shape[1]) > 0
  return jnp.where(there, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def no_repeat_ngram(logits: jax.Array, seen: Seen, n: int) -> jax.Array:
  """Rules out what would complete an n-gram that is there already."""
  rows, ends = jnp.arange(logits.shape[0])[:, None], seen.length
  width = seen.tokens.shape[1]
  if n > width:
    return logits
  places = jnp.arange(width - n + 1)
  same = jnp.broadcast_to(places + n - 1 < ends[:, None], (len(ends), len(places)))
  for j in range(n - 1):
    last = _at(seen.tokens, ends - (n - 1) + j)
    same &= seen.tokens[:, j : j + len(places)] == last[:, None]
  same &= (ends >= n - 1)[:, None]
  ids = jnp.where(same, seen.tokens[:, n - 1 :], logits.shape[1])
  return logits.at[rows, ids].set(-jnp.inf, mode='drop')


def ban_sequences(logits: jax.Array, seen: Seen, banned: tuple[tuple[int, ...], ...]) -> jax.Array:
  """Rules out the last id of each sequence in the rows that end with the others."""
  for *before, last in banned:
    there = jnp.ones(logits.shape[0], bool) if not before else seen.length >= len(before)
    for j, token in enumerate(reversed(before)):
      there &= _at(seen.tokens, seen.length - 1 - j) == token
    logits = logits.at[:, last].set(jnp.where(there, -jnp.inf, logits[:, last]))
  return logits


def ban(logits: jax.Array, allowed: jax.Array) -> jax.Array:
  """Rules out every id whose entry in `allowed` (bool [vocab] or [batch, vocab]) is False."""
  return jnp.where(allowed, logits, -jnp.inf)


def scale(logits: jax.Array, temperature: Any) -> jax.Array:
  """`logits / temperature`, shifted so that the largest is 0: no temperature > 0 overflows."""
  return (logits - logits.max(-1, keepdims=True)) / temperature


def keep_top_k(logits: jax.Array, k: Any) -> jax.Array:
  """Keeps exactly the `k` largest logits of each row, of equal ones at the border the lowest ids; 0 keeps all."""
  if isinstance(k, int) and (k == 0 or k >= logits.shape[-1]):
    return logits
  k = jnp.where(jnp.asarray(k) == 0, logits.shape[-1], k).astype(jnp.float32)
  return jnp.where(_largest(logits, jnp.ones_like(logits), k), logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: Any) -> jax.Array:
  """Keeps the fewest tokens whose probabilities sum to at least `p`.

  A token stays iff the mass of those before it, in descending order, is below `p`: at least one always does. Of equal
  logits the lowest ids come first. p = 1 changes nothing.
  """
  if isinstance(p, int | float) and p >= 1:
    return logits
  return jnp.where(_largest(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)


def keep_min_p(logits: jax.Array, p: Any) -> jax.Array:
  """Keeps the tokens with at least `p` times the largest probability."""
  kept = logits >= logits.max(-1, keepdims=True) + jnp.log(p)
  return jnp.where(kept, logits, -jnp.inf)


def keep_typical(logits: jax.Array, p: Any) -> jax.Array:
  """Keeps the tokens whose surprise is nearest to the entropy, the fewest with mass `p`."""
  logp = jax.nn.log_softmax(logits)
  nearness = -jnp.abs(-logp - _entropy(logp))
  return jnp.where(_largest(nearness, jnp.exp(logp), p), logits, -jnp.inf)


def keep_epsilon(logits: jax.Array, epsilon: Any) -> jax.Array:
  """Keeps the tokens with at least the probability `epsilon`, and always the likeliest."""
  kept = jax.nn.softmax(logits) >= epsilon
  return jnp.where(kept | (logits == logits.max(-1, keepdims=True)), logits, -jnp.inf)


def keep_eta(logits: jax.Array, epsilon: Any) -> jax.Array:
  """Epsilon sampling with the bound min(epsilon, sqrt(epsilon) exp(-entropy))."""
  entropy = _entropy(jax.nn.log_softmax(logits))
  return keep_epsilon(logits, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy)))


# --- drawing ------------------------------------------------------------------------------------------


def draw(logits: jax.Array, key: jax.Array, temperature: Any = 1.0) -> jax.Array:
  """One id per row of processed logits, int32 [batch]; the likeliest where `temperature` is 0.

  key: [batch] keys, one per row, so that a row's draw does not depend on its neighbours; a single key, which is folded
  with the row's number; or f32 [batch], numbers u in [0, 1): then the first id whose cumulative probability exceeds u.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  warm = _on(temperature, 0)
  if warm is False:
    return best
  if warm is True:
    return _drawn(logits, key)
  drawn = jax.lax.cond(warm.any(), _drawn, lambda logits, key: best, logits, key)
  return jnp.where(warm, drawn, best)


def _drawn(logits: jax.Array, key: jax.Array) -> jax.Array:
  """int32 [batch]."""
  if jnp.issubdtype(key.dtype, jnp.floating):
    mass = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    return jnp.sum(mass <= key[:, None] * mass[:, -1:], axis=-1).astype(jnp.int32)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = key if key.ndim else fold(key, jnp.arange(logits.shape[0]))
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  seen: Seen | None = None,
  allowed: jax.Array | None = None,
  bias: jax.Array | None = None,
  banned: tuple[tuple[int, ...], ...] = (),
  **settings: Any,
) -> jax.Array:
  """`process` and `draw`: one id per row, int32 [batch]. settings: fields of `Sampling`."""
  sampling = Sampling(**settings)
  logits = process(logits, sampling, seen, allowed=allowed, bias=bias, banned=banned)
  return draw(logits, key, sampling.temperature)


# --- what they share ----------------------------------------------------------------------------------


def _on(value: Any, neutral: float) -> Any:
  """Whether a setting does anything: True or False where it is a number, else bool [batch]."""
  return value != neutral


def _at(tokens: jax.Array, index: jax.Array) -> jax.Array:
  """tokens [batch, n] at index [batch], -2 in front of the first."""
  found = jnp.take_along_axis(tokens, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]
  return jnp.where(index < 0, -2, found)


def _counts(seen: Seen, vocab: int, answer: bool = False) -> jax.Array:
  """f32 [batch, vocab]: how often each id stands in prompt and answer, or in the answer alone."""
  index = jnp.arange(seen.tokens.shape[1])
  real = index < seen.length[:, None]
  if answer:
    real &= index >= seen.prompt[:, None]
  ids = jnp.where(real & (seen.tokens >= 0), seen.tokens, vocab)
  rows = jnp.arange(len(ids))[:, None]
  return jnp.zeros((len(ids), vocab), jnp.float32).at[rows, ids].add(1, mode='drop')


def _entropy(logp: jax.Array) -> jax.Array:
  """f32 [batch, 1], nats."""
  return -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0), axis=-1, keepdims=True)


def _largest(x: jax.Array, weight: jax.Array, need: Any) -> jax.Array:
  """bool [batch, vocab]: the fewest of the largest `x` whose weights sum to `need`, of equal ones the lowest ids.

  weight: not negative, and equal where `x` is equal. need: a number or [batch, 1].
  """
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)  # -0 becomes 0
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
  over = lambda border: jnp.sum(jnp.where(order >= border, weight, 0), -1, keepdims=True)

  def halve(i: jax.Array, border: jax.Array) -> jax.Array:
    higher = border | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(over(higher) >= need, higher, border)

  border = jax.lax.fori_loop(0, 32, halve, jnp.zeros_like(order[:, :1]))
  above, equal = order > border, order == border
  before = jnp.sum(jnp.where(above, weight, 0), -1, keepdims=True)
  before = before + (jnp.cumsum(equal, axis=-1) - 1) * weight  # the mass in front of each equal one
  return above | (equal & (before < need))
