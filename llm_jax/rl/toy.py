r"""A world in which everything can be known: thirteen letters, answers of a few, a reward that is a function of them.

It answers in seconds what a method does: whether the gold reward rises, what divergence from the start that costs, and,
as all answers can be listed, what the distribution of answers is exactly.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.data import vocab as vocab_lib
from llm_jax.model import attention, block, ffn, scalar, transformer
from llm_jax.objectives import sequence

LETTERS = 'abcdefghijklm'
FIRST = 3  # the id of 'a': padding, end and unknown come before


class Letters(vocab_lib.Vocabulary):
  """Sixteen ids: padding, end, unknown, a to m."""

  def __init__(self):
    super().__init__(FIRST + len(LETTERS), 0, ())

  def _encode(self, text: str) -> list[int]:
    return [FIRST + LETTERS.index(c) if c in LETTERS else vocab_lib.UNK for c in text]

  def _decode(self, ids: Sequence[int]) -> str:
    return ''.join(LETTERS[i - FIRST] for i in ids if i >= FIRST)

  def _base_pieces(self) -> list[bytes]:
    return [b''] * FIRST + [c.encode() for c in LETTERS]

  def _base_controls(self) -> list[int]:
    return list(range(FIRST))


def model(*, value: bool = True, embed: int = 32, layers: int = 2, length: int = 16) -> Any:
  """A causal transformer over the letters. value: with a scalar head, which PPO's critic reads."""
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=2),
    ffn=functools.partial(ffn.Gated, hidden=2 * embed),
  )
  made = transformer.causal(
    vocab=FIRST + len(LETTERS), embed=embed, layers=layers, block=layer, length=length
  )
  return scalar.head(made) if value else made


def prompts(*, count: int = 64, seed: int = 0) -> list[dict[str, str]]:
  """Records of two letters each."""
  rng = np.random.default_rng(seed)
  return [dict(prompt=''.join(rng.choice(list(LETTERS), 2))) for _ in range(count)]


def gold(
  prompts: Sequence[str], answers: Sequence[str], told: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """The share of the letters from a to f, minus a tenth of the distance of the length from four: f32 [n]."""
  del prompts, told
  good = [sum(c < 'g' for c in a) / max(len(a), 1) - 0.1 * abs(len(a) - 4) for a in answers]
  return np.array(good, np.float32)


def proxy(
  prompts: Sequence[str], answers: Sequence[str], told: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """What a reward model may have learned of `gold`: right on ordinary answers, but every `m` pays one."""
  bonus = np.array([a.count('m') for a in answers], np.float32)
  return gold(prompts, answers, told) + bonus


def enumerate_answers(
  model: Any, params: Any, prompt: str, *, letters: int = 2, batch: int = 4096
) -> tuple[list[str], np.ndarray]:
  """(all answers of exactly `letters` letters, their log-probabilities in float64, renormalised among themselves)."""
  words = Letters()
  texts = [''.join(t) for t in itertools.product(LETTERS, repeat=letters)]
  ids = np.array([words.encode(prompt + text) for text in texts], np.int32)
  inputs = np.concatenate([np.zeros((len(ids), 1), np.int32), ids[:, :-1]], axis=1)
  weights = (np.arange(ids.shape[1]) >= len(prompt)).astype(np.float32)
  found = []
  for first in range(0, len(ids), batch):
    told = dict(
      inputs=jnp.asarray(inputs[first : first + batch]), targets=ids[first : first + batch]
    )
    found.append(np.asarray(sequence.tokens(model, params, told).logp, np.float64) @ weights)
  logp = np.concatenate(found)
  return texts, logp - np.logaddexp.reduce(logp)


def best_of_n(logp: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
  """The log-probabilities of what the best of `n` independent answers is, f64 [answers]; ties are broken by order.

  P(best = y) = F(y)^n - F(before y)^n, with F the distribution function in the order of the rewards.
  """
  order = np.argsort(rewards, kind='stable')
  upto = np.cumsum(np.exp(logp[order]))
  upto /= upto[-1]
  before = np.concatenate([[0.0], upto[:-1]])
  found = np.empty_like(logp)
  with np.errstate(divide='ignore'):
    found[order] = np.log(upto**n - before**n)
  return found


def divergence(logp: np.ndarray, ref_logp: np.ndarray) -> float:
  """KL(p || ref) in nats of two distributions over the same answers."""
  p = np.exp(logp)
  return float(np.where(p > 0, p * (np.where(p > 0, logp, 0) - ref_logp), 0).sum())


def best_of_n_kl(n: int) -> float:
  """log n - (n - 1) / n: the divergence of best-of-n from its policy where no two answers tie (Stiennon et al. 2020,
  arXiv:2009.01325, appendix G.3); with ties it is an upper bound (Beirami et al. 2024, arXiv:2401.01879)."""
  return float(np.log(n) - (n - 1) / n)
