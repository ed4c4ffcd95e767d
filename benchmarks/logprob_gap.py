r"""What separates the log-probabilities of the sampler from those of the learner, over a thousand answers.

  python -m benchmarks.logprob_gap                       # a LLaMA of 4 layers, 128 wide, random weights: a minute
  python -m benchmarks.logprob_gap --run=runs/smollm2 --answers=64

In f32. Prompts have many lengths, answers end where they like, and rounds are read in minibatches of several sizes, so
that no sequence keeps its neighbours. Three gaps, each the largest |difference| of a token in nats:

  sampler    the decoding loop, a token at a time with a cache, beside the learner's forward over the whole sequence:
             the `rl/gap` that the flight recorder writes
  batch      the learner's forward in minibatches of 64, 16 and 4 rows
  loss       what the objective compares at a round's first update: `old_logp`, which the rollout takes from the
             learner's own forward in the very shape that is learned from, beside the log-probability in the loss

The first two are rounding: products of other shapes add up in another order. They never reach a loss. The third has to
be 0 to the last bit, or this exits with 1: then the ratio of the first update is exactly 1.
"""

import argparse
import functools
import os
import sys
from typing import Any

import numpy as np

VOCAB, LONGEST, NEW, GROUP = 256, 40, 48, 8
SIZES = (64, 16, 4)  # rows of a minibatch


def tiny() -> tuple[Any, Any, Any, list[dict]]:
  """(model, params, vocabulary, prompts): random weights; the prompts are beginnings of the bundled instructions."""
  import jax

  from llm_jax.data import examples, vocab
  from llm_jax.model import attention, block, ffn, transformer

  words = vocab.bytes_(extra_ids=0, modes=())
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=4),
    ffn=functools.partial(ffn.Gated, hidden=344),
  )
  told = dict(vocab=words.size, embed=128, layers=4, block=layer, length=LONGEST + NEW + 1)
  model = transformer.causal(**told)
  params = jax.jit(model.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)  # far from uniform
  texts = list(examples.instructions(template='alpaca').texts())
  rng = np.random.default_rng(0)
  tails = [t[-rng.integers(2, LONGEST) :].strip() for t in texts]
  return model, params, words, [dict(prompt=t) for t in tails if len(words.encode(t)) <= LONGEST]


def trained(run: str) -> tuple[Any, Any, Any, list[dict]]:
  """The same of a run; the prompts are the beginnings of instructions that it makes few tokens of."""
  from llm_jax.cli import generate
  from llm_jax.data import examples

  model, params, words = generate.load(run)
  texts = list(examples.instructions(template='alpaca').texts())
  tails = [t.partition('### Instruction:')[2].partition('###')[0].strip() for t in texts]
  return model, params, words, [dict(prompt=t) for t in tails if len(words.encode(t)) <= LONGEST]


def measure(model: Any, params: Any, words: Any, prompts: list[dict], count: int) -> dict:
  """What is printed: the gaps in nats, and what the sequences are."""
  import jax
  import jax.numpy as jnp

  from llm_jax.objectives import policy, sequence
  from llm_jax.rl import rollout
  from llm_jax.train.state import State

  reward = lambda prompts, answers, told: np.array([len(a) for a in answers], np.float32)
  told = dict(prompts=lambda: prompts, reward=reward, vocab=lambda: words, group=GROUP)
  told |= dict(batch=SIZES[0], round=count, max_new=NEW, prompt_length=LONGEST)
  source = rollout.make(model, **told)
  first = source(State(jnp.zeros((), jnp.int32), params, None))
  rows = source.rows
  read = jax.jit(lambda params, batch: sequence.tokens(model, params, batch).logp)

  def logp(size: int) -> np.ndarray:
    order = np.random.default_rng(size).permutation(count)  # other neighbours for every row
    found = np.empty(rows['old_logp'].shape, np.float32)
    for start in range(0, count, size):
      some = order[start : start + size]
      found[some] = read(params, {k: v[some] for k, v in rows.items() if k in sequence.READ})
    return found * rows['weights']

  by_size = [logp(size) for size in SIZES]
  update = jax.jit(functools.partial(policy.grpo, model))
  loss = update(params, first, jax.random.key(0))
  said = float(loss.metrics['old_kl']) + float(loss.metrics['clipped'])
  lengths = rows['weights'].sum(1).astype(int)
  before = rows['segments'].sum(1).astype(int) - lengths
  return dict(
    sampler=rows['gap'],
    batch=np.max([np.abs(by_size[0] - other).max(1) for other in by_size[1:]], axis=0),
    loss=max(said, float(np.abs(by_size[0] - rows['old_logp'] * rows['weights']).max())),
    tokens=int(lengths.sum()),
    lengths=(lengths.min(), lengths.max()),
    prompts=(before.min(), before.max()),
  )


def main() -> None:
  """Prints the three gaps."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--run', help='a run to write with; default: random weights')
  parser.add_argument('--answers', type=int, default=1024, help='a multiple of 64')
  given = parser.parse_args()
  print(f'load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores')
  made = trained(given.run) if given.run else tiny()
  found = measure(*made, given.answers)
  (a, b), (c, d) = found['lengths'], found['prompts']
  print(
    f'{given.answers} answers of {a} to {b} tokens after prompts of {c} to {d}: {found["tokens"]} tokens'
  )
  for name in ('sampler', 'batch'):
    gaps = found[name]
    print(f'{name:8} largest {gaps.max():.2g} nats, median of an answer {np.median(gaps):.2g}')
  print(f'{"loss":8} largest {found["loss"]:.2g} nats')
  sys.exit(found['loss'] != 0)


if __name__ == '__main__':
  main()
