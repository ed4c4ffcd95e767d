"""Text as it is found -> text to learn from: repair, take out tags, drop lines and documents, drop what is repeated.

    found, steps = clean.all_of(documents)

The rules are published ones: lines by C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), documents by
MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A1), near copies by the Jaccard similarity of runs of words
(Broder 1997; Lee et al. 2022, arXiv:2107.06499, which estimates by hashing what is computed here exactly).
"""

import collections
import html.parser
import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r'\w+')
_TAG = re.compile(r'</\w+>')
_END = re.compile(r'[.!?:;…]["\'”’)\]_ ]*$')  # terminal punctuation, quotes and brackets may follow
_POLICY = re.compile(
  r'javascript|lorem ipsum|terms of use|privacy policy|cookie policy|uses? (of )?cookies', re.I
)
_STOP = frozenset('the be to of and that have with'.split())
_SKIPPED = ('script', 'style', 'head', 'nav', 'footer', 'noscript')
_INLINE = frozenset('a abbr b bdi cite code em font i small span strong sub sup u'.split())
_EMPTY = frozenset('area base br col embed hr img input link meta source track wbr'.split())


def repaired(text: str) -> str:
  """UTF-8 that was read as Latin-1 as it was; any other text unchanged."""
  try:
    return text.encode('latin-1').decode('utf-8')
  except UnicodeError:
    return text


class _Extractor(html.parser.HTMLParser):
  """Collects what is read outside of `_SKIPPED`; tags but for those within a line begin a new one."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []
    self._inside = 0

  def handle_starttag(self, tag: str, attributes: list) -> None:
    if tag in _SKIPPED:
      self._inside += 1
    elif tag not in _INLINE:
      self.parts.append('\n')

  def handle_endtag(self, tag: str) -> None:
    if tag in _SKIPPED:
      self._inside = max(0, self._inside - 1)
    elif tag not in _INLINE and tag not in _EMPTY:
      self.parts.append('\n')

  def handle_data(self, text: str) -> None:
    if not self._inside:
      self.parts.append(text)


def untagged(text: str) -> str:
  """What a reader sees of HTML, a block to a line; text without closing tags unchanged."""
  if not _TAG.search(text):
    return text
  extractor = _Extractor()
  extractor.feed(text)
  extractor.close()
  found = (' '.join(line.split()) for line in ''.join(extractor.parts).split('\n'))
  return '\n'.join(line for line in found if line)


def sentences(text: str) -> str:
  """The lines of five words or more that end as sentences do and are about no script or policy (C4)."""
  keep = lambda x: _END.search(x) and len(_WORD.findall(x)) >= 5 and not _POLICY.search(x)
  return '\n'.join(line for line in text.split('\n') if keep(line))


def prose(text: str) -> bool:
  """50 to 100,000 words of 3 to 10 letters on average, four in five with a letter, two of eight common ones among
  them (MassiveText; its limits for marks and bullets are not needed after `sentences`)."""
  words = _WORD.findall(text)
  if not 50 <= len(words) <= 100_000 or not 3 <= sum(map(len, words)) / len(words) <= 10:
    return False
  letters = sum(any(c.isalpha() for c in word) for word in words)
  return letters >= 0.8 * len(words) and len(_STOP & {word.lower() for word in words}) >= 2


def unique(found: Sequence[str]) -> list[str]:
  """The first of all documents that are equal in their letters and digits."""
  first: dict[str, str] = {}
  for one in found:
    first.setdefault(' '.join(_WORD.findall(one.lower())), one)
  return list(first.values())


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
  """The runs of `size` words."""
  words = _WORD.findall(text.lower())
  return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def distinct(found: Sequence[str], limit: float = 0.5) -> list[str]:
  """The documents but for those whose shingles have a Jaccard similarity of `limit` or more with one kept before."""
  kept, sizes = [], []
  where: dict[tuple, list[int]] = collections.defaultdict(list)
  for one in found:
    own = shingles(one)
    shared = collections.Counter(i for x in own for i in where.get(x, ()))
    if any(n >= limit * (len(own) + sizes[i] - n) for i, n in shared.items()):
      continue
    for x in own:
      where[x].append(len(kept))
    kept.append(one)
    sizes.append(len(own))
  return kept


def unframed(found: Sequence[str], most: int = 2) -> list[str]:
  """The documents without lines that more than `most` of them have: the templates of web sites."""
  lines = [one.split('\n') for one in found]
  count = collections.Counter(line for some in lines for line in set(some))
  return ['\n'.join(line for line in some if count[line] <= most) for some in lines]


STEPS: dict[str, Callable[[Sequence[str]], list[str]]] = {
  'letters repaired': lambda found: [repaired(one) for one in found],
  'tags taken out': lambda found: [untagged(one) for one in found],
  'only sentences': lambda found: [sentences(one) for one in found],
  'only prose': lambda found: [one for one in found if prose(one)],
  'no copies': unique,
  'no near copies': distinct,
  'no lines of templates': unframed,
}
COPIES = ('no copies', 'no near copies')


def all_of(found: Sequence[str], steps: Sequence[str] = tuple(STEPS)) -> tuple[list[str], list]:
  """(What is left, [step, documents, bytes] after each of `steps`, in their order)."""
  told = [['as found', len(found), _bytes(found)]]
  for name in steps:
    found = STEPS[name](found)
    told.append([name, len(found), _bytes(found)])
  return list(found), told


def against(found: Sequence[str], clean: Sequence[str]) -> dict[str, float]:
  """What the lines of `found` are, as shares of their bytes: lines of `clean`, the same once more, others; and the
  share of the bytes of `clean`'s lines that is there."""
  there = {line: len(line.encode()) for one in clean for line in one.split('\n')}
  seen: set[str] = set()
  sizes = dict.fromkeys(('clean', 'repeated', 'other'), 0)
  for line in (line for one in found for line in one.split('\n')):
    kind = 'other' if line not in there else 'repeated' if line in seen else 'clean'
    sizes[kind] += len(line.encode())
    seen.add(line)
  total = sum(sizes.values())
  told = {kind: size / total for kind, size in sizes.items()}
  return dict(told, recovered=sizes['clean'] / sum(there.values()))


def _bytes(found: Sequence[str]) -> int:
  return sum(len(one.encode()) for one in found)
