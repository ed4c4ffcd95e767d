"""Clean documents of three real domains, and what happens to text on the web: copies, templates, tags, broken letters.

A document is about 1,500 characters of whole paragraphs, one to a line. What `dirty` does to them is made up, in kinds
and amounts of our own choice; only the three pages of pages/ are raw text from the web.
"""

import functools
import glob
import gzip
import html
import os
import random
import re
from collections.abc import Sequence

import numpy as np

from llm_jax.data import tasks

DOMAINS = ('books', 'wikipedia', 'stories')
SIZE = 1500  # characters of a document, at least

COPIED, COPIES = 0.10, 3  # the share of documents that has so many exact copies more
ALTERED, VARIANTS, CHANGED = 0.10, 2, 0.03  # ... copies with this share of words replaced
FRAMED, TAGGED, GARBLED, SPAM = 0.40, 0.30, 0.20, 0.05

HEADS = (
  'Home | About | Contact | Site map',
  'Skip to main content',
  'You are here: Home > Archive > 2014',
  'Log in | Register | My account (0)',
  'We use cookies to give you the best experience on our website. Accept all Decline',
  'Please enable JavaScript to view this page correctly.',
)
FEET = (
  'Share this: Facebook Twitter Google+ Email Print',
  'Copyright 2014. All rights reserved. Terms of use | Privacy policy',
  'Click here to subscribe to our newsletter and never miss a story again!',
  'Tags: news, archive, reading',
  'Posted by admin on 12/03/2014 at 10:41 | 0 comments',
  'Related: 10 things you did not know (number 7 will surprise you)',
)
WARES = 'cheap shoes online sale discount watches buy best price free shipping outlet deals'.split()


def paragraphs(name: str, split: str) -> list[str]:
  """The paragraphs of a domain, each on one line; split: 'train' or 'validation'."""
  task = tasks.domain(name=name, vocab=None)
  found = []
  for corpus in task.corpora:
    for text in corpus.texts(split):
      cut = text.splitlines() if name == 'wikipedia' else re.split(r'\n\s*\n', text)
      found += [' '.join(part.split()) for part in cut]
  return [one for one in found if one]


@functools.cache
def documents(name: str, split: str) -> list[str]:
  """The paragraphs of a domain in order, as few to a document as make `SIZE` characters."""
  found, now = [], []
  for one in paragraphs(name, split):
    now.append(one)
    if sum(map(len, now)) >= SIZE:
      found.append('\n'.join(now))
      now = []
  return found


def sample(name: str, limit: int, seed: int = 0) -> list[str]:
  """Documents to train on, drawn without replacement up to `limit` bytes."""
  found = documents(name, 'train')
  order = np.random.default_rng(seed).permutation(len(found))
  ends = np.cumsum([len(found[i].encode()) for i in order])
  return [found[i] for i in order[: int(np.searchsorted(ends, limit, side='right'))]]


def pages() -> list[str]:
  """The raw web pages of pages/."""
  paths = sorted(glob.glob(os.path.join(os.path.dirname(__file__), 'pages', '*.gz')))
  return [gzip.open(path, 'rt', encoding='utf-8').read() for path in paths]


# --- what happens to text on the web -------------------------------------------------------------------


def dirty(clean: Sequence[str], seed: int = 0) -> list[str]:
  """The documents with copies, variants, frames, tags, broken letters and spam, in a new order."""
  rng, made = random.Random(seed), list(clean)
  words = sorted({word for one in clean for word in one.split()})
  for one in clean:
    if rng.random() < COPIED:
      made += [one] * COPIES
    if rng.random() < ALTERED:
      made += [altered(one, words, rng) for _ in range(VARIANTS)]
  made = [framed(one, rng) if rng.random() < FRAMED else one for one in made]
  made = [tagged(one, rng) if rng.random() < TAGGED else one for one in made]
  made = [garbled(one) if rng.random() < GARBLED else one for one in made]
  made += [spam(rng) for _ in range(int(SPAM * len(clean)))]
  rng.shuffle(made)
  return made


def altered(text: str, words: Sequence[str], rng: random.Random) -> str:
  """Every word is another one with probability `CHANGED`."""
  return re.sub(r'\S+', lambda m: rng.choice(words) if rng.random() < CHANGED else m[0], text)


def framed(text: str, rng: random.Random) -> str:
  """Lines of a web site's template around the text."""
  return '\n'.join([*rng.sample(HEADS, 2), text, *rng.sample(FEET, 2)])


def tagged(text: str, rng: random.Random) -> str:
  """The text as HTML, entities escaped, with a script before it."""
  number = rng.randrange(10**6)
  parts = ''.join(
    f'<p class="entry-text text-{number}">{html.escape(one)}</p>\n' for one in text.split('\n')
  )
  script = f'<script>var _gaq = _gaq || []; _gaq.push(["_setAccount", "UA-{number}-1"]);</script>'
  return f'<div id="post-{number}" class="post hentry">\n{script}\n{parts}</div>'


def garbled(text: str) -> str:
  """UTF-8 read as Latin-1: a letter outside ASCII becomes two or more others."""
  return text.encode().decode('latin-1')


def spam(rng: random.Random) -> str:
  """Keywords, or a table of numbers."""
  if rng.random() < 0.5:
    return ' '.join(rng.choice(WARES) for _ in range(250))
  return '\n'.join(' '.join(f'{rng.uniform(0, 1000):.2f}' for _ in range(8)) for _ in range(28))


# --- rows ----------------------------------------------------------------------------------------------


def windows(text: bytes, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
  """A batch that predicts bytes [start + 1, start + length] from those before; starts: any shape."""
  at = starts[..., None] + np.arange(length + 1)
  found = np.frombuffer(text, np.uint8)[at].astype(np.int32)
  weights = np.ones(found[..., 1:].shape, np.float32)
  return dict(inputs=found[..., :-1], targets=found[..., 1:], weights=weights)


def drawn(text: bytes, steps: int, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
  """Batches [steps, rows, length] of windows anywhere in the text."""
  rng = np.random.default_rng(seed)
  return windows(text, rng.integers(0, len(text) - length, (steps, rows)), length)


def held(text: bytes, batches: int, rows: int, length: int) -> list[dict[str, np.ndarray]]:
  """Batches of windows at equal distances that do not overlap, from beginning to end."""
  starts = np.linspace(0, len(text) - length - 1, batches * rows).astype(int)
  return [windows(text, part, length) for part in starts.reshape(batches, rows)]


def joined(found: Sequence[str]) -> bytes:
  """A text of documents with an empty line between them."""
  return '\n\n'.join(found).encode()
