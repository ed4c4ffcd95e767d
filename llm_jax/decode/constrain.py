"""Text that matches a regular expression or a JSON schema: which ids may come next, by llguidance on the host.

    guide = constrain.json_schema(vocab, {'type': 'object', 'properties': {'age': {'type': 'integer'}}})
    pieces = generate.stream_text(model, params, vocab, prompt, key, guides=[guide])

A guide follows one text: `allowed()` says which ids may come next, `advance(id)` that one came, `done` that the text is
complete and nothing may follow but the end. Any object with these three can guide. A text that `max_new` cuts off is
the beginning of one that matches. Where the grammar leaves one text only, it is spelt as the vocabulary spells it.
Decoding constrained by a state machine over tokens: Willard and Louf 2023, arXiv:2307.09702.
"""

import functools
import json
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError

SPACE = '[ \n]?'  # no schema bounds the white space between JSON's tokens: without a bound it may go on for ever


class Guide:
  """The state of one text under a grammar of llguidance. vocab: a `data.vocab.Vocabulary`; grammar: as
  `LLMatcher.grammar_from_*` writes it; end: the id that ends the text. Raises `UserError` for a wrong grammar."""

  def __init__(self, vocab: Any, grammar: str, end: int):
    library = _library()
    self._matcher = library.LLMatcher(_tokenizer(vocab, end), grammar, log_level=0)
    self._size = vocab.size
    if self._matcher.is_error():
      raise UserError(f'the constraint cannot be used: {_line(self._matcher.get_error())}')

  @property
  def done(self) -> bool:
    """Whether only the end may follow, or has come."""
    return self._matcher.is_stopped()

  def allowed(self) -> np.ndarray:
    """bool [vocab.size]: what may come next; the end where the text may end."""
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
    self._check()
    return np.unpackbits(bits, bitorder='little')[: self._size].astype(bool)

  def advance(self, token: int) -> None:
    """Takes note of the next id. Raises `UserError` for one that is not allowed."""
    self._matcher.consume_token(int(token))
    self._check()

  def copy(self) -> 'Guide':
    """Another one in the same state, for a text that begins alike."""
    other = object.__new__(Guide)
    other._matcher, other._size = self._matcher.deep_copy(), self._size
    return other

  def _check(self) -> None:
    if self._matcher.is_error():
      raise UserError(f'the text leaves its constraint: {_line(self._matcher.get_error())}')


def regex(vocab: Any, pattern: str, *, end: int | None = None) -> Guide:
  """Texts that match the whole `pattern`, in the syntax of Rust's `regex`: no look-around, and `\\d` is any digit of
  Unicode. end: default eos."""
  grammar = _library().LLMatcher.grammar_from_regex(pattern)
  return Guide(vocab, grammar, vocab.eos if end is None else end)


def json_schema(
  vocab: Any, schema: dict | str, *, whitespace: str = SPACE, end: int | None = None
) -> Guide:
  """JSON that a JSON schema describes, properties in the schema's order. `{'type': 'object'}` is any object.

  whitespace: a regular expression of what may stand between two tokens of JSON. end: default eos. Raises `UserError`
  for a schema that is not JSON or asks for what llguidance does not support.
  """
  told = dict(whitespace_flexible=True, whitespace_pattern=whitespace)
  try:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    grammar = _library().LLMatcher.grammar_from_json_schema(text, overrides=told)
  except (TypeError, ValueError) as e:
    raise UserError(f'the schema is not JSON: {_line(str(e))}') from e
  return Guide(vocab, grammar, vocab.eos if end is None else end)


@functools.lru_cache(maxsize=4)  # a trie of the whole vocabulary
def _tokenizer(vocab: Any, end: int) -> Any:
  library = _library()
  return library.LLTokenizer(library.TokenizerWrapper(_Words(vocab, end)), eos_token=end)


class _Words:
  """A vocabulary as llguidance asks for it."""

  def __init__(self, vocab: Any, end: int):
    self._vocab, self.bos_token_id, self.eos_token_id = vocab, None, end
    self.tokens, self.special_token_ids = vocab.pieces, vocab.controls
    self._special = frozenset(self.special_token_ids)

  def __call__(self, text: bytes) -> list[int]:
    """The ids of a text, markers in it spelt letter by letter."""
    ids, found = self._vocab.encode(text.decode(errors='replace')), []
    for i in ids:
      spelt = self.tokens[i].decode() if i in self._special else ''
      found += [j for letter in spelt for j in self._vocab.encode(letter)] or [i]
    return found


def _library() -> Any:
  try:
    import llguidance
  except ImportError as e:
    raise UserError('constraints need llguidance: pip install llm_jax[serve]') from e
  return llguidance


def _line(message: str) -> str:
  """The first lines of a report of several, as one."""
  return ' '.join(message.split('<state>')[0].split())
