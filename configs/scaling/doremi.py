r"""DoReMi: in which proportions to mix books, Wikipedia and stories. Differs from configs/pretrain/lm.py in the source.

  llm-jax train --config=configs/scaling/doremi.py:stage=reference --workdir=runs/reference
  llm-jax train --config=configs/scaling/doremi.py --config.source.ref=runs/reference --workdir=runs/proxy

The reference sees the domains equally often; the proxy, which has its size, counts the domains in which it is behind
the reference for more. `domain/NAME/average` in metrics.jsonl at the last step is the mixture: the `rates` of
`tasks.mixture` for the large model. Bytes, and a model of 123 thousand parameters.

Expected with steps=300 in both commands, one seed: books 0.40, Wikipedia 0.36, stories 0.24, where all were a third.
What such a mixture gains over the uniform one is measured in experiments/mixture_lab.
"""

from configs.pretrain import lm
from llm_jax.core.config import use, variant
from llm_jax.core.errors import UserError
from llm_jax.data import batch, domains, pipeline, tasks, vocab
from llm_jax.model import init
from llm_jax.optim import chain, rules, schedules
from llm_jax.scaling import mixture

DOMAINS = ('books', 'wikipedia', 'stories')


def get_config(text=None):
  arg = variant(text, stage='proxy', batch=24, length=128, steps=1500)
  if arg.stage not in ('reference', 'proxy'):
    raise UserError(f"stage={arg.stage!r}: choose 'reference' or 'proxy'")
  c = lm.get_config(f'steps={arg.steps},batch={arg.batch},length={arg.length}')
  words = use(vocab.bytes_, extra_ids=0, modes=())
  parts = tuple(use(tasks.domain, name=name) for name in DOMAINS)
  mixed = use(tasks.mixture, tasks=parts, rates=(1.0,) * len(parts), vocab=words)
  rows = dict(rows=use(batch.concatenate))
  c.model.vocab, c.model.vocab_multiple, c.model.embed, c.model.layers = 259, 1, 64, 2
  c.model.block.ffn.hidden = 192
  c.model.init = use(init.gpt2, std=0.08)
  c.source = use(pipeline.make, task=mixed, batch=arg.batch, length=arg.length, **rows)
  schedule = use(
    schedules.cosine, peak=5e-3, steps=arg.steps, warmup=max(1, min(20, arg.steps // 10)), floor=0.0
  )
  c.optimizer = use(chain.make, rule=use(rules.adamw, b2=0.99), schedule=schedule, clip=1.0)
  every = max(1, arg.steps // 10)
  hooks = lm.hook_set(c.source, every)
  if arg.stage == 'proxy':
    one = lambda name: use(pipeline.make, task=use(tasks.domain, name=name, vocab=words), **rows)
    sides = use(domains.make, sources=tuple(map(one, DOMAINS)), batch=arg.batch, length=arg.length)
    c.source = use(mixture.doremi, source=sides, burn_in=arg.steps // 3)
    hooks['weights'] = use(mixture.trace, every=every, names=DOMAINS)
  with c.unlocked():
    c.hooks = hooks
  return c
