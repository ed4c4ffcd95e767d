r"""Objectives of reinforcement learning: what makes answers likelier that earned more.

A batch holds texts whose `weights` are 1 on the answer, and what needs no gradient (llm_jax/rl/rollout.py): f32
[batch, length] `old_logp` (of the policy that wrote the answer), `advantages`, where there is a reference `ref_logp`,
for a critic `values` and `returns`; [batch] `fresh`, 1 where no update lies between writing and learning, and `reward`
and `gap`, which are only reported. Where there is no `gap`, the `old_logp` of fresh rows is the sampler's and the gap
is what lies between it and this forward. There is no dropout: in a fresh row the ratio to the policy that wrote is
exactly 1.

With `r = exp(logp - old_logp)` the clipped surrogate is `min(r A, clip(r, 1 - low, 1 + high) A)`. The objectives
differ in what a ratio belongs to (token or answer) and what is averaged (tokens, answers, a constant).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import scalar
from llm_jax.objectives import cross_entropy, sequence
from llm_jax.objectives.loss import Loss

Batch = Mapping[str, jax.Array]


# --- estimators of KL(policy || reference) from tokens that the policy drew ---------------------------


def k1(logp: jax.Array, ref_logp: jax.Array, old_logp: Any = None) -> jax.Array:
  """log pi - log ref: without bias, of both signs (Schulman 2020, joschu.net/blog/kl-approx.html)."""
  del old_logp
  return logp - ref_logp


def k2(logp: jax.Array, ref_logp: jax.Array, old_logp: Any = None) -> jax.Array:
  """(log pi - log ref)^2 / 2: biased, never negative."""
  del old_logp
  return (logp - ref_logp) ** 2 / 2


def k3(logp: jax.Array, ref_logp: jax.Array, old_logp: Any = None) -> jax.Array:
  """ref / pi - 1 - log(ref / pi): without bias and never negative."""
  del old_logp
  return jnp.expm1(ref_logp - logp) + logp - ref_logp


def corrected_k3(logp: jax.Array, ref_logp: jax.Array, old_logp: jax.Array) -> jax.Array:
  """k3 times pi / old, so that its gradient too is without bias (DeepSeek-V3.2, arXiv:2512.02556); TRL's default."""
  return jnp.exp(logp - old_logp) * k3(logp, ref_logp)


# --- values -------------------------------------------------------------------------------------------


def value_head(model: Any, params: Any, batch: Batch, x: jax.Array) -> jax.Array:
  """The critic is a scalar head on the policy (`scalar.make`): f32 [batch, length]. x: what logits are read from."""
  del model, batch
  return scalar.read(params, x)


def critic(
  model: Any, params: Any, batch: Batch, x: jax.Array, *, critic: Callable[[], Any]
) -> jax.Array:
  """The critic is a model of its own (`scalar.with_critic`) that `critic()` builds; its weights: params['critic']."""
  del model, x
  own = params[scalar.CRITIC]
  return scalar.read(own, sequence.hidden(critic(), own, batch)[0])


# --- objectives ---------------------------------------------------------------------------------------


