r"""A world in which everything can be known: thirteen letters, answers of a few, a reward that is a function of them.

It answers in seconds what a method does: whether the gold reward rises, what divergence from the start that costs, and,
as all answers can be listed, what the distribution of answers is exactly.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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


def texts(most: int = 4) -> list[str]:
  """All answers of at most `most` letters, short ones first: 30,941 for four."""
  every = (itertools.product(LETTERS, repeat=n) for n in range(most + 1))
  return [''.join(t) for same_length in every for t in same_length]


def _grid(letters: int) -> np.ndarray:
  return np.array(list(itertools.product(range(FIRST, FIRST + len(LETTERS)), repeat=letters)))


def _behind(prompt: jax.Array, rows: np.ndarray) -> dict[str, jax.Array]:
  """What a decoder reads: padding as the start, the prompt, and a row of letters."""
  ids = jnp.concatenate([jnp.zeros((1,), jnp.int32), prompt])
  before = jnp.broadcast_to(ids, (len(rows), len(ids)))
  return dict(inputs=jnp.concatenate([before, jnp.asarray(rows, jnp.int32)], axis=1))


def distribution(model: Any, *, most: int = 4) -> Callable:
  """(params, prompts) -> the log-probabilities of `texts(most)` as answers, f64 [prompts, answers], nats.

  They are those of sampling that stops at the end or after `most` letters, so they sum to one; padding and unknown,
  which are no text, are left out. One forward over the beginnings of `most - 1` letters has them all.
  """
  rows = _grid(most - 1)
  drawn = np.array([vocab_lib.EOS, *range(FIRST, FIRST + len(LETTERS))])

  @jax.jit
  def following(params: Any, prompt: jax.Array) -> jax.Array:
    x = model.hidden(params, _behind(prompt, rows)).x[:, -most:]
    logits = model.logits(model.head(params), x)[..., drawn]
    return jax.nn.log_softmax(logits.astype(jnp.float32))

  def listed(params: Any, prompts: Sequence[str]) -> np.ndarray:
    found = []
    for prompt in prompts:
      table = np.asarray(following(params, np.array(Letters().encode(prompt), np.int32)), float)
      begun, parts = np.zeros(1), []
      for n in range(most):
        after = begun[:, None] + table[:: len(LETTERS) ** (most - 1 - n), n]
        parts.append(after[:, 0])
        begun = after[:, 1:].reshape(-1)
      logp = np.concatenate([*parts, begun])
      found.append(logp - np.logaddexp.reduce(logp))
    return np.stack(found)

  return listed


def rewards(model: Any, *, most: int = 4) -> Callable:
  """(params, prompts) -> what a reward model with a scalar head gives `texts(most)`, f32 [prompts, answers]."""
  rows = _grid(most)

  @jax.jit
  def read(params: Any, prompt: jax.Array) -> jax.Array:
    return scalar.read(params, model.hidden(params, _behind(prompt, rows)).x)[:, -most - 1 :]

  def listed(params: Any, prompts: Sequence[str]) -> np.ndarray:
    found = []
    for prompt in prompts:
      table = np.asarray(read(params, np.array(Letters().encode(prompt), np.int32)))
      found.append([table[:: len(LETTERS) ** (most - n), n] for n in range(most + 1)])
    return np.stack([np.concatenate(parts) for parts in found])

  return listed


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


def tilted(logp: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
  """log of p(y) exp(r(y) / beta) / Z: what maximises E r - beta KL(. || p), so no policy has a higher mean reward at
  the same divergence (DPO, arXiv:2305.18290, equation 4)."""
  found = logp + rewards / beta
  return found - np.logaddexp.reduce(found)


def divergence(logp: np.ndarray, ref_logp: np.ndarray) -> float:
  """KL(p || ref) in nats of two distributions over the same answers."""
  p = np.exp(logp)
  return float(np.where(p > 0, p * (np.where(p > 0, logp, 0) - ref_logp), 0).sum())


def best_of_n_kl(n: int) -> float:
  """log n - (n - 1) / n: the divergence of best-of-n from its policy where no two answers tie (Stiennon et al. 2020,
  arXiv:2009.01325, appendix G.3); with ties it is an upper bound (Beirami et al. 2024, arXiv:2401.01879)."""
  return float(np.log(n) - (n - 1) / n)


def best_of_n_slack(logp: np.ndarray, rewards: np.ndarray, n: int) -> float:
  """At most this far is the divergence of best-of-n below `best_of_n_kl`, where answers are not infinitely many.

  An answer has an interval I of the distribution function, on which best-of-n has the density g(u) = n u^(n - 1) with
  mean m; spreading it evenly over I loses the integral of g log(g / m), which is at most that of g^2 / m - g.
  """
  order = np.argsort(rewards, kind='stable')
  upto = np.cumsum(np.exp(logp[order]))
  upto /= upto[-1]
  before = np.concatenate([[0.0], upto[:-1]])
  mass, width = upto**n - before**n, upto - before
  squares = n * n / (2 * n - 1) * (upto ** (2 * n - 1) - before ** (2 * n - 1))
  there = mass > 0
  lost = squares[there] * width[there] / mass[there] - mass[there]
  return float(np.maximum(lost, 0).sum())
