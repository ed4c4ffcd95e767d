"""Given text instead of drawn text: what the model thinks of it, and which of several answers to keep.

    scores = score.tokens(model, params, prompts, lengths, answers, answer_lengths)      # one forward
    texts = score.best_of(model, params, vocab, prompts, key, n=8, rank=score.certainty, temperature=0.7)

A ranking is a function from the `Candidates` of one prompt to numbers [n], the largest of which wins.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps
from llm_jax.decode.prompts import START

CHUNK = 32  # positions whose logits exist at one time


class Scores(NamedTuple):
  """Of each token of the answers, f32 [batch, answer], 0 behind their ends. logp: nats. certainty: KL(uniform || p),
  the divergence of the model's distribution from the uniform one, nats (Kang et al. 2025, arXiv:2502.18581)."""

  logp: jax.Array
  certainty: jax.Array


class Candidates(NamedTuple):
  """Several answers to one prompt. tokens: a list of ids each, the end included; scores: `Scores` of [n, answer];
  texts: without what ends them."""

  prompt: str
  texts: list[str]
  tokens: list[list[int]]
  scores: Scores


def tokens(
  model: Any,
  params: Any,
  prompts: Any,
  lengths: Any,
  answers: Any,
  answer_lengths: Any,
  *,
  start: int | None = START,
) -> Scores:
  """What the model gives each token of `answers` after its prompt, in one forward without a state.

  prompts: int32 [batch, length], lengths: int32 [batch]; answers: int32 [batch, answer], answer_lengths: int32 [batch];
  all right-padded. start: as in `generate.generate`. An empty prompt scores a whole text; without a start token nothing
  predicts its first token, which gets 0. Raises `UserError` for texts that do not fit the model's context.
  """
  prompts, answers = np.asarray(prompts, np.int32), np.asarray(answers, np.int32)
  lengths, ends = np.asarray(lengths, np.int32), np.asarray(answer_lengths, np.int32)
  if answers.ndim != 2 or ends.shape != lengths.shape or len(answers) != len(prompts):
    shapes = f'{prompts.shape}, {answers.shape} and {ends.shape}'
    raise UserError(f'prompts, answers and their lengths must have the same rows, got {shapes}')
  lay = _decoder_only if model.card.kind != 'encoder_decoder' else _encoder_decoder
  batch, first = lay(model, prompts, lengths, answers, ends, start)
  static = steps.functions(model, 0)
  filled = prompts_lib.fill(answers), prompts_lib.fill(ends)
  found = _score(static, model.card.vocab, params, batch, first, *filled)
  return Scores(*(x[: len(answers)] for x in found))


def _decoder_only(
  model: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  answers: np.ndarray,
  ends: np.ndarray,
  start: int | None,
) -> tuple[dict, np.ndarray]:
  """The batch, and the position [batch] whose output predicts the answer's first token."""
  width = prompts.shape[1] + answers.shape[1]
  whole = np.zeros((len(prompts), width), np.int32)
  whole[:, : prompts.shape[1]] = prompts
  at = lengths[:, None] + np.arange(answers.shape[1])
  whole[np.arange(len(whole))[:, None], at] = answers
  read = np.maximum(lengths + ends - 1, start is None)  # the last token predicts nothing
  laid = prompts_lib.lay(model, whole, read, 1, start)
  first = prompts_lib.fill(lengths) - (start is None)
  batch = dict(laid.batch)
  if model.card.kind == 'prefix':
    batch['prefix'] = np.arange(batch['inputs'].shape[1]) <= first[:, None]
  return batch, first


def _encoder_decoder(
  model: Any,
  prompts: np.ndarray,
  lengths: np.ndarray,
  answers: np.ndarray,
  ends: np.ndarray,
  start: int | None,
) -> tuple[dict, np.ndarray]:
  most = prompts_lib.limit(model)
  if ends.max() > most:
    raise UserError(f'an answer has {ends.max()} tokens, the decoder {most} positions: shorten it')
  laid = prompts_lib.lay(model, prompts, lengths, answers.shape[1], start)
  inputs = np.concatenate([laid.batch['inputs'], prompts_lib.fill(answers)[:, :-1]], axis=1)
  inputs = inputs[:, : int(min(inputs.shape[1], most))]
  positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
  return laid.batch | dict(inputs=inputs, positions=positions), np.zeros_like(laid.last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  static: steps.Functions,
  vocab: int,
  params: Any,
  batch: dict,
  first: jax.Array,
  answers: jax.Array,
  ends: jax.Array,
) -> Scores:
  at = first[:, None] + jnp.arange(answers.shape[1])
  hidden = static.hidden(params, batch).x
  x = jnp.take_along_axis(hidden, jnp.clip(at, 0, hidden.shape[1] - 1)[..., None], axis=1)

  def position(told: tuple[jax.Array, jax.Array]) -> Scores:
    logp = jax.nn.log_softmax(steps.logits(static, params, told[0]))
    own = jnp.take_along_axis(logp, told[1][:, None], axis=1)[:, 0]
    return Scores(own, -math.log(vocab) - logp[:, :vocab].mean(-1))

  columns = x.swapaxes(0, 1), answers.swapaxes(0, 1)
  found = jax.lax.map(position, columns, batch_size=CHUNK)
  known = (at >= 0) & (jnp.arange(answers.shape[1]) < ends[:, None])
  return jax.tree.map(lambda y: steps.whole(jnp.where(known, y.swapaxes(0, 1), 0.0)), found)


