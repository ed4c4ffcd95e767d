"""The server under load: many streams at once, some cut off, some malformed. Nothing may leak or be wrong.

python -m benchmarks.serving_load --workdir=runs/smollm2     # make smollm2 first
python -m benchmarks.serving_load --fake --seconds=10        # the server alone, with the engine of tests/serve/fake.py

Starts the server as a process of its own. Asks every request of a list once, one after another, and keeps the answers.
Then 200 clients for 60 s: each streams a request of the list, one in ten is cut off after a few pieces, one in twenty
is malformed. Every stream that was left alone has to say what its request was answered before, malformed ones have to
get a 4xx. Then the server has to be empty (no request, no block), its memory is printed, and with streams still running
it gets SIGTERM: they have to finish, and the server to exit with 0. Exits with 1 if anything of this is not so.

first: time to the first piece; between: from one piece of a stream to the next. The clients share the cores with the
server.
"""

import argparse
import asyncio
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
OPENINGS = (
  'The capital of France is',
  'Once upon a time, there was a small village at the foot of a mountain where',
  'def fibonacci(n):\n',
  'Water boils at',
  'The three laws of motion are the following. First,',
  'Q: How many legs has a spider?\nA:',
)
MALFORMED = (
  b'{"prompt": ',
  b'[]',
  b'{"prompt": 5}',
  b'{"prompt": "a", "temperature": "hot"}',
  b'{"prompt": "a", "max_tokens": -1}',
  b'{"prompt": "a", "no_such_field": 1}',
  b'{"prompt": "\\ud800"}',
)


def requests(tokens: int) -> list[dict]:
  """Prompts of 5 to some 300 tokens, answers of `tokens` / 4 to `tokens`, greedy and drawn."""
  found = []
  for i in range(24):
    prompt = OPENINGS[i % len(OPENINGS)]
    if i % 4 == 3:
      prompt = ' '.join(OPENINGS) * (1 + i % 3) + f' {i}. ' + prompt
    setting = dict(temperature=0) if i % 2 else dict(temperature=0.9, top_p=0.95, seed=i)
    size = tokens * (1 + i % 4) // 4
    found.append(dict(prompt=prompt[-1200:], max_tokens=size, stream=True, **setting))
  return found


class Client:
  """One server, as its clients see it."""

  def __init__(self, host: str, port: int):
    self.host, self.port = host, port
    self.first: list[float] = []
    self.between: list[float] = []
    self.pieces = 0

  async def send(self, body: bytes, cut: int | None = None) -> tuple[int, str | float]:
    """(status, text of the stream, or seconds to wait after a 429). cut: hang up after so many pieces."""
    reader, writer = await asyncio.open_connection(self.host, self.port)
    try:
      head = (
        f'POST /v1/completions HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n'
      )
      writer.write(
        f'{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n'.encode() + body
      )
      began = last = time.perf_counter()
      status = int((await reader.readline()).split()[1])
      headers = {}
      while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(':')
        headers[name.lower()] = value.strip()
      if status != 200:
        return status, float(headers.get('retry-after', 0))
      text, pieces = '', 0
      while line := await reader.readline():
        if not line.startswith(b'data: '):
          continue  # the sizes of chunks, empty lines
        now = time.perf_counter()
        if line.startswith(b'data: [DONE]'):
          return status, text
        event = json.loads(line[6:])
        if 'error' in event:
          return 599, 0.0
        text += event['choices'][0]['text']
        (self.between if pieces else self.first).append(now - (last if pieces else began))
        last, pieces, self.pieces = now, pieces + 1, self.pieces + 1
        if pieces == cut:
          return 0, text
      return 598, 0.0  # the stream ended without its end
    finally:
      writer.close()

  async def get(self, path: str) -> bytes:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection(self.host, self.port)
    writer.write(f'GET {path} HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\n\r\n'.encode())
    found = await reader.read()
    writer.close()
    return found.partition(b'\r\n\r\n')[2]

  async def engine(self) -> dict[str, float]:
    """The engine's numbers, from /metrics."""
    lines = [x for x in (await self.get('/metrics')).decode().splitlines() if x[:1] != '#']
    pairs = (x.rpartition(' ') for x in lines if x.startswith('llm_jax_engine_'))
    return {name.removeprefix('llm_jax_engine_'): float(value) for name, _, value in pairs}


