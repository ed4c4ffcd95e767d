"""An engine without a model: the interface of serve/engine.py, tokens that are a function of the request alone.

A prompt that ends with `say:TEXT` is answered with TEXT; others with letters that a hash of prompt, seed and position
chooses, without end. `python -m tests.serve.fake --port=8000` serves it, until SIGTERM.
"""

import argparse
import hashlib
import math
import re
import sys
import threading
import time

import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import vocab
from llm_jax.serve.reading import Causal
from llm_jax.serve.requests import Full, Token

BLOCK = 16
CHATML = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def words(template=CHATML):
  """The bytes as a vocabulary, with a chat template."""
  made = vocab.bytes_(extra_ids=0)
  made.template, made.spelling = template, {}
  return made


class Ticket:
  def __init__(self, engine, request, listener):
    self.request, self.listener, self.engine = request, listener, engine
    self.answer, self.made, self.cancelled, self.prompt_logp = (
      engine.answer(request),
      0,
      False,
      None,
    )

  def cancel(self):
    self.engine.cancelled += 1
    with self.engine.woken:
      self.cancelled = True
      self.engine.woken.notify()

  def blocks(self):
    return math.ceil((len(self.request.prompt) + self.made) / BLOCK)


class Engine:
  """delay: seconds per step. rows: answered at a time. queue: waiting at most."""

  def __init__(self, words, *, length=512, delay=0.0, rows=8, queue=64):
    self.words, self.length, self.delay, self.rows, self.queue = words, length, delay, rows, queue
    self.reading = Causal(length)
    self.requests, self.cancelled, self.broken = [], 0, False
    self._waiting, self._running, self._closed = [], [], False
    self._totals = dict(tokens_total=0, prompt_tokens_total=0, requests_total=0)
    self.woken = threading.Condition()
    self._thread = threading.Thread(target=self._loop, daemon=True)
    self._thread.start()

  def submit(self, request, listener):
    if not request.prompt:
      raise UserError('the prompt is empty')
    if len(request.prompt) + request.max_new > self.length:
      raise UserError('prompt and answer are longer than the engine holds')
    with self.woken:
      if self._closed or len(self._waiting) >= self.queue:
        raise Full(2.5)
      ticket = Ticket(self, request, listener)
      self._waiting.append(ticket)
      self.requests.append(request)
      self.requests = self.requests[-100:]
      self.woken.notify()
    return ticket

  def embed(self, prompts):
    time.sleep(self.delay)
    rows = [np.random.default_rng(sum(p) % 2**31).normal(size=8) for p in prompts]
    return np.stack([x / np.linalg.norm(x) for x in rows]).astype(np.float32)

  def stats(self):
    with self.woken:
      used = sum(t.blocks() for t in self._running)
      queues = dict(running=len(self._running), waiting=len(self._waiting))
      return dict(queues, blocks_used=used, blocks_total=self.rows * 64, **self._totals)

  def close(self, drain=None):
    until = math.inf if drain is None else time.monotonic() + drain
    with self.woken:
      self._closed = True
      while (self._running or self._waiting) and time.monotonic() < until:
        self.woken.wait(0.01)
      for ticket in self._running + self._waiting:
        ticket.cancelled = True
      self.woken.notify()

  def answer(self, request):
    """The ids of the answer, one after another."""
    asked = self.words.decode(request.prompt)
    said = re.search(r'.*say:(.*?)(?:<\|im_end\|>.*)?$', asked, re.S)
    if said and request.constraint is None:
      yield from self.words.encode(said[1])
      yield request.ends[0] if request.ends else 1
      return
    seed = 0 if request.sampling.temperature == 0 else request.seed
    digest = hashlib.sha256(repr((request.prompt, seed)).encode()).digest()
    for j in range(10**9):
      number = int.from_bytes(hashlib.sha256(digest + j.to_bytes(4)).digest()[:4])
      if request.constraint is None:
        yield 3 + (b'abcdefghijklmnopqrstuvwxyz     .'[number % 32])
      else:
        allowed = np.flatnonzero(request.constraint.allowed())
        yield int(allowed[number % len(allowed)])

  def _loop(self):
    while True:
      with self.woken:
        while not (self._waiting or self._running or self._closed):
          self.woken.wait()
        if self._closed and not (self._waiting or self._running):
          return
        while self._waiting and (len(self._running) < self.rows or self._waiting[0].cancelled):
          ticket = self._waiting.pop(0)
          self._running.append(ticket)
          prompt = ticket.request.prompt
          self._totals['prompt_tokens_total'] += len(prompt)
          self._totals['requests_total'] += 1
          ticket.prompt_logp = [None, *(-0.25 * (i % 8) for i in prompt[1:])]
        running = list(self._running)
      if self.delay:
        time.sleep(self.delay)
      told = [(t, self._step(t)) for t in running]
      with self.woken:
        for ticket, token in told:
          if token.end is not None:
            self._running.remove(ticket)
        self.woken.notify_all()
      for ticket, token in told:
        ticket.listener(token)

  def _step(self, ticket):
    request = ticket.request
    if ticket.cancelled or self.broken:
      return Token(-1, 0.0, (), 'error' if self.broken else 'cancelled')
    id = next(ticket.answer)
    ticket.made += 1
    self._totals['tokens_total'] += 1
    end = 'length' if ticket.made == request.max_new else None
    if request.constraint is not None:
      request.constraint.advance(id)
      end = 'stop' if request.constraint.done else end
    end = 'stop' if id in request.ends else end
    top = tuple((3 + (id - 3 + k) % 256, -0.1 - k) for k in range(request.top))
    return Token(id, -0.1 - (id % 10) / 10, top, end)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--port', type=int, default=0)
  parser.add_argument('--delay', type=float, default=0.01)
  parser.add_argument('--drain', type=float, default=10.0)
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--queue', type=int, default=256)
  parser.add_argument('--length', type=int, default=512)
  given = parser.parse_args()
  from llm_jax.serve import server

  sizes = dict(rows=given.rows, queue=given.queue, length=given.length)
  engine = Engine(words(), delay=given.delay, **sizes)
  sock = server.listen('127.0.0.1', given.port, None)
  print(f'serving at http://127.0.0.1:{sock.getsockname()[1]}', flush=True)
  server.run(server.app(engine, engine.words, 'fake'), sock, drain=given.drain)


if __name__ == '__main__':
  sys.exit(main())
