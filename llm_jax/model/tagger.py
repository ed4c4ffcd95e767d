"""Networks that tag words, several tasks over one table of vectors (Collobert & Weston 2008, ICML, "A unified
architecture for natural language processing"; Collobert et al. 2011, arXiv:1103.0398).

    model = tagger.make(tables=((30_000, 50),), tasks=dict(case=4, mark=6))
    model = tagger.make(tables=..., tasks=..., network=functools.partial(tagger.sentence, far=20))

The vectors of a word's features side by side are what every task's layers read; nothing but the tables is shared. A
task is a model to `objectives.language.next_token`, whose targets are tags; `objectives.classify.tagged` trains all.
Outside a sentence there is id 0, a word like others (arXiv:1103.0398, section 3.3.1).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import weights
from llm_jax.core.errors import UserError
from llm_jax.model import param
from llm_jax.model.functions import Batch, Hidden, Params
from llm_jax.model.recurrent import sequence

Sizes = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


class Network(NamedTuple):
  """The layers of a task before its last one.

  sizes(features) -> name -> (shape, axis names), for words of so many features. run(params, x [batch, t + 2 reach,
  features], real bool [batch, t]) -> [batch, t, hidden]. reach: the words on either side of x.
  """

  sizes: Callable[[int], Sizes]
  run: Callable[[Params, jax.Array, jax.Array], jax.Array]
  hidden: int
  reach: int


class Tags(NamedTuple):
  """What an objective asks of a task's card. vocab: its tags."""

  vocab: int


class Task(NamedTuple):
  """One task as `model/functions.py` has models; batch['inputs']: int32 [batch, t, tables], batch['segments']: int32
  [batch, t], 0 for padding. The logits are f32 [batch, t, tags]."""

  hidden: Callable[..., Hidden]
  logits: Callable[[Params, jax.Array], jax.Array]
  head: Callable[[Params], Params]
  card: Tags


class Tagger(NamedTuple):
  """init(key) -> {tables: {'0': [rows, size], ...}, tasks: {name: its layers}}; axes: a tree like it."""

  init: Callable[[jax.Array], Params]
  axes: Any
  tasks: Mapping[str, Task]


def window(*, width: int = 5, hidden: int = 100) -> Network:
  """tanh(W x + b), x: the vectors of the `width` words around the one to be tagged, itself in the middle."""
  reach = _reach(width)

  def sizes(features: int) -> Sizes:
    return dict(up=((width * features, hidden), ('rank', 'ffn')), up_bias=((hidden,), ('ffn',)))

  def run(params: Params, x: jax.Array, real: jax.Array) -> jax.Array:
    del real
    return _layer(params, 'up', _windows(x, width), 'btr,rf->btf')

  return Network(sizes, run, hidden, reach)


def sentence(
  *, width: int = 3, filters: int = 100, hidden: int = 100, place: int = 5, far: int = 30
) -> Network:
  """tanh(W max_j (W_c x_ij + b_c) + b): a convolution over all words j of the sentence, which is told where j is.

  x_ij: the vectors of the `width` words around j, each beside one of `place` numbers for its distance from the word i
  to be tagged, which beyond `far` words is `far`. The maximum is of every filter by itself.
  """
  reach = _reach(width)

  def sizes(features: int) -> Sizes:
    return dict(
      places=((2 * far + 1, place), ('positions', 'rank')),
      convolution=((width * (features + place), filters), ('rank', 'filters')),
      convolution_bias=((filters,), ('filters',)),
      up=((filters, hidden), ('filters', 'ffn')),
      up_bias=((hidden,), ('ffn',)),
    )

  def run(params: Params, x: jax.Array, real: jax.Array) -> jax.Array:
    b, t = real.shape
    away = jnp.arange(x.shape[1])[None] - reach - jnp.arange(t)[:, None]  # [t, t + 2 reach]
    told = weights.dense(params['places'], x.dtype)[jnp.clip(away, -far, far) + far]
    sizes = (b, t, x.shape[1])
    pairs = [jnp.broadcast_to(y, (*sizes, y.shape[-1])) for y in (x[:, None], told[None])]
    around = _windows(jnp.concatenate(pairs, -1), width)  # [b, t, t, width * (features + place)]
    y = weights.einsum('btsr,ro->btso', around, params['convolution'])
    y = weights.add(y, params['convolution_bias'], 'o')
    y = jnp.where(real[:, None, :, None], y, -jnp.inf).max(2)
    return _layer(params, 'up', jnp.where(jnp.isfinite(y), y, 0), 'bto,of->btf')

  return Network(sizes, run, hidden, reach)


