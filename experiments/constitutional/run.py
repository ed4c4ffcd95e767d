r"""Constitutional AI with our own engine: a model revises its answers by principles, and says which answer is better.

  make smollm2
  .venv/bin/python experiments/constitutional/run.py --workdir=runs/smollm2 --out=runs/constitution

The prompts are the first turns of the bundled harmless pairs of HH-RLHF. Writes revisions.jsonl for
configs/align/constitutional.py, and pairs.jsonl: of the first answer and its last revision the one that the model
itself prefers, in both orders, by the log-probabilities of the letters.
"""

import functools
import os
import sys

import jax
from absl import app, flags

from llm_jax.cli import generate
from llm_jax.data import records
from llm_jax.model import stack
from llm_jax.rl import constitutional, feedback, judge

WORKDIR = flags.DEFINE_string('workdir', 'runs/smollm2', 'a run to write with')
OUT = flags.DEFINE_string('out', 'runs/constitution', 'where the records go')
COUNT = flags.DEFINE_integer('count', 64, 'prompts')
REVISIONS = flags.DEFINE_integer('revisions', 2, 'revisions of each answer')
TOKENS = flags.DEFINE_integer('tokens', 96, 'at most, of an answer')
SEED = flags.DEFINE_integer('seed', 0, 'what the draws depend on')
DATA = 'hh_harmless/harmless-base_test.jsonl.gz'


def prompts(count: int) -> list[str]:
  """The first `count` different first turns."""
  found: dict[str, None] = {}
  for record in records.read(records.bundled(DATA)):
    if len(found) < count and all(isinstance(v, str) and v.strip() for v in record.fields.values()):
      first = record.fields['chosen'].partition('Human:')[2].partition('\n\nAssistant:')[0]
      found.setdefault(first.strip())
  return list(found)


def main(argv: list[str]) -> None:
  """Runs it."""
  del argv
  model, params, words = generate.load(WORKDIR.value, None)
  params = stack.apart(params, free=True)
  settings = dict(max_new=TOKENS.value, temperature=0.8, top_p=0.95, batch=8)
  stop = ('\n\nHuman:', '\n\nRevision request:', '\n\nCritique request:')
  write = feedback.of_model(model, params, words, stop=stop, **settings)
  asked, key = prompts(COUNT.value), jax.random.key(SEED.value)
  first = write([f'Human: {p}\n\nAssistant:' for p in asked], key)
  first = [text.strip() for text in first]
  chains = constitutional.revise(write, asked, first, key, revisions=REVISIONS.value)
  compare = constitutional.asked(
    functools.partial(judge.probabilities, model, params, words, batch=4)
  )
  last = [chain.answers[-1] for chain in chains]
  pairs = constitutional.label(constitutional.fair(compare), asked, first, last, key)
  os.makedirs(OUT.value, exist_ok=True)
  examples = constitutional.examples(chains)
  feedback.save(examples, os.path.join(OUT.value, 'revisions.jsonl'))
  different = [p for p in pairs if p['chosen'].strip() != p['rejected'].strip()]
  feedback.save(different, os.path.join(OUT.value, 'pairs.jsonl'))
  revised = sum(p['chosen'] == a for p, a in zip(pairs, last, strict=True))
  print(f'{len(asked)} prompts, {len(examples)} revisions; the model prefers {revised} of them')
  for chain in chains[:2]:
    print(chain)


if __name__ == '__main__':
  app.run(main, argv=sys.argv)
