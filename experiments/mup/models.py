"""One small decoder in two parametrisations, at any width and depth; what its layers do after some steps."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import small
from llm_jax.core import tree, widths
from llm_jax.model import depth, ffn, heads, init, norms
from llm_jax.model.functions import Model
from llm_jax.optim import chain, mup, rules, schedules

HEAD_DIM = 32


class Base(NamedTuple):
  """The model that the others are measured against. alpha: of the depth, see `widths.residual_multiplier`."""

  width: int = 64
  layers: int = 2
  alpha: float = 0.5

  @property
  def sizes(self) -> dict[str, int]:
    """Its axes that grow."""
    heads, w = self.width // HEAD_DIM, self.width
    return dict(embed=w, ffn=2 * w, heads=heads, groups=heads, norm=w, layers=self.layers)


class Parametrisation(NamedTuple):
  """recipe: of the initial values. multiplier: of the residual branches. scaling: of the learning rate."""

  recipe: Callable
  multiplier: float
  scaling: Callable


def standard(base: Base, layers: int) -> Parametrisation:
  """Every weight by its fan-in, one learning rate."""
  del base, layers
  return Parametrisation(init.palm, 1.0, chain.unscaled)


def transferred(base: Base, layers: int, *, rule: Callable = mup.adam) -> Parametrisation:
  """muP, which is `standard` in the base model."""
  return Parametrisation(
    functools.partial(init.mup, base=base.sizes, recipe=init.palm),
    widths.residual_multiplier(layers=layers, base=base.layers, alpha=base.alpha),
    functools.partial(rule, base=base.sizes, alpha=base.alpha),
  )


PARAMETRISATIONS = {'standard': standard, 'muP': transferred}


def model(
  width: int, layers: int, vocab: int, multiplier: float = 1.0, recipe: Callable = init.palm
) -> Model:
  """A decoder with heads of 32, RoPE, RMSNorm, an MLP of twice its width and a head of its own."""
  residual = functools.partial(norms.scaled, multiplier=multiplier)
  sizes = dict(vocab=vocab, embed=width, layers=layers, heads=width // HEAD_DIM)
  return small.decoder(**sizes, mlp=ffn.MLP, residual=residual, head=heads.Untied, init=recipe)


class Program(NamedTuple):
  """What is compiled once for all rates, seeds and parametrisations of a size.

  run(peak, factors, params, batches [steps, ...]) -> (params, losses [steps]); factors: (axis names, shape) -> of the
  rate. look(params, batch) -> (the residual stream before the first and after every layer, logits).
  """

  run: Callable
  look: Callable


@functools.cache
def program(
  width: int, layers: int, vocab: int, multiplier: float, steps: int, rule: Callable = rules.adamw
) -> Program:
  """A size, trained for `steps`: the rate is warmed up over a tenth of them and comes down to zero on a line."""
  made = model(width, layers, vocab, multiplier)
  curve = functools.partial(
    schedules.linear, peak=1.0, steps=steps, warmup=max(1, steps // 10), floor=0.0
  )
  run = small.scanned(made, rule=rule, schedule=curve, clip=None)
  looks = depth.exits(tuple(range(layers + 1)))._replace(end=lambda kept, finish: kept)

  @jax.jit
  def look(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    found = made.hidden(params, batch, around=looks)
    return found.aux['around'], made.logits(params, found.x)

  return Program(run, look)


class Run(NamedTuple):
  """A model of one size and parametrisation. train(peak, params, batches) -> (params, losses). look: see `Program`."""

  model: Model
  train: Callable
  look: Callable


def build(
  chosen: Parametrisation, width: int, layers: int, vocab: int, steps: int, **more: Any
) -> Run:
  """What is trained for `steps`; more: as `program` takes it."""
  made = model(width, layers, vocab, chosen.multiplier, chosen.recipe)
  run, look = program(width, layers, vocab, chosen.multiplier, steps, **more)
  shapes = tree.flatten(jax.eval_shape(made.init, jax.random.key(0)))
  names = tree.flatten(made.axes, is_leaf=tree.is_names)
  factors = {
    (names[path], x.shape): float(chosen.scaling(names[path], x.shape))
    for path, x in shapes.items()
  }
  train = lambda peak, params, batches: run(jnp.float32(peak), factors, params, batches)
  return Run(made, train, look)


def moved(run: Run, peak: float, params: Any, batches: Any, layers: int) -> dict[str, float]:
  """How far the coordinates are, after training, from where they began: the mean of |x_t - x_0| over the first batch,
  of the residual stream after every layer and of the logits (the coordinate check, arXiv:2203.03466, appendix D.1)."""
  batch = jax.tree.map(lambda x: x[0], batches)
  before, after = (run.look(p, batch) for p in (params, run.train(peak, params, batches)[0]))
  mean = lambda x, y, axes=None: np.abs(np.asarray(x) - np.asarray(y)).mean(axes)
  told = {f'layer {i}': float(x) for i, x in enumerate(mean(after[0], before[0], (1, 2, 3)))}
  return dict(told, logits=float(mean(after[1], before[1])))


def slopes(sizes: Sequence[int], rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """The exponents of power laws in the size through what `moved` found, by name."""
  x = np.log(np.asarray(sizes, float))
  return {name: float(np.polyfit(x, np.log([row[name] for row in rows]), 1)[0]) for name in rows[0]}
