"""Data from rewards: against brute force, on a toy policy whose rewards are known, and with a small real model."""

import collections
import difflib
import functools
import json

import jax
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.rl import edits, feedback, toy
from tests.data.test_curate import longest
from tests.decode import kinds

KEY = jax.random.key(0)


def scripted(prompts, key):
  """Each prompt's answers are its own letters with a number, counted through."""
  seen = collections.Counter()
  made = []
  for prompt in prompts:
    made.append(f'{prompt}{seen[prompt]}')
    seen[prompt] += 1
  return made


def digits(prompts, answers, told):
  """The number at the end, times the record's sign."""
  return np.array([int(a[-1]) * t['sign'] for a, t in zip(answers, told)], np.float32)


def found(n=4):
  told = [dict(sign=1), dict(sign=-1)]
  return feedback.sample(scripted, digits, ['a', 'b'], told, KEY, n=n)


def test_samples_keep_prompts_answers_and_rewards_together():
  one, two = found()
  assert one.answers == ['a0', 'a1', 'a2', 'a3'] and one.scores.tolist() == [0, 1, 2, 3]
  assert two.answers == ['b0', 'b1', 'b2', 'b3'] and two.scores.tolist() == [0, -1, -2, -3]
  with pytest.raises(UserError, match='1 answers: give one'):
    feedback.sample(lambda p, k: ['x'], digits, ['a', 'b'], [{}, {}], KEY, n=1)
  with pytest.raises(UserError, match="reward gives nan for the prompt 'a'"):
    bad = lambda prompts, answers, told: np.full(len(answers), np.nan)
    feedback.sample(scripted, bad, ['a'], [{}], KEY, n=2)
  with pytest.raises(UserError, match='need as many records'):
    feedback.sample(scripted, digits, ['a'], [], KEY)


def test_what_is_kept():
  outputs = lambda records: [r['output'] for r in records]
  assert outputs(feedback.best_of_each(found())) == ['a3', 'b0']
  assert outputs(feedback.top(found())) == ['a3', 'a2']  # a quarter of all, whoever asked
  assert outputs(feedback.top(found(), share=0.5)) == ['a3', 'a2', 'a1', 'a0']
  assert outputs(feedback.right(found(), least=2)) == ['a2', 'a3']
  assert feedback.right([found()[0]._replace(answers=['x'] * 4)], least=0) == [
    dict(instruction='a', output='x', reward=0.0)
  ]
  made = feedback.pairs(found())
  assert made[1] == dict(
    prompt='b', chosen='b0', rejected='b3', score_chosen=0.0, score_rejected=-3.0
  )
  assert feedback.pairs([found()[0]._replace(scores=np.zeros(4))]) == []


@pytest.mark.parametrize('n', [2, 4, 16])
def test_kl_of_the_best_of_n_by_enumeration(n):
  """Of V outcomes with chances p, in the order of their rewards, the best of n is outcome i with chance F_i^n -
  F_(i-1)^n: the formula is an upper bound, and the limit of many equally likely outcomes."""
  rng = np.random.default_rng(n)
  for size, alpha in ((3, 1.0), (10, 0.3), (100_000, None)):
    p = np.full(size, 1 / size) if alpha is None else rng.dirichlet([alpha] * size)
    total = np.minimum(np.concatenate([[0], np.cumsum(p)]), 1)
    best = np.diff(total**n)
    there = best > 0
    kl = (best[there] * np.log(best[there] / p[there])).sum()
    assert kl <= toy.best_of_n_kl(n) + 1e-9
    if alpha is None:
      assert abs(kl - toy.best_of_n_kl(n)) < 1e-3
  assert toy.best_of_n_kl(1) == 0


# A policy over 8 answers to each of 3 prompts, tuned by moving its probabilities to what it is shown.
SIZE = 8


