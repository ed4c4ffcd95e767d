r"""Held-out bits per byte of tiny Shakespeare beside nanoGPT's CPU recipe, in the same wall time.

  python -m benchmarks.nanogpt                    # about eight minutes on two quiet cores; needs the extra `parity`
  python -m benchmarks.nanogpt --seconds=60       # only ours, as if the peer had taken 60 s

The peer is the recipe for CPUs in nanoGPT's README (github.com/karpathy/nanoGPT, `train_shakespeare_char`), in our own
PyTorch (benchmarks/peer.py): characters, 4 layers, 4 heads, 128 wide, context 64, batch 12, no dropout, 2000 steps of
AdamW at 1e-3 (betas 0.9, 0.99; decay 0.1; clip 1), 100 of warmup, cosine to 1e-4. Only its training steps are timed.

Ours is the `llm-jax train` command, configs/quickstart.py made smaller, and *all* of it is timed: imports, compilation,
held-out pass, checkpoints. Only the vocabulary is there already, as it is in a second run. How many steps fit is found
by two short runs first.

Both are scored on all of the last 10 % of the characters, which neither has seen. nanoGPT's windows do not overlap: a
prediction is made from 1 to 64 characters. The text is ASCII: one character, one byte.
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from llm_jax.data import tasks

PLAY = os.path.join(os.path.dirname(tasks.__file__), 'bundled', 'tinyshakespeare', 'input.txt.gz')
STEPS, BATCH, LENGTH = 2000, 12, 64
RATE, LOWEST, WARMUP = 1e-3, 1e-4, 100
OURS = ('--config.checkpoint.every=1000000', '--config.log_every=50')


def recipe(batch: int, length: int, steps: int) -> list[str]:
  """The overrides of configs/quickstart.py for a run of a minute or two."""
  return [
    f'--config=configs/quickstart.py:steps={steps},batch={batch},length={length}',
    '--config.model.embed=128',
    '--config.model.block.ffn.hidden=352',
    f'--config.hooks.heldout.every={steps}',
    '--config.hooks.samples.at=()',
    *OURS,
  ]


def peer_run(text: bytes, steps: int) -> tuple[float, float]:
  """(seconds of training, bits per byte on the last tenth) of the PyTorch model."""
  import torch

  from benchmarks import peer

  torch.manual_seed(1337)
  alphabet = np.unique(np.frombuffer(text, np.uint8))
  ids = torch.from_numpy(np.searchsorted(alphabet, np.frombuffer(text, np.uint8)))
  cut = int(0.9 * len(ids))
  train, held = ids[:cut], ids[cut:]
  model = peer.Decoder(vocab=len(alphabet), embed=128, layers=4, heads=4, length=LENGTH)
  tx = peer.adamw(model, rate=RATE, betas=(0.9, 0.99), decay=0.1)
  start = time.perf_counter()
  for step in range(steps):
    for group in tx.param_groups:
      group['lr'] = _rate(step, steps)
    at = torch.randint(len(train) - LENGTH, (BATCH,))
    windows = torch.stack([train[i : i + LENGTH + 1] for i in at])
    loss = model(windows[:, :-1], windows[:, 1:])
    tx.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tx.step()
  seconds = time.perf_counter() - start
  with torch.no_grad():
    return seconds, _score(model, held)


def _rate(step: int, steps: int) -> float:
  """The learning rate of an update: linear warmup, then half a cosine to the end."""
  if step < WARMUP:
    return RATE * (step + 1) / (WARMUP + 1)
  share = (step - WARMUP) / (steps - WARMUP)
  return LOWEST + 0.5 * (1 + math.cos(math.pi * share)) * (RATE - LOWEST)


def _score(model, held) -> float:
  """Bits per character over the whole split but its first character, which nothing predicts."""
  whole = (len(held) - 1) // LENGTH * LENGTH
  inputs, targets = held[:whole].view(-1, LENGTH), held[1 : whole + 1].view(-1, LENGTH)
  nats = sum(
    model(x, y).item() * y.numel()
    for x, y in zip(inputs.split(256), targets.split(256), strict=True)
  )
  if whole + 1 < len(held):
    rest = held[whole:][None]
    nats += model(rest[:, :-1], rest[:, 1:]).item() * (len(held) - 1 - whole)
  return nats / math.log(2) / (len(held) - 1)


def our_run(steps: int, batch: int, length: int) -> tuple[float, float]:
  """(seconds of the whole command, bits per byte on the last tenth) of `llm-jax train`."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'llm_jax.cli.main', 'train', *recipe(batch, length, steps)]
    start = time.perf_counter()
    done = subprocess.run([*command, f'--workdir={folder}'], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
      raise SystemExit(f'llm-jax train failed:\n{done.stderr}')
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as f:
      lines = [json.loads(line) for line in f]
  found = [line['heldout/bits_per_byte'] for line in lines if 'heldout/bits_per_byte' in line]
  return seconds, found[-1]


def steps_that_fit(seconds: float, batch: int, length: int) -> int:
  """The steps that `llm-jax train` makes in so many seconds, by the line through two short runs."""
  few, more = 100, 300
  our_run(few, batch, length)  # the vocabulary and the token maps are made once
  first, second = our_run(few, batch, length)[0], our_run(more, batch, length)[0]
  each = (second - first) / (more - few)
  fit = few + int((0.97 * seconds - first) / each)
  if each <= 0 or fit < few:
    raise SystemExit(f'{seconds:.0f} s are too few: {few} steps alone take {first:.0f} s here')
  return fit


def main() -> None:
  """Runs the peer, then ours in its time, and prints both."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seconds', type=float, help='leave the peer out, give ours this time')
  parser.add_argument('--peer_steps', type=int, default=STEPS)
  parser.add_argument('--steps', type=int, help='of ours, instead of as many as fit')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=128)
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  limit, peer_bits = args.seconds, None
  if limit is None:
    with gzip.open(PLAY) as f:
      limit, peer_bits = peer_run(f.read(), args.peer_steps)
    print(
      f'nanoGPT recipe  {limit:7.1f} s of training       {peer_bits:.3f} bits per byte', flush=True
    )
  steps = args.steps or steps_that_fit(limit, args.batch, args.length)
  seconds, bits = our_run(steps, args.batch, args.length)
  print(
    f'llm_jax         {seconds:7.1f} s, all included     {bits:.3f} bits per byte ({steps} steps)'
  )
  if peer_bits is not None:
    fits = 'within' if seconds <= limit else 'MORE THAN'
    print(f'llm_jax / nanoGPT: {bits / peer_bits:.3f} of the bits, {fits} its time')


if __name__ == '__main__':
  main()
