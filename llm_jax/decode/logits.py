"""What happens to the next-token logits before a token is drawn: temperature, top-k, top-p, banned ids.

Every function is pure, `[batch, vocab] -> [batch, vocab]`, and they compose in any order; a token that is ruled
out has logit -inf. `sample` applies them in the usual order: ban, temperature, top-k, top-p.
"""

import math

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError

# Settings the papers report their results with; the keys are those of `sample`.
PRESETS = dict(
  t5=dict(temperature=0.0),  # greedy; Raffel et al. 2020, arXiv:1910.10683, section 3.1.2
  alpaca=dict(temperature=0.7, top_k=50, top_p=0.9),
  llama=dict(
    temperature=0.0
  ),  # greedy on question answering; Touvron et al. 2023, arXiv:2302.13971
  llama_pass1=dict(temperature=0.1),  # HumanEval pass@1, same paper, section 3.5
  llama_pass100=dict(temperature=0.8),  # HumanEval pass@100
)


def check(*, temperature: float, top_k: int, top_p: float) -> None:
  """Raises `UserError` for settings outside their range."""
  if not (math.isfinite(temperature) and temperature >= 0):
    raise UserError(f'temperature must be 0 (greedy) or a positive number, got {temperature}')
  if top_k < 0:
    raise UserError(f'top_k must be 0 (off) or the number of tokens to keep, got {top_k}')
  if not 0 < top_p <= 1:
    raise UserError(f'top_p must be in (0, 1], 1 is off, got {top_p}')


def ban(logits: jax.Array, allowed: jax.Array) -> jax.Array:
  """Rules out every id whose entry in `allowed` ([vocab] bool) is False."""
  return jnp.where(allowed, logits, -jnp.inf)


def scale(logits: jax.Array, temperature: float) -> jax.Array:
  """`logits / temperature`, shifted so that the largest is 0: no temperature > 0 overflows."""
  return (logits - logits.max(-1, keepdims=True)) / temperature


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Keeps exactly the `k` largest logits of each row (Fan et al. 2018, arXiv:1805.04833); 0 keeps all.

  Of equal logits at the border the lowest ids are kept.
  """
  if k == 0 or k >= logits.shape[-1]:
    return logits
  return jnp.where(_first(logits, jax.lax.top_k(logits, k)[0], k), logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Keeps the fewest tokens whose probabilities sum to at least `p` (nucleus; Holtzman et al. 2020, arXiv:1904.09751).

  A token stays iff the mass of those before it, in descending order, is below `p`: at least one always does. Of equal
  logits the lowest ids come first. p = 1 changes nothing.
  """
  if p >= 1:
    return logits
  ranked = jnp.sort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  size = jnp.sum(before < p, axis=-1, keepdims=True)
  return jnp.where(_first(logits, ranked, size), logits, -jnp.inf)


def _first(logits: jax.Array, ranked: jax.Array, size: jax.Array | int) -> jax.Array:
  """bool [batch, vocab]: the `size` largest, of equal ones the lowest ids. ranked: the logits in descending order."""
  last = jnp.broadcast_to(jnp.asarray(size) - 1, (logits.shape[0], 1))
  border = jnp.take_along_axis(ranked, last, axis=-1)
  above, equal = logits > border, logits == border
  room = last + 1 - jnp.sum(above, axis=-1, keepdims=True)
  return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  allowed: jax.Array | None = None,
) -> jax.Array:
  """One id per row, int32 [batch].

  logits: f32 [batch, vocab]. key: [batch] keys, one per row, so that a row's draw does not depend on its
  neighbours; or a single key, which is folded with the row's number. temperature: 0 takes the largest logit (of
  equal ones the lowest id). allowed: [vocab] bool.
  """
  if allowed is not None:
    logits = ban(logits, allowed)
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = keep_top_p(keep_top_k(scale(logits, temperature), top_k), top_p)
  keys = (
    key
    if key.ndim
    else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
  )
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
