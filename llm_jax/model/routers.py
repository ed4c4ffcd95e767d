"""Routers: which tokens meet which experts, and how much each meeting counts.

    router(scores, told) -> Routing

`scores()` is the product of the tokens with the router's matrix, f32 [batch, t, experts]; a router that does not call
it has no matrix. Tokens that are padding are routed nowhere.

| router | tokens choose | weights of the chosen |
|---|---|---|
| `switch` | 1 | probability |
| `gshard` | 2 | probabilities, made to sum to 1; the second is dropped at random |
| `softmax_top_k` (DeepSeekMoE, Qwen2-MoE, OLMoE) | k | probabilities |
| `top_k_softmax` (Mixtral) | k | probabilities, made to sum to 1 |
| `expert_choice` | experts choose tokens | probabilities |
| `hashed` | by their ids | 1 |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import mesh
from llm_jax.core.errors import UserError


class Told(NamedTuple):
  """What a router knows besides scores.

  experts: how many. k: to how many each token goes. real: bool [batch, t], False for padding. causal: whether no token
  may depend on later ones. ids: int [batch, t] or None. rng: a key while training, else None.
  """

  experts: int
  k: int
  real: jax.Array
  causal: bool
  ids: jax.Array | None
  rng: jax.Array | None


class Routing(NamedTuple):
  """Pairs of a token and an expert, in rounds: first choices, second choices, ...

  expert: int [batch, rounds, n]. gate: f32, what the expert's output is multiplied with. kept: bool, whether the pair
  exists. token: int, the index in the row; None: pair i of a round is of token i. logits: f32 [batch, t, experts];
  None: nothing is learned. load: f32 [batch, experts], the number of tokens that the balance loss counts for each
  expert, before any is dropped; None: balanced by construction.
  """

  expert: jax.Array
  gate: jax.Array
  kept: jax.Array
  token: jax.Array | None = None
  logits: jax.Array | None = None
  load: jax.Array | None = None


Scores = Callable[[], jax.Array]


def softmax_top_k(scores: Scores, told: Told) -> Routing:
  """The k likeliest experts, weighed by their probabilities (Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066)."""
  logits = scores()
  gate, expert = _best(jax.nn.softmax(logits), _checked(told))
  return _rounds(told, logits, gate, expert)


def top_k_softmax(scores: Scores, told: Told) -> Routing:
  """The k likeliest experts, weighed by the softmax over their k logits (Jiang et al. 2024, Mixtral, arXiv:2401.04088,
  section 2.1): the same as probabilities divided by their sum."""
  logits = scores()
  top, expert = _best(logits, _checked(told))
  return _rounds(told, logits, jax.nn.softmax(top), expert)


def switch(scores: Scores, told: Told) -> Routing:
  """The likeliest expert, weighed by its probability (Fedus et al. 2021, arXiv:2101.03961, eq. 2)."""
  _exactly(told, 1, 'switch')
  return softmax_top_k(scores, told)


def gshard(scores: Scores, told: Told) -> Routing:
  """The two likeliest experts, their probabilities made to sum to 1 (Lepikhin et al. 2020, arXiv:2006.16668, alg. 1).

  While there is a key, the second is kept with probability min(1, 2 g2); one that is not takes no place. The balance
  loss counts first choices; it is E^2 times that of the algorithm, Switch's scale.
  """
  _exactly(told, 2, 'gshard')
  found = top_k_softmax(scores, told)
  kept = found.kept
  if told.rng is not None:
    draw = jax.random.uniform(told.rng, told.real.shape, out_sharding=_like(told.real))
    kept = kept & jnp.stack([told.real, 2 * found.gate[:, 1] > draw], 1)
  return found._replace(kept=kept, load=_load(told, found.expert[:, :1]))


def expert_choice(scores: Scores, told: Told) -> Routing:
  """Every expert takes the k t / experts tokens that like it most (Zhou et al. 2022, arXiv:2202.09368, eq. 2).

  No expert is ever idle or full, and a token gets as many experts as want it, k on average. Whether one does depends on
  later tokens, so a causal mask is refused with a `UserError`: it is for encoders.
  """
  if told.causal:
    raise UserError(
      'expert_choice compares a token with later ones, which a causal model must not: '
      'use another router in decoders (routers.top_k_softmax, routers.switch, ...)'
    )
  logits = scores()
  t = logits.shape[1]
  likes = jnp.where(told.real[..., None], jax.nn.softmax(logits), -1.0)
  likes, n = jnp.swapaxes(likes, 1, 2), min(t, -(-told.k * t // told.experts))
  token = jnp.zeros_like(likes, jnp.int32) + jnp.arange(t, dtype=jnp.int32)
  less, token = jax.lax.sort((-likes, token), num_keys=1)
  gate, token = -less[..., :n], token[..., :n]
  each = jnp.arange(told.experts, dtype=jnp.int32)[:, None]
  return Routing(jnp.zeros_like(token) + each, gate, gate >= 0, token, logits)


def hashed(scores: Scores, told: Told, *, seed: int = 0) -> Routing:
  """The expert that a fixed hash of the token's id says, with weight 1 (Roller et al. 2021, arXiv:2106.04426).

  Their random hash; nothing is learned, so there is nothing to balance either.
  """
  del scores
  _exactly(told, 1, 'hashed')
  if told.ids is None:
    raise UserError('hashed routes by token ids, and this layer is told none')
  x = told.ids.astype(jnp.uint32) + jnp.uint32(0x9E3779B9 * (seed + 1) & 0xFFFFFFFF)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's last steps
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  expert = (x % jnp.uint32(told.experts)).astype(jnp.int32)[:, None]
  return Routing(expert, jnp.ones_like(expert, jnp.float32), told.real[:, None])


def balance(found: Routing, told: Told) -> jax.Array:
  """E sum_e f_e P_e, f32 [batch], 1 when balanced (Fedus et al. 2021, eq. 4-6, without its factor alpha).

  f: the part of a row's choices that are e; P: the mean probability of e over its tokens.
  """
  if found.load is None:
    raise UserError('this router has no loads to balance: set balance=0')
  p = jnp.where(told.real[..., None], jax.nn.softmax(found.logits), 0).sum(1) / _count(told)
  f = found.load / jnp.maximum(found.load.sum(-1, keepdims=True), 1)
  return told.experts * (f * p).sum(-1)


def z_loss(found: Routing, told: Told) -> jax.Array:
  """The mean of (log sum_e exp x_e)^2 over the tokens of each row, f32 [batch] (Zoph et al. 2022, ST-MoE,
  arXiv:2202.08906, eq. 5, without its factor)."""
  if found.logits is None:
    raise UserError('this router has no logits to keep small: set z_loss=0')
  squares = jax.nn.logsumexp(found.logits, axis=-1) ** 2
  return jnp.where(told.real, squares, 0).sum(1) / _count(told)[:, 0]


def _best(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest of each token, best first, and where: [batch, t, k]. XLA would gather the batch for `top_k`."""
  values, places, left = [], [], x
  for _ in range(k):
    places.append(jnp.argmax(left, -1))
    chosen = places[-1][..., None] == jnp.arange(x.shape[-1])
    values.append(jnp.where(chosen, x, 0).sum(-1))
    left = jnp.where(chosen, -jnp.inf, left)
  return jnp.stack(values, -1), jnp.stack(places, -1)


