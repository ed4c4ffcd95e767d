"""Speculative decoding beside plain decoding: tokens per step and wall time, taken in turn, one row, greedy.

python -m benchmarks.speculative                # about three minutes; make smollm2 first

copy   SmolLM2 is asked to say a paragraph again: what the prompt says is what comes
free   it is asked for a story: nothing to copy
draft  `ngram` looks the text up, `exit` runs the first layers of the model itself (which was not trained for that)

tokens per step: 1 is plain decoding, gamma + 1 the most. times as fast: seconds of plain decoding over seconds, the
best of `--rounds` each. Both must write the same tokens, or it says so.
"""

import argparse
import functools
import os
import time

COPY = """Repeat this text word for word:

The river rises in the hills above the town and runs past the old mill, where three women sell bread and honey on \
Sundays. Beyond the bridge it turns east, and the road to the coast follows it through fields of barley. In winter \
the road is closed."""
FREE = 'Write a short story about a lighthouse.'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', default='runs/smollm2', help='the converted run')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--new', type=int, default=64, help='tokens at most')
  parser.add_argument('--gamma', type=int, nargs='+', default=[4, 10])
  parser.add_argument('--layers', type=int, default=10, help='of the early exit')
  given = parser.parse_args()
  import jax
  import jax.numpy as jnp
  import numpy as np

  from llm_jax.cli import generate as command
  from llm_jax.data import chat
  from llm_jax.decode import drafts, generate, speculative

  print(f'load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores')
  model, params, words = command.load(given.workdir)
  params = jax.tree.map(jnp.asarray, params)
  told = dict(max_new=given.new, temperature=0.0, eos=words.turn, start=None)
  ways = {('plain', 0): generate.generate}
  tried = [('ngram', gamma, drafts.by_ngram()) for gamma in given.gamma]
  for name, gamma, draft in (*tried, ('exit', 2, drafts.by_early_exit(given.layers))):
    ways[name, gamma] = functools.partial(speculative.generate, draft=draft, gamma=gamma)
  for task, text in (('copy', COPY), ('free', FREE)):
    ids = words.encode(chat.render(words, [dict(role='user', content=text)]))
    seconds, out = {}, {}
    for _ in range(given.rounds + 1):  # the first compiles
      for way, run in ways.items():
        start = time.perf_counter()
        found = run(model, params, np.array([ids]), [len(ids)], jax.random.key(0), **told)
        out[way] = jax.block_until_ready(found)
        seconds.setdefault(way, []).append(time.perf_counter() - start)
    best = {way: min(taken[1:]) for way, taken in seconds.items()}
    plain = out['plain', 0]
    n = int(plain.lengths[0])
    print(f'{task}: prompt {len(ids)}, {n} new, plain {n / best["plain", 0]:.1f} tokens/s')
    for name, gamma in list(ways)[1:]:
      found = out[name, gamma]
      same = '' if found.tokens.tolist() == plain.tokens.tolist() else ', OTHER TOKENS'
      print(
        f'  {name:5} gamma {gamma:2}: {found.per_step()[0]:5.2f} tokens per step, '
        f'{best["plain", 0] / best[name, gamma]:.2f} times as fast{same}',
        flush=True,
      )


if __name__ == '__main__':
  main()