def reinforce(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """-sum_t A_t log pi_t, a mean over answers (Williams 1992)."""
  now = _read(model, params, batch, chunk, temperature)
  each = -now.logp * batch['advantages'] * now.tokens
  return _loss(now, batch, each.sum(), now.answers)


def ppo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  clip: float = 0.2,
  value: Callable = value_head,
  value_weight: float = 0.1,
  value_clip: float = 0.2,
  entropy: float = 0.0,
  ptx: float = 27.8,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9) as InstructGPT has it, a mean over tokens.

  -surrogate + value_weight max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2 - entropy H.
  Where the batch has a text `ptx/...` of the pre-training data (rl/pretraining.py), PPO-ptx: + ptx times its cross
  entropy per token (arXiv:2203.02155, eq. 2; gamma = 27.8). value: (model, params, batch, x) -> f32 [batch, length].
  The KL penalty is part of the rewards.
  """
  now = _read(model, params, batch, chunk, temperature)
  ratio = jnp.exp(now.logp - now.old)
  found = value(model, params, batch, now.x)
  old, returns = batch['values'], batch['returns']
  near = jnp.clip(found, old - value_clip, old + value_clip)
  error = jnp.maximum((found - returns) ** 2, (near - returns) ** 2) / 2
  each = -surrogate(ratio, batch['advantages'], clip, clip) + value_weight * error
  loss = (now.tokens * (each - entropy * now.entropy)).sum()
  more = dict(
    clipped=_clipped(ratio, batch['advantages'], clip, clip),
    value_loss=error,
    value_error=(found - returns) ** 2,
    value=found,
    returns=returns,
    returns_squared=returns**2,
  )
  if 'ptx/inputs' not in batch:
    return _loss(now, batch, loss, now.tokens, more)
  nats = _nats(model, params, sequence.side(batch, 'ptx'), chunk)
  told = _loss(now, batch, loss + ptx * nats, now.tokens, more)
  return told._replace(metrics=dict(told.metrics, ptx=nats))


def rloo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  clip: float = 0.2,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """The whole answer is one action: the surrogate of the ratio of its probabilities, a mean over answers.

  REINFORCE leave-one-out at the policy that wrote (Ahmadian et al. 2024, arXiv:2402.14740), clipped as in TRL. Every
  token of a row has the advantage of its answer.
  """
  now = _read(model, params, batch, chunk, temperature)
  ratio = jnp.exp(sequence.total(now.logp - now.old, now.tokens))
  own = sequence.total(batch['advantages'], now.answers)
  more = dict(clipped=_clipped(ratio, own, clip, clip)[:, None])
  return _loss(now, batch, -surrogate(ratio, own, clip, clip).sum(), now.answers, more)


def grpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  clip: float = 0.2,
  beta: float = 0.0,
  kl: Callable = k3,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """A mean over answers of the mean over their tokens of -surrogate + beta kl(logp, ref_logp) (Shao et al. 2024,
  arXiv:2402.03300, eq. 3; beta = 0.04 there)."""
  now = _read(model, params, batch, chunk, temperature)
  each, more = _per_token(now, batch, clip, clip, beta, kl)
  return _loss(now, batch, (each * now.answers).sum(), now.answers, more)


def dr_grpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  longest: int,
  clip: float = 0.2,
  beta: float = 0.0,
  kl: Callable = k3,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """GRPO with the sum over tokens divided by a constant, `longest`, so that long answers are not spared (Liu et al.
  2025, arXiv:2503.20783). To go with `advantage.dr_grpo`; longest: the most tokens an answer may have."""
  now = _read(model, params, batch, chunk, temperature)
  each, more = _per_token(now, batch, clip, clip, beta, kl)
  return _loss(now, batch, (each * now.tokens).sum() / longest, now.answers, more)


def dapo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  clip: float = 0.2,
  clip_high: float = 0.28,
  beta: float = 0.0,
  kl: Callable = k3,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """GRPO with a wider clip upwards and a mean over tokens (Yu et al. 2025, arXiv:2503.14476, eq. 8). Its other two
  parts are in the rollout: `keep=rollout.varied` and `penalty=advantage.overlong`."""
  now = _read(model, params, batch, chunk, temperature)
  each, more = _per_token(now, batch, clip, clip_high, beta, kl)
  return _loss(now, batch, (each * now.tokens).sum(), now.tokens, more)


def gspo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: Any,
  *,
  clip: float = 3e-4,
  clip_high: float = 4e-4,
  chunk: int | None = 32,
  temperature: float = 1.0,
) -> Loss:
  """The ratio of an answer is the geometric mean of those of its tokens, a mean over answers (Zheng et al. 2025,
  arXiv:2507.18071, eq. 5 and 7)."""
  now = _read(model, params, batch, chunk, temperature)
  ratio = jnp.exp(sequence.total(now.logp - now.old, now.answers))
  own = sequence.total(batch['advantages'], now.answers)
  more = dict(clipped=_clipped(ratio, own, clip, clip_high)[:, None])
  return _loss(now, batch, -surrogate(ratio, own, clip, clip_high).sum(), now.answers, more)


# --- their parts --------------------------------------------------------------------------------------


class _Now(NamedTuple):
  """The policy as it is, [batch, length] each. tokens: 1 on the answers' tokens; answers: the same, summing to 1 in
  each row that has an answer. What is averaged over one of them has its sum as the weight. old: of the policy that
  wrote."""

  logp: jax.Array
  entropy: jax.Array
  x: jax.Array
  aux: dict[str, jax.Array]
  tokens: jax.Array
  answers: jax.Array
  old: jax.Array


def surrogate(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
  """min(r A, clip(r, 1 - low, 1 + high) A), elementwise."""
  return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def _clipped(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
  """1 where the clip holds back, so that there is no gradient."""
  above, below = (ratio > 1 + high) & (advantages > 0), (ratio < 1 - low) & (advantages < 0)
  return (above | below).astype(jnp.float32)


def _per_token(
  now: _Now, batch: Batch, low: float, high: float, beta: float, kl: Callable
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss, metrics) of each token, [batch, length]."""
  ratio = jnp.exp(now.logp - now.old)
  each = -surrogate(ratio, batch['advantages'], low, high)
  if beta:
    each += beta * kl(now.logp, batch['ref_logp'], now.old)
  return each, dict(clipped=_clipped(ratio, batch['advantages'], low, high))


