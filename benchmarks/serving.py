r"""The engine on SmolLM2-135M: 64 requests of mixed lengths at once, and the same one after another.

  make smollm2
  python -m benchmarks.serving                       # about four minutes on two cores

Prompts are pieces of WikiText-2 of 16 to 256 tokens, answers have 16 to 128 tokens, both drawn evenly, seed 0. One
after another is done in two ways: through the same engine, and by `decode.generate` alone, whose matrix products are
made for one row. `waste` is the part of the slots in the pages of running requests that nothing was written to, over
all steps. Times between tokens are of all requests together.
"""

import argparse
import gzip
import os
import pathlib
import threading
import time
from typing import Any

import numpy as np

TEXT = pathlib.Path(__file__).parents[1] / 'tests/interop/real/wiki.txt.gz'


def requests(words: Any, n: int) -> list:
  """Greedy ones."""
  from llm_jax.decode.logits import Sampling
  from llm_jax.serve.requests import Request

  ids, rng = words.encode(gzip.decompress(TEXT.read_bytes()).decode()), np.random.default_rng(0)
  found = []
  for _ in range(n):
    first, length, new = rng.integers(len(ids) - 300), rng.integers(16, 257), rng.integers(16, 129)
    prompt = tuple(ids[first : first + length])
    found.append(Request(prompt, int(new), Sampling(temperature=0.0)))
  return found


def timed(engine: Any, asked: list, at_once: int) -> tuple[float, list[float], list[float]]:
  """(seconds, seconds to each first token, seconds between tokens) with `at_once` requests in the engine."""
  room, done = threading.Semaphore(at_once), threading.Semaphore(0)
  first, between = [], []

  def ask(request: Any) -> None:
    last = [time.perf_counter()]

    def hear(token: Any) -> None:
      now = time.perf_counter()
      (between if len(last) > 1 else first).append(now - last[-1])
      last.append(now)
      if token.end is not None:
        room.release()
        done.release()

    engine.submit(request, hear)

  start = time.perf_counter()
  for request in asked:
    room.acquire()
    ask(request)
  for _ in asked:
    done.acquire()
  return time.perf_counter() - start, first, between


def alone(model: Any, params: Any, asked: list) -> float:
  """Seconds of `generate` for one request after the other."""
  import jax

  from llm_jax.decode.generate import stream

  def run(request: Any) -> None:
    ids = np.zeros((1, 256), np.int32)
    ids[0, : len(request.prompt)] = request.prompt
    told = dict(temperature=0, eos=None, start=None, max_new=128)
    columns = stream(model, params, ids, [len(request.prompt)], jax.random.key(0), **told)
    for _, _ in zip(range(request.max_new), columns, strict=False):
      pass

  run(asked[0])
  start = time.perf_counter()
  for request in asked:
    run(request)
  return time.perf_counter() - start


def main() -> None:
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', default='runs/smollm2')
  parser.add_argument('--requests', type=int, default=64)
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--kv', default=None)
  given = parser.parse_args()
  from llm_jax.cli import generate
  from llm_jax.model import stack
  from llm_jax.serve.engine import Engine

  model, params, words = generate.load(given.workdir)
  params = stack.apart(params, free=True)
  asked = requests(words, given.requests)
  new = sum(r.max_new for r in asked)
  told = dict(rows=given.rows, length=512, kv=given.kv, prefix_cache=False)
  print(f'load {os.getloadavg()[0]:.1f}; {len(asked)} requests, {new} tokens to write', flush=True)
  start = time.perf_counter()
  with Engine(model, params, **told) as engine:
    print(f'ready after {time.perf_counter() - start:.1f} s', flush=True)
    apart, *_ = timed(engine, asked[:8], 1)
    few = sum(r.max_new for r in asked[:8])
    single = alone(model, params, asked[:8])
    print(f'one after another (8 of them): {few / apart:.1f} tokens/s in the engine', flush=True)
    print(f'one after another (8 of them): {few / single:.1f} tokens/s by generate', flush=True)
    seconds, first, between = timed(engine, asked, len(asked))
    stats = engine.stats()
  ratios = f'{new / seconds * apart / few:.1f} and {new / seconds * single / few:.1f}'
  print(f'all at once: {new / seconds:.1f} tokens/s, {ratios} times as many')
  for name, values in (('to the first token', first), ('between tokens', between)):
    half, most = np.percentile(values, [50, 99])
    print(f'seconds {name}: p50 {half:.2f}, p99 {most:.2f}')
  for name in ('kv_waste', 'compilations_total', 'preemptions_total', 'blocks_used'):
    print(f'{name}: {stats[name]:.3g}')


if __name__ == '__main__':
  main()
