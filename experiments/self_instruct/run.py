r"""Self-Instruct with our own engine: instructions that a model writes from the 175 seeds of the paper.

  make smollm2
  .venv/bin/python experiments/self_instruct/run.py --workdir=runs/smollm2 --out=made.jsonl

Writes a record per instance, in Alpaca's form, and prints how many candidates each rule refused.
"""

import sys
import time

import jax
from absl import app, flags

from llm_jax.cli import generate
from llm_jax.data import curate, synthesize
from llm_jax.data import records as records_lib
from llm_jax.model import stack
from llm_jax.rl import feedback

WORKDIR = flags.DEFINE_string('workdir', 'runs/smollm2', 'a run to write with')
BUNDLED = records_lib.bundled('self_instruct/seed_tasks.jsonl.gz')
SEEDS = flags.DEFINE_string('seeds', BUNDLED, 'seed tasks, as JSON lines')
OUT = flags.DEFINE_string('out', 'self_instruct.jsonl', 'where the records go')
WANTED = flags.DEFINE_integer('wanted', 100, 'new tasks to make')
ROUNDS = flags.DEFINE_integer('rounds', 100, 'requests at most, each of --parallel lists')
PARALLEL = flags.DEFINE_integer('parallel', 8, 'lists per round')
SEED = flags.DEFINE_integer('seed', 0, 'what the draws depend on')
LIST, KIND, INSTANCE = 160, 4, 96  # tokens of an answer


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  model, params, words = generate.load(WORKDIR.value, None)
  params = stack.apart(params, free=True)

  def write(prompts, key):
    last = prompts[0].rpartition('\n')[2]
    most = KIND if last == 'Labels:' else LIST if last.endswith('.') else INSTANCE
    told = dict(max_new=most, temperature=0.7, top_p=0.9, batch=8)
    return feedback.of_model(model, params, words, **told)(prompts, key)

  seeds, start = synthesize.read_seeds(SEEDS.value), time.perf_counter()
  settings = dict(wanted=WANTED.value, parallel=PARALLEL.value, rounds=ROUNDS.value)
  made = synthesize.self_instruct(write, seeds, jax.random.key(SEED.value), **settings)
  records = synthesize.records(made.tasks)
  feedback.save(records, OUT.value)
  texts = [task.instruction for task in made.tasks]
  print(
    f'{len(texts)} tasks, {len(records)} instances, {made.rounds} rounds, {time.perf_counter() - start:.0f} s'
  )
  print('refused:', made.refused)
  print(f'distinct-2 {curate.distinct(texts):.3f}')
  for task in made.tasks[:10]:
    kind = 'classification' if task.classification else 'task'
    print(f'- {task.instruction} [{kind}] -> {task.instances[0]}')


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
