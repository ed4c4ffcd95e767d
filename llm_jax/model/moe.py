"""Mixtures of experts: a feed-forward of many parts, of which each token meets a few.

    MoE(experts=8, expert=functools.partial(ffn.Gated, hidden=14336), top_k=2)(x [b, t, d], ctx) -> (y, aux)

An expert is a feed-forward of `model/ffn.py`. A router (`model/routers.py`) says who meets whom, a dispatch
(`model/dispatch.py`) brings tokens to experts. GLaM's every other layer (Du et al. 2021, arXiv:2112.06905) is a pattern
of two blocks, one of them with this. Like GShard's groups, each row of a batch is routed and balanced by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import mesh, weights
from llm_jax.core.errors import UserError
from llm_jax.model import dispatch, ffn, param, routers
from llm_jax.model.dropout import dropout
from llm_jax.model.routers import Routing, Told


class MoE(nn.Module):
  """The weighted sum of the experts that a token is routed to (Shazeer et al. 2017, arXiv:1701.06538, eq. 1).

  experts: how many; over the mesh axis `expert` they are split. expert: what each is, `ffn.Gated` or `ffn.MLP` with its
  arguments. top_k: experts per token. router, dispatch: see there. shared: a feed-forward that all tokens meet as well
  (DeepSeekMoE, arXiv:2401.06066; n shared experts are one of n times the width). jitter: in training the router sees
  inputs times a number between 1 - jitter and 1 + jitter (Switch: 0.01). balance, z_loss: coefficients of the losses
  `balance` and `router_z` (Switch: 0.01; ST-MoE: 0.001). `seen/dropped` is the part of pairs that found no
  place, summed over layers like the losses.

  The router computes in f32 whatever the dtype (Switch, section 2.4).
  """

  experts: int
  expert: Callable = ffn.Gated
  top_k: int = 2
  router: Callable = routers.top_k_softmax
  dispatch: Callable = dispatch.dropless
  shared: Callable | None = None
  jitter: float = 0.0
  balance: float = 0.0
  z_loss: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    keys = (None,) * 4 if ctx.rng is None else jax.random.split(ctx.rng, 4)
    real = jnp.ones_like(x[..., 0], bool)
    if ctx.mask.segments is not None:
      real = ctx.mask.segments[0] > 0
    ids = None if ctx.ids is None else mesh.shard(ctx.ids, 'batch', 'length')
    real = mesh.shard(real, 'batch', 'length')
    told = Told(self.experts, self.top_k, real, ctx.mask.causal, ids, keys[0])
    found = self.router(lambda: self._scores(x, keys[1]), told)
    y, dropped = self._experts(x, found, keys[2])
    if self.shared is not None:
      also, aux = self.shared(name='shared')(x, ctx._replace(rng=keys[3]))
      y = y + also
    else:
      aux = {}
    if self.balance:
      aux = dict(aux, balance=self.balance * routers.balance(found, told))
    if self.z_loss:
      aux = dict(aux, router_z=self.z_loss * routers.z_loss(found, told))
    return y, {**aux, 'seen/dropped': dropped}

  @nn.nowrap
  def _scores(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """f32 [b, t, experts]."""
    x = x.astype(jnp.float32)
    if rng is not None and self.jitter:
      like = jax.typeof(x).sharding if mesh.is_explicit() else None
      low, high = 1 - self.jitter, 1 + self.jitter
      x = x * jax.random.uniform(rng, x.shape, minval=low, maxval=high, out_sharding=like)
    shape = (x.shape[-1], self.experts)
    w = param.weight(self, 'router', shape, ('embed', 'expert'), 'router')
    return weights.einsum('btd,de->bte', x, w, dtype=jnp.float32)

  @nn.nowrap
  def _experts(self, x: jax.Array, found: Routing, rng: jax.Array | None) -> tuple:
    """(y [b, t, d], dropped [b]), on one device or within a `shard_map` over all of them."""
    expert = self.expert(parent=None)
    w, letters = self._weights(expert, x.shape[-1], x.dtype)
    if self.is_initializing():
      return x, jnp.zeros(x.shape[:1])
    found = found._replace(logits=None, load=None)
    run = functools.partial(_run, self.dispatch, expert, self.experts, self.top_k)
    if mesh.current() is None:
      return run(dict(split=(), summed=(), rows=()), x, found, w, rng)
    specs = {name: mesh.used(*weights.axes_of(axes)) for name, axes in letters.items()}
    batch, split, summed = map(mesh.named, (mesh.spec('batch')[0], *specs['down'][:2]))
    if not set(split) <= set(batch):
      raise UserError(
        f'the experts are split over {split}, the batch over {batch}: '
        "let axes.activations.batch name the experts' mesh axes too"
      )
    axes = dict(split=split, summed=summed, rows=batch)
    rows = mesh.spec('batch')
    spare = -x.shape[0] % math.prod(mesh.current().shape[a] for a in batch)
    moved = jax.tree.map(lambda a: _rows(a, spare), (x, found))
    y, dropped = jax.shard_map(
      functools.partial(run, axes),
      in_specs=(rows, rows, specs, jax.sharding.PartitionSpec()),
      out_specs=(rows, rows),
    )(*moved, w, rng)
    y, dropped = (y[: x.shape[0]], dropped[: x.shape[0]]) if spare else (y, dropped)
    return mesh.shard(y, 'batch', 'length', 'embed'), dropped

  @nn.nowrap
  def _weights(self, expert: Any, embed: int, dtype: Any) -> tuple[dict, dict]:
    """All experts' weights by name, and the letters of their axes."""
    sizes, found, letters = dict(e=self.experts, d=embed, f=expert.hidden), {}, {}

    def declare(name: str, axes: str, init: Any) -> None:
      shape = tuple(sizes[letter] for letter in axes)
      w = param.weight(self, name, shape, weights.axes_of(axes), init)
      found[name], letters[name] = weights.ready(w, axes, dtype), axes

    for name in expert.inward:
      declare(name, 'edf', 'ffn_in')
      if expert.bias:
        declare(f'{name}_bias', 'ef', param.zeros)
    declare('down', 'efd', 'ffn_out')
    if expert.bias:
      declare('down_bias', 'ed', param.zeros)
    return found, letters


