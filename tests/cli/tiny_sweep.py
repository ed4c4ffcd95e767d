"""Sweeps of seconds for the tests: `tiny.py` with other seeds and steps. `:failing` has a cell that cannot train."""

from llm_jax.core.config import use, variant
from llm_jax.data import pipeline
from llm_jax.scaling import sweep
from tests.cli import tiny


def get_config(text=None):
  arg = variant(text, kind='plain', seeds=3, steps=8)
  return sweep.cells(make, sweep.grid(kind=(arg.kind,), steps=(arg.steps,), seed=range(arg.seeds)))


def make(*, kind, steps, seed):
  c = tiny.get_config(f'steps={steps}')
  c.seed = seed
  with c.unlocked():
    c.hooks = {'heldout': c.hooks.heldout}
    c.checkpoint.asynchronous = False  # on the disk before a test kills anything
  if kind == 'failing' and seed == 1:
    c.source = use(pipeline.make, task=c.source.task, batch=4, length=16, split='nowhere')
  return c
