r"""Quark: text conditioned on a token for its reward, kept near the reference; then one asks for the best token.

  llm-jax train --config=configs/align/quark.py --workdir=runs/quark
  llm-jax train --config=configs/align/quark.py:tiny --workdir=runs/quark-tiny

Differs from dpo.py in reading the two answers of a pair apart, with '-' before the worse and '+' before the better one,
and in the objective. Tiny: 3.11 nats per held-out token after 60 steps, of both kinds of answers.
"""

from configs.align import dpo
from llm_jax.core.config import use
from llm_jax.data import pairs
from llm_jax.objectives import feedback
from llm_jax.rl import annotate


def get_config(text=None):
  c, arg = dpo.start(text)
  c.hooks.samples.prompts = tuple(f'{r}{p}' for r in '-+' for p in c.hooks.samples.prompts)
  told = dict(dpo.data(arg), length=arg.length - 1)  # the token takes a slot
  marked = dict(tokens=('-', '+'), ref=arg.run or None)
  source = lambda **kw: use(annotate.with_top, source=use(pairs.unpaired, **told, **kw), **marked)
  return dpo.finish(c, source, use(feedback.quark, kl=0.05))