def _read(model: Any, params: Any, batch: Batch, chunk: int | None, temperature: float) -> _Now:
  missing = [name for name in ('old_logp', 'advantages') if name not in batch]
  if missing:
    raise UserError(
      f'the batch has no {missing[0]}: policy objectives need the source rollout.make'
    )
  tokens = batch['weights'].astype(jnp.float32)
  now = sequence.tokens(model, params, batch, chunk=chunk, temperature=temperature)
  old = batch['old_logp']
  if 'fresh' in batch:
    # Written by this very policy: what another program made of it differs in the last bits.
    old = jnp.where(batch['fresh'][:, None] > 0, jax.lax.stop_gradient(now.logp), old)
  return _Now(*now, tokens, tokens / jnp.maximum(tokens.sum(-1, keepdims=True), 1e-9), old)


def _nats(model: Any, params: Any, batch: Batch, chunk: int | None) -> jax.Array:
  """The cross entropy of the targets, summed with their weights."""
  x, _, _ = model.hidden(params, batch)
  scored = (model.logits, model.head(params), x, batch['targets'], batch['weights'])
  penalty = cross_entropy.Penalty(0.0, 0.0, model.card.vocab)
  if chunk is None:
    return cross_entropy.whole(*scored, penalty).loss
  return cross_entropy.fused(*scored, penalty, chunk).loss


def _loss(
  now: _Now, batch: Batch, loss: jax.Array, over: jax.Array, more: Mapping[str, Any] | None = None
) -> Loss:
  """With the metrics and the model's own losses. over: `now.tokens` or `now.answers`, whose sum is the weight; metrics
  are means over the same, so those of a whole answer (reward, gap) are weighted by length where it is tokens.
  """
  ratio = now.logp - now.old
  found = dict(entropy=now.entropy, old_kl=jnp.expm1(ratio) - ratio)
  if 'ref_logp' in batch:
    found |= dict(kl=k1(now.logp, batch['ref_logp']), k3=k3(now.logp, batch['ref_logp']))
  rows = {name: batch[name] for name in ('reward', 'gap') if name in batch} | now.aux
  if 'gap' not in batch and 'fresh' in batch:
    off = jnp.abs(now.old - batch['old_logp']) * now.tokens
    rows['gap'] = off.max(-1)
    rows['gap_squared'] = rows['gap'] ** 2
  found |= {name: value[:, None] for name, value in rows.items()} | dict(more or {})
  metrics = {name: (over * value).sum() for name, value in found.items()}
  own = [metrics[name] for name in now.aux if not name.startswith('seen/')]
  return Loss(sum(own, loss), over.sum(), metrics)
