"""The server: OpenAI's API over one model, as a FastAPI application, and its life from the first request to SIGTERM.

    server.run(server.app(engine, vocab, 'smollm2'), port=8000)

`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/v1/models`; `/` is a page to talk to the model;
`/health`, `/ready`, `/metrics`. Every error has OpenAI's shape. A client that goes away is forgotten at once.
"""

import asyncio
import contextlib
import json
import pathlib
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import fastapi
import starlette.exceptions
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from llm_jax.core.errors import UserError, nearest
from llm_jax.serve import api, prepare, shapes
from llm_jax.serve.answers import full
from llm_jax.serve.api import Limits, Refused
from llm_jax.serve.gate import GONE, Gate, loopback
from llm_jax.serve.metrics import Metrics
from llm_jax.serve.replies import ChatReply, CompletionReply, Reply
from llm_jax.serve.requests import Full

DEFAULTS = Limits()
PAGE = pathlib.Path(__file__).with_name('page.html')
# The page asks this server and nobody else; what a model writes is text there, never a program.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Service:
  """One model being served. draining: no new work; replies: what is being answered."""

  def __init__(self, engine: Any, vocab: Any, name: str, limits: Limits):
    self.engine, self.vocab, self.name, self.limits = engine, vocab, name, limits
    self.names, self.metrics = shapes.Names(vocab), Metrics(engine)
    self.draining, self.embedding, self.since = False, 0, int(time.time())
    self.replies: set[Reply] = set()

  def model(self) -> dict[str, Any]:
    """What /v1/models says. chat: whether it converses; length: of prompt and answer, in tokens."""
    known = dict(chat=self.vocab.template is not None, length=self.engine.length)
    return dict(id=self.name, object='model', created=self.since, owned_by='llm_jax', **known)

  def check_model(self, asked: str | None) -> None:
    """Raises `Refused` for another model than this."""
    if asked is not None and asked != self.name:
      words = f'no model {asked[:80]!r} here; {nearest(asked[:80], [self.name])}'
      raise Refused(404, words, param='model', code='model_not_found')

  async def complete(
    self, body: api.Common, request: fastapi.Request, ready: Callable[..., Any], kind: type[Reply]
  ) -> Response:
    """Answers a completion of either kind."""
    self.check_model(body.model)
    told = body, self.vocab, self.engine.reading, self.limits
    job = await asyncio.to_thread(ready, *told)
    shared = dict(engine=self.engine, vocab=self.vocab, names=self.names, model=self.name)
    try:
      reply = kind(job, body, timeout=self.limits.timeout, **shared)
    except UserError as e:
      raise (self.broken() or e) from e
    self.replies.add(reply)
    if body.stream:
      return Events(reply, self)
    try:
      return _json(await _while_there(request, reply.whole()))
    finally:
      reply.answers.cancel()
      self.replies.discard(reply)

  async def embed(self, body: api.Embedding, request: fastapi.Request) -> Response:
    """Answers /v1/embeddings."""
    self.check_model(body.model)
    if self.embedding >= self.limits.embeddings:
      raise Refused(429, 'too many embeddings at a time: try again later', retry_after=1)
    self.embedding += 1
    try:
      told = body, self.vocab, self.engine.reading, self.limits
      prompts = await asyncio.to_thread(prepare.embedding, *told)
      work = asyncio.to_thread(self.engine.embed, prompts)
      async with asyncio.timeout(self.limits.timeout):
        vectors = await _while_there(request, work)
    except Full as e:
      raise full(e) from e
    except TimeoutError as e:
      raise Refused(504, f'not done after {self.limits.timeout:g} s', code='timeout') from e
    finally:
      self.embedding -= 1
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
      words = f'the embeddings of this model have {vectors.shape[1]} dimensions'
      raise Refused(400, words, param='dimensions')
    form = body.encoding_format or 'float'
    return _json(shapes.embeddings(vectors, form, self.name, sum(map(len, prompts))))

  def broken(self) -> Refused | None:
    """The error for all requests where the engine has given up."""
    if not self.engine.stats().get('failed'):
      return None
    return Refused(503, 'the engine has failed: the server has to be started again', code='failed')

  def cut(self) -> None:
    """Ends what is still being answered; its clients are told."""
    for reply in list(self.replies):
      reply.answers.cut()


