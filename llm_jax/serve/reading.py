"""How the engine reads what it is asked, by the kind of model; nothing else asks for the kind.

| kind | the prompt | the answer |
|---|---|---|
| causal | in chunks of `CHUNK`, from left to right | goes on with it |
| prefix | at once, every token sees all of it (Raffel et al. 2020, figure 4) | goes on with it |
| encoder_decoder | at once, by the encoder, whose output cross-attention reads (serve/encoder.py) | begins anew |

What is read at once is padded to one of a few widths, so that nothing is compiled later, and always to the same: so its
bits depend on nobody else. At most `ONCE` tokens are.
"""

from typing import Any

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import prompts
from llm_jax.serve.requests import Request

CHUNK = 32
ONCE = 2048


def widths(longest: int) -> tuple[int, ...]:
  """`CHUNK` and its doubles up to `longest`, which is the last where it is none of them."""
  found = [CHUNK]
  while found[-1] < longest:
    found.append(min(2 * found[-1], longest))
  return tuple(found)


class Causal:
  """Prompt and answer are one sequence.

  length: of the longest sequence. longest: of the prompts. chunks: the numbers of a prompt's tokens read in one call;
  encodes: those of the encoder, none without one. cuts: whether what is read of a prompt depends on nothing behind it.
  said: whether the answer goes on with the prompt's text.
  """

  chunks, encodes = (CHUNK,), ()
  cuts, said = True, True

  def __init__(self, length: int):
    self.length, self.longest = length, length - 1

  def check(self, request: Request) -> None:
    """Raises `UserError` for what cannot be read."""
    if request.encoded:
      raise UserError('this model has no encoder: everything it reads is the prompt')
    if len(request.prompt) > self.longest:
      raise UserError(self.too_long(len(request.prompt)))

  def too_long(self, tokens: int) -> str:
    """What is said of a prompt with more than `longest`."""
    return f'the prompt has {tokens} tokens, the context holds {self.length}: shorten it'

  def room(self, prompt: int) -> int:
    """Tokens that the answer to a prompt may have."""
    return self.length - prompt

  def embed(self, prompt: tuple[int, ...]) -> Request:
    """The request for the embedding of a prompt. Raises `UserError` where there is none."""
    return Request(prompt, max_new=1)

  def front(self, count: int) -> dict[str, np.ndarray]:
    """What the model is told of a call that reads `count` tokens of a prompt."""
    del count
    return {}

  def text(self, ids: tuple[int, ...], vocab: Any) -> tuple[tuple[int, ...], int]:
    """(what is read of a text's ids, how many of these stand in front of the text)."""
    front = () if vocab.start is None else (vocab.start,)
    return (*front, *ids) or (vocab.eos,), len(front)

  def turns(self, ids: tuple[int, ...], vocab: Any) -> tuple[int, ...]:
    """What is read of the ids of a conversation, which a template wrote."""
    return ids or (vocab.eos,)

  def ask(self, ids: tuple[int, ...], vocab: Any) -> Request:
    """The request for an answer to what is read."""
    del vocab
    return Request(ids)


class Prefix(Causal):
  """The same, but every token of the prompt sees all of it."""

  cuts = False

  def __init__(self, length: int):
    super().__init__(length)
    self.longest = min(self.longest, ONCE)
    self.chunks = widths(self.longest)

  def check(self, request: Request) -> None:
    """Raises `UserError` for what cannot be read."""
    super().check(request)
    _no_scores(request)

  def too_long(self, tokens: int) -> str:
    """What is said of a prompt with more than `longest`."""
    if tokens >= self.length:
      return super().too_long(tokens)
    return f'the prompt has {tokens} tokens, {self.longest} are read at once at most: shorten it'

  def front(self, count: int) -> dict[str, np.ndarray]:
    """Which slots the tokens of a prompt see."""
    return dict(prefix=np.arange(self.chunks[-1])[None] < count)


class EncoderDecoder(Causal):
  """The encoder reads the prompt, `Request.encoded`; the decoder begins with `Request.prompt`, its start token."""

  cuts, said = False, False

  def __init__(self, length: int):
    super().__init__(length)
    self.longest = min(length, ONCE)
    self.encodes = widths(self.longest)

  def check(self, request: Request) -> None:
    """Raises `UserError` for what cannot be read."""
    if not request.encoded:
      raise UserError(
        'this model reads a prompt with its encoder: name its ids as encoded, the start token as prompt'
      )
    if len(request.encoded) > self.longest:
      raise UserError(self.too_long(len(request.encoded)))
    if len(request.prompt) >= self.length:
      raise UserError(super().too_long(len(request.prompt)))
    _no_scores(request)

  def too_long(self, tokens: int) -> str:
    """What is said of a prompt with more than `longest`."""
    return f'the prompt has {tokens} tokens, the encoder reads {self.longest} at most: shorten it'

  def room(self, prompt: int) -> int:
    """Tokens that the answer may have, whatever the prompt."""
    del prompt
    return self.length - 1

  def embed(self, prompt: tuple[int, ...]) -> Request:
    """Raises `UserError`: a decoder's outputs are no function of the prompt alone."""
    raise UserError(
      'embeddings are the mean of what a decoder makes of the prompt: not for an encoder-decoder'
    )

  def text(self, ids: tuple[int, ...], vocab: Any) -> tuple[tuple[int, ...], int]:
    """(what the encoder reads of a text's ids, 0)."""
    return tuple(prompts.encoded(vocab, ids)), 0

  def turns(self, ids: tuple[int, ...], vocab: Any) -> tuple[int, ...]:
    """A conversation without the start token that its template wrote."""
    if vocab.start is not None and ids[:1] == (vocab.start,):
      ids = ids[1:]
    return ids or (vocab.eos,)

  def ask(self, ids: tuple[int, ...], vocab: Any) -> Request:
    """The request for an answer to what the encoder reads."""
    return Request((vocab.first,), encoded=ids)


KINDS = dict(causal=Causal, prefix=Prefix, encoder_decoder=EncoderDecoder)


def kind(model: Any) -> type[Causal]:
  """That of a model. Raises `UserError` for one without a decoder."""
  if model.card.kind not in KINDS:
    raise UserError(
      f'the engine answers with decoders, this model is of kind {model.card.kind!r} and writes nothing'
    )
  return KINDS[model.card.kind]


def _no_scores(request: Request) -> None:
  if request.prompt_logp:
    raise UserError(
      'this model sees its whole prompt at once, whose tokens have no log-probabilities: ask for an echo or for '
      'logprobs, not for both'
    )
