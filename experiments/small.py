"""What studies of small models share: a store of finished runs, a small LLaMA, its training, its loss on batches."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import files, mesh
from llm_jax.data import batch as batching
from llm_jax.data import pipeline, tasks, vocab
from llm_jax.model import attention, block, ffn, norms, transformer
from llm_jax.model.functions import Model
from llm_jax.objectives import language
from llm_jax.optim import chain, rules
from llm_jax.train import loop, state, step


class Cells:
  """What has been trained: a line of JSON each in FOLDER/cells.jsonl, found by name. Several processes may add."""

  def __init__(self, folder: str):
    os.makedirs(folder, exist_ok=True)
    self._path = os.path.join(folder, 'cells.jsonl')

  def all(self) -> dict[str, dict[str, Any]]:
    """Name -> what was measured."""
    return {one['cell']: one for one in files.lines(self._path)}

  def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `name` measured; `make()` does where it has not been. cpu: seconds of all the process's threads."""
    if name not in self.all():
      begin, spent = time.perf_counter(), time.process_time()
      told = dict(cell=name, **make())
      told['seconds'] = round(time.perf_counter() - begin, 1)
      told['cpu'] = round(time.process_time() - spent, 1)
      with open(self._path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(told) + '\n')
      print(f'{told["cpu"]:6} s', json.dumps(told)[:200], flush=True)
    return self.all()[name]


def decoder(
  *, embed: int, heads: int, mlp: Any = ffn.Gated, residual: Callable = norms.pre, **more: Any
) -> Model:
  """A small LLaMA whose feed-forward is twice its width. more: of `transformer.causal`."""
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=heads),
    ffn=functools.partial(mlp, hidden=2 * embed),
    residual=residual,
  )
  return transformer.causal(embed=embed, block=layer, **more)


def trainer(
  model: Model, *, steps: int, schedule: Callable, chunk: int | None = None, **optimizer: Any
) -> Callable:
  """train(source, seed) -> the parameters after `steps` updates, by the ordinary loop; compiled once for all runs.

  train also takes the first params (it keeps them whole) and hooks of the loop. optimizer: of `chain.make`.
  """
  tx = chain.make(model.axes, schedule=schedule, **optimizer)
  update = step.make(functools.partial(language.next_token, model, chunk=chunk), tx)

  def start(params: Any) -> state.State:
    return state.State(jnp.zeros((), jnp.int32), params, tx.init(params))

  fresh = jax.jit(lambda key: start(model.init(key)))

  def train(source: Any, seed: int, params: Any = None, hooks: Iterable[Callable] = ()) -> Any:
    key = jax.random.key(seed)
    copy = lambda: jax.tree.map(
      lambda x: jnp.array(x, copy=True), params
    )  # an update reuses its own
    first = fresh(key) if params is None else start(copy())
    return loop.train(first, source, update, steps=steps, key=key, hooks=tuple(hooks)).params

  return train


def scanned(
  model: Model, *, schedule: Callable, rule: Callable = rules.adamw, **optimizer: Any
) -> Callable:
  """run(peak, factors, params, batches) -> (params, losses [steps]): all steps in one program, compiled once for every
  learning rate.

  schedule: of peak 1. factors: (axis names, shape) -> of the rate, None for ones. batches: stacked, [steps, ...].
  """

  @jax.jit
  def run(peak: jax.Array, factors: Any, params: Any, batches: Any) -> tuple[Any, jax.Array]:
    # the rate is traced, so it comes in as a scaling
    scaling = lambda names, shape: peak * (1.0 if factors is None else factors[names, shape])
    tx = chain.make(model.axes, rule=rule, schedule=schedule, scaling=scaling, **optimizer)
    update = step.make(functools.partial(language.next_token, model, chunk=None), tx)
    first = state.State(jnp.zeros((), jnp.int32), params, tx.init(params))

    def one(now: Any, batch: Any) -> tuple:
      now, metrics = update(now, batch, jax.random.key(0))
      return now, metrics['loss']

    last, losses = jax.lax.scan(one, first, batches)
    return last.params, losses

  return run


def evaluator(model: Model, *, chunk: int | None = None) -> Callable:
  """(params, batches) -> nats per target token."""

  @jax.jit
  def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    loss = language.next_token(model, params, batch, None, chunk=chunk)
    return loss.metrics['nats'], loss.weight

  def measure(params: Any, batches: Iterable) -> float:
    found = [jax.device_get(sums(params, mesh.place(b))) for b in batches]
    nats, weight = np.sum(found, axis=0)
    return float(nats / weight)

  return measure


def text(
  model: Model, split: str, number: int, *, batch: int, length: int, seed: int
) -> dict[str, jax.Array]:
  """`number` batches of bytes of tiny Shakespeare, stacked: [number, batch, length]."""
  source = pipeline.make(
    model,
    task=lambda: tasks.tiny_shakespeare(vocab=lambda t: vocab.bytes_(t, extra_ids=0, modes=())),
    split=split,
    batch=batch,
    length=length,
    rows=batching.concatenate,
    seed=seed,
  )
  with contextlib.closing(source):
    drawn = [source(None) for _ in range(number)]
  names = ('inputs', 'targets', 'weights')
  return {name: jnp.asarray(np.stack([b[name] for b in drawn])) for name in names}