def _rows(x: jax.Array, spare: int) -> jax.Array:
  """An array [batch, ...] with `spare` more rows, split over the devices of the batch."""
  if spare:
    x = jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1)))
  return mesh.shard(x, 'batch', *(None,) * (x.ndim - 1))


def _run(
  send: Callable,
  expert: Any,
  experts: int,
  k: int,
  axes: dict[str, tuple[str, ...]],
  x: jax.Array,
  found: Routing,
  w: dict[str, jax.Array],
  rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """One device's part. axes: mesh axes that split the experts, their hidden axis, the rows of the batch."""
  copies = tuple(a for a in axes['rows'] if a not in axes['split'])
  if copies:  # the same weights for other rows: their gradients are added up
    w = jax.tree.map(lambda a: jax.lax.pcast(a, copies, to='varying'), w)
  if rng is not None:
    for axis in (*axes['rows'], *axes['summed']):
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))

  def apply(x: jax.Array, product: Callable, spread: Callable) -> jax.Array:
    if axes['summed']:
      x = jax.lax.pcast(x, axes['summed'], to='varying')

    def up(name: str) -> jax.Array:
      y = product(x, w[name])
      return y + spread(w[f'{name}_bias']) if expert.bias else y

    h = dropout(expert.unit(*(up(name) for name in expert.inward)), expert.dropout, rng)
    y = product(h, w['down'])
    y = jax.lax.psum(y, axes['summed']) if axes['summed'] else y
    return y + spread(w['down_bias']) if expert.bias else y

  return send(x, found, dispatch.Crew(experts, k, rng is not None, axes['split'], apply))


class Weighed(nn.Module):
  """A feed-forward times sigmoid(x w), one number per token: the shared expert of Qwen2-MoE (arXiv:2407.10671)."""

  ffn: Callable

  @nn.compact
  def __call__(self, x: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    y, aux = self.ffn(name='ffn')(x, ctx)
    w = param.weight(self, 'weigh', (x.shape[-1],), ('embed',), 'router')
    return y * jax.nn.sigmoid(weights.einsum('btd,d->bt', x, w))[..., None], aux
