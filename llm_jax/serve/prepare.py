"""From a request body to what the engine is asked: text to ids, limits, constraints, the functions that may be called.

Nothing here waits for the model, but rendering, tokenising and compiling a schema take their time, so the server calls
these functions in a thread.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.data import chat, templates
from llm_jax.serve import api, tools
from llm_jax.serve.reading import Causal
from llm_jax.serve.requests import Request


class Prompt(NamedTuple):
  """One prompt. ids: what the model reads; start: how many of them stand in front of the text, not being part of it;
  text: for the echo. samples: one request per answer."""

  ids: tuple[int, ...]
  start: int
  text: str
  samples: tuple[Request, ...]


class Job(NamedTuple):
  """A request body, ready for the engine. keep: answers per prompt that are given back, of those that are made. said:
  whether the answers go on with the prompt's text (and its spelling depends on it), or begin anew. hear: makes what
  reads the calls of one answer. drop: whether the tokens are not wanted, only the prompt's log-probabilities.
  """

  prompts: list[Prompt]
  stop: list[str]
  keep: int
  said: bool
  hear: Callable[[], Any]
  drop: bool = False


def completion(body: api.Completion, vocab: Any, reading: Causal, limits: api.Limits) -> Job:
  """Raises `Refused` and `UserError` for what cannot be done. reading: of the engine."""
  if body.suffix:
    raise api.Refused(400, 'suffix is not supported: the model writes what follows', param='suffix')
  texts = _inputs(body.prompt, vocab, limits, 'prompt')
  n, best = body.n or 1, body.best_of or body.n or 1
  _check_n(best, limits)
  if best < n:
    raise api.Refused(400, f'best_of ({best}) must be at least n ({n})', param='best_of')
  if best > n and body.stream:
    raise api.Refused(400, 'best_of cannot be streamed: it compares whole answers', param='best_of')
  drop = body.max_tokens == 0
  if drop and not body.echo:
    words = 'max_tokens must be at least 1; 0 only with echo, to score the prompt'
    raise api.Refused(400, words, param='max_tokens')
  most = 1 if drop else 16 if body.max_tokens is None else body.max_tokens
  shared = _shared(body, vocab)
  shared |= dict(ends=(vocab.eos,), top=body.logprobs or 0)
  shared |= dict(prompt_logp=bool(body.echo and body.logprobs is not None))
  seeds, prompts = _seeds(body.seed, best), []
  for ids, text in texts:
    ids, front = reading.text(ids, vocab)
    start = front if text else len(ids)
    given = body.max_tokens is not None and not drop
    room = _room(len(ids), most, given, reading, limits, 'max_tokens')
    ask = reading.ask(ids, vocab)._replace(max_new=room, **shared)
    prompts.append(Prompt(ids, start, text, tuple(ask._replace(seed=s) for s in seeds)))
  return Job(prompts, body.stops(limits), n, reading.said, tools.Plain, drop)


def conversation(body: api.Chat, vocab: Any, reading: Causal, limits: api.Limits) -> Job:
  """Raises `Refused` and `UserError` for what cannot be done, for instance without a chat template."""
  if vocab.template is None:
    words = 'this model has no chat template, it was not taught to converse: use /v1/completions'
    raise api.Refused(400, words, code='no_chat_template')
  n = body.n or 1
  _check_n(n, limits)
  if body.top_logprobs is not None and not body.logprobs:
    raise api.Refused(400, 'top_logprobs needs logprobs: true', param='top_logprobs')
  functions, forced = tools.wanted(body)
  native = chat.takes(vocab.template, 'tools')
  told = dict(tools=[tools.listed(f) for f in functions]) if functions and native else {}
  said = tools.messages(body, functions, native)
  ids = reading.turns(tuple(templates.prompt(vocab, said, **told)), vocab)
  if body.max_completion_tokens is not None:
    asked, field = body.max_completion_tokens, 'max_completion_tokens'
  else:
    asked, field = body.max_tokens, 'max_tokens'
  most = reading.length if asked is None else asked
  shared = _shared(body, vocab)
  shared |= dict(ends=tuple({vocab.turn, vocab.eos}), top=body.top_logprobs or 0)
  room = _room(len(ids), most, asked is not None, reading, limits, field)
  make = _constraint(body, vocab, functions, forced)
  ask = reading.ask(ids, vocab)._replace(max_new=room, **shared)
  samples = tuple(ask._replace(seed=s, constraint=make()) for s in _seeds(body.seed, n))
  hear = tools.Forced if forced else tools.Reader if functions else tools.Plain
  return Job([Prompt(ids, len(ids), '', samples)], body.stops(limits), n, False, hear)


def embedding(
  body: api.Embedding, vocab: Any, reading: Causal, limits: api.Limits
) -> list[tuple[int, ...]]:
  """The ids of every input."""
  found = []
  for ids, _ in _inputs(body.input, vocab, limits, 'input'):
    ids, _ = reading.text(ids, vocab)
    _check_long(len(ids), reading)
    found.append(ids)
  return found


def _inputs(
  given: Any, vocab: Any, limits: api.Limits, param: str
) -> list[tuple[tuple[int, ...], str]]:
  """(ids, text) of each prompt of a text, texts, ids, or lists of ids."""
  several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
  if len(several) > limits.prompts:
    words = f'at most {limits.prompts} prompts in a request, got {len(several)}'
    raise api.Refused(400, words, param=param)
  found = []
  for one in several:
    if isinstance(one, str):
      found.append((tuple(vocab.encode(one)), one))
      continue
    if max(one) >= vocab.size:
      words = f'{param}: {max(one)} is not the id of a token, 0 to {vocab.size - 1}'
      raise api.Refused(400, words, param=param)
    found.append((tuple(one), vocab.decode(one)))
  return found


def _shared(body: api.Common, vocab: Any) -> dict[str, Any]:
  return dict(sampling=body.sampling(), bias=body.bias(vocab))


def _seeds(seed: int | None, n: int) -> list[int]:
  """One for each answer, in [0, 2^31); the first is the client's own. What a prompt is answered depends on no other."""
  first = secrets.randbits(31) if seed is None else seed
  return [(first + i * 0x9E3779B1) % 2**31 for i in range(n)]


