r"""Tokens per second of one training step, beside the same model in PyTorch, eager and compiled.

  python -m benchmarks.train_step                 # about ten minutes; needs the extra `parity`
  python -m benchmarks.train_step --sizes=small --dtypes=f32 --rounds=3

A step is forward, backward, global-norm clip and AdamW on one batch: GPT-2 style, learned positions, LayerNorm, GELU,
no biases, tied head. All engines start from the same weights, see the same batch, and must agree on the loss of
the first steps, or the benchmark fails. Each is a process of its own, alive for the whole run; steps are taken in
turn (A B C A B C ...), so that what else the machine does hits all alike. Medians.

  of peak   model FLOPs (6 per weight and token, and all products of attention: PaLM, arXiv:2204.02311, app. B) over
            the fastest f32 products seen in this run (numpy, jax, torch; several sizes; before and after)
  CPU-s     of a step, all threads: the figure to trust on a machine that is not quiet
"""

import argparse
import functools
import multiprocessing
import os
import time
from typing import Any, NamedTuple

import numpy as np

ENGINES = ('llm_jax', 'torch eager', 'torch compile')
RATE, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
PRODUCTS = ((2048, 2048, 2048), (8192, 1536, 384), (8192, 384, 1536))  # [m, k] @ [k, n]


class Size(NamedTuple):
  """A model and its batch.

  microbatches, chunk: the parts into which llm_jax cuts the batch, and the positions whose logits exist at one time;
  both so that what a part touches stays in a cache of some 30 MiB.
  """

  layers: int
  embed: int
  heads: int
  vocab: int
  length: int
  batch: int
  microbatches: int
  chunk: int


SIZES = dict(
  small=Size(6, 384, 6, 1024, 256, 32, microbatches=8, chunk=256),
  large=Size(8, 512, 8, 32_768, 512, 8, microbatches=4, chunk=64),
)
TOLERANCE = dict(f32=1e-3, bf16=3e-2)  # of the loss, relative


# --- the engines: step() -> loss ------------------------------------------------------------------


def jax_engine(size: Size, dtype: str, devices: int):
  """(step, initial weights by path) of llm_jax; `devices` virtual CPU devices share the batch."""
  import jax

  jax.config.update('jax_num_cpu_devices', devices)
  from llm_jax.core import mesh, tree
  from llm_jax.model import attention, block, ffn, kernels, norms, positions, stack, transformer
  from llm_jax.objectives import language
  from llm_jax.optim import chain, rules, schedules
  from llm_jax.train import state as state_lib
  from llm_jax.train import step as step_lib

  partial = functools.partial
  jax.set_mesh(mesh.make(data=devices))  # for the life of this process
  norm = partial(norms.LayerNorm, bias=False)
  layer = partial(
    block.decoder,
    mixer=partial(attention.SelfAttention, heads=size.heads, rotate=None, kernel=kernels.blocked),
    ffn=partial(ffn.MLP, hidden=4 * size.embed, activation=ffn.gelu),
    norm=norm,
  )
  model = transformer.causal(
    vocab=size.vocab,
    embed=size.embed,
    layers=size.layers,
    block=layer,
    length=size.length,
    runner=stack.loop,
    norm=norm,
    positions=positions.Learned,
    dtype=dict(f32='float32', bf16='bfloat16')[dtype],
  )
  tx = chain.make(
    model.axes,
    rule=partial(rules.adamw, b1=BETAS[0], b2=BETAS[1]),
    schedule=partial(schedules.constant, peak=RATE),
    clip=CLIP,
    weight_decay=DECAY,
    decayed=chain.matrices,
  )
  layout = state_lib.layout(model, tx)
  objective = partial(language.next_token, model, chunk=size.chunk)
  update = step_lib.make(objective, tx, layout, microbatches=size.microbatches)
  state = state_lib.create(model, tx, 0, layout=layout)
  weights = {path: np.asarray(x) for path, x in tree.flatten(state.params).items()}
  batch, key = mesh.place(_batch(size)), jax.random.key(0)

  def step() -> float:
    nonlocal state
    state, metrics = update(state, batch, key)
    return float(jax.block_until_ready((state, metrics))[1]['nats'])

  return step, weights


def torch_engine(size: Size, dtype: str, compiled: bool, weights: dict[str, np.ndarray]):
  """step of the peer."""
  import torch

  from benchmarks import peer

  model = peer.Decoder(
    vocab=size.vocab,
    embed=size.embed,
    layers=size.layers,
    heads=size.heads,
    length=size.length,
  )
  peer.load(model, weights)
  tx = peer.adamw(model, rate=RATE, betas=BETAS, decay=DECAY)
  forward = torch.compile(model) if compiled else model
  batch = {name: torch.from_numpy(x).long() for name, x in _batch(size).items()}

  def step() -> float:
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bf16'):
      loss = forward(batch['inputs'], batch['targets'])
    tx.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    tx.step()
    return loss.item()

  return step


def _batch(size: Size) -> dict[str, np.ndarray]:
  ids = np.random.default_rng(0).integers(1, size.vocab, (size.batch, size.length), np.int32)
  return dict(inputs=np.pad(ids, ((0, 0), (1, 0)))[:, :-1], targets=ids)


def fastest_product(multiply) -> float:
  """FLOP/s of the fastest of some f32 products; `multiply` gives a function of two numpy arrays' places."""
  best, rng = 0.0, np.random.default_rng(0)
  for m, k, n in PRODUCTS:
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    run = multiply(a, b)
    run()
    for _ in range(4):
      start = time.perf_counter()
      run()
      best = max(best, 2 * m * k * n / (time.perf_counter() - start))
  return best