async def load(
  client: Client, bodies: list[bytes], expected: list[str], streams: int, seconds: float
):
  """Counts of what became of the requests that `streams` clients sent for `seconds`."""
  counts, end = collections.Counter(), time.perf_counter() + seconds

  async def one(number: int) -> None:
    chance = random.Random(number)
    while time.perf_counter() < end:
      kind, i = chance.random(), chance.randrange(len(bodies))
      if kind < 0.05:
        status, _ = await client.send(chance.choice(MALFORMED))
        counts['malformed, refused' if 400 <= status < 500 else f'malformed, but {status}'] += 1
        continue
      cut = chance.randrange(1, 8) if kind < 0.15 else None
      status, told = await client.send(bodies[i], cut)
      if status == 429:
        counts['429'] += 1
        await asyncio.sleep(told)
      elif status == 0:
        counts['cut off'] += 1
      elif status == 200:
        counts['right' if told == expected[i] else 'WRONG'] += 1
      else:
        counts[f'FAILED with {status}'] += 1

  await asyncio.gather(*(one(i) for i in range(streams)))
  return counts


def memory(pid: int) -> float:
  """Resident, MB."""
  return int(subprocess.check_output(['ps', '-o', 'rss=', '-p', str(pid)])) / 1024


def spread(found: list[float]) -> str:
  """p50 and p99 in ms."""
  some = sorted(found) or [0.0]
  at = lambda p: 1e3 * some[min(int(p * len(some)), len(some) - 1)]
  return f'p50 {at(0.5):.0f} ms, p99 {at(0.99):.0f} ms'


async def run(server: subprocess.Popen, client: Client, given: argparse.Namespace) -> list[str]:
  """Everything; what was wrong."""
  bodies = [json.dumps(r).encode() for r in requests(given.tokens)]
  began = time.perf_counter()
  expected = [(await client.send(body))[1] for body in bodies]
  alone = client.pieces / (time.perf_counter() - began)
  print(f'one after another: {alone:.0f} pieces/s', flush=True)
  await load(
    client, bodies, expected, given.streams, min(5, given.seconds)
  )  # memory as it is in use
  client.first, client.between, client.pieces = [], [], 0
  before, start = memory(server.pid), await client.engine()
  began = time.perf_counter()
  counts = await load(client, bodies, expected, given.streams, given.seconds)
  took = time.perf_counter() - began
  wrong = [
    f'{n} requests: {what}' for what, n in counts.items() if what[0].isupper() or 'but' in what
  ]
  print(f'{given.streams} streams: {client.pieces / took:.0f} pieces/s,', dict(counts))
  print(f'first: {spread(client.first)}; between: {spread(client.between)}')
  if not counts['right'] or not counts['cut off'] or not counts['malformed, refused']:
    wrong.append('too few requests to say anything: raise --seconds')
  until = time.perf_counter() + 10
  while (left := await client.engine())['running'] + left[
    'waiting'
  ] and time.perf_counter() < until:
    await asyncio.sleep(0.1)
  busy = {name: left[name] for name in ('running', 'waiting', 'blocks_used') if left[name]}
  wrong += [f'left over: {busy}'] if busy else []
  grown = {name: left[name] - start[name] for name in left if name.endswith('_total')}
  after = memory(server.pid)
  print(f'afterwards: {busy or "nothing left over"}; memory {before:.0f} MB -> {after:.0f} MB')
  print('the engine meanwhile:', {k: int(v) for k, v in grown.items()})
  if after > 1.1 * before + 20:
    wrong.append('the memory grew')
  last = [asyncio.create_task(client.send(bodies[i])) for i in range(8)]
  await asyncio.sleep(0.5)
  server.send_signal(signal.SIGTERM)
  rest = await asyncio.gather(*last, return_exceptions=True)
  good = sum(r == (200, expected[i]) for i, r in enumerate(rest))
  wrong += (
    [] if good == len(rest) else [f'{len(rest) - good} of {len(rest)} streams broke at SIGTERM']
  )
  code = await asyncio.to_thread(server.wait, 60)
  print(f'SIGTERM: {good} of {len(rest)} streams finished, exit code {code}')
  return wrong + ([f'exit code {code}'] if code else [])


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', default='runs/smollm2', help='the run to serve')
  parser.add_argument('--fake', action='store_true', help='no model: tokens from a hash')
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--streams', type=int, default=200)
  parser.add_argument('--tokens', type=int, default=48, help='of the longest answers')
  parser.add_argument('--serve', default='--rows=32 --length=1024', help='flags for llm-jax serve')
  given = parser.parse_args()
  if given.fake:
    command = ['tests.serve.fake', '--delay=0.05', f'--rows={given.streams}', '--length=2048']
  else:
    command = ['llm_jax.cli.serve', f'--workdir={given.workdir}', '--port=0', *given.serve.split()]
  print(f'load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores', flush=True)
  command = [sys.executable, '-m', *command]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
    try:
      line = server.stdout.readline()
      if 'http://' not in line:
        return 1
      host, _, port = line.split('http://')[1].split()[0].partition(':')
      wrong = asyncio.run(run(server, Client(host, int(port)), given))
    finally:
      if server.poll() is None:
        server.kill()
  print(*wrong or ['all as it should be'], sep='\n')
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(main())
