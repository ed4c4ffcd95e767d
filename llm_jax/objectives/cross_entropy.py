"""Cross entropy over a large vocabulary, as T5X defines it, without ever holding all logits.

With weight w, target y, logits l, log Z = logsumexp(l) and smoothing s, a position contributes

  w * (-sum_v q_v log p_v - H(q) + z_loss * (log Z)^2),   q_y = 1 - s, q_v = s / (V - 1) elsewhere,

H(q) being the constant that makes a perfect prediction cost 0 (T5X `compute_weighted_cross_entropy`; the z-loss is
PaLM's, arXiv:2204.02311, section 5: 1e-4).

`fused` goes over the length in chunks and computes value and gradients of a chunk while its logits exist: memory for
one chunk instead of all, nothing computed twice (for [8, 512] positions and a vocabulary of 32k the logits alone are
512 MiB).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core import mesh

LogitsFn = Callable[[Any, jax.Array], jax.Array]


class Terms(NamedTuple):
  """Weighted sums over positions, f32 []: the loss, its cross entropy in nats alone, its z-loss alone, right guesses.

  Where several logits share the maximum, a guess among them counts for its chance to be right.
  """

  loss: jax.Array
  nats: jax.Array
  z_loss: jax.Array
  accuracy: jax.Array


class Penalty(NamedTuple):
  """z_loss: weight of (log Z)^2; label_smoothing: s; vocab: V, logits beyond it are padding (None: there are none)."""

  z_loss: float = 0.0
  label_smoothing: float = 0.0
  vocab: int | None = None


def whole(
  logits_fn: LogitsFn,
  head: Any,
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  penalty: Penalty,
) -> Terms:
  """All logits at once.

  logits_fn: (head, x) -> [batch, length, vocab]. x: [batch, length, embed]. targets, weights: int32, f32
  [batch, length].
  """
  return _terms(logits_fn(head, x).astype(jnp.float32), targets, weights, penalty)[0]


def fused(
  logits_fn: LogitsFn,
  head: Any,
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  penalty: Penalty,
  chunk: int,
) -> Terms:
  """As `whole`, at most `chunk` positions of the length at a time.

  Only `loss` can be differentiated, by `head` and `x`; the other terms and the other arguments count as constants.
  """
  targets, weights = jax.lax.stop_gradient((targets, weights))
  loss, rest = _fused(logits_fn, penalty, chunk, head, x, targets, weights)
  return Terms(loss, *rest)


def _terms(logits: jax.Array, targets: jax.Array, weights: jax.Array, penalty: Penalty):
  """(Terms, d loss / d logits as a function).

  Comparing with an iota instead of indexing keeps a vocabulary that is split over devices where it is.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
  vocab = penalty.vocab or logits.shape[-1]
  is_target = ids == targets[..., None]
  top = jax.lax.stop_gradient(logits.max(-1))
  log_z = jnp.log(jnp.exp(logits - top[..., None]).sum(-1)) + top
  right = jnp.where(is_target, logits, 0).sum(-1)
  ties = (logits == top[..., None]).sum(-1)
  low = penalty.label_smoothing / (vocab - 1)
  nats = log_z - right
  smoothed = nats
  if penalty.label_smoothing:
    high = 1 - penalty.label_smoothing
    entropy = -(high * math.log(high) + (vocab - 1) * low * math.log(low + 1e-20))
    everywhere = jnp.where(ids < vocab, logits, 0).sum(-1)
    smoothed = log_z - (high - low) * right - low * everywhere - entropy
  squares = penalty.z_loss * log_z**2
  accuracy = (right == top) / jnp.maximum(ties, 1)
  total = lambda term: (weights * term).sum()
  terms = Terms(total(smoothed + squares), total(nats), total(squares), total(accuracy))

  def gradient() -> jax.Array:
    p = jnp.exp(logits - log_z[..., None]) * (weights * (1 + 2 * penalty.z_loss * log_z))[..., None]
    constant = jnp.where(is_target, 1 - penalty.label_smoothing, jnp.where(ids < vocab, low, 0))
    return p - weights[..., None] * constant

  return terms, gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(logits_fn, penalty, chunk, head, x, targets, weights):
  """(loss, the other terms). Without differentiation: no gradients are computed."""
  wanted = (False,) * len(jax.tree.leaves(head)), False
  run = functools.partial(_scan, logits_fn, penalty, chunk, wanted)
  terms, _ = _over_devices(run, head, x, targets, weights)
  return terms[0], tuple(terms[1:])


def _fused_forward(logits_fn, penalty, chunk, head, x, targets, weights):
  """The terms, and as residuals the gradients by what is differentiated; frozen weights cost nothing."""
  of = lambda part: jax.tree.map(lambda p: p.value, part, is_leaf=_is_primal)
  wanted = tuple(p.perturbed for p in jax.tree.leaves(head, is_leaf=_is_primal)), x.perturbed
  run = functools.partial(_scan, logits_fn, penalty, chunk, wanted)
  terms, gradients = _over_devices(run, of(head), of(x), of(targets), of(weights))
  return (terms[0], tuple(terms[1:])), gradients


