r"""In which proportions to mix domains: DoReMi, RegMix and the data mixing law.

DoReMi (Xie et al. 2023, arXiv:2305.10429) trains a small reference on some mixture, then a proxy of the same size with
group DRO over the domains: those in which the proxy is furthest behind the reference count more. The average of these
weights is the mixture for the large model (`tasks.mixture(rates=...)`). Here that is a source:

    sides = use(domains.make, sources=(use(pipeline.make, task=books), use(pipeline.make, task=wiki)), batch=24)
    source = use(mixture.doremi, source=sides, ref='runs/reference')

RegMix (Liu et al. 2024, arXiv:2407.01492) trains many tiny proxies on random mixtures and regresses the loss on them:

    tried = mixture.dirichlet(30, (1 / 3, 1 / 3, 1 / 3), seed=0)                # [30, 3]; train one proxy on each
    predict = mixture.regress(tried, loss, features=mixture.quadratic)
    rates = mixture.best(predict, mixture.dirichlet(100_000, (1 / 3, 1 / 3, 1 / 3), seed=1))
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import domains, pipeline
from llm_jax.objectives import sequence
from llm_jax.rl import annotate
from llm_jax.train import hooks

Predict = Callable[[np.ndarray], np.ndarray]  # mixtures [n, domains] -> loss [n]


# --- DoReMi -------------------------------------------------------------------------------------------


def reweigh(
  weights: np.ndarray, excess: np.ndarray, *, eta: float = 1.0, smoothing: float = 1e-3
) -> np.ndarray:
  """The domain weights after one step of exponentiated gradient ascent (Algorithm 1): f64 [domains], sum 1.

  excess: nats per token by which the proxy is behind the reference, each token's clipped at 0. smoothing: the share c
  of the uniform mixture in the result.
  """
  logits = np.log(weights) + eta * np.asarray(excess, np.float64)
  raised = np.exp(logits - logits.max())
  return (1 - smoothing) * raised / raised.sum() + smoothing / len(raised)


def doremi(
  model: Any,
  *,
  source: Callable,
  ref: str | None = None,
  seed: int = 0,
  eta: float = 1.0,
  smoothing: float = 1e-3,
  burn_in: int = 0,
  chunk: int | None = 32,
) -> 'DoReMi':
  """The source of a proxy's training by group DRO (Algorithm 1); train it with the ordinary objective.

  source: model -> source of batches with `domain`, see `data/domains.py`. ref: folder of the reference's run, see
  `rl/annotate.py` for it and `seed`. eta: step size. smoothing: c. burn_in: steps left out of the average; in a short
  run those in which the proxy learns its first letters are not few (paper: 0 of 200,000). chunk: see
  `language.next_token`.
  """
  if eta < 0 or not 0 <= smoothing <= 1 or burn_in < 0:
    raise UserError(
      f'eta={eta} and burn_in={burn_in} must not be negative, smoothing={smoothing} is a share of 1'
    )
  inner = source(model)
  reference = annotate.Frozen(model, inner.vocab, ref, seed).params
  told = dict(eta=eta, smoothing=smoothing, burn_in=burn_in, chunk=chunk)
  return DoReMi(model, inner, reference, **told)


class DoReMi:
  """A source of `domain`s in which each domain counts as much as its weight says.

  Before a batch is given away the weights take a step, with the parameters that the training state has by now. The
  weight of a domain's tokens is then such that the loss of the batch is sum_i a_i mean(loss of domain i).
  reference: training state -> parameters.
  """

  def __init__(
    self,
    model: Any,
    source: domains.Domains,
    reference: Callable[[Any], Any],
    *,
    eta: float = 1.0,
    smoothing: float = 1e-3,
    burn_in: int = 0,
    chunk: int | None = 32,
  ):
    self.batch, self.length, self.vocab = source.batch, source.length, source.vocab
    self._source, self._reference, self._step = source, reference, (eta, smoothing)
    self._measure = _excess(model, source.count, chunk)
    self.weights = np.full(source.count, 1 / source.count)
    self._sum, self._steps, self._burn_in = np.zeros(source.count), 0, burn_in

  @property
  def average(self) -> np.ndarray:
    """The mean of the weights of all steps after the first `burn_in`, what DoReMi answers: f64 [domains]."""
    counted = self._steps - self._burn_in
    return self._sum / counted if counted > 0 else self.weights

  def __call__(self, state: Any) -> pipeline.Batch:
    """The next batch, weighted by domain."""
    batch = self._source(state)
    measured = self._measure(state.params, self._reference(state), mesh.place(batch))
    excess, tokens = (np.asarray(x, np.float64) for x in jax.device_get(measured))
    eta, smoothing = self._step
    self.weights = reweigh(
      self.weights, excess / np.maximum(tokens, 1), eta=eta, smoothing=smoothing
    )
    self._steps += 1
    if self._steps > self._burn_in:
      self._sum = self._sum + self.weights
    scale = self.weights * tokens.sum() / np.maximum(tokens, 1)
    counted = batch['weights'] * scale[batch['domain']][:, None]
    return batch | dict(weights=counted.astype(np.float32))

  def state(self) -> dict[str, Any]:
    """Where the source and the weights stand."""
    found = dict(weights=self.weights.tolist(), sum=self._sum.tolist(), steps=self._steps)
    return dict(source=self._source.state(), doremi=found)

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    if 'doremi' not in state:
      raise UserError('this is not the state of a DoReMi source: restore another checkpoint')
    self._source.restore(state['source'])
    found = state['doremi']
    self.weights, self._sum = np.array(found['weights']), np.array(found['sum'])
    self._steps = int(found['steps'])

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches; the weights stay."""
    self._source.skip(batches)

  def once(self) -> Iterator[pipeline.Batch]:
    """One pass over the domains, every target counting 1."""
    return self._source.once()

  def close(self) -> None:
    """Stops the threads."""
    self._source.close()


