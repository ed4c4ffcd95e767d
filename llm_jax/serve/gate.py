"""What every request passes before anything reads it, and every response on its way out.

Plain ASGI, because Starlette's middleware classes hide from an endpoint that its client has gone.
"""

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from llm_jax.serve.api import Limits, Refused
from llm_jax.serve.metrics import Metrics

OPEN = ('/', '/health', '/ready')  # no key is needed for these
GONE = 499  # what is counted for a client that left, as nginx does
READ_SECONDS = 30  # for a body to arrive


def loopback(host: str) -> bool:
  """Whether `host` is this machine itself."""
  if host.lower() == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False


class Gate:
  """Counts requests; refuses a wrong key, a body that is too large, and new work while `draining()`.

  Without a key only this machine is served. A page of somebody else's that a browser on it shows could reach the server
  under a name of its own (DNS rebinding), so the Host header has to name the machine.
  """

  def __init__(
    self,
    app: Any,
    *,
    api_key: str | None,
    limits: Limits,
    metrics: Metrics,
    draining: Callable[[], bool],
  ):
    self._app, self._limits, self._metrics, self._draining = app, limits, metrics, draining
    self._key = None if api_key is None else api_key.encode()

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """One request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    start, status = time.monotonic(), GONE

    async def sent(message: Any) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    self._metrics.open.inc()
    try:
      try:
        self._admit(scope)
        received = await self._body(scope, receive)
      except Refused as e:
        await refuse(e, sent)
      else:
        if received is not None:
          await self._app(scope, received, sent)
    except Exception:
      status = 500
      raise
    finally:
      route = getattr(scope.get('route'), 'path', None) or 'none'
      self._metrics.open.dec()
      self._metrics.requests.labels(route, str(status)).inc()
      self._metrics.seconds.labels(route).observe(time.monotonic() - start)

  def _admit(self, scope: Any) -> None:
    headers = dict(scope['headers'])
    if self._key is None:
      host = headers.get(b'host', b'localhost').decode('latin-1')
      if not loopback(host if host.count(':') > 1 and host[0] != '[' else _without_port(host)):
        words = (
          f'this server answers to localhost alone, not to {host[:80]!r}: start it with --api_key'
        )
        raise Refused(403, words, code='host')
    elif scope['path'] not in OPEN:
      scheme, _, key = headers.get(b'authorization', b'').partition(b' ')
      if scheme.lower() != b'bearer' or not secrets.compare_digest(key.strip(), self._key):
        words = 'the API key is missing or wrong: send the header Authorization: Bearer KEY'
        raise Refused(401, words, code='invalid_api_key')
    if self._draining() and scope['path'].startswith('/v1/'):
      raise Refused(503, 'the server is shutting down', code='draining', retry_after=5)

  async def _body(self, scope: Any, receive: Any) -> Callable[[], Awaitable[Any]] | None:
    """Reads the body, whole; the application gets it from what is returned. None where the client has gone."""
    most = self._limits.body
    length = dict(scope['headers']).get(b'content-length', b'0')
    known = int(length) if length.isdigit() else 0
    parts, size = [], 0
    try:
      async with asyncio.timeout(READ_SECONDS):
        while True:
          message = await receive()
          if message['type'] != 'http.request':
            return None
          size += len(message.get('body', b''))
          if size <= most:
            parts.append(message.get('body', b''))
          else:
            parts.clear()
          if not message.get('more_body', False):
            break
          if max(size, known) > 4 * most:  # what is a little too large is read to its end
            break
    except TimeoutError as e:
      raise Refused(408, f'the body did not arrive within {READ_SECONDS} s') from e
    if max(size, known) > most:
      words = f'the body is larger than {most} bytes: shorten the prompt or send several requests'
      raise Refused(413, words, code='body_too_large')
    first, given = dict(type='http.request', body=b''.join(parts), more_body=False), False

    async def received() -> Any:
      nonlocal given
      if given:
        return await receive()
      given = True
      return first

    return received


def _without_port(host: str) -> str:
  name, colon, port = host.rpartition(':')
  return name if colon and port.isdigit() else host


async def refuse(error: Refused, send: Any) -> None:
  """Sends the error as a whole response."""
  body = json.dumps(error.body()).encode()
  headers = {'content-type': 'application/json', 'content-length': str(len(body))}
  if error.status in (408, 413):
    headers['connection'] = 'close'  # the rest of the body is not read
  if error.status == 401:
    headers['www-authenticate'] = 'Bearer'
  pairs = [(k.encode(), v.encode()) for k, v in (headers | error.headers()).items()]
  await send(dict(type='http.response.start', status=error.status, headers=pairs))
  await send(dict(type='http.response.body', body=body))