def _fused_backward(logits_fn, penalty, chunk, gradients, cotangents):
  by_head, by_x = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
  return by_head, by_x, None, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
  return hasattr(x, 'perturbed')


def _scan(logits_fn, penalty, chunk, wanted, head, x, targets, weights):
  """(Terms, (gradients by head, by x)), chunk by chunk; None in place of gradients that are not `wanted`."""
  leaves, treedef = jax.tree.flatten(head)
  by_head, by_x = wanted
  chosen = [leaf for leaf, yes in zip(leaves, by_head, strict=True) if yes]

  def logits_of(chosen: list, x: jax.Array) -> jax.Array:
    rest = iter(chosen)
    filled = [next(rest) if yes else leaf for leaf, yes in zip(leaves, by_head, strict=True)]
    return logits_fn(treedef.unflatten(filled), x)

  def one(x: jax.Array, targets: jax.Array, weights: jax.Array):
    if not (by_x or chosen):
      return whole(logits_fn, head, x, targets, weights, penalty), [], None
    logits, pull = jax.vjp(logits_of, chosen, x)
    terms, gradient = _terms(logits.astype(jnp.float32), targets, weights, penalty)
    of_head, of_x = pull(gradient().astype(logits.dtype))
    return terms, [g.astype(jnp.float32) for g in of_head], of_x if by_x else None

  def body(carry: Any, part: Any):
    terms, of_head, of_x = one(*part)
    return jax.tree.map(jnp.add, carry, (terms, of_head)), of_x

  zero = Terms(*(jnp.zeros((), jnp.float32) for _ in Terms._fields))
  start = zero, [jnp.zeros_like(p, dtype=jnp.float32) for p in chosen]
  parts = jax.tree.map(lambda a: _cut(a, chunk), (x, targets, weights))
  (terms, of_head), of_x = jax.lax.scan(body, start, parts)
  of_head = iter([g.astype(p.dtype) for g, p in zip(of_head, chosen, strict=True)])
  of_head = treedef.unflatten([next(of_head) if yes else None for yes in by_head])
  return terms, (of_head, None if of_x is None else _join(of_x, x.shape[1]))


def _cut(x: jax.Array, chunk: int) -> jax.Array:
  """[batch, length, ...] -> [chunks, batch, length / chunks, ...], padded at the end with zeros, hence weight 0."""
  length = x.shape[1]
  chunks = -(-length // chunk)
  size = -(-length // chunks)
  x = jnp.pad(x, ((0, 0), (0, chunks * size - length), *((0, 0),) * (x.ndim - 2)))
  return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
  """Undoes `_cut`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _over_devices(run: Callable, head: Any, x: jax.Array, targets: jax.Array, weights: jax.Array):
  """`run` on every device's own positions, its sums added over the devices once, after the last chunk.

  Left to itself XLA adds the head's gradients over the devices in every chunk.
  """
  if mesh.current() is None:
    return run(head, x, targets, weights)
  rows, sizes = mesh.spec('batch', 'length'), mesh.current().shape
  over = set(itertools.chain.from_iterable(e if isinstance(e, tuple) else (e,) for e in rows if e))
  if math.prod(sizes[axis] for axis in over) == 1:
    return run(head, x, targets, weights)
  over |= {axis for axis, size in sizes.items() if size == 1}

  def local(head: Any, x: jax.Array, targets: jax.Array, weights: jax.Array):
    terms, (of_head, of_x) = run(head, x, targets, weights)
    return *jax.lax.psum((terms, of_head), tuple(sorted(over))), of_x  # one order on all hosts

  everywhere = PartitionSpec()
  places = dict(in_specs=(everywhere, rows, rows, rows), out_specs=(everywhere, everywhere, rows))
  mapped = jax.shard_map(local, axis_names=over, check_vma=False, **places)
  if not mesh.is_explicit():
    terms, of_head, of_x = mapped(head, x, targets, weights)
    return terms, (of_head, of_x)
  whole_head = jax.tree.map(
    lambda p: mesh.constrain(p, _less(jax.typeof(p).sharding.spec, over)), head
  )
  scored = (
    mesh.constrain(a, PartitionSpec(*rows, *[None] * (a.ndim - 2))) for a in (x, targets, weights)
  )
  terms, of_head, of_x = mapped(whole_head, *scored)
  # A gradient has the type of its weight, which says how it is split.
  back = lambda p, g: None if g is None else mesh.constrain(g, jax.typeof(p).sharding.spec)
  return terms, (jax.tree.map(back, head, of_head), of_x)


def _less(partition: PartitionSpec, axes: set[str]) -> PartitionSpec:
  """`partition` without these mesh axes."""
  entries = (e if isinstance(e, tuple) else (e,) for e in partition)
  return PartitionSpec(*(tuple(a for a in e if a and a not in axes) or None for e in entries))
