"""Sweeps of seconds for the tests: `tiny.py` with other seeds. In `:troubled` the process of the first cell dies in the
middle, once, and the second cell cannot train."""

from llm_jax.core.config import use, variant
from llm_jax.data import pipeline
from llm_jax.scaling import sweep
from tests.cli import killed, tiny


def get_config(text=None):
  arg = variant(text, kind='plain', seeds=3, steps=8)
  return sweep.cells(make, sweep.grid(kind=(arg.kind,), steps=(arg.steps,), seed=range(arg.seeds)))


def make(*, kind, steps, seed):
  c = tiny.get_config(f'steps={steps}')
  c.seed = seed
  hooks = {'heldout': c.hooks.heldout}
  if kind == 'troubled' and seed == 0:
    hooks['die'] = use(killed.die_once, at=5)
  if kind == 'troubled' and seed == 1:
    c.source = use(pipeline.make, task=c.source.task, batch=4, length=16, split='nowhere')
  with c.unlocked():
    c.hooks = hooks
    c.checkpoint.asynchronous = False  # on the disk before anything dies
  return c
