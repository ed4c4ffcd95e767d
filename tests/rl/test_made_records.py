"""What the makers of data write is what the readers of data read."""

import jax
import numpy as np

from llm_jax.data import formats, preferences, records, synthesize
from llm_jax.rl import constitutional, feedback

KEY = jax.random.key(0)


def read(path, made, format):
  feedback.save(made, str(path))
  return [one for record in records.read(str(path)) for one in format(record)]


def test_readers_read_what_makers_write(tmp_path):
  found = [feedback.Sampled('Say a', ['b', 'a'], np.array([0, 1], np.float32), {})]
  says = lambda one: [(m['role'], m['content']) for m in one.messages]
  for made in (feedback.best_of_each(found), feedback.right(found)):
    (one,) = read(tmp_path / 'best.jsonl', made, formats.alpaca)
    assert says(one) == [('user', 'Say a'), ('assistant', 'a')]
  (pair,) = read(tmp_path / 'pairs.jsonl', feedback.pairs(found), preferences.chosen_rejected)
  text = lambda messages: [m['content'] for m in messages]
  assert (
    text(pair.prompt) == ['Say a'] and text(pair.chosen) == ['a'] and text(pair.rejected) == ['b']
  )
  assert pair.margin == 1
  likes = lambda prompts, first, second, principles: np.array([0.2])
  made = constitutional.label(likes, ['Say a'], ['b'], ['a'], KEY)
  assert read(tmp_path / 'labels.jsonl', made, preferences.chosen_rejected)[0].chosen == pair.chosen
  chain = constitutional.Chain('Say a', ['b', 'a'], ['c'], [])
  (one,) = read(tmp_path / 'chain.jsonl', constitutional.examples([chain]), formats.alpaca)
  assert says(one) == [('user', 'Say a'), ('assistant', 'a')]


def test_the_bundled_seeds_are_175():
  seeds = synthesize.read_seeds(records.bundled('self_instruct/seed_tasks.jsonl.gz'))
  assert len(seeds) == 175 and sum(task.classification for task in seeds) == 26