def _jax_products(a: np.ndarray, b: np.ndarray):
  import jax

  x, y, product = jax.numpy.asarray(a), jax.numpy.asarray(b), jax.jit(jax.numpy.matmul)
  return lambda: product(x, y).block_until_ready()


def _torch_products(a: np.ndarray, b: np.ndarray):
  import torch

  x, y = torch.from_numpy(a), torch.from_numpy(b)
  return lambda: torch.mm(x, y)


# --- one process per engine -----------------------------------------------------------------------


def work(pipe: Any, engine: str, size: Size, dtype: str, devices: int) -> None:
  """Answers 'step' with (seconds, CPU-seconds, loss), 'peak' with FLOP/s; the first message is the weights."""
  given = pipe.recv()
  if engine == 'llm_jax':
    step, weights = jax_engine(size, dtype, devices)
    pipe.send(weights)
    product = _jax_products
  else:
    step = torch_engine(size, dtype, engine == 'torch compile', given)
    product = _torch_products
  for message in iter(pipe.recv, 'stop'):
    if message == 'peak':
      numpy_too = fastest_product(lambda a, b: lambda: a @ b)
      pipe.send(max(fastest_product(product), numpy_too))
    else:
      wall, cpu = time.perf_counter(), time.process_time()
      loss = step()
      pipe.send((time.perf_counter() - wall, time.process_time() - cpu, loss))


class Worker:
  """One engine's process."""

  def __init__(self, *arguments: Any):
    context = multiprocessing.get_context('spawn')
    self.pipe, far = context.Pipe()
    self.process = context.Process(target=work, args=(far, *arguments), daemon=True)
    self.process.start()
    far.close()  # so that a worker that dies is noticed

  def ask(self, message: Any) -> Any:
    """Sends a message and waits for the answer."""
    self.pipe.send(message)
    try:
      return self.pipe.recv()
    except EOFError:
      raise SystemExit('an engine stopped; its error is above') from None

  def stop(self) -> None:
    """Ends the process."""
    self.pipe.send('stop')
    self.process.join()


def race(size: Size, dtype: str, rounds: int, devices: int) -> tuple[dict[str, list], float]:
  """({engine: [(seconds, CPU-seconds, loss) per step]}, fastest f32 FLOP/s), after two steps to warm up."""
  workers = {e: Worker(e, size, dtype, devices) for e in ENGINES}
  weights = workers['llm_jax'].ask(None)
  for name in ENGINES[1:]:
    workers[name].pipe.send(weights)
  first = {name: [w.ask('step')[2] for _ in range(2)] for name, w in workers.items()}
  _agree(first, dtype)
  peaks, times = [w.ask('peak') for w in workers.values()], {name: [] for name in ENGINES}
  for _ in range(rounds):
    for name, worker in workers.items():
      times[name].append(worker.ask('step'))
  peaks += [w.ask('peak') for w in workers.values()]
  for worker in workers.values():
    worker.stop()
  return times, max(peaks)


def _agree(losses: dict[str, list[float]], dtype: str) -> None:
  ours = np.asarray(losses['llm_jax'])
  for name, theirs in losses.items():
    off = np.abs(ours / np.asarray(theirs) - 1).max()
    if off > TOLERANCE[dtype]:
      raise SystemExit(f'not the same model: first losses {losses} ({name} is {off:.1e} off)')


def flops_per_token(size: Size) -> int:
  """6 per weight, 12 per layer, embed and position seen: all products of attention, as PaLM counts."""
  weights = size.layers * 12 * size.embed**2 + size.vocab * size.embed
  return 6 * weights + 12 * size.layers * size.embed * size.length


def report(name: str, dtype: str, rounds: int, devices: int) -> None:
  """Runs one size in one dtype and prints the table."""
  size = SIZES[name]
  times, peak = race(size, dtype, rounds, devices)
  tokens = size.batch * size.length
  middle = {e: np.median(np.asarray(t), axis=0) for e, t in times.items()}
  print(
    f'\n{name}, {dtype}: {size.layers} layers, {size.embed} wide, {size.heads} heads, vocabulary '
    f'{size.vocab}, {size.batch} x {size.length} tokens; fastest f32 product {peak / 1e9:.0f} GFLOP/s'
  )
  print(f'{"":14}{"tokens/s":>10}{"s/step":>9}{"CPU-s":>9}{"of peak":>9}{"loss":>9}')
  for e, (wall, cpu, loss) in middle.items():
    share = flops_per_token(size) * tokens / wall / peak
    print(f'{e:14}{tokens / wall:10.0f}{wall:9.3f}{cpu:9.3f}{share:9.0%}{loss:9.4f}')
  ratios = [min(middle[e][i] for e in ENGINES[1:]) / middle['llm_jax'][i] for i in (0, 1)]
  print(f'llm_jax / faster PyTorch: {ratios[0]:.2f} in tokens/s, {ratios[1]:.2f} per CPU-second')


def main() -> None:
  """Parses the command line and prints one table per size and dtype."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--sizes', default=','.join(SIZES), help='of small, large')
  parser.add_argument('--dtypes', default='f32,bf16')
  parser.add_argument('--rounds', type=int, default=7, help='timed steps of each engine')
  parser.add_argument('--devices', type=int, default=1, help='virtual CPU devices for llm_jax')
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  for dtype in args.dtypes.split(','):
    for name in args.sizes.split(','):
      report(name, dtype, args.rounds, args.devices)
  print(f'\nload of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')


if __name__ == '__main__':
  main()