def _check_n(n: int, limits: api.Limits) -> None:
  if n > limits.n:
    raise api.Refused(400, f'at most {limits.n} answers to a prompt, got {n}', param='n')


def _check_long(prompt: int, reading: Causal) -> None:
  if prompt > reading.longest:
    raise api.Refused(400, reading.too_long(prompt), code='context_length_exceeded')


def _room(
  prompt: int, most: int, given: bool, reading: Causal, limits: api.Limits, field: str
) -> int:
  """The tokens that an answer may have. given: whether the client asked for `most` itself.

  An answer that the context has no room for ends with finish_reason 'length', as OpenAI's do."""
  _check_long(prompt, reading)
  cap = limits.max_tokens or reading.length
  if given and most > cap:
    raise api.Refused(400, f'{field} is at most {cap} here, got {most}', param=field)
  return min(most, cap, reading.room(prompt))


def _constraint(
  body: api.Chat, vocab: Any, functions: Sequence[api.Signature], forced: bool
) -> Callable[[], Any]:
  """What makes the constraint of one answer; a new one for each, since they keep track of it."""
  form = body.response_format
  if form is None or form.type == 'text':
    wanted = tools.schema(functions) if forced else None
  elif functions:
    words = (
      'response_format and tools exclude one another: leave one out, or set tool_choice to none'
    )
    raise api.Refused(400, words, param='response_format')
  elif form.type == 'json_object':
    wanted = dict(type='object')
  elif form.json_schema is None:
    raise api.Refused(400, 'response_format: json_schema is missing', param='response_format')
  else:
    wanted = form.json_schema.schema_
  if wanted is None:
    return lambda: None
  from llm_jax.decode import constrain

  def make() -> Any:
    try:
      return constrain.json_schema(vocab, wanted, end=vocab.turn)
    except UserError as e:
      raise api.Refused(400, str(e), param='tools' if forced else 'response_format') from e

  return make