def _rounds(told: Told, logits: jax.Array, gate: jax.Array, expert: jax.Array) -> Routing:
  """gate, expert: [batch, t, k], best first."""
  gate, expert = jnp.swapaxes(gate, 1, 2), jnp.swapaxes(expert, 1, 2)
  kept = jnp.stack([told.real] * told.k, 1)
  return Routing(expert, gate, kept, None, logits, _load(told, expert))


def _load(told: Told, expert: jax.Array) -> jax.Array:
  """expert [batch, rounds, t] -> the number of real tokens of each, f32 [batch, experts]."""
  chosen = expert[..., None] == jnp.arange(told.experts)
  return (chosen & told.real[:, None, :, None]).sum((1, 2), dtype=jnp.float32)


def _count(told: Told) -> jax.Array:
  """The real tokens of each row, at least 1: f32 [batch, 1]."""
  return jnp.maximum(told.real.sum(1, keepdims=True, dtype=jnp.float32), 1)


def _checked(told: Told) -> int:
  if not 1 <= told.k <= told.experts:
    raise UserError(f'top_k={told.k} of {told.experts} experts: choose 1 <= top_k <= experts')
  return told.k


def _exactly(told: Told, k: int, name: str) -> None:
  if told.k != k:
    raise UserError(f'{name} sends a token to {k} expert(s): set top_k={k}, not {told.k}')


def _like(x: jax.Array):
  return jax.typeof(x).sharding if mesh.is_explicit() else None
