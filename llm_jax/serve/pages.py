"""Who holds which page of the KV pool: sharing, copies on writing, and the cache of prompts' beginnings.

A page is held by every sequence whose table names it and by the cache, and is free when nobody does. Prompts are read
in chunks of a fixed length; the pages of a whole chunk are kept under the tokens up to its end, so that another prompt
that begins the same need not read it again. When pages run out, the chunks that have not been used for longest go.
"""

import collections
from collections.abc import Sequence

import numpy as np


class Pages:
  """Counts the holders of `total` pages. Not for several threads at once."""

  def __init__(self, total: int):
    self.total = total
    self._free = list(range(total - 1, -1, -1))
    self._holders = np.zeros(total, np.int64)
    self._cache: collections.OrderedDict[bytes, tuple[int, ...]] = collections.OrderedDict()

  @property
  def free(self) -> int:
    """Pages nobody holds."""
    return len(self._free)

  @property
  def cached(self) -> int:
    """Pages that only the cache holds, which go when others are needed."""
    return sum(self._idle(pages) * len(pages) for pages in self._cache.values())

  def take(self) -> int | None:
    """A free page, now held once; None when there is none, nor one that the cache can give up."""
    if not self._free and not self._evict():
      return None
    page = self._free.pop()
    self._holders[page] = 1
    return page

  def hold(self, pages: Sequence[int]) -> None:
    """One more holder for each."""
    for page in pages:
      self._holders[page] += 1

  def drop(self, pages: Sequence[int]) -> None:
    """One holder less for each."""
    for page in pages:
      self._holders[page] -= 1
      if not self._holders[page]:
        self._free.append(page)

  def shared(self, page: int) -> bool:
    """Whether somebody else holds it too: then it must not be written."""
    return self._holders[page] > 1

  def keep(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
    """Caches the pages of the last chunk of `tokens`."""
    key = _key(tokens)
    if key not in self._cache:
      self._cache[key] = tuple(pages)
      self.hold(pages)

  def find(self, tokens: Sequence[int], chunk: int) -> list[int]:
    """The pages of as many whole chunks of `tokens` as are cached, held for the caller."""
    found: list[int] = []
    for end in range(chunk, len(tokens) + 1, chunk):
      key = _key(tokens[:end])
      if key not in self._cache:
        break
      self._cache.move_to_end(key)
      found += self._cache[key]
    self.hold(found)
    return found

  def clear(self) -> None:
    """Empties the cache."""
    for pages in self._cache.values():
      self.drop(pages)
    self._cache.clear()

  def _idle(self, pages: Sequence[int]) -> bool:
    return all(self._holders[page] == 1 for page in pages)

  def _evict(self) -> bool:
    for key, pages in self._cache.items():  # the least recently used first
      if self._idle(pages):
        del self._cache[key]
        self.drop(pages)
        return True
    return False


def _key(tokens: Sequence[int]) -> bytes:
  return np.asarray(tokens, np.int32).tobytes()
