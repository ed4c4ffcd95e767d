"""Which instructions are worth learning from: overlap (ROUGE-L), quality, diversity, difficulty, richness of words.

    pool = curate.Pool(texts)
    if not pool.similar(new, 0.7): pool.add(new)
    keep = curate.k_centre(curate.features(texts), 1000)

Selections are arrays of indices into what they were given, in order.
"""

import collections
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from llm_jax.core.errors import UserError

_WORD = re.compile(r'[a-z0-9]+')


def words(text: str) -> list[str]:
  """Lower-case runs of a-z and 0-9, as Google's rouge-score has them."""
  return _WORD.findall(text.lower())


def common(a: Sequence, b: Sequence) -> int:
  """The length of the longest common subsequence, exactly; as many steps as `b` is long (the bit-parallel algorithm of
  Hyyro 2004, on one integer with a bit for every element of `a`)."""
  where: dict = {}
  for i, x in enumerate(a):
    where[x] = where.get(x, 0) | 1 << i
  row = full = (1 << len(a)) - 1
  for x in b:
    hit = row & where.get(x, 0)
    row = (row + hit | row - hit) & full
  return len(a) - row.bit_count()


def rouge_l(a: str, b: str) -> float:
  """ROUGE-L's F1 between two texts, without stemming (Lin 2004): 2 x common words in order / all words."""
  x, y = words(a), words(b)
  return 2 * common(x, y) / (len(x) + len(y)) if x and y else 0.0


class Pool:
  """Texts, asked whether a new one is like one of them; an index of words spares most comparisons."""

  def __init__(self, texts: Iterable[str] = ()):
    self.texts: list[str] = []
    self._words: list[list[str]] = []
    self._with: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for text in texts:
      self.add(text)

  def __len__(self) -> int:
    return len(self.texts)

  def add(self, text: str) -> None:
    """Puts a text in."""
    found = words(text)
    for word, count in collections.Counter(found).items():
      self._with[word].append((len(self.texts), count))
    self.texts.append(text)
    self._words.append(found)

  def similar(self, text: str, limit: float) -> bool:
    """Whether ROUGE-L with any text of the pool is at least `limit`, which is above 0."""
    if limit <= 0:
      raise UserError(f'limit={limit}: ROUGE-L is at least 0, so choose a limit above it')
    found = words(text)
    shared: collections.Counter = collections.Counter()
    for word, count in collections.Counter(found).items():
      for i, own in self._with.get(word, ()):
        shared[i] += min(count, own)
    need = lambda i: limit * (len(found) + len(self._words[i])) / 2 - 1e-9
    near = (i for i, bound in shared.items() if bound >= need(i))  # no order has more in common
    return any(common(self._words[i], found) >= need(i) for i in near)


# --- selections ---------------------------------------------------------------------------------------


def above(scores: Sequence[float], least: float = 4.5) -> np.ndarray:
  """Those with a score of at least `least`: AlpaGasus kept 9k of 52k answers rated 4.5 or more of 5 (Chen et al. 2023,
  arXiv:2307.08701)."""
  return np.flatnonzero(np.asarray(scores) >= least)


def features(texts: Sequence[str], *, size: int = 512) -> np.ndarray:
  """f32 [n, size], rows of length 1: counts of words times the log of their rarity, hashed into `size` columns."""
  found = [collections.Counter(words(text)) for text in texts]
  seen: collections.Counter = collections.Counter()
  for counts in found:
    seen.update(counts.keys())
  x = np.zeros((len(texts), size), np.float32)
  for row, counts in zip(x, found, strict=True):
    for word, count in counts.items():
      code = zlib.crc32(word.encode())
      row[code % size] += (
        (1 if code >> 16 & 1 else -1) * count * math.log1p(len(texts) / seen[word])
      )
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def k_centre(x: np.ndarray, count: int, *, first: int = 0) -> np.ndarray:
  """`count` rows that cover all: each next one is the farthest from those chosen (Gonzalez 1985), so that no row is
  more than twice as far from its nearest as with the best choice of `count`. Returns them in the order of choice."""
  if not 1 <= count <= len(x):
    raise UserError(f'count={count} of {len(x)} rows: choose between 1 and all')
  chosen = [first]
  far = np.linalg.norm(x - x[first], axis=1)
  while len(chosen) < count:
    chosen.append(int(far.argmax()))
    far = np.minimum(far, np.linalg.norm(x - x[chosen[-1]], axis=1))
  return np.array(chosen)


def moderate(difficulty: Sequence[float], count: int) -> np.ndarray:
  """The `count` in the middle of the order by difficulty, such as the perplexity of the answer under the base model:
  neither what it knows nor what it cannot learn. The survey's Table 9 kept 70K of 220K so."""
  order = np.argsort(np.asarray(difficulty), kind='stable')
  if not 1 <= count <= len(order):
    raise UserError(f'count={count} of {len(order)} records: choose between 1 and all')
  start = (len(order) - count) // 2
  return np.sort(order[start : start + count])


def progressive(difficulty: Sequence[float], stages: int) -> list[np.ndarray]:
  """All records in `stages` parts of equal size, the easiest first."""
  return np.array_split(np.argsort(np.asarray(difficulty), kind='stable'), stages)


# --- how rich a set is --------------------------------------------------------------------------------


def distinct(texts: Sequence[str], n: int = 2) -> float:
  """The share of different n-grams of words among all (Li et al. 2016, arXiv:1510.03055)."""
  grams = [tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)]
  return len(set(grams)) / len(grams) if grams else 0.0


def mtld(text: str, *, least: float = 0.72) -> float:
  """Lexical diversity: the mean number of words until the share of different ones falls below `least`, read forwards
  and backwards (McCarthy and Jarvis 2010)."""
  found = words(text)
  return (_factors(found, least) + _factors(found[::-1], least)) / 2 if found else 0.0


def _factors(found: list[str], least: float) -> float:
  count, size, seen = 0.0, 0, set()
  for word in found:
    seen.add(word)
    size += 1
    if len(seen) / size < least:
      count, size, seen = count + 1, 0, set()
  if size:
    count += (1 - len(seen) / size) / (1 - least)
  return len(found) / count if count else float(len(found))


def filtered(
  records: Sequence[Mapping], checks: Mapping[str, Callable[[Mapping], bool]]
) -> tuple[list, dict[str, int]]:
  """(The records that pass every check, how many each check refused first)."""
  kept, refused = [], dict.fromkeys(checks, 0)
  for record in records:
    bad = next((name for name, check in checks.items() if not check(record)), None)
    if bad is None:
      kept.append(record)
    else:
      refused[bad] += 1
  return kept, refused
