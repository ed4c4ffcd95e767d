"""Learning from preferences without a reward model: pairs of texts, or single texts called good or bad.

A batch of pairs has `chosen/...` and `rejected/...` (the arrays of a text, `weights` 1 on the response), and where an
objective compares with a reference model, `chosen/ref_logp` and `rejected/ref_logp`, f32 [batch]: the reference's
log-probability of the response, which `rl/annotate.py` adds. No objective holds a second model. Where rows branch and
hold several pairs (data/branches.py), [batch] is [batch, comparisons] in all that is said of pairs.

Each returns sums over pairs (or texts) and their number, so microbatches agree. With w the chosen and l the rejected
response, log p the sum over a response, |y| its tokens and r the log-ratio log p(y|x) - log ref(y|x), metrics are
accuracy (the chosen one scores higher), margin, and the scores chosen and rejected themselves. A row without targets
is padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.objectives import sequence
from llm_jax.objectives.loss import Loss

Batch = Mapping[str, jax.Array]


class Texts(NamedTuple):
  """What the sides of a batch are worth to a model.

  logp: of each side's response, nats, f32 [batch]. size: its targets, f32 [batch]. counts: 1 where all sides have
  targets, f32 [batch]. aux: the model's auxiliary losses by name, the mean over the sides, [batch]. entropy: of the
  model's distributions over each side's response, summed over its targets, nats, f32 [batch].
  """

  logp: list[jax.Array]
  size: list[jax.Array]
  counts: jax.Array
  aux: dict[str, jax.Array]
  entropy: Sequence[jax.Array] = ()

  def mean(self, i: int) -> jax.Array:
    """log p(y|x) / |y| of side i; -1 in rows of padding, where 0 would be no log-probability."""
    return jnp.where(self.counts > 0, self.logp[i] / jnp.maximum(self.size[i], 1), -1.0)


def read(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  names: Sequence[str],
  chunk: int | None,
) -> Texts:
  """The texts called `names`, through the model in one forward. chunk: as in `sequence.tokens`."""
  told = sequence.together(batch, names)
  return _texts(model, params, told, rng, len(names), chunk)


def _texts(model, params, told, rng, count, chunk) -> Texts:
  found = sequence.tokens(model, params, told, rng, chunk=chunk)
  logp = sequence.totals(found.logp, told, count)
  size = sequence.totals(jnp.ones_like(told['weights']), told, count)
  counts = (jnp.stack(size).min(0) > 0).astype(jnp.float32)
  aux = {name: sequence.between(value, told, count) for name, value in found.aux.items()}
  entropy = sequence.totals(found.entropy, told, count)
  return Texts(logp, size, counts, aux, entropy)


def settle(
  each: jax.Array, counts: jax.Array, metrics: Mapping[str, jax.Array], aux: Mapping[str, jax.Array]
) -> Loss:
  """The Loss of a value [batch] per row, of the rows that count; auxiliary losses are added once per row."""
  total = lambda value: jnp.where(counts > 0, value, 0).astype(jnp.float32).sum()
  added = [value for name, value in aux.items() if not name.startswith('seen/')]
  sums = {name: total(value) for name, value in {**metrics, **aux}.items()}
  return Loss(sum(map(total, added), total(each)), counts.sum(), sums)


def compared(
  each: jax.Array, texts: Texts, chosen: jax.Array, rejected: jax.Array, **more: jax.Array
) -> Loss:
  """`settle` with the metrics of a pair, whose scores are `chosen` and `rejected`, [batch]; a tie is half right."""
  right = (chosen > rejected) + 0.5 * (chosen == rejected)
  metrics = dict(accuracy=right, margin=chosen - rejected, chosen=chosen, rejected=rejected, **more)
  return settle(each, texts.counts, metrics, texts.aux)


def reference(batch: Batch, name: str) -> jax.Array:
  """An array that the reference model gave."""
  if name not in batch:
    raise UserError(
      f'the batch has no {name}: wrap the source, use(annotate.with_reference, source=..., ref=RUN)'
    )
  return jax.lax.stop_gradient(batch[name])


def _ratios(model, params, batch, rng, chunk) -> tuple[Texts, jax.Array, jax.Array]:
  """(texts, r of the chosen, r of the rejected)."""
  texts = read(model, params, batch, rng, ('chosen', 'rejected'), chunk)
  w, l = (
    logp - reference(batch, f'{side}/ref_logp')
    for logp, side in zip(texts.logp, ('chosen', 'rejected'), strict=True)
  )
  return texts, w, l


def _smoothed(margin: jax.Array, label_smoothing: float, batch: Batch | None = None) -> jax.Array:
  """-log sigmoid(margin), where a label is wrong with probability `label_smoothing`, or 1 - batch['chance']."""
  if not 0 <= label_smoothing < 0.5:
    raise UserError(
      f'label_smoothing={label_smoothing}: choose a probability below 1/2 that a label is wrong'
    )
  right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  odds = 1 - batch['chance'] if batch and 'chance' in batch else label_smoothing
  return -(1 - odds) * right - odds * wrong


def dpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  chunk: int | None = 32,
) -> Loss:
  """-log sigmoid(beta (r_w - r_l)), direct preference optimisation (arXiv:2305.18290, equation 7).

  label_smoothing: cDPO, the probability that a label is wrong; a batch with `chance` f32 [batch], the probability that
  each is right (RLAIF's soft labels, arXiv:2309.00267, section 2.2), says it per pair. Without a reference it is
  `cpo(nll=0)`.
  """
  texts, w, l = _ratios(model, params, batch, rng, chunk)
  return compared(_smoothed(beta * (w - l), label_smoothing, batch), texts, beta * w, beta * l)


def robust_dpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
  chunk: int | None = 32,
) -> Loss:
  """DPO whose expectation is that under clean labels, if `label_smoothing` of them are flipped.

  ((1 - e) L(m) - e L(-m)) / (1 - 2e) with L(m) = -log sigmoid(m) (arXiv:2403.00409, equation 12).
  """
  texts, w, l = _ratios(model, params, batch, rng, chunk)
  margin, e = beta * (w - l), label_smoothing
  each = ((1 - e) * _smoothed(margin, 0.0) - e * _smoothed(-margin, 0.0)) / (1 - 2 * e)
  return compared(each, texts, beta * w, beta * l)


def hinge_dpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  chunk: int | None = 32,
) -> Loss:
  """max(0, 1 - beta (r_w - r_l)): the hinge of SLiC on DPO's margin (RSO, arXiv:2309.06657, table 1)."""
  texts, w, l = _ratios(model, params, batch, rng, chunk)
  return compared(jax.nn.relu(1 - beta * (w - l)), texts, beta * w, beta * l)


def ipo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  chunk: int | None = 32,
) -> Loss:
  """(r_w / |w| - r_l / |l| - 1 / (2 beta))^2, identity preference optimisation (arXiv:2310.12036, equation 17).

  Log-ratios per token, as its authors computed them (and TRL does), or the target would depend on the length.
  """
  texts, w, l = _ratios(model, params, batch, rng, chunk)
  w, l = (r / jnp.maximum(size, 1) for r, size in zip((w, l), texts.size, strict=True))
  return compared((w - l - 1 / (2 * beta)) ** 2, texts, beta * w, beta * l)


def simpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 2.0,
  gamma: float = 1.0,
  chunk: int | None = 32,
) -> Loss:
  """-log sigmoid(beta (log p(w) / |w| - log p(l) / |l|) - gamma) (SimPO, arXiv:2405.14734, equation 6).

  gamma: the margin by which the chosen one should win. No reference.
  """
  texts = read(model, params, batch, rng, ('chosen', 'rejected'), chunk)
  w, l = beta * texts.mean(0), beta * texts.mean(1)
  return compared(_smoothed(w - l - gamma, 0.0), texts, w, l)


def cpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  nll: float = 1.0,
  label_smoothing: float = 0.0,
  chunk: int | None = 32,
) -> Loss:
  """-log sigmoid(beta (log p(w) - log p(l))) - nll log p(w) / |w| (CPO, arXiv:2401.08417, equations 3 to 5).

  nll: weight of imitating the chosen one; 0 leaves DPO without a reference.
  """
  texts = read(model, params, batch, rng, ('chosen', 'rejected'), chunk)
  w, l = beta * texts.logp[0], beta * texts.logp[1]
  imitation = -texts.mean(0)
  each = _smoothed(w - l, label_smoothing, batch) + nll * imitation
  return compared(each, texts, w, l, nll=imitation)


def orpo(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  chunk: int | None = 32,
) -> Loss:
  """-log P(w) - beta log sigmoid(log odds(w) - log odds(l)), log P(y) = log p(y) / |y| and odds = P / (1 - P).

  ORPO, arXiv:2403.07691, equations 3, 6 and 7, where beta is called lambda. The first term imitates the response alone;
  TRL's imitates the prompt as well.
  """
  texts = read(model, params, batch, rng, ('chosen', 'rejected'), chunk)
  w, l = (logp - jnp.log(-jnp.expm1(logp)) for logp in (texts.mean(0), texts.mean(1)))
  imitation = -texts.mean(0)
  return compared(imitation + beta * _smoothed(w - l, 0.0), texts, w, l, nll=imitation)


