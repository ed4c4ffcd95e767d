"""The recipes of tuning and alignment at a size of seconds, and a command line that kills its own process.

  python -m tests.cli.killed save train --config=tests/cli/killed.py:kind=dpo --workdir=DIR

Moments: `read`, while the fourth batch (of PPO: the second round) is being made; `learn`, as soon as the fifth
update has been handed to the device; `save`, when the checkpoint of step 4 is written and has yet its temporary name.
"""

import functools
import os
import signal
import sys

from configs.align import dpo, dpo_packed, grpo, ppo, reward
from configs.tune import arithmetic, sft
from llm_jax.core.config import variant

STEPS = 6
PAIRED = dict(dpo=dpo, packed=dpo_packed, reward=reward)
DRAWN = dict(ppo=ppo, grpo=grpo)


def get_config(text=None):
  arg = variant(text, kind='sft', run='')
  if arg.kind == 'sft':
    c = sft.get_config(f'tiny,batch=2,length=96,steps={STEPS}')
    c.source.task.sets[0].left_out = 1.0
  elif arg.kind in PAIRED:
    length = 320 if arg.kind == 'packed' else 160  # of a row of both answers
    c = PAIRED[arg.kind].get_config(f'tiny,batch=2,length={length},steps={STEPS}')
    (c.source if arg.kind == 'reward' else c.source.source).left_out = 1.0
  elif arg.kind in DRAWN:
    c = DRAWN[arg.kind].get_config(f'steps={STEPS},round=16,group=4')
    c.init.init_from = arg.run or None
    if c.source.reference is not None:
      c.source.reference.path = arg.run
  else:
    c = arithmetic.get_config('steps=1,batch=2')
  shape = c.model.model if 'model' in c.model else c.model
  shape.embed, shape.layers, shape.block.mixer.heads, shape.block.ffn.hidden = 16, 1, 2, 16
  c.mesh.data, c.log_every, c.checkpoint.every = 1, 1, 2
  with c.unlocked():
    c.checkpoint.asynchronous = False  # step 2 is on the disk before anything dies
    c.hooks = {name: hook for name, hook in c.hooks.items() if name == 'recorder'}
  return c


def die(*ignored):
  os.kill(os.getpid(), signal.SIGKILL)


def die_once(run, *, at):
  """A hook that ends its process at step `at`, unless it has been there before."""
  mark = os.path.join(run.workdir, 'died')

  def hook(step, state, metrics):
    if step == at and not os.path.exists(mark):
      with open(mark, 'w'):
        die()

  return hook


def at_call(number, function, after=False):
  """`function`, the `number`th call of which is the end; after: of this process' part of it."""
  calls = []

  @functools.wraps(function)  # configs name a reward by its module and name
  def counted(*args, **kw):
    calls.append(1)
    if len(calls) == number and not after:
      die()
    found = function(*args, **kw)
    return die() if len(calls) == number else found

  return counted


def arm(moment, rounds):
  """Sees to it that this process does not survive `moment`. rounds: the one whose answers are scored then."""
  from llm_jax.data import pipeline
  from llm_jax.rl import arithmetic as sums
  from llm_jax.train import step

  if moment == 'read':
    pipeline.Source.__call__ = at_call(4, pipeline.Source.__call__)
    sums.correct = at_call(rounds, sums.correct)
  elif moment == 'learn':
    make = step.make
    step.make = lambda *args, **kw: at_call(5, make(*args, **kw), after=True)
  elif moment == 'save':
    name = f'{os.sep}4.'

    def heard(event, args):
      if event == 'os.rename' and name in str(args[0]) and 'tmp' in str(args[0]):
        die()

    sys.addaudithook(heard)
  else:
    raise ValueError(moment)


if __name__ == '__main__':
  from llm_jax.cli.main import main

  arm(
    sys.argv[1], 2 if 'kind=ppo' in ' '.join(sys.argv) else 4
  )  # PPO takes four steps from a round
  sys.exit(main(sys.argv[2:]))
