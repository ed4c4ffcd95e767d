"""The two kinds of completion as they are given back: whole, or event by event as they are made.

Both say the same: the pieces of a stream, joined, are the whole answer.
"""

from collections.abc import AsyncIterator
from typing import Any

from llm_jax.serve import api, shapes
from llm_jax.serve.answers import Answers, Piece, Reader, Told
from llm_jax.serve.prepare import Job, Prompt


class Reply:
  """What both kinds share. Submits the job's requests at once: what refuses them is raised here.

  A kind says what its answers look like: `choices(whole answers)` and, for the stream, `pieces(number, piece)`, both
  lists of dicts.
  """

  prefix, kind = '', ''

  def __init__(
    self,
    job: Job,
    body: api.Common,
    *,
    engine: Any,
    vocab: Any,
    names: shapes.Names,
    model: str,
    timeout: float,
  ):
    self.job, self.body, self.names = job, body, names
    self.each = len(job.prompts[0].samples)
    requests = [r for p in job.prompts for r in p.samples]
    before = [p.ids[p.start :] if job.said else () for p in job.prompts for _ in p.samples]
    readers = [Reader(vocab, r, b, job.stop) for r, b in zip(requests, before, strict=True)]
    self.frame = shapes.Frame(self.prefix, self.kind, model)
    self.answers = Answers(engine, requests, readers, timeout)

  def usage(self) -> dict[str, int]:
    """Of everything that was read and made."""
    made = 0 if self.job.drop else sum(r.made for r in self.answers.readers)
    return shapes.usage(sum(len(p.ids) for p in self.job.prompts), made)

  async def whole(self) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    found = await self.answers.whole()
    return self.frame(self.choices(found), usage=self.usage())

  async def events(self) -> AsyncIterator[bytes]:
    """The events of one that is. An error after the first is an event too."""
    told = self.body.stream_options is not None and self.body.stream_options.include_usage
    more: dict[str, Any] = dict(usage=None) if told else {}
    try:
      async for i, piece in self.answers.pieces():
        for choice in self.pieces(i, piece):
          yield shapes.event(self.frame([choice], **more))
      if told:
        yield shapes.event(self.frame([], usage=self.usage()))
      yield shapes.DONE
    except api.Refused as e:
      yield shapes.event(e.body())
    finally:
      self.answers.cancel()


class CompletionReply(Reply):
  """/v1/completions."""

  prefix, kind = 'cmpl', 'text_completion'

  def __init__(self, *args: Any, **told: Any):
    super().__init__(*args, **told)
    self._begun: set[int] = set()

  def choices(self, found: list[tuple[str, list[Told], str]]) -> list[dict[str, Any]]:
    """The likeliest of each prompt, per token, where more were made than are kept."""
    made, out = self.answers.readers, []
    for p in range(len(self.job.prompts)):
      own = list(range(p * self.each, (p + 1) * self.each))
      if self.each > self.job.keep:
        own.sort(key=lambda i: made[i].total / max(made[i].made, 1), reverse=True)
      for j, i in enumerate(own[: self.job.keep]):
        text, tokens, end = found[i]
        out.append(self._choice(p * self.job.keep + j, i, Piece(text, tuple(tokens), end), True))
    return out

  def pieces(self, i: int, piece: Piece) -> list[dict[str, Any]]:
    """One choice."""
    first = i not in self._begun
    self._begun.add(i)
    return [self._choice(i, i, piece, first)]

  def _choice(self, index: int, i: int, piece: Piece, first: bool) -> dict[str, Any]:
    prompt: Prompt = self.job.prompts[i // self.each]
    text, tokens, end = piece
    if self.job.drop:
      text, tokens, end = '', (), end and 'length'
    echo, logprobs = bool(self.body.echo), None
    if self.body.logprobs is not None:
      begin = len(prompt.text) if echo else 0
      logprobs = shapes.text_logprobs(self.names, tokens, begin)
      if echo and first:
        known = self.answers.tickets[i].prompt_logp or [None] * len(prompt.ids)
        before = prompt.ids[prompt.start :], known[prompt.start :]
        logprobs = shapes.joined(shapes.echo_logprobs(self.names, *before), logprobs)
    shown = prompt.text + text if echo and first else text
    return dict(index=index, text=shown, logprobs=logprobs, finish_reason=end)


class ChatReply(Reply):
  """/v1/chat/completions."""

  prefix, kind = 'chatcmpl', 'chat.completion'

  def __init__(self, *args: Any, **told: Any):
    if args[1].stream:
      self.kind = 'chat.completion.chunk'
    super().__init__(*args, **told)
    self._hears: list[Any] = [self.job.hear() for _ in self.answers.readers]
    self._called = [0] * self.each
    self._begun: set[int] = set()

  def choices(self, found: list[tuple[str, list[Told], str]]) -> list[dict[str, Any]]:
    """One message each."""
    out = []
    for i, (text, tokens, end) in enumerate(found):
      said, calls = _all(self._hears[i], text)
      message: dict[str, Any] = dict(role='assistant', content=said or (None if calls else ''))
      message['refusal'] = None
      if calls:
        message['tool_calls'] = [c.shape() for c in calls]
      end = 'tool_calls' if calls and end == 'stop' else end
      out.append(dict(index=i, message=message, logprobs=self._logprobs(tokens), finish_reason=end))
    return out

  def pieces(self, i: int, piece: Piece) -> list[dict[str, Any]]:
    """The role, what is said or called, and why it ended."""
    out, hears = [], self._hears[i]

    def say(delta: dict[str, Any], logprobs: Any = None, end: str | None = None) -> None:
      out.append(dict(index=i, delta=delta, logprobs=logprobs, finish_reason=end))

    if i not in self._begun:
      self._begun.add(i)
      say(dict(role='assistant', content=''))
    said, calls = hears.add(piece.text)
    if piece.end is not None:
      rest, more = hears.end()
      said, calls = said + rest, calls + more
    if said or (self.body.logprobs and piece.tokens):
      say(dict(content=said), self._logprobs(piece.tokens))
    for call in calls:
      say(dict(tool_calls=[dict(index=self._called[i], **call.shape())]))
      self._called[i] += 1
    if piece.end is not None:
      say({}, end='tool_calls' if hears.called and piece.end == 'stop' else piece.end)
    return out

  def _logprobs(self, tokens: Any) -> Any:
    return shapes.chat_logprobs(self.names, tokens) if self.body.logprobs else None


def _all(hears: Any, text: str) -> tuple[str, list[Any]]:
  said, calls = hears.add(text)
  rest, more = hears.end()
  return said + rest, calls + more