def policy_writes(policy):
  def write(prompts, key):
    draws = np.asarray(jax.random.uniform(key, (len(prompts),)))
    pick = lambda p, u: int(np.searchsorted(np.cumsum(policy[p]), u).clip(max=SIZE - 1))
    return [str(pick(p, u)) for p, u in zip(prompts, draws)]

  return write


def policy_learns(policy, records, rate=0.5):
  policy = dict(policy)
  for prompt in policy:
    shown = [int(r['output']) for r in records if r['instruction'] == prompt]
    if shown:
      new = np.bincount(shown, minlength=SIZE) / len(shown)
      policy[prompt] = (1 - rate) * policy[prompt] + rate * new
  return policy


def gold(prompts, answers, told):
  return np.array([-abs(int(a) - t['right']) for a, t in zip(answers, told)], np.float32)


@pytest.mark.parametrize(
  'settings',
  [
    dict(),
    dict(keep=feedback.top),
    dict(keep=functools.partial(feedback.right, least=0.0), remember=feedback.all_rounds),
    dict(remember=feedback.best_of_all),
  ],
  ids=['raft', 'raft_top', 'expert_iteration', 'llama2'],
)
def test_iterations_improve_on_every_seed(settings):
  """The expected gold reward, computed from the policy itself, rises on 10 of 10 seeds."""
  prompts, told = ['a', 'b', 'c'], [dict(right=0), dict(right=3), dict(right=7)]
  expected = lambda policy: np.mean(
    [-(policy[p] * abs(np.arange(SIZE) - t['right'])).sum() for p, t in zip(prompts, told)]
  )
  for seed in range(10):
    start = {p: np.full(SIZE, 1 / SIZE) for p in prompts}
    end, means = feedback.iterate(
      start,
      policy_writes,
      policy_learns,
      gold,
      prompts,
      told,
      jax.random.key(seed),
      rounds=6,
      n=8,
      **settings,
    )
    assert len(means) == 6 and expected(end) > expected(start) + 0.8, (seed, means)


def test_old_samples_are_kept():
  one = [
    dict(instruction='a', output='x', reward=1.0),
    dict(instruction='b', output='y', reward=0.0),
  ]
  two = [
    dict(instruction='a', output='z', reward=0.5),
    dict(instruction='b', output='w', reward=2.0),
  ]
  outputs = lambda records: [r['output'] for r in records]
  assert outputs(feedback.newest([one, two])) == ['z', 'w']
  assert outputs(feedback.all_rounds([one, two, one])) == ['x', 'y', 'z', 'w']
  assert outputs(feedback.best_of_all([one, two])) == ['x', 'w']


def test_quantiles_are_those_of_numpy():
  scores = np.random.default_rng(0).normal(size=103)
  parts = feedback.quantiles(scores, 5)
  edges = np.quantile(scores, [0.2, 0.4, 0.6, 0.8])
  assert (parts == np.searchsorted(edges, scores)).mean() > 0.98  # but for samples on the edges
  assert np.ptp(np.bincount(parts)) <= 1 and (np.diff(parts[np.argsort(scores)]) >= 0).all()
  made = feedback.quark(found(), k=2)
  assert made[3] == dict(instruction='a', output='a3', reward=3.0, quantile=1)
  assert collections.Counter(r['quantile'] for r in made) == {0: 4, 1: 4}
  assert [r['quantile'] for r in made if r['instruction'] == 'b'] == [1, 0, 0, 0]


def test_answers_are_relabelled_by_what_they_did():
  describe = lambda score, told: f'Say {int(score) * told["sign"]}: '
  made = feedback.relabel(found(2), describe)
  assert [r['instruction'] for r in made] == ['Say 0: a', 'Say 1: a', 'Say 0: b', 'Say 1: b']


