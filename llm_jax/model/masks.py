"""Who may attend to whom, as one composable value that becomes an array only where a kernel needs one.

    M[i, j] = same segment(i, j) and (not causal or j <= i or prefix[j]) and pattern(p_i, p_j)

The keys of a call sit at indices 0..s-1 (in decoding: the slots of the KV state); a query's own index is `queries`.
A sparse pattern is a function of the two positions inside the document, the same whether the document is packed with
others or being decoded:

| pattern | a query at p sees the keys at r with | |
|---|---|---|
| `window=n` | abs(p - r) < n | local (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825) |
| `window=n, sinks=m` | that, or r < m | Lambda-shaped (LM-Infinite, arXiv:2308.16137; StreamingLLM, arXiv:2309.17453) |
| `sees=strided` | p - r < n, or n divides p - r | strided (Child et al. 2019, arXiv:1904.10509, section 4.3) |
| `sees=fixed` | the same block of n, or one of the last c of any block | fixed (same section) |
| `sees=dilated` | p - r < n * d, d divides p - r | dilated window (arXiv:2004.05150, section 3.1) |
| `sees=blocks` | their blocks are neighbours, or global ones | block-sparse (BigBird, arXiv:2007.14062, section 2) |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
  """What a query may see. The default sees everything.

  causal: only keys at or before the query (a Python bool: kernels have a case for it that needs no array).
  prefix: bool [batch, s], keys that every query of the segment may see (prefix LM; Raffel et al. 2020, figure 4).
  segments: int ([batch, t], [batch, s]), packed documents: a query sees only keys of its own number (0 is padding).
  queries: int [batch, t], the index of each query among the keys; None counts 0, 1, 2, ...
  window, sinks, sees: the sparse pattern, see above; `sees` gets positions [batch, t, 1] and [batch, 1, s].
  places: int ([batch or 1, t], [batch or 1, s]), the positions of queries and keys in their documents; None for their
  indices. windows: int ([batch, t], [batch, s]), parallel context windows: a key is seen by queries of its own number
  and by those of number 0 (Ratner et al. 2022, arXiv:2212.10947). order: int ([batch, t], [batch, s]), places in a
  factorisation order: a query sees itself and the even places up to its own (XLNet; data/permuted.py). branches: int
  ([batch, t], [batch, s]), continuations of one beginning: a key is seen by queries of its own number, one of number 0
  by all (data/branches.py).
  """

  causal: bool = False
  prefix: jax.Array | None = None
  segments: tuple[jax.Array, jax.Array] | None = None
  queries: jax.Array | None = None
  window: int | None = None
  sinks: int = 0
  sees: Callable | None = None
  places: tuple[jax.Array, jax.Array] | None = None
  windows: tuple[jax.Array, jax.Array] | None = None
  order: tuple[jax.Array, jax.Array] | None = None
  branches: tuple[jax.Array, jax.Array] | None = None

  @property
  def sparse(self) -> bool:
    """Whether there is a pattern by position."""
    return self.window is not None or self.sees is not None

  @property
  def static(self) -> bool:
    """Whether the mask is known from the shapes alone: everything, or causal."""
    told = self.segments, self.windows, self.order, self.branches
    if self.sparse or any(pair is not None for pair in told):
      return False
    return not self.causal or (self.prefix is None and self.queries is None)

  def rows(self, start: int, stop: int) -> 'Mask':
    """The mask of the queries start..stop-1 against the keys before `stop`, for a causal mask over a whole sequence."""
    cut = lambda pair: pair and (pair[0][:, start:stop], pair[1][:, :stop])
    queries = jnp.arange(start, stop)[None]
    paired = 'segments', 'places', 'windows', 'order', 'branches'
    return self._replace(queries=queries, **{name: cut(getattr(self, name)) for name in paired})

  def dense(self, t: int, s: int) -> jax.Array | None:
    """bool [batch or 1, 1, t, s], True where the query may look; None when it may look everywhere."""
    seen = None
    if self.causal:
      queries = jnp.arange(t)[None] if self.queries is None else self.queries
      seen = jnp.arange(s)[None, None, :] <= queries[:, :, None]
      if self.prefix is not None:
        seen = seen | self.prefix[:, None, :]
    if self.segments is not None:
      query, key = self.segments
      same = query[:, :, None] == key[:, None, :]
      seen = same if seen is None else seen & same
    if self.windows is not None:
      query, key = self.windows
      apart = (query == 0)[:, :, None] | (query[:, :, None] == key[:, None, :])
      seen = apart if seen is None else seen & apart
    if self.order is not None:
      query, key = self.order[0][:, :, None], self.order[1][:, None, :]
      before = (query == key) | ((key % 2 == 0) & (key <= query))
      seen = before if seen is None else seen & before
    if self.branches is not None:
      query, key = self.branches[0][:, :, None], self.branches[1][:, None, :]
      own = (key == 0) | (query == key)
      seen = own if seen is None else seen & own
    if self.sparse:
      near = self._pattern(t, s)
      seen = near if seen is None else seen & near
    return None if seen is None else seen[:, None]

  def _pattern(self, t: int, s: int) -> jax.Array:
    """bool [batch or 1, t, s] of the sparse pattern."""
    rows = jnp.arange(t)[None] if self.queries is None else self.queries
    query, key = self.places or (rows, jnp.arange(s)[None])
    p, r = query[:, :, None], key[:, None, :]
    seen = True
    if self.window is not None:
      seen = (jnp.abs(p - r) < self.window) | (r < self.sinks)
    return seen if self.sees is None else seen & self.sees(p, r)


def strided(p: jax.Array, r: jax.Array, *, size: int) -> jax.Array:
  """The last `size` keys, and every `size`-th before (Child et al. 2019, the union of the two heads of section 4.3)."""
  distance = jnp.abs(p - r)
  return (distance < size) | (distance % size == 0)


def fixed(p: jax.Array, r: jax.Array, *, size: int, summary: int = 1) -> jax.Array:
  """The own block of `size`, and the last `summary` positions of every block (Child et al. 2019, section 4.3)."""
  return (p // size == r // size) | (r % size >= size - summary)


def dilated(p: jax.Array, r: jax.Array, *, size: int, step: int) -> jax.Array:
  """Every `step`-th of the last `size * step` keys (Beltagy et al. 2020, figure 2c)."""
  distance = jnp.abs(p - r)
  return (distance < size * step) & (distance % step == 0)


def blocks(p: jax.Array, r: jax.Array, *, size: int, near: int = 1, first: int = 1) -> jax.Array:
  """Blocks of `size`: the own and `near` on either side, and the `first` blocks, which also see all (Zaheer et al.
  2020; BigBird without its random blocks).
  """
  p, r = p // size, r // size
  return (jnp.abs(p - r) <= near) | (r < first) | (p < first)
