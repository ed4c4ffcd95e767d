"""Classes of texts, with or without language modelling beside them: supervised finetuning as before instructions; and
tags of words.

The model of `labelled` is one with a classifier (`model/classes.py`), the batch has `label` and `at` int32 [batch]; a
row whose weights are all 0 does not count.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.core.errors import UserError
from llm_jax.model import classes
from llm_jax.objectives import language, preference, sequence
from llm_jax.objectives.loss import Loss, add
from llm_jax.objectives.preference import Batch


def labelled(
  model, params, batch: Batch, rng: jax.Array | None, *, lm: float = 0.0, chunk: int | None = 32
) -> Loss:
  """-log p(label) - lm * (mean over the row's targets of log p(target)) per row.

  lm: 0.5 for GPT's auxiliary language modelling (Radford et al. 2018, equation 5; the mean per row is that of its
  code), 1 for BERT's pre-training, whose targets are the masked words and whose label is the next sentence (Devlin et
  al. 2018, arXiv:1810.04805, appendix A.2). Rows count alike, also those with fewer targets. Metrics: accuracy,
  `label_nll` and with `lm` `nll`, nats.
  """
  if lm < 0:
    raise UserError(f'lm={lm} is the weight of language modelling: choose 0 for none, 0.5 for GPT')
  if classes.NAME not in params:
    raise UserError('this model knows no classes: set model to use(classes.make, model=...)')
  more = {}
  if lm:
    found = sequence.tokens(model, params, batch, rng, chunk=chunk)
    x, aux = found.x, found.aux
    more = dict(nll=-sequence.mean(found.logp, batch['weights']))
  else:
    x, _, aux = model.hidden(params, batch, rng=rng)
  logits = classes.read(params, x, batch['at'])
  logp = jax.nn.log_softmax(logits)
  own = -jnp.take_along_axis(logp, batch['label'][:, None], axis=1)[:, 0]
  right = (logits.argmax(-1) == batch['label']).astype(jnp.float32)
  each = own + lm * more['nll'] if lm else own
  counts = (batch['weights'].sum(-1) > 0).astype(jnp.float32)
  return preference.settle(each, counts, dict(accuracy=right, label_nll=own, **more), aux)


def tagged(model, params, batch: Batch, rng: jax.Array | None) -> Loss:
  """-log p(tag) of every word in every task, all alike (Collobert & Weston 2008, section 4, where the steps take turns
  at tasks).

  model: of `tagger.make`. batch: inputs, segments, and `TASK/targets`, `TASK/weights` [batch, t] of each of its tasks
  (data/tags.py). Metrics: those of `language.next_token`, of all tasks together.
  """
  parts = []
  for name, task in model.tasks.items():
    told = dict(batch, targets=batch[f'{name}/targets'], weights=batch[f'{name}/weights'])
    parts.append(language.next_token(task, params, told, rng, chunk=None))
  return functools.reduce(add, parts)
