r"""Which instructions are worth tuning on: Table 9 of the survey (section 5.1.4) with stories260K as the base model.

  .venv/bin/python -m experiments.instruction_mixtures.run --out=runs/mixtures
  .venv/bin/python -m experiments.instruction_mixtures.run --quick
  .venv/bin/python -m experiments.instruction_mixtures.run --data=DIR      # chat.*, synthetic.* of your own

Every row of the table is the same model after the same number of updates of the same number of tokens, tuned on other
data; several seeds of the order and of the draw. Writes results.json, results.md and results.png.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import small
from experiments.instruction_mixtures import data as kinds
from experiments.instruction_mixtures import report
from llm_jax.core.config import build
from llm_jax.data import curate, examples, formats, stages, templates
from llm_jax.data.formats import Conversation
from llm_jax.decode import generate, prompts, score
from llm_jax.interop import runs
from llm_jax.optim import rules, schedules
from llm_jax.rl import feedback

REAL = os.path.join(os.path.dirname(__file__), '..', '..', 'tests', 'interop', 'real')
BASE = flags.DEFINE_string('base', os.path.join(REAL, 'stories260K.bin'), 'a model of llama2.c')
OUT = flags.DEFINE_string('out', 'runs/mixtures', 'where the data and the results go')
DATA = flags.DEFINE_string('data', None, 'a folder with chat.* (ShareGPT), synthetic.* (Alpaca)')
QUICK = flags.DEFINE_bool('quick', False, 'few updates of four rows, to see it work')
SEEDS = flags.DEFINE_integer('seeds', 3, 'runs of every row')
STEPS = flags.DEFINE_integer('steps', 60, 'updates of every run')
COUNT = flags.DEFINE_integer('count', 300, 'instructions in a set')
ROWS, LENGTH, TEMPLATE, PEAK = 4, 256, 'survey', 1e-3
QUICK_ARMS = ('task', 'synthetic')
Sets = list[list[list[Conversation]]]  # stages of sets of conversations


class Base(NamedTuple):
  """The model before tuning, and its vocabulary."""

  model: Any
  params: Any
  words: Any


class Pools(NamedTuple):
  """What the sets are drawn from, what is measured on, and how hard each of `synthetic` is, nats per token."""

  chat: list[Conversation]
  synthetic: list[Conversation]
  heldout: dict[str, list[Conversation]]
  nats: np.ndarray


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  quick = QUICK.value
  seeds, steps = (1, 10) if quick else (SEEDS.value, STEPS.value)
  begin = time.perf_counter()
  base = load(BASE.value)
  pools = gather(base, DATA.value)
  tune, measure = tuner(base, steps), measurer(base, pools.heldout)
  found: dict[str, list[dict[str, float]]] = {'base': [measure(base.params)]}
  settings = dict(steps=steps, seeds=seeds, rows=ROWS, length=LENGTH, count=COUNT.value)
  for seed in range(seeds):
    made = arms(base, pools, COUNT.value, seed)
    for name in QUICK_ARMS if quick else made:
      folder = os.path.join(OUT.value, f'data-{seed}', name.replace(' ', '_'))
      params = tune(source(base, made[name], folder, steps, seed), seed)
      told = measure(params) | described(made[name])
      found.setdefault(name, []).append(told)
      seconds = round(time.perf_counter() - begin)
      print(f'{seconds} s, seed {seed} {name:14}', report.line(told), flush=True)
      summary = report.summarise(found, settings | dict(seconds=seconds))
      report.write(summary, OUT.value)
  print(report.table(summary))
  print(f'{seconds} s; results.json, results.md and results.png are in {OUT.value}')


def load(path: str) -> Base:
  """A trained model of llama2.c as the base."""
  found = runs.from_llama2c(path)
  params = jax.tree.map(jnp.asarray, found.params)
  return Base(build(found.model)(), params, found.vocabulary)


def gather(base: Base, folder: str | None) -> Pools:
  """Pools of training data and the held-out parts, no prompt in both."""
  fitting = functools.partial(short, base.words)
  chat, chat_held = examples.held_out(fitting(kinds.chat(folder)), 0.1)
  synthetic, synthetic_held = examples.held_out(fitting(kinds.synthetic(folder)), 0.1)
  heldout = dict(
    chat=chat_held[:64],
    task=kinds.tasks(64, 10**6, heldout=True),
    synthetic=synthetic_held[:64],
    people=fitting(kinds.seeds())[:64],
  )
  return Pools(chat, synthetic, heldout, difficulty(base, synthetic))


def short(words: Any, found: Sequence[Conversation]) -> list[Conversation]:
  """Those that fit into a row."""
  return [one for one in found if fits(words, one)]


def fits(words: Any, one: Conversation) -> bool:
  """Whether a conversation fits into a row."""
  return len(templates.encode(words, one.messages, templates.ALL[TEMPLATE]).ids) <= LENGTH


def arms(base: Base, pools: Pools, count: int, seed: int) -> dict[str, Sets]:
  """Name -> the sets it is tuned on, in stages; sets of a stage are drawn from equally."""
  rng = np.random.default_rng(seed)
  draw = lambda some: [some[i] for i in rng.permutation(len(some))[:count]]
  task, chat, synthetic = (
    kinds.tasks(count, seed, heldout=False),
    draw(pools.chat),
    draw(pools.synthetic),
  )
  few = lambda n: kinds.tasks(count, seed, heldout=False, kinds=tuple(kinds.TASKS)[:n])
  ordered = kinds.progressive(pools.synthetic, pools.nats, 3)
  return {
    'task': [[task]],
    'chat': [[chat]],
    'synthetic': [[synthetic]],
    'chat+synthetic': [[chat, synthetic]],
    'all three': [[task, chat, synthetic]],
    'complexity': [[kinds.complex_(synthetic, functools.partial(fits, base.words))]],
    'diversity': [[kinds.diverse(pools.synthetic, count, seed)]],
    'difficulty': [[kinds.moderate(pools.synthetic, pools.nats, count)]],
    'scaling': [[pools.synthetic]],
    'progressive': [[part] for part in ordered],
    '2 task kinds': [[few(2)]],
    '4 task kinds': [[few(4)]],
  }


def source(base: Base, sets: Sets, folder: str, steps: int, seed: int) -> Any:
  """The ordinary source of these conversations, which are written to `folder` first."""
  os.makedirs(folder, exist_ok=True)
  made = []
  for i, stage in enumerate(sets):
    kept = []
    for j, found in enumerate(stage):
      path = os.path.join(folder, f'{i}{j}.jsonl')
      feedback.save([dict(messages=_plain(one.messages)) for one in found], path)
      told = dict(path=path, format=formats.messages, template=TEMPLATE, heldout=0.0)
      kept.append(functools.partial(examples.conversations, **told))
    task = functools.partial(
      examples.task, sets=tuple(kept), rates=(1.0,) * len(kept), vocab=lambda text: base.words
    )
    made.append(functools.partial(examples.make, task=task, seed=seed))
  sizes = dict(batch=ROWS, length=LENGTH)
  if len(made) == 1:
    return made[0](base.model, **sizes)
  until = tuple(steps * i // len(made) for i in range(1, len(made)))
  return stages.make(base.model, sources=tuple(made), until=until, **sizes)


def _plain(messages: Sequence[dict]) -> list[dict]:
  return [dict(role=m['role'], content=m['content']) for m in messages]


def tuner(base: Base, steps: int) -> Callable[[Any, int], Any]:
  """(source, seed) -> the parameters after `steps` updates from the base's; the source is closed."""
  told = dict(peak=PEAK, steps=steps, warmup=max(1, steps * 3 // 100), floor=0.0)
  schedule = functools.partial(schedules.cosine, **told)
  rule = functools.partial(rules.adamw, b2=0.999)
  train = small.trainer(base.model, steps=steps, schedule=schedule, chunk=32, rule=rule)

  def tune(made: Any, seed: int) -> Any:
    with contextlib.closing(made):
      return train(made, seed, base.params)

  return tune


# --- what is measured ---------------------------------------------------------------------------------


def measurer(base: Base, heldout: dict[str, list[Conversation]]) -> Callable[[Any], dict]:
  """params -> nats per target token on each held-out part, exact matches on tasks."""
  batches = {
    name: list(source(base, [[found]], os.path.join(OUT.value, 'heldout', name), 1, 0).once())
    for name, found in heldout.items()
  }

  nats = small.evaluator(base.model, chunk=32)

  def measure(params: Any) -> dict[str, float]:
    told = {name: nats(params, some) for name, some in batches.items()}
    said = answers(base, params, heldout['task'], 12)
    right = [
      a.strip() == one.messages[-1]['content'] for a, one in zip(said, heldout['task'], strict=True)
    ]
    told['exact'] = float(np.mean(right))
    return told

  return measure


def answers(base: Base, params: Any, found: Sequence[Conversation], most: int) -> list[str]:
  """What the model says, greedily, to the first question of each."""
  program, words = templates.ALL[TEMPLATE], base.words
  ids = [templates.prompt(words, one.messages[:1], program) for one in found]
  told = dict(max_new=most, eos=words.turn, start=None, temperature=0.0)
  told['allowed'] = prompts.drawable(base.model, words)
  padded = prompts.pad(base.model, ids)
  out = generate.generate(base.model, params, *padded, jax.random.key(0), **told)
  lengths = np.asarray(out.lengths)
  return [words.decode(row[:n]) for row, n in zip(np.asarray(out.tokens), lengths, strict=True)]


def difficulty(base: Base, found: Sequence[Conversation], *, batch: int = 64) -> np.ndarray:
  """f64 [n]: nats per token of each first answer under the base model; its exponential is the perplexity."""
  program, nats = templates.ALL[TEMPLATE], []
  nothing = np.zeros((batch, 1), np.int32), np.zeros(batch, np.int32)  # whole texts are scored
  for first in range(0, len(found), batch):
    ids, sizes = np.zeros((batch, LENGTH), np.int32), np.ones(batch, np.int32)
    counted = np.zeros((batch, LENGTH))
    for i, one in enumerate(found[first : first + batch]):
      encoded = templates.encode(base.words, one.messages[:2], program)
      sizes[i] = len(encoded.ids)
      ids[i, : sizes[i]], counted[i, : sizes[i]] = encoded
    logp = score.tokens(base.model, base.params, *nothing, ids, sizes, start=None).logp
    total = (np.asarray(logp, np.float64) * counted).sum(1)
    nats.append(-(total / np.maximum(counted.sum(1), 1))[: len(found) - first])
  return np.concatenate(nats)


def described(sets: Sets) -> dict[str, float]:
  """How many instructions there are, and how rich their words are (MTLD)."""
  texts = [text for stage in sets for found in stage for text in kinds.asked(found)]
  return dict(records=len(texts), mtld=curate.mtld(' '.join(texts)))


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