def make(*, tables: tuple, tasks: Mapping[str, int], network: Callable = window) -> Tagger:
  """A network for each of `tasks` (name -> number of tags) over the same `tables` (rows, size), one per feature.

  Rows begin as N(0, 1 / size), weights uniform within the root of 1 / (what they sum over), biases as 0.
  """
  if not tables or not tasks:
    raise UserError('a tagger needs a table of (rows, size) and a task with its number of tags')
  made, features = network(), sum(size for _, size in tables)
  parts = {name: _sizes(made, features, count) for name, count in tasks.items()}
  rows = {str(i): (tuple(shape), ('vocab', 'embed')) for i, shape in enumerate(tables)}

  def init(key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    keys = zip(jax.random.split(first, len(rows)), rows.items(), strict=True)
    drawn = {n: jax.random.normal(k, shape) * shape[1] ** -0.5 for k, (n, (shape, _)) in keys}
    keys = jax.random.split(second, len(parts))
    own = zip(keys, parts.items(), strict=True)
    return dict(tables=drawn, tasks={name: _draw(k, part) for k, (name, part) in own})

  named = lambda part: {name: axes for name, (_, axes) in part.items()}
  axes = dict(tables=named(rows), tasks={name: named(part) for name, part in parts.items()})
  return Tagger(init, axes, {name: _task(name, made, count) for name, count in tasks.items()})


def _task(name: str, network: Network, count: int) -> Task:
  def hidden(params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Hidden:
    del rng
    real = batch['segments'] > 0
    ids = jnp.where(real[..., None], batch['inputs'], 0)
    ids = jnp.pad(ids, ((0, 0), (network.reach,) * 2, (0, 0)))
    found = [
      weights.lookup(params['tables'][str(i)], ids[..., i], dtype=jnp.float32)
      for i in range(ids.shape[-1])
    ]
    x = jnp.concatenate(found, -1)
    return Hidden(network.run(params['tasks'][name], x, real), None, {})

  def logits(params: Params, x: jax.Array) -> jax.Array:
    own = params['tasks'][name]
    y = weights.einsum('btf,fc->btc', x, own['tags'], dtype=jnp.float32)
    return weights.add(y, own['tags_bias'], 'c')

  def head(params: Params) -> Params:
    own = params['tasks'][name]
    return dict(tasks={name: {part: own[part] for part in ('tags', 'tags_bias')}})

  return Task(hidden, logits, head, Tags(count))


def _sizes(network: Network, features: int, count: int) -> Sizes:
  last = dict(
    tags=((network.hidden, count), ('ffn', 'classes')), tags_bias=((count,), ('classes',))
  )
  return {**network.sizes(features), **last}


def _draw(key: jax.Array, sizes: Sizes) -> Params:
  made = {}
  for k, (name, (shape, _)) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True):
    bound = (1 if name == 'places' else shape[0]) ** -0.5
    draw = sequence.uniform(bound) if len(shape) > 1 else param.zeros
    made[name] = draw(k, shape)
  return made


def _layer(params: Params, name: str, x: jax.Array, eq: str) -> jax.Array:
  return jnp.tanh(weights.add(weights.einsum(eq, x, params[name]), params[f'{name}_bias'], eq[-1]))


def _windows(x: jax.Array, width: int) -> jax.Array:
  """[..., n, features] -> [..., n - width + 1, width * features]: neighbours side by side."""
  n = x.shape[-2] - width + 1
  return jnp.concatenate([x[..., j : j + n, :] for j in range(width)], axis=-1)


def _reach(width: int) -> int:
  if width < 1 or width % 2 == 0:
    raise UserError(f'width={width}: a window has a word in its middle, choose an odd number')
  return width // 2
