"""Answers in the shapes of OpenAI's API: tokens with their probabilities, usage, the objects around them."""

import base64
import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.serve.answers import LEAST, Told


class Names:
  """What each id says, as text: what it adds behind another token, so that its space is kept. Kept once looked up."""

  def __init__(self, vocab: Any):
    self._vocab, self._known = vocab, {}
    some = vocab.encode('a')
    self._front = some[-1:]
    self._skip = len(vocab.decode(self._front))
    self._roles = {vocab.eos: '<eos>'} | ({} if vocab.pad is None else {vocab.pad: '<pad>'})

  def __call__(self, id: int) -> str:
    """An id that adds nothing has its role or its number as its name."""
    if id not in self._known:
      text = self._vocab.decode([*self._front, id])[self._skip :]
      self._known[id] = text or self._roles.get(id, f'<{id}>')
    return self._known[id]

  def all(self, ids: Sequence[int]) -> list[str]:
    """The names of `ids`."""
    return [self(i) for i in ids]


def chat_logprobs(names: Names, tokens: Sequence[Told]) -> dict[str, Any]:
  """`logprobs` of a chat completion. bytes: null for a token that is a part of a character."""

  def one(id: int, logp: float) -> dict[str, Any]:
    text = names(id)
    spelt = None if '\ufffd' in text else list(text.encode('utf-8', errors='replace'))
    return dict(token=text, logprob=_finite(logp), bytes=spelt)

  content = [dict(one(t.id, t.logp), top_logprobs=[one(i, p) for i, p in t.top]) for t in tokens]
  return dict(content=content, refusal=None)


def text_logprobs(names: Names, tokens: Sequence[Told], begin: int) -> dict[str, Any]:
  """`logprobs` of a completion. begin: characters in front of the answer, an echo's."""
  top = [{names(i): _finite(p) for i, p in reversed(t.top)} for t in tokens]
  return dict(
    tokens=names.all([t.id for t in tokens]),
    token_logprobs=[t.logp for t in tokens],
    top_logprobs=top,
    text_offset=[begin + t.at for t in tokens],
  )


def echo_logprobs(names: Names, ids: Sequence[int], logp: Sequence[float | None]) -> dict[str, Any]:
  """The same of a prompt. There are no alternatives to its tokens; the first has no probability."""
  texts = names.all(ids)
  offsets = np.cumsum([0, *(len(t) for t in texts)]).tolist()[:-1]
  known = [None if p is None else _finite(p) for p in logp]
  return dict(
    tokens=texts, token_logprobs=known, top_logprobs=[None] * len(texts), text_offset=offsets
  )


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
  """`logprobs` of a prompt and its answer."""
  return {key: first[key] + second[key] for key in first}


def usage(prompt: int, made: int) -> dict[str, int]:
  """Numbers of tokens, those that end an answer counted."""
  return dict(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)


class Frame:
  """What all pieces of one response have in common. kind: its `object`, such as 'chat.completion'."""

  def __init__(self, prefix: str, kind: str, model: str):
    self._head = dict(
      id=f'{prefix}-{secrets.token_hex(12)}', object=kind, created=int(time.time()), model=model
    )

  def __call__(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One object."""
    return dict(self._head, choices=choices, **more)


def event(what: Any) -> bytes:
  """One server-sent event."""
  return b'data: ' + (what if isinstance(what, bytes) else json.dumps(what).encode()) + b'\n\n'


DONE = event(b'[DONE]')


def embeddings(vectors: np.ndarray, form: str, model: str, tokens: int) -> dict[str, Any]:
  """The response of /v1/embeddings. vectors: f32 [n, embed]; form: 'float' or 'base64' (of little-endian f32)."""

  def written(vector: np.ndarray) -> Any:
    if form == 'base64':
      return base64.b64encode(np.asarray(vector, '<f4').tobytes()).decode()
    return [float(x) for x in vector]

  data = [dict(object='embedding', index=i, embedding=written(v)) for i, v in enumerate(vectors)]
  return dict(
    object='list', data=data, model=model, usage=dict(prompt_tokens=tokens, total_tokens=tokens)
  )


def _finite(logp: float) -> float:
  return max(float(logp), LEAST) if not math.isnan(logp) else LEAST
