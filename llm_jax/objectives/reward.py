"""Reward models: a number for a text, learnt from comparisons, ratings or judged steps.

The model is one with a scalar head (`model/scalar.py`); the reward of a text is read at its last weighted target's
position, where the whole response has been read but for its end.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import scalar
from llm_jax.objectives import preference, ranking, sequence
from llm_jax.objectives.loss import Loss
from llm_jax.objectives.preference import Batch


def last(weights: jax.Array) -> jax.Array:
  """The position of the last target that counts in each row, int32 [batch]; 0 where none does."""
  return jnp.where(weights > 0, jnp.arange(weights.shape[1]), 0).max(1)


def rewards(params: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
  """The reward of each text, f32 [batch]. x: [batch, length, embed], what the layers made of them."""
  at = last(weights)[:, None, None]
  return _every(params, jnp.take_along_axis(x, at, axis=1))[:, 0]


def of_texts(params: Any, x: jax.Array, told: Batch, count: int) -> list[jax.Array]:
  """The rewards of each of the `count` texts of what `sequence.together` gave: [batch] each, or [batch, comparisons]
  where rows branch."""
  if 'branches' not in told:
    return sequence.parts(rewards(params, x, told['weights']), count)
  every, slots = _every(params, x)[..., None], jnp.arange(x.shape[1])[:, None]
  counted = (told['weights'] > 0)[..., None]
  ends = (jnp.where(own & counted, slots, -1).max(1) for own in sequence.owned(told, count))
  return [jnp.where(slots == end[:, None], every, 0).sum(1) for end in ends]


def _every(params: Any, x: jax.Array) -> jax.Array:
  """The number at every position of x [batch, length, embed]."""
  if scalar.NAME not in params:
    raise UserError('this model gives no number: set model to use(scalar.make, model=...)')
  return scalar.read(params, x)


def score(model: Any, params: Any, batch: Batch) -> jax.Array:
  """The rewards of the texts of a batch, f32 [batch]."""
  return rewards(params, model.hidden(params, batch).x, batch['weights'])


def _read(model, params, batch, rng, sides):
  """(rewards of each side, [batch] each; x of all; aux; sides under one another)."""
  told = sequence.join(batch, sides)
  x, _, aux = model.hidden(params, told, rng=rng)
  aux = {name: sum(sequence.parts(value, len(sides))) / len(sides) for name, value in aux.items()}
  found = sequence.parts(rewards(params, x, told['weights']), len(sides))
  return found, aux


def bradley_terry(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  lm: float = 0.0,
  centre: float = 0.0,
  noise: float = 0.0,
) -> Loss:
  """-log P(w before l) per pair, P = (1 - noise) sigmoid(R(w) - R(l) - m) + noise / 2.

  m: `margin` f32 [batch] where the batch has it, how much better the chosen one is (LLaMA 2, arXiv:2307.09288, equation
  2). noise: the chance that a labeller answers at random, 0.1 in arXiv:1706.03741, section 2.2.3. lm: weight of
  -log p(w) / |w| (arXiv:2112.00861), for which the model keeps its language. centre: weight of (R(w) + R(l))^2, which
  holds rewards near 0 (arXiv:2312.09244).
  """
  if not 0 <= noise < 1:
    raise UserError(f'noise={noise} is a probability: choose 0 <= noise < 1')
  told = sequence.together(batch, ('chosen', 'rejected'))
  size = sequence.totals(jnp.ones_like(told['weights']), told, 2)
  if lm:
    found = sequence.tokens(model, params, told, rng)
    x, aux = found.x, found.aux
    imitation = -sequence.totals(found.logp, told, 2)[0] / jnp.maximum(size[0], 1e-9)
  else:
    x, _, aux = model.hidden(params, told, rng=rng)
    imitation = 0.0
  w, l = of_texts(params, x, told, 2)
  counts = (jnp.stack(size).min(0) > 0).astype(jnp.float32)
  aux = {name: sequence.between(value, told, 2) for name, value in aux.items()}
  each = -_log_chance(w - l - batch.get('margin', 0.0), noise)
  texts = preference.Texts([w, l], size, counts, aux)
  more = dict(nll=imitation) if lm else {}
  return preference.compared(
    each + lm * imitation + centre * (w + l) ** 2, texts, w, l, ranking=each, **more
  )


def _log_chance(margin: jax.Array, noise: float) -> jax.Array:
  """log((1 - noise) sigmoid(margin) + noise / 2)."""
  if not noise:
    return jax.nn.log_sigmoid(margin)
  return jnp.logaddexp(jnp.log1p(-noise) + jax.nn.log_sigmoid(margin), jnp.log(noise / 2))


def ranked(model: Any, params: Any, batch: Batch, rng: jax.Array | None) -> Loss:
  """-1 / C(K, 2) sum over i better than j of log sigmoid(R_i - R_j), per prompt (InstructGPT, arXiv:2203.02155,
  equation 1).

  All pairs of a prompt are in one row (`ranking.py` says how), so each answer goes through the model once.
  """
  sides = ranking.names(batch)
  found, aux = _read(model, params, batch, rng, sides)
  r, apart = jnp.stack(found, 1), ranking.pairs(ranking.existing(batch, sides))
  count = jnp.maximum(apart.sum((1, 2)), 1)
  margins = r[:, :, None] - r[:, None, :]
  mean = lambda value: jnp.where(apart, value, 0).sum((1, 2)) / count
  each = -mean(jax.nn.log_sigmoid(margins))
  right = (margins > 0) + 0.5 * (margins == 0)
  there = apart.any((1, 2)).astype(jnp.float32)
  metrics = dict(accuracy=mean(right), margin=mean(margins))
  return preference.settle(each, there, metrics, aux)


def regression(model: Any, params: Any, batch: Batch, rng: jax.Array | None) -> Loss:
  """(R(y) - reward)^2 per text, for rewards that are known: `reward` f32 [batch] beside a text."""
  x, _, aux = model.hidden(params, batch, rng=rng)
  found = rewards(params, x, batch['weights'])
  counts = (batch['weights'].sum(-1) > 0).astype(jnp.float32)
  off = found - batch['reward']
  return preference.settle(off**2, counts, dict(absolute=jnp.abs(off), predicted=found), aux)


def process(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  labels: tuple,
) -> Loss:
  """Cross entropy of the judgement of each step, said as one token after it (PRM800K, arXiv:2305.20050, section 2.6).

  labels: the ids of the three words for a bad, neutral and good step. The batch is a text with `steps` int32
  [batch, length]: 0 where no step ends, else 1 bad, 2 neutral, 3 good at the last token of a step. Only those three
  words compete. Per step.
  """
  x, _, aux = model.hidden(params, batch, rng=rng)
  logp = _judgements(model, params, x, labels)
  steps = batch['steps']
  ends = (steps > 0).astype(jnp.float32)
  own = jnp.take_along_axis(logp, jnp.maximum(steps - 1, 0)[..., None], axis=-1)[..., 0]
  right = (logp.argmax(-1) == steps - 1) * ends
  sums = {name: (value * ends.sum(-1)).sum() for name, value in aux.items()}
  added = sum(value for name, value in sums.items() if not name.startswith('seen/'))
  return Loss(-(own * ends).sum() + added, ends.sum(), dict(accuracy=right.sum(), **sums))


def _judgements(model: Any, params: Any, x: jax.Array, labels: tuple) -> jax.Array:
  """log P(bad), log P(neutral), log P(good), f32 [batch, length, 3]."""
  if len(labels) != 3:
    raise UserError(f'labels={labels}: name three ids, of a bad, a neutral and a good step')
  logits = model.logits(model.head(params), x).astype(jnp.float32)
  return jax.nn.log_softmax(logits[..., jnp.asarray(labels)])


def solutions(
  model: Any, params: Any, batch: Batch, *, labels: tuple, combine: Any = jnp.prod
) -> jax.Array:
  """The score of each solution, f32 [batch]: `combine` (jnp.prod, or jnp.min) over its steps of the probability that a
  step is not bad, a neutral one counting as good (PRM800K, arXiv:2305.20050, appendix F.1)."""
  logp = _judgements(model, params, model.hidden(params, batch).x, labels)
  fine = 1 - jnp.exp(logp[..., 0])
  return combine(jnp.where(batch['steps'] > 0, fine, 1.0), axis=-1)


def centred(model: Any, params: Any, demonstrations: Iterable[Mapping[str, Any]]) -> Any:
  """`params` with the bias moved so that demonstrations have reward 0 on average (InstructGPT, section 3.5).

  demonstrations: batches of texts, such as `source.once()`.
  """
  total = count = 0.0
  run = jax.jit(lambda p, b: (score(model, p, b), b['weights'].sum(-1) > 0))
  for batch in demonstrations:
    found, there = run(params, batch)
    total, count = total + float((found * there).sum()), count + float(there.sum())
  if not count:
    raise UserError('there are no demonstrations to centre the rewards on: name another split')
  own = dict(params[scalar.NAME])
  return dict(params, **{scalar.NAME: dict(own, bias=own['bias'] - total / count)})