def _excess(model: Any, count: int, chunk: int | None) -> Callable:
  """(proxy, reference, batch) -> (sum of the clipped excess losses, tokens) by domain."""

  @jax.jit
  def measure(params: Any, ref: Any, batch: Mapping[str, jax.Array]) -> tuple:
    loss = lambda p: -sequence.tokens(model, p, batch, chunk=chunk).logp
    excess = jnp.maximum(loss(params) - loss(ref), 0)
    rows = jax.nn.one_hot(batch['domain'], count)  # [batch, domains]
    return tuple(
      (rows * x.sum(-1)[:, None]).sum(0) for x in (excess * batch['weights'], batch['weights'])
    )

  return measure


def trace(run: hooks.Run, *, every: int = 100, names: tuple = ()) -> hooks.Hook:
  """Every `every` steps and at the last: the domain weights, `domain/NAME` now and `domain/NAME/average`.

  names: of the domains, default their numbers.
  """
  told = names or tuple(map(str, range(len(run.source.weights))))
  if len(told) != len(run.source.weights) or every < 1:
    raise UserError(f'trace: {len(run.source.weights)} domains, names={names}, every={every}')

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    del state, metrics
    if step and (step % every == 0 or step == run.steps):
      now = {f'domain/{name}': x for name, x in zip(told, run.source.weights, strict=True)}
      mean = {f'domain/{name}/average': x for name, x in zip(told, run.source.average, strict=True)}
      run.writer.write(step, now | mean)

  return hook


# --- RegMix and the data mixing law ---------------------------------------------------------------------


def dirichlet(
  count: int, prior: tuple, *, strength: tuple = (0.1, 5.0), least: float = 0.0, seed: int = 0
) -> np.ndarray:
  """Mixtures to try: [count, domains] from Dirichlet(s * prior), s log-uniform between the bounds `strength`.

  least: what a domain has at the least; the rest is shared as drawn.
  """
  share = np.asarray(prior, np.float64) / np.sum(prior)
  if share.min() <= 0 or not 0 <= least * len(share) < 1:
    raise UserError(f'prior={prior} must be positive and least={least} below 1 / domains')
  rng = np.random.default_rng(seed)
  s = np.exp(rng.uniform(*np.log(strength), count))
  drawn = np.array([rng.dirichlet(one * share) for one in s])
  return least + (1 - least * len(share)) * drawn


def linear(mixtures: np.ndarray) -> np.ndarray:
  """The shares themselves [n, k]: the loss is a mean over domains. They sum to 1, so there is no intercept."""
  return np.asarray(mixtures, np.float64)


def quadratic(mixtures: np.ndarray) -> np.ndarray:
  """Shares and the products of two, [n, k (k + 1) / 2]: the full quadratic on the simplex (Scheffe 1958)."""
  x = np.asarray(mixtures, np.float64)
  i, j = np.triu_indices(x.shape[1], 1)
  return np.concatenate([x, x[:, i] * x[:, j]], 1)


def logarithmic(mixtures: np.ndarray, *, floor: float = 1e-3) -> np.ndarray:
  """Shares and their logarithms, [n, 2 k]: the loss rises ever faster as a domain runs out."""
  x = np.asarray(mixtures, np.float64)
  return np.concatenate([x, np.log(np.maximum(x, floor))], 1)


def regress(mixtures: np.ndarray, loss: np.ndarray, *, features: Callable = quadratic) -> Predict:
  """Least squares of `loss` [n] on features of mixtures [n, domains]; gives mixtures -> predicted loss."""
  x = features(mixtures)
  if len(x) < x.shape[1]:
    raise UserError(f'{len(x)} mixtures do not determine {x.shape[1]} coefficients: train more')
  found = np.linalg.lstsq(x, np.asarray(loss, np.float64), rcond=None)[0]
  return lambda other: features(other) @ found


def exponential(mixtures: np.ndarray, loss: np.ndarray) -> Predict:
  """The data mixing law, L(r) = c + k exp(sum_j t_j r_j) with k > 0 (Ye et al. 2024, arXiv:2403.16952, eq. 6).

  Least squares from several starts. k is absorbed: the shares sum to 1, so k exp(t r) = exp((t + log k) r).
  """
  from scipy import optimize

  x, y = np.asarray(mixtures, np.float64), np.asarray(loss, np.float64)
  if len(x) <= x.shape[1]:
    raise UserError(f'{len(x)} mixtures do not determine {x.shape[1] + 1} constants: train more')
  law = lambda theta, r: theta[0] + np.exp(r @ theta[1:])
  tries = []
  for share in (0.1, 0.5, 0.9, 0.99):  # of the lowest loss that no mixture removes
    c = share * y.min()
    t = np.linalg.lstsq(x, np.log(y - c), rcond=None)[0]
    tries.append(optimize.least_squares(lambda theta: law(theta, x) - y, np.array([c, *t])))
  found = min(tries, key=lambda one: one.cost).x
  return lambda other: law(found, np.asarray(other, np.float64))


def best(predict: Predict, candidates: np.ndarray, *, top: int = 100) -> np.ndarray:
  """The mean of the `top` candidates [n, domains] of lowest predicted loss: [domains]."""
  order = np.argsort(predict(candidates), kind='stable')
  return candidates[order[:top]].mean(0)