# --- rankings -----------------------------------------------------------------------------------------


def sum_logp(candidates: Candidates) -> np.ndarray:
  """The log-probability of each answer: favours short ones."""
  return np.asarray(candidates.scores.logp).sum(-1)


def mean_logp(candidates: Candidates) -> np.ndarray:
  """The log-probability per token, as OpenAI's `best_of` ranks."""
  return sum_logp(candidates) / _counts(candidates)


def certainty(candidates: Candidates) -> np.ndarray:
  """Self-certainty, the mean of `Scores.certainty` over the answer (arXiv:2502.18581)."""
  return np.asarray(candidates.scores.certainty).sum(-1) / _counts(candidates)


def minimum_risk(
  candidates: Candidates, *, utility: Callable[[str, str], float] | None = None
) -> np.ndarray:
  """Minimum Bayes risk: the mean utility of each answer when the others are the references (Eikema and Aziz 2020,
  arXiv:2005.10283). utility(answer, reference), for instance sacrebleu's sentence chrF; default `token_f1`."""
  utility, texts = utility or token_f1, candidates.texts
  if len(texts) == 1:
    return np.zeros(1)
  gains = [[utility(a, b) for b in texts] for a in texts]
  return (np.sum(gains, axis=1) - np.diag(gains)) / (len(texts) - 1)


def token_f1(answer: str, reference: str) -> float:
  """The harmonic mean of precision and recall of words, with their numbers (SQuAD; arXiv:1606.05250)."""
  a, b = answer.split(), reference.split()
  if not a or not b:
    return float(a == b)
  both = (collections.Counter(a) & collections.Counter(b)).total()
  return 2 * both / (len(a) + len(b))


def best_of(
  model: Any,
  params: Any,
  vocab: Any,
  prompts: Sequence[str],
  key: jax.Array,
  *,
  n: int = 8,
  rank: Callable[[Candidates], Any] = mean_logp,
  max_new: int = 100,
  stop: Sequence[str] = (),
  **sampling: float,
) -> list[str]:
  """Of `n` sampled continuations of each prompt the one that `rank` puts first. sampling: see `logits.Sampling`.

  rank: one of the above, or any function of the `Candidates`, such as a reward model's.
  """
  found = []
  told = dict(eos=vocab.eos, start=vocab.start, allowed=prompts_lib.drawable(model, vocab))
  for i, prompt in enumerate(prompts):
    ids = prompts_lib.encode(model, vocab, prompt)
    rows, padded = i * n + np.arange(n), prompts_lib.pad(model, [ids])
    settings = dict(max_new=max_new, n=n, rows=rows, **sampling, **told)
    out = generate_lib.generate(model, params, *padded, key, **settings)
    answers, ends = np.asarray(out.tokens), np.asarray(out.lengths)
    scores = tokens(
      model, params, *(np.repeat(x, n, axis=0) for x in padded), answers, ends, start=vocab.start
    )
    own = [row[:end].tolist() for row, end in zip(answers, ends, strict=True)]
    before = prompts_lib.shown(model, ids)
    texts = [''.join(prompts_lib.pieces(vocab, before, [row], vocab.eos, stop)) for row in own]
    ranks = np.asarray(rank(Candidates(prompt, texts, own, scores)))
    if ranks.shape != (n,):
      raise UserError(f'rank must return one number for each of the {n} texts, got {ranks.shape}')
    found.append(texts[int(ranks.argmax())])
  return found


def _counts(candidates: Candidates) -> np.ndarray:
  return np.array([max(len(ids), 1) for ids in candidates.tokens])
