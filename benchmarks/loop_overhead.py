"""What the training loop costs over a bare jitted step: data, logging, guards, a checkpoint in the background.

  python -m benchmarks.loop_overhead              # about five minutes
  python -m benchmarks.loop_overhead --config=configs/pretrain/ul2.py --steps=50

Stretches of the bare update on one batch and of `loop.train` with the hooks of `llm-jax train` are taken in turn,
with the same compiled update, batch shape and state. A stretch of the loop saves one checkpoint, and waits until it is
written: in training one is saved a few times in a run. Held-out evaluation and samples are left out: they are work
asked for, not overhead.
"""

import argparse
import functools
import os
import tempfile
import time

import numpy as np


class Run:
  """One model, ready to step: bare, or in the loop."""

  def __init__(self, path: str, variant: str, workdir: str, steps: int):
    import jax

    from llm_jax.core import config, mesh, metrics
    from llm_jax.train import checkpoint, guards, preemption, state, step
    from llm_jax.train.hooks import Run as Told

    cfg = config.read(path, variant or None)
    jax.set_mesh(mesh.make(**cfg.mesh))  # for the life of this process
    self.model = config.build(cfg.model)()
    self.source = config.build(cfg.source)(self.model)
    objective = functools.partial(config.build(cfg.objective), self.model)
    tx = config.build(cfg.optimizer)(self.model.axes)
    layout = state.layout(self.model, tx)
    self.update = step.make(objective, tx, layout, microbatches=cfg.microbatches)
    self.state = state.create(self.model, tx, 0, layout=layout)
    self.batch, self.key = mesh.place(self.source(self.state)), jax.random.key(0)
    self.saver = checkpoint.Saver(workdir, every=steps, keep=1)
    writer = metrics.Writer(workdir, every=cfg.log_every, flops_per_token=1.0)
    self.saver.track('source', self.source)
    self.saver.track('writer', writer)
    told = Told(self.model, self.source, self.saver, writer, workdir, 10**9)
    guard = [guards.stop_on_nan(told), self.saver.hook, preemption.preemption(told)]
    self.hooks = [writer, *guard]

  def bare(self, steps: int) -> None:
    """Updates on one batch, the device never waiting."""
    import jax

    for _ in range(steps):
      self.state, _ = self.update(self.state, self.batch, self.key)
    jax.block_until_ready(self.state)

  def looped(self, steps: int) -> None:
    """The same updates by `loop.train`, until their checkpoint is on disk."""
    import jax

    from llm_jax.train import loop

    end = int(self.state.step) + steps
    arguments = dict(steps=end, key=self.key, hooks=self.hooks)
    self.state = loop.train(self.state, self.source, self.update, **arguments)
    self.saver.wait()
    jax.block_until_ready(self.state)


def measure(run: Run, steps: int, rounds: int) -> np.ndarray:
  """[rounds, bare and looped, (seconds, CPU-seconds)] per step."""
  run.bare(2)
  run.looped(steps - 2)  # from here on stretches of the loop end where a checkpoint is due
  found = []
  for i in range(rounds):
    pair = {}
    for take in (run.bare, run.looped) if i % 2 else (run.looped, run.bare):
      wall, cpu = time.perf_counter(), time.process_time()
      take(steps)
      pair[take.__name__] = (time.perf_counter() - wall, time.process_time() - cpu)
    found.append([pair['bare'], pair['looped']])
  return np.asarray(found) / steps


def main() -> None:
  """Prints seconds per step of both and what the loop adds."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--config', default='configs/quickstart.py', help='FILE or FILE:ARGS')
  parser.add_argument('--steps', type=int, default=40, help='of a stretch')
  parser.add_argument('--rounds', type=int, default=6)
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  path, _, variant = args.config.partition(':')
  with tempfile.TemporaryDirectory() as folder:
    run = Run(path, variant, folder, args.steps)
    times = measure(run, args.steps, args.rounds)
    run.source.close()
  (bare, bare_cpu), (looped, looped_cpu) = np.median(times, axis=0)
  more, more_cpu = np.median(times[:, 1] / times[:, 0], axis=0) - 1
  print(f'{args.config}, {args.rounds} x {args.steps} steps, one checkpoint in each stretch')
  print(f'bare step    {1e3 * bare:8.1f} ms {1e3 * bare_cpu:8.1f} CPU-ms')
  print(f'in the loop  {1e3 * looped:8.1f} ms {1e3 * looped_cpu:8.1f} CPU-ms')
  print(f'the loop adds {more:+.1%} of wall time, {more_cpu:+.1%} of CPU time (medians of pairs)')
  print(f'load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')


if __name__ == '__main__':
  main()