def test_refinements_use_the_comment_and_the_best_is_kept():
  asked = []

  def write(prompts, key):
    asked.extend(prompts)
    return scripted([p[-2:] for p in prompts], key)

  def reward(prompts, answers, told):
    assert set(prompts) == {'p1', 'p2'}  # the reward sees the task, not the request to improve
    return digits(prompts, answers, told)

  template = '{prompt}|{answer}|{comment}|>'
  records = feedback.refine(
    write,
    reward,
    ['p1', 'p2'],
    ['x', 'y'],
    ['longer', 'shorter'],
    [dict(sign=1), dict(sign=-1)],
    KEY,
    n=3,
    template=template,
  )
  assert asked[::3] == ['p1|x|longer|>', 'p2|y|shorter|>'] and len(asked) == 6
  assert [(r['instruction'], r['output']) for r in records] == [('p1', '|>2'), ('p2', '|>3')]


def test_records_are_written_as_lines(tmp_path):
  path = tmp_path / 'made.jsonl'
  feedback.save(feedback.best_of_each(found()), str(path))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == feedback.best_of_each(found()) and [p.name for p in tmp_path.iterdir()] == [
    'made.jsonl'
  ]


def test_best_of_n_of_a_real_model():
  """The answers are those of generation, and the kept ones maximise the reward among them."""
  words = vocab_lib.Bytes(extra_ids=0, modes=())
  model, params = kinds.make('causal', vocab=words.size)
  write = feedback.of_model(model, params, words, max_new=5, temperature=1.0)
  count = lambda prompts, answers, told: np.array([len(set(a)) for a in answers], np.float32)
  made = feedback.sample(write, count, ['one', 'two'], [{}, {}], KEY, n=4)
  again = write(['one'] * 4 + ['two'] * 4, KEY)
  assert made[0].answers + made[1].answers == again and len(set(again)) > 1
  for one, kept in zip(made, feedback.best_of_each(made)):
    assert kept['reward'] == max(len(set(a)) for a in one.answers) == len(set(kept['output']))


def test_credit_is_given_to_what_was_edited():
  new, old = edits.credit([1, 2, 3, 4, 9], [1, 5, 3, 4, 6, 9])  # 2 -> 5, 6 put in
  assert new.tolist() == [0, 1, 0, 0, 1, 0] and old.tolist() == [0, 0.5, 0, 0, 0]
  new, old = edits.credit([1, 2], [1], added=2.0, removed=0.25, kept=0.1)
  assert new.tolist() == [np.float32(0.1)] and old.tolist() == [0, 0.25]
  rng = np.random.default_rng(0)
  for _ in range(
    200
  ):  # what is kept of both is the same text, no longer than the longest common one
    before, after = (rng.integers(0, 4, rng.integers(0, 9)).tolist() for _ in range(2))
    new, old = edits.credit(before, after)
    same = [t for t, c in zip(after, new) if c == 0], [t for t, c in zip(before, old) if c == 0]
    assert same[0] == same[1] and len(same[0]) <= longest(tuple(before), tuple(after))
    matches = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    assert len(same[0]) == sum(m.size for m in matches)


class Pairs:
  batch, length, vocab = 2, 6, None

  def __init__(self):
    self.given = {}
    for name, rows in (('chosen', [[7, 1, 5, 3], [2, 2]]), ('rejected', [[7, 1, 2, 3], [2, 9]])):
      targets, weights = np.zeros((2, 6), np.int32), np.zeros((2, 6), np.float32)
      for i, row in enumerate(rows):
        targets[i, : len(row)] = row
        weights[i, 1 : len(row)] = 1  # the first token is the prompt
      self.given |= {f'{name}/targets': targets, f'{name}/weights': weights}

  def __call__(self, state=None):
    return dict(self.given)

  def once(self):
    return iter([dict(self.given)])


def test_a_source_of_pairs_gets_credits():
  source = edits.with_credit(None, source=lambda model: Pairs())
  batch = source()
  assert batch['chosen/credit'].tolist() == [[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
  assert batch['rejected/credit'].tolist() == [[0, 0, 0.5, 0, 0, 0], [0, 0.5, 0, 0, 0, 0]]
  assert source.batch == 2 and source.length == 6
  (one,) = source.once()
  assert all((one[k] == batch[k]).all() for k in batch)
