"""A server of its own for each module of tests, on a free port, with the engine of fake.py."""

import contextlib
import threading
import time

import httpx
import openai
import pytest

from llm_jax.serve import api, server
from tests.serve import fake


class Served:
  """url, engine, service, and two clients: `ai` is OpenAI's own, `http` sends anything."""

  def __init__(self, made, engine, sock, drain):
    self.service, self.engine, self.made = made.state.service, engine, made
    self.url = f'http://127.0.0.1:{sock.getsockname()[1]}'
    self.thread = threading.Thread(target=server.run, args=(made, sock), kwargs=dict(drain=drain))
    self.thread.start()
    self.http = httpx.Client(base_url=self.url, timeout=60)
    key = dict(api_key='key', max_retries=0, timeout=60)
    self.ai = openai.OpenAI(base_url=self.url + '/v1', **key)
    until(lambda: self.http.get('/health').is_success)

  def stop(self):
    if self.thread.is_alive():
      self.made.state.server.handle_exit(15, None)
    self.thread.join(60)
    assert not self.thread.is_alive()


def until(true, seconds=60):
  """Waits for what another thread does."""
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.005)


@contextlib.contextmanager
def serving(*, words=None, api_key=None, drain=5.0, limits=None, **engine):
  made = fake.Engine(words or fake.words(), **engine)
  sock = server.listen('127.0.0.1', 0, None)
  app = server.app(made, made.words, 'fake', api_key=api_key, limits=limits or api.Limits())
  served = Served(app, made, sock, drain)
  try:
    yield served
  finally:
    served.stop()


@pytest.fixture(scope='module')
def served():
  with serving() as found:
    yield found
