r"""Greedy decoding of SmolLM2-135M in f32 on the CPU, beside transformers and llama.cpp, in one interleaved run.

  make smollm2 && pip install torch transformers xllamacpp
  python -m benchmarks.decode                       # about ten minutes on two cores
  python -m benchmarks.decode --batches=1 --only=transformers

Prompts of 128 tokens, 128 new ones, end-of-text ignored. Everybody has the same weights: ours are written to a folder
for transformers and to an f32 GGUF file for llama.cpp (through xllamacpp, its server in this process, one request for
each row at once). Calls are taken in turn, and the fastest of each counts. `prefill` is the time until the first
token; `decode` is what the other 127 take.

  bandwidth   bytes of the weights times steps a second, over what a sum of 540 MB reaches here
  MFU         2 FLOPs a parameter and token, over the fastest product here (core/peak.py)
"""

import argparse
import concurrent.futures
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT, NEW = 128, 128


def ours(made: tuple, rows: np.ndarray) -> Callable[[int], np.ndarray]:
  """new -> ids [rows, new]."""
  import jax

  from llm_jax.decode import generate

  model, params, _ = made
  told = dict(temperature=0, eos=None, start=None)
  lengths, key = [rows.shape[1]] * len(rows), jax.random.key(0)
  run = lambda new: generate.generate(model, params, rows, lengths, key, max_new=new, **told)
  return lambda new: np.asarray(run(new).tokens)


def transformers(folder: str) -> Callable:
  """rows -> new -> ids."""
  import torch
  import transformers as hf

  peer = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def make(rows: np.ndarray) -> Callable[[int], np.ndarray]:
    ids = torch.tensor(rows)
    told = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)

    def run(new: int) -> np.ndarray:
      with torch.inference_mode():
        return peer.generate(ids, min_new_tokens=new, max_new_tokens=new, **told)[
          :, rows.shape[1] :
        ].numpy()

    return run

  return make


def llama_cpp(path: str, batch: int) -> Callable:
  """rows -> new -> None. A server for `batch` requests at once."""
  import xllamacpp as lib

  told = lib.CommonParams()
  told.model.path = path
  told.n_parallel, told.n_ctx, told.n_gpu_layers = batch, batch * 320, 0
  told.n_batch, told.n_ubatch = 4096, 512
  told.cpuparams.n_threads = told.cpuparams_batch.n_threads = os.cpu_count()
  told.warmup, told.cache_prompt, told.cont_batching = True, False, True
  told.cache_ram_mib, told.verbosity = 0, -1
  server = lib.Server(told)

  def make(rows: np.ndarray) -> Callable[[int], None]:
    def one(row: np.ndarray, new: int) -> None:
      asked = dict(prompt=row.tolist(), n_predict=new, ignore_eos=True, cache_prompt=False)
      asked |= dict(temperature=0.0, samplers=['temperature'])
      heard: list = []
      server.handle_completions(json.dumps(asked), heard.append)
      found = json.loads(heard[-1]) if isinstance(heard[-1], str) else heard[-1]
      if found.get('tokens_predicted', new) != new:
        raise SystemExit(f'llama.cpp wrote {found["tokens_predicted"]} tokens, not {new}')

    def run(new: int) -> None:
      with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(lambda row: one(row, new), rows))

    return run

  return make


def bandwidth() -> float:
  """Bytes a second of a sum over 540 MB."""
  import jax
  import jax.numpy as jnp

  x, add = jnp.ones(135_000_000), jax.jit(jnp.sum)
  return x.nbytes / min(_seconds(lambda: add(x).block_until_ready()) for _ in range(8))


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def compare(runs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, tuple[float, float]]:
  """(seconds to the first token, seconds of the others) of each."""
  for run in runs.values():
    run(1)
    run(NEW)
  first, all_ = ({name: [] for name in runs} for _ in range(2))
  for _ in range(rounds):
    for name, run in runs.items():
      first[name].append(_seconds(lambda: run(1)))  # noqa: B023
      all_[name].append(_seconds(lambda: run(NEW)))  # noqa: B023
  return {name: (min(first[name]), min(all_[name]) - min(first[name])) for name in runs}


def main() -> None:
  """Prints a line for each side and batch, and the ratios."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', default='runs/smollm2')
  parser.add_argument('--batches', default='1,8,32')
  parser.add_argument('--only', default='transformers,llama.cpp')
  parser.add_argument('--rounds', type=int, default=3)
  given = parser.parse_args()
  import jax

  from llm_jax.cli import generate
  from llm_jax.cli import main as command
  from llm_jax.core import peak
  from llm_jax.model import stack

  model, params, words = generate.load(given.workdir)
  made = model, stack.apart(params, free=True), words
  size = sum(x.nbytes for x in jax.tree.leaves(made[1]))
  reach, fastest = bandwidth(), peak.peak('f32')
  print(f'load {os.getloadavg()[0]:.1f}; {size / 1e6:.0f} MB of weights; {reach / 1e9:.1f} GB/s')
  print(f'{"batch":>5} {"":14}{"prefill tok/s":>14}{"MFU":>6}{"decode tok/s":>14}{"bandwidth":>10}')
  with tempfile.TemporaryDirectory() as folder:
    written = {'transformers': f'{folder}/hf', 'llama.cpp': f'{folder}/f32.gguf'}
    peers = {}
    for name in given.only.split(','):
      form = ['--format=gguf', '--type=f32'] if name == 'llama.cpp' else ['--format=huggingface']
      told = ['convert', '--from=run', f'--path={given.workdir}', f'--to={written[name]}', *form]
      if command.main(told):
        raise SystemExit(f'{name}: the weights could not be written')
      peers[name] = transformers(written[name]) if name == 'transformers' else None
    for batch in map(int, given.batches.split(',')):
      rows = np.random.default_rng(0).integers(10, words.size, (batch, PROMPT)).astype(np.int32)
      runs = dict(llm_jax=ours(made, rows))
      for name, make in peers.items():
        runs[name] = (make or llama_cpp(written[name], batch))(rows)
      for name, (first, rest) in (found := compare(runs, given.rounds)).items():
        mfu = size / 4 * 2 * batch * PROMPT / first / fastest
        print(
          f'{batch:5} {name:14}{batch * PROMPT / first:14.0f}{mfu:6.0%}'
          f'{batch * (NEW - 1) / rest:14.1f}{size * (NEW - 1) / rest / reach:10.0%}'
        )
      for name in peers:
        ratios = (there / here for here, there in zip(found['llm_jax'], found[name], strict=True))
        print(
          f'{batch:5} times as fast as {name}: prefill {next(ratios):.2f}, decode {next(ratios):.2f}',
          flush=True,
        )


if __name__ == '__main__':
  main()