class Events(Response):
  """A stream of server-sent events that stops when its client goes, even while none is due."""

  def __init__(self, reply: Reply, service: Service):
    super().__init__(media_type='text/event-stream')
    self._reply, self._service = reply, service
    self.raw_headers = [h for h in self.raw_headers if h[0] != b'content-length']
    self.raw_headers += [(b'cache-control', b'no-store'), (b'x-accel-buffering', b'no')]

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Sends them."""

    async def run() -> None:
      head = dict(type='http.response.start', status=200, headers=self.raw_headers)
      await send(head)
      metrics, last, first = self._service.metrics, time.monotonic(), True
      async with contextlib.aclosing(self._reply.events()) as events:
        async for body in events:
          now = time.monotonic()
          (metrics.first if first else metrics.between).observe(now - last)
          last, first = now, False
          async with asyncio.timeout(self._service.limits.timeout):  # a client that does not read
            await send(dict(type='http.response.body', body=body, more_body=True))
      await send(dict(type='http.response.body', body=b''))

    try:
      with contextlib.suppress(Refused, TimeoutError):
        await _race(run(), receive)
    finally:
      self._reply.answers.cancel()
      self._service.replies.discard(self._reply)


async def _race(work: Coroutine[Any, Any, Any], receive: Any) -> Any:
  """The result of `work`, which is cancelled, and 499 raised, when the client goes first."""

  async def left() -> None:
    while (await receive())['type'] != 'http.disconnect':
      pass

  doing, gone = asyncio.create_task(work), asyncio.create_task(left())
  try:
    await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
    if doing.done():
      return doing.result()
    raise Refused(GONE, 'the client has gone')
  finally:
    for task in (doing, gone):
      task.cancel()
    await asyncio.gather(doing, gone, return_exceptions=True)


def _while_there(request: fastapi.Request, work: Coroutine[Any, Any, Any]) -> Any:
  return _race(work, request.receive)


def _json(what: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  return Response(json.dumps(what), status, headers, 'application/json')


# --- the application ----------------------------------------------------------------------------------


def app(
  engine: Any, vocab: Any, name: str, *, api_key: str | None = None, limits: Limits = DEFAULTS
) -> fastapi.FastAPI:
  """The application. engine: see serve/engine.py; name: of the model, for clients; api_key: None serves this machine
  alone. Its `state.service` is the `Service`."""
  service = Service(engine, vocab, name, limits)
  wrong = {
    code: dict(model=api.ErrorBody, description=words)
    for code, words in (
      ('400', 'wrong values'), ('401', 'no or a wrong key'), ('404', 'no such model'),
      ('413', 'too large'), ('429', 'queue full: Retry-After says when to ask again'),
      ('503', 'shutting down'), ('504', 'not done in time'),
    )
  }  # fmt: skip
  made = fastapi.FastAPI(
    title='llm_jax', docs_url=None, redoc_url=None, openapi_url='/openapi.json', responses=wrong
  )
  made.state.service = service
  _errors(made)
  _completions(made, service)
  _about(made, service)
  gate = dict(api_key=api_key, limits=limits, metrics=service.metrics)
  made.add_middleware(Gate, draining=lambda: service.draining, **gate)
  documented = made.openapi

  def openapi() -> dict[str, Any]:
    found = documented()
    for path in found['paths'].values():
      for operation in path.values():
        operation['responses'].pop('422', None)  # such errors are 400 here, as in OpenAI's API
    return found

  made.openapi = openapi
  return made


def _completions(made: fastapi.FastAPI, service: Service) -> None:
  @made.post('/v1/chat/completions')
  async def chat(body: api.Chat, request: fastapi.Request) -> Response:
    """Answers a conversation."""
    return await service.complete(body, request, prepare.conversation, ChatReply)

  @made.post('/v1/completions')
  async def completions(body: api.Completion, request: fastapi.Request) -> Response:
    """Goes on with a text."""
    return await service.complete(body, request, prepare.completion, CompletionReply)

  @made.post('/v1/embeddings')
  async def embeddings(body: api.Embedding, request: fastapi.Request) -> Response:
    """The mean of the last hidden states, of length 1."""
    return await service.embed(body, request)


def _about(made: fastapi.FastAPI, service: Service) -> None:
  @made.get('/v1/models')
  async def models() -> Response:
    """The one model that is served."""
    return _json(dict(object='list', data=[service.model()]))

  @made.get('/v1/models/{model:path}')
  async def model(model: str) -> Response:
    """What is known of it."""
    service.check_model(model)
    return _json(service.model())

  @made.get('/health')
  async def health() -> Response:
    """The process lives."""
    if error := service.broken():
      raise error
    return _json(dict(status='ok'))

  @made.get('/ready')
  async def ready() -> Response:
    """It takes requests."""
    if service.draining:
      raise Refused(503, 'the server is shutting down', code='draining', retry_after=5)
    if error := service.broken():
      raise error
    return _json(dict(status='ready'))

  @made.get('/metrics')
  async def metrics() -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  @made.get('/', include_in_schema=False)
  async def page() -> Response:
    headers = {'content-security-policy': POLICY, 'referrer-policy': 'no-referrer'}
    return Response(PAGE.read_bytes(), 200, headers, 'text/html; charset=utf-8')


def _errors(made: fastapi.FastAPI) -> None:
  """Every way to fail, in one shape."""

  def shaped(error: Refused) -> Response:
    return _json(error.body(), error.status, error.headers())

  @made.exception_handler(Refused)
  async def refused(_: Any, error: Refused) -> Response:
    return shaped(error)

  @made.exception_handler(UserError)
  async def user(_: Any, error: UserError) -> Response:
    return shaped(Refused(400, str(error)))

  @made.exception_handler(RequestValidationError)
  async def invalid(_: Any, error: RequestValidationError) -> Response:
    return shaped(_explained(error))

  @made.exception_handler(starlette.exceptions.HTTPException)
  async def http(request: fastapi.Request, error: starlette.exceptions.HTTPException) -> Response:
    words = str(error.detail)
    if error.status_code in (404, 405):
      words = f'no {request.method} {request.url.path[:200]} here; the API is under /v1'
    return shaped(Refused(error.status_code, words))

  @made.exception_handler(Exception)
  async def unforeseen(_: Any, error: Exception) -> Response:
    return shaped(Refused(500, 'the server failed on this request; its log says how'))


def _explained(error: RequestValidationError) -> Refused:
  """The first complaint of pydantic in one line, with the nearest name for a field that is not known."""
  found = max(error.errors(), key=lambda e: len(e['loc']))
  where = [str(x) for x in found['loc'][1:]]
  where = [x for x in where if '[' not in x and x != 'str']  # which of several types was tried
  if found['type'] == 'json_invalid':
    return Refused(400, f'the body is not JSON (character {where[0]}): {found["ctx"]["error"]}')
  if not where and found['type'] == 'value_error':
    return Refused(400, str(found['ctx']['error']))
  if not where:
    words = 'the body must be a JSON object, sent with content-type: application/json'
    return Refused(400, words)
  param = '.'.join(where)[:200]
  if found['type'] == 'extra_forbidden':
    known = [*api.Chat.model_fields, *api.Completion.model_fields]
    return Refused(
      400, f'no field {where[-1][:80]!r}; {nearest(where[-1][:80], known)}', param=param
    )
  return Refused(400, f'{param}: {found["msg"][:300]}', param=where[0][:200])


# --- its life -----------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
  """Ends with exit code 0 when it was asked to end: no new requests, those that run get `drain` seconds."""

  def __init__(self, settings: uvicorn.Config, service: Service, drain: float):
    super().__init__(settings)
    self._service, self._drain = service, drain

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Keeps the loop, for the signal handler."""
    self._own_loop = asyncio.get_running_loop()
    await super().startup(sockets)

  def handle_exit(self, sig: int, frame: Any) -> None:
    """The first signal drains, the second cuts what is left."""
    again, self._service.draining, self.should_exit = self._service.draining, True, True
    seconds = 0 if again else self._drain
    cut = lambda: self._own_loop.call_later(seconds, self._service.cut)
    self._own_loop.call_soon_threadsafe(cut)


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
  """A socket for the server. Raises `UserError` for a port that is taken, or another host without a key."""
  if not loopback(host) and not api_key:
    raise UserError(
      f'--host={host} lets other machines in: name a key with --api_key=KEY, or leave out --host'
    )
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=2048)
  except OSError as e:
    reason = (e.strerror or str(e)).lower()
    raise UserError(f'cannot listen at {host}:{port} ({reason}): try another --port') from e


def run(made: fastapi.FastAPI, sock: socket.socket, *, drain: float = 30.0) -> None:
  """Serves until SIGTERM or Ctrl-C (or `made.state.server.handle_exit`); then answers under way get `drain` seconds.
  Closes the engine."""
  service: Service = made.state.service
  settings = dict(log_level='warning', access_log=False, server_header=False, ws='none')
  settings['log_config'] = None  # uvicorn's own closes the handlers that others have set up
  settings |= dict(timeout_keep_alive=30, timeout_graceful_shutdown=int(drain) + 5)
  made.state.server = server = _Server(uvicorn.Config(made, **settings), service, drain)
  try:
    server.run(sockets=[sock])
  finally:
    service.engine.close(drain=0.0)
