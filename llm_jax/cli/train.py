r"""Train a model, or go on training it.

  llm-jax train --config=configs/quickstart.py --workdir=runs/quickstart
  llm-jax train --config=configs/pretrain/ul2.py --config.mesh.data=2 --config.steps=1000 --workdir=DIR

The same command resumes from the newest checkpoint in the workdir. A config file may take arguments after a colon
(`--config=configs/pretrain/llama.py:7b`).
"""

import functools
import sys
from typing import Any

import jax
from absl import flags

from llm_jax.cli.flags import join_cluster, parse, read_config
from llm_jax.cli.main import main as command
from llm_jax.core import mesh, metrics
from llm_jax.core.config import build, to_json
from llm_jax.model import count
from llm_jax.train import checkpoint, guards, loop, preemption, report, state, step
from llm_jax.train.hooks import Run


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = flags.FlagValues()
  flags.DEFINE_string(
    'workdir', None, 'folder for checkpoints, metrics and samples', flag_values=given
  )
  cfg = read_config(parse(argv, given, __doc__))
  workdir = report.open_workdir(given.workdir)
  join_cluster()
  return run(cfg, workdir)


def run(cfg: Any, workdir: str) -> int:
  """Trains what the config describes in a folder that exists; returns the exit code. Sweeps call it too."""
  with jax.set_mesh(mesh.make(**cfg.mesh)), mesh.rules(**cfg.axes):
    model = build(cfg.model)()  # pure functions: init, hidden, logits, states, axes
    source = build(cfg.source)(model)  # state -> batch
    mesh.check_batch(source.batch, cfg.microbatches)
    objective = functools.partial(build(cfg.objective), model)  # (params, batch, key) -> Loss
    tx = build(cfg.optimizer)(model.axes)  # optax, told each parameter's axes
    layout = state.layout(model, tx, cfg.trainable)
    update = step.make(
      objective, tx, layout, microbatches=cfg.microbatches, trainable=cfg.trainable
    )
    first = state.create(model, tx, cfg.seed, trainable=cfg.trainable, layout=layout)
    flops = count.training_flops(model.card, source.length)
    writer = metrics.Writer(
      workdir,
      every=cfg.log_every,
      steps=cfg.steps,
      flops_per_token=flops,
      tokens_per_step=getattr(source, 'texts', 1) * source.batch * source.length,
    )
    with checkpoint.Saver(
      workdir, steps=cfg.steps, config_json=to_json(cfg), **cfg.checkpoint
    ) as saver:
      last = saver.restore(first, source, writer, **build(cfg.init))
      report.record(workdir, to_json(cfg), source.vocab)
      run = Run(model, source, saver, writer, workdir, cfg.steps)
      chosen = [build(hook)(run) for hook in cfg.hooks.values()]  # in the order of their names
      hooks = [writer, *chosen, guards.stop_on_nan(run), saver.hook, preemption.preemption(run)]
      last = loop.train(
        last,
        source,
        update,
        steps=cfg.steps,
        key=jax.random.key(cfg.seed),
        hooks=hooks,
        rescue=report.rescue(run),
      )
      return report.finish(run, last)


if __name__ == '__main__':  # python -m llm_jax.cli.train
  sys.exit(command(['train', *sys.argv[1:]]))
