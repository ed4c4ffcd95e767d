r"""From what answers earned to what each of their tokens is credited with.

A rollout is laid out as in training: `weights` is 1 on the tokens of the answer (its end included), position `t` holds
what stood before target `t`, so `values[t]` is the value before target `t` is drawn and `rewards[t]` comes after it.
Everything here is numpy on the host and needs no gradient. An estimator is `(told, memory) -> (Credit, memory)`;
`memory` is what it keeps from round to round, a dict of numbers that goes into checkpoints.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm_jax.core.errors import UserError

EPSILON = 1e-8


class Told(NamedTuple):
  """A round as estimators see it.

  scores: f32 [n], what each answer earned; rows `group * i` to `group * (i + 1) - 1` answer prompt `i`. rewards: f32
  [n, length], per token, KL penalty included. values: f32 [n, length] or None without a critic. weights: [n, length].
  """

  scores: np.ndarray
  rewards: np.ndarray
  values: np.ndarray | None
  weights: np.ndarray
  group: int


class Credit(NamedTuple):
  """advantages, returns: f32 [n, length], 0 where nothing counts; returns are what a critic is to predict."""

  advantages: np.ndarray
  returns: np.ndarray


Memory = Mapping[str, float]


# --- rewards per token --------------------------------------------------------------------------------


def penalised(
  scores: np.ndarray, logp: np.ndarray, ref_logp: np.ndarray, weights: np.ndarray, beta: float
) -> np.ndarray:
  """r_t = -beta (log pi_t - log ref_t), and the score at the last token that counts: f32 [n, length].

  Stiennon et al. 2020 (arXiv:2009.01325, section 3.4) and InstructGPT (arXiv:2203.02155, eq. 2), per token. scores:
  [n]; the others: [n, length].
  """
  rewards = -beta * (logp - ref_logp) * weights
  last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)
  rewards[np.arange(len(scores)), last] += np.where(weights.any(1), scores, 0)
  return rewards.astype(np.float32)


def overlong(lengths: np.ndarray, *, limit: int = 64, buffer: int = 16) -> np.ndarray:
  """DAPO's soft punishment of long answers, added to the score (Yu et al. 2025, arXiv:2503.14476, eq. 13): f32 [n].

  0 up to `limit - buffer` tokens, then falling to -1 at `limit`, -1 beyond. lengths: [n], tokens.
  """
  if not 0 < buffer <= limit:
    raise UserError(f'overlong: buffer={buffer} must be between 1 and limit={limit}')
  return -np.clip((lengths - (limit - buffer)) / buffer, 0, 1).astype(np.float32)


# --- estimators ---------------------------------------------------------------------------------------


def gae(
  told: Told, memory: Memory, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Credit, Memory]:
  """Generalised advantages (Schulman et al. 2016, arXiv:1506.02438, eq. 16), whitened; returns = raw ones + values.

  delta_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_k (gamma lam)^k delta_{t+k},  V = 0 after the last token; PPO's
  estimator of InstructGPT (gamma 1, lam 0.95). Tokens that do not count are stepped over.
  """
  if told.values is None:
    raise UserError('gae needs values: give the rollout a critic (value=policy.value_head)')
  advantages = discounted(told.rewards, told.values, told.weights, gamma, lam)
  returns = (advantages + told.values) * told.weights
  return Credit(whiten(advantages, told.weights), returns.astype(np.float32)), memory


def leave_one_out(told: Told, memory: Memory) -> tuple[Credit, Memory]:
  """RLOO: R_i minus the mean of the other answers to the same prompt, R = the sum of a row's rewards, KL included.

  Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740, section 3.3).
  """
  total = _groups(told, told.rewards.sum(1, dtype=np.float64))
  if told.group < 2:
    raise UserError('leave_one_out compares answers to one prompt: set group to 2 or more')
  others = (total.sum(1, keepdims=True) - total) / (told.group - 1)
  return _spread(told, total - others), memory


def batch_mean(told: Told, memory: Memory) -> tuple[Credit, Memory]:
  """REINFORCE with the mean of the round as its baseline (Williams 1992)."""
  total = told.rewards.sum(1, dtype=np.float64)
  return _spread(told, total - total.mean()), memory


def moving(told: Told, memory: Memory, *, decay: float = 0.9) -> tuple[Credit, Memory]:
  """REINFORCE with the exponential moving average of the rounds before as its baseline; 0 in the first."""
  total = told.rewards.sum(1, dtype=np.float64)
  before, weight = memory.get('baseline', 0.0), memory.get('rounds', 0.0)
  baseline = before / weight if weight else 0.0
  new = dict(
    baseline=decay * before + (1 - decay) * float(total.mean()), rounds=decay * weight + 1 - decay
  )
  return _spread(told, total - baseline), new


def grpo(told: Told, memory: Memory, *, epsilon: float = 1e-4) -> tuple[Credit, Memory]:
  """(R - mean) / (std + epsilon) over the answers to one prompt, std with n - 1 (Shao et al. 2024, arXiv:2402.03300,
  section 4.1.2). The KL term belongs into the objective."""
  total = _groups(told, told.rewards.sum(1, dtype=np.float64))
  if told.group < 2:
    raise UserError('grpo compares answers to one prompt: set group to 2 or more')
  centred = total - total.mean(1, keepdims=True)
  return _spread(told, centred / (total.std(1, keepdims=True, ddof=1) + epsilon)), memory


def dr_grpo(told: Told, memory: Memory) -> tuple[Credit, Memory]:
  """R - mean over the answers to one prompt: without the standard deviation, which favours prompts that are nearly
  always or nearly never solved (Liu et al. 2025, arXiv:2503.20783, section 3.2)."""
  total = _groups(told, told.rewards.sum(1, dtype=np.float64))
  return _spread(told, total - total.mean(1, keepdims=True)), memory


def score(told: Told, memory: Memory) -> tuple[Credit, Memory]:
  """The reward itself, without a baseline: for rejection sampling, where it is not used."""
  return _spread(told, told.rewards.sum(1, dtype=np.float64)), memory


# --- their parts --------------------------------------------------------------------------------------


def discounted(
  rewards: np.ndarray, values: np.ndarray, weights: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
  """The advantages of `gae`, f32 [n, length], not whitened."""
  rewards, values = rewards.astype(np.float64), values.astype(np.float64)
  found = np.zeros_like(rewards)
  value, advantage = np.zeros(len(rewards)), np.zeros(len(rewards))
  for t in reversed(range(rewards.shape[1])):
    counts = weights[:, t] > 0
    delta = rewards[:, t] + gamma * value - values[:, t]
    advantage = np.where(counts, delta + gamma * lam * advantage, advantage)
    value = np.where(counts, values[:, t], value)
    found[:, t] = np.where(counts, advantage, 0)
  return found.astype(np.float32)


def whiten(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """`x` with mean 0 and variance 1 over what counts, 0 elsewhere (Ziegler et al. 2019, arXiv:1909.08593): f32."""
  total = max(weights.sum(dtype=np.float64), 1)
  mean = (x * weights).sum(dtype=np.float64) / total
  variance = ((x - mean) ** 2 * weights).sum(dtype=np.float64) / total
  return ((x - mean) / np.sqrt(variance + EPSILON) * weights).astype(np.float32)


def _groups(told: Told, total: np.ndarray) -> np.ndarray:
  return total.reshape(-1, told.group)


def _spread(told: Told, advantages: np.ndarray) -> Credit:
  """One number per row, given to each of its tokens."""
  each = advantages.reshape(-1, 1) * told.weights
  total = told.rewards.sum(1, keepdims=True) * told.weights
  return Credit(each.astype(np.float32), total.astype(np.float32))


# --- the coefficient of the KL penalty ----------------------------------------------------------------


def fixed(beta: float, kl: float) -> float:
  """The coefficient stays as it is."""
  del kl
  return beta


def adaptive(
  beta: float, kl: float, *, target: float = 6.0, gain: float = 0.1, clip: float = 0.2
) -> float:
  """beta (1 + gain clip((kl - target) / target, -clip, clip)) (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

  kl: of the round, nats per answer. gain: K_beta.
  """
  if target <= 0:
    raise UserError(f'adaptive: target={target} nats must be positive')
  return beta * (1 + gain * min(max((kl - target) / target, -clip), clip))