def slic(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  delta: float = 1.0,
  nll: float = 0.1,
  target: str = 'chosen',
  chunk: int | None = 32,
) -> Loss:
  """max(0, delta - log p(w) + log p(l)) - nll log p(target) (SLiC-HF, arXiv:2305.10425, equation 1).

  target: the side that keeps the model near what it learnt in fine-tuning; the paper takes the text of that data.
  nll: the weight lambda of that.
  """
  names = list(dict.fromkeys(('chosen', 'rejected', target)))
  texts = read(model, params, batch, rng, names, chunk)
  w, l, *_ = texts.logp
  imitation = -texts.logp[names.index(target)]
  return compared(jax.nn.relu(delta - w + l) + nll * imitation, texts, w, l, nll=imitation)


def unlikelihood(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  alpha: float = 1.0,
  chunk: int | None = 32,
) -> Loss:
  """-log p(w) / |w| - alpha mean_t log(1 - p(l_t)): the rejected response's tokens become unlikely (arXiv:1908.04319,
  equations 3 and 5)."""
  told = sequence.together(batch, ('chosen', 'rejected'))
  found = sequence.tokens(model, params, told, rng, chunk=chunk)
  size = sequence.totals(jnp.ones_like(told['weights']), told, 2)
  mean = lambda values: [
    y / jnp.maximum(n, 1e-9) for y, n in zip(sequence.totals(values, told, 2), size, strict=True)
  ]
  w, l = mean(found.logp)
  away = jnp.log(-jnp.expm1(jnp.minimum(found.logp, -1e-7)))  # 1 - p of a certain token is no 0
  _, unlikely = mean(away)
  aux = {name: sequence.between(value, told, 2) for name, value in found.aux.items()}
  texts = Texts([w, l], size, (jnp.stack(size).min(0) > 0).astype(jnp.float32), aux)
  return compared(-w - alpha * unlikely, texts, w, l, nll=-w)


def kto(
  model: Any,
  params: Any,
  batch: Batch,
  rng: jax.Array | None,
  *,
  beta: float = 0.1,
  desirable: float = 1.0,
  undesirable: float = 1.0,
  chunk: int | None = 32,
) -> Loss:
  """Single texts, good or bad: d (1 - sigmoid(beta (r - z))) or u (1 - sigmoid(beta (z - r))) (arXiv:2402.01306,
  equation 8).

  The batch is one text per row with `desirable` bool [batch], `ref_logp` and `kl` f32 [batch]. kl: z, how far the
  policy is from the reference on responses of other prompts. It belongs to the whole batch and has no gradient, so it
  comes with the batch (`annotate.with_kl`), or microbatches would differ. desirable, undesirable: d and u.
  """
  texts = _texts(model, params, batch, rng, 1, chunk)
  z, good = reference(batch, 'kl'), batch['desirable']
  reward = texts.logp[0] - reference(batch, 'ref_logp')
  gain = jnp.where(good, 1.0, -1.0) * (reward - z)
  each = jnp.where(good, desirable, undesirable) * jax.nn.sigmoid(-beta * gain)
  metrics = dict(accuracy=gain > 0, reward=beta * reward, margin=beta * gain, kl=z)
  return settle(each, texts.counts, metrics, texts.aux)
