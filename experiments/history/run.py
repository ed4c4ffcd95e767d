r"""From counting to attention: n-grams, NPLM, LSTM and Transformer on the same novels.

  .venv/bin/python -m experiments.history.run --out=runs/history          # 4 minutes of one core
  .venv/bin/python -m experiments.history.run --quick --out=runs/try

n-grams of 1 to 5 bytes with Katz's back-off, and three neural models of about 140,000 parameters that read 1.7 of the
2.2 MB of training text. All are measured on the same held-out bytes. Every model is a line of OUT/cells.jsonl; what is
there already is not made again. Writes results.json, results.md and results.png.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from experiments import small
from experiments.history import models, report
from llm_jax.data import batch, ngram, pipeline, tasks, vocab
from llm_jax.model import count
from llm_jax.model.functions import Model
from llm_jax.optim import rules, schedules

OUT = flags.DEFINE_string('out', 'runs/history', 'where the results go')
QUICK = flags.DEFINE_bool('quick', False, 'hardly trained, to see it work')
LENGTH, ROWS = 128, 16
ORDERS = (1, 2, 3, 4, 5)
PEAK = {'NPLM': 3e-3, 'LSTM': 5e-3, 'Transformer': 5e-3}


def words(text: Any = None) -> vocab.Bytes:
  """Bytes: a token per byte, and the end of a document."""
  return vocab.bytes_(text, extra_ids=0, modes=())


BOOKS = functools.partial(tasks.domain, name='books', vocab=words)


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  store, steps = small.Cells(OUT.value), 20 if QUICK.value else 850
  for order in ORDERS:
    store.once(f'{order}-gram', functools.partial(counted, order))
  for name in models.MODELS:
    store.once(name, functools.partial(trained, name, steps))
  report.write(store.all(), OUT.value)
  print(f'results.json, results.md and results.png are in {OUT.value}')


# --- counting ------------------------------------------------------------------------------------------


def documents(split: str) -> list[np.ndarray]:
  """Each book with its end, as ids."""
  task = BOOKS()
  texts = (text for corpus in task.corpora for text in corpus.texts(split))
  return [np.array([*task.vocab.encode(text), task.vocab.eos]) for text in texts]


def counted(order: int) -> dict[str, Any]:
  """Katz's back-off on all of the text, and on its first parts: the beginning of every book."""
  books, held = documents('train'), documents('validation')
  curve, total = [], sum(map(len, books))
  for share in 2.0 ** -np.arange(9, -1, -1):
    made = ngram.katz(
      ngram.count(
        [book[: int(share * len(book))] for book in books], order=order, vocab=models.VOCAB
      )
    )
    nats = -np.concatenate([ngram.logp(made, text) for text in held]).mean()
    curve.append([int(share * total), float(nats / np.log(2))])
  numbers = sum(len(level.p) + len(level.backoff) for level in made.levels)
  return dict(parameters=numbers, sees=order - 1, bits=curve[-1][1], curve=curve)


# --- training ------------------------------------------------------------------------------------------


def trained(name: str, steps: int) -> dict[str, Any]:
  """One neural model, measured on its way on a part and in the end on all of the held-out text."""
  model, seed = models.MODELS[name](), 0
  source = pipeline.make(
    model, task=BOOKS, batch=ROWS, length=LENGTH, rows=batch.concatenate, seed=seed
  )
  told = dict(peak=PEAK[name], steps=steps, warmup=max(1, steps // 20), floor=0.0)
  rule = functools.partial(rules.adamw, b2=0.99)
  schedule = functools.partial(schedules.cosine, **told)
  train = small.trainer(model, steps=steps, schedule=schedule, rule=rule, clip=1.0)
  measure, curve = measurer(model), []
  marks = set(np.geomspace(10, steps, 8).round().astype(int).tolist()[:-1])

  def look(at: int, now: Any, metrics: Any) -> None:
    if at in marks:
      curve.append([at * ROWS * LENGTH, measure(now.params, 4)])

  with contextlib.closing(source):
    params = train(source, seed, hooks=[look])
  sees = models.WINDOW if name == 'NPLM' else LENGTH
  bits = measure(params, None)
  curve.append([steps * ROWS * LENGTH, bits])
  return dict(parameters=count.total(model.card), sees=sees, bits=bits, steps=steps, curve=curve)


def measurer(model: Model) -> Callable[[Any, int | None], float]:
  """(params, batches, None for all) -> held-out bits per byte."""
  source = pipeline.make(
    model,
    task=BOOKS,
    batch=4 * ROWS,
    length=LENGTH,
    rows=batch.concatenate,
    split='validation',
    shuffle=False,
    jitter=False,
  )
  held = list(source.once())
  source.close()
  spread = np.random.default_rng(0).permutation(len(held))
  nats = small.evaluator(model)
  return lambda params, batches: nats(params, [held[i] for i in spread[:batches]]) / np.log(2)


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
