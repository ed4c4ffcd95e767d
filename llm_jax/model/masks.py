"""Who may attend to whom, as one composable value that becomes an array only where a kernel needs one.

    M[i, j] = same segment(i, j) and (not causal or j <= i or prefix[j])

The keys of a call sit at indices 0..s-1 (in decoding: the slots of the KV state); a query's own index is `queries`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
  """What a query may see. The default sees everything.

  causal: only keys at or before the query (a Python bool: kernels have a case for it that needs no array).
  prefix: bool [batch, s], keys that every query of the segment may see (prefix LM; Raffel et al. 2020, figure 4).
  segments: int ([batch, t], [batch, s]), packed documents: a query sees only keys of its own number (0 is padding).
  queries: int [batch, t], the index of each query among the keys; None counts 0, 1, 2, ...
  """

  causal: bool = False
  prefix: jax.Array | None = None
  segments: tuple[jax.Array, jax.Array] | None = None
  queries: jax.Array | None = None

  @property
  def static(self) -> bool:
    """Whether the mask is known from the shapes alone: everything, or causal."""
    return self.segments is None and (
      not self.causal or (self.prefix is None and self.queries is None)
    )

  def rows(self, start: int, stop: int) -> 'Mask':
    """The mask of the queries start..stop-1 against the keys before `stop`, for a causal mask over a whole sequence."""
    queries, segments = jnp.arange(start, stop)[None], self.segments
    if segments is not None:
      segments = (segments[0][:, start:stop], segments[1][:, :stop])
    return self._replace(queries=queries, segments=segments)

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
    return None if seen is None else seen[:, None]
