"""The parts of experiments/instruction_mixtures: right answers, held-out instances, the four ways, the intervals."""

import json
import re

import jax
import numpy as np
import pytest

from experiments.instruction_mixtures import data, report, run
from llm_jax.core.errors import UserError
from llm_jax.data import templates


def solve(asked):
  """The answer, from the sentence alone."""
  words = re.findall(r'\w+', asked)
  numbers = [int(w) for w in words if w.isdigit()]
  both = data.OPPOSITES | {b: a for a, b in data.OPPOSITES.items()}
  if re.search(r'\+|^Add|^Sum', asked):
    return str(sum(numbers))
  if numbers:
    return str(max(numbers))
  if re.search('opposite|antonym|^Not ', asked):
    return next(both[w] for w in reversed(words) if w in both)
  named = [w for w in words if w in data.WORDS]
  if 'letter' in asked and 'Capital' not in asked:
    return named[0][0]
  if re.search('capitals|Shout|Capital', asked):
    return named[0].upper()
  return named[0] if len(named) == 1 or re.search('first|First', asked) else named[-1]


def _asked(one):
  return one.messages[0]['content']


def test_tasks_have_the_right_answer_and_what_is_held_out_is_never_trained():
  train, held = (data.tasks(n, 3, heldout=h) for n, h in ((300, False), (96, True)))
  for one in [*train, *held]:
    assert solve(_asked(one)) == one.messages[1]['content'], one
  given = lambda one: (
    one.told['kind'],
    *sorted(set(re.findall(r'\w+', _asked(one))) & {*data.WORDS}),
  )
  seen = {given(one) for one in train if one.told['kind'] in ('copy', 'letter', 'capitals')}
  assert seen and not seen & {given(one) for one in held}
  assert {one.told['kind'] for one in held} == set(data.TASKS)
  two = data.tasks(50, 0, heldout=False, kinds=('copy', 'larger'))
  assert {one.told['kind'] for one in two} == {'copy', 'larger'}
  with pytest.raises(UserError, match='fewer than 300'):
    data.tasks(300, 0, heldout=False, kinds=('sum',))


def talk(*pairs):
  return [data.formats.task(asked, '', said, f'x:{i}') for i, (asked, said) in enumerate(pairs)]


def test_the_four_ways():
  found = talk(('Name a fruit', 'Plum.'), ('Say hi', 'Hi.'), ('Greet', 'Hello.'))
  texts = [(one.messages[0]['content'], one.messages[1]['content']) for one in data.complex_(found)]
  assert texts == [
    ('Do both.\n1. Name a fruit\n2. Say hi', '1. Plum.\n2. Hi.'),
    ('Say hi\nWrite the answer in capital letters.', 'HI.'),
    ('Greet\nEnd with the word done.', 'Hello. Done.'),
  ]
  short = lambda one: len(_asked(one)) < 25
  assert data.complex_(found, short) == found
  single = data.complex_(found, lambda one: 'Do both' not in _asked(one))
  assert single[0].messages[1]['content'] == 'PLUM.'
  alike = talk(
    *[(f'Add two and {w}', '?') for w in ('two', 'three', 'four')], ('Sing loudly', 'La')
  )
  assert alike[3] in data.diverse(alike, 2)
  nats = [3.0, 0.1, 9.0, 2.0]
  assert data.moderate(alike, nats, 2) == [alike[0], alike[3]]
  order = [one for part in data.progressive(alike, nats, 2) for one in part]
  assert order == [alike[1], alike[3], alike[0], alike[2]]


@pytest.fixture(scope='module')
def base():
  return run.load(run.os.path.join(run.REAL, 'stories260K.bin'))


def test_difficulty_is_the_loss_of_the_answer_alone(base):
  """Against the logits of the whole text, in float64."""
  found = talk(('Who is Lily?', 'Lily is a girl.'), ('Say it', 'Zebra quartz'))
  nats = run.difficulty(base, found, batch=4)
  assert nats[0] < nats[1]
  for one, told in zip(found, nats, strict=True):
    ids, weights = templates.encode(base.words, one.messages, templates.SURVEY)
    x = base.model.hidden(base.params, dict(inputs=ids[None, :-1])).x
    logits = np.asarray(base.model.logits(base.params, x), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = -logp[np.arange(len(ids) - 1), ids[1:]]
    assert abs((picked * weights[1:]).sum() / weights.sum() - told) < 1e-4


@pytest.mark.slow
def test_stages_come_in_order_and_a_run_leaves_the_base_as_it_was(base, tmp_path):
  easy, hard = talk(('A?', 'one one one')), talk(('B?', 'two two two'))
  made = run.source(base, [[easy], [hard]], str(tmp_path / 'a'), 4, 0)
  texts = [base.words.decode(made()['targets'][0]) for _ in range(4)]
  made.close()
  assert all('one' in t and 'two' not in t for t in texts[:2])
  assert all('two' in t and 'one' not in t for t in texts[2:])

  before = [np.array(x) for x in jax.tree.leaves(base.params)]
  tuned = run.tuner(base, 8)(run.source(base, [[easy]], str(tmp_path / 'b'), 8, 0), 0)
  for x, y in zip(before, jax.tree.leaves(base.params), strict=True):
    np.testing.assert_array_equal(x, y)
  after = base._replace(params=tuned)
  assert run.difficulty(after, easy, batch=4)[0] < run.difficulty(base, easy, batch=4)[0] - 1


def test_the_sets_of_a_seed(base):
  pool = talk(*[(f'Say {w}', w) for w in data.WORDS])
  pools = run.Pools(pool, pool, {}, np.arange(len(pool), dtype=float))
  made, same, other = (run.arms(base, pools, 12, seed) for seed in (0, 0, 1))
  assert made == same and made['synthetic'] != other['synthetic']
  sizes = {name: [[len(one) for one in stage] for stage in sets] for name, sets in made.items()}
  assert sizes['all three'] == [[12, 12, 12]] and sizes['scaling'] == [[len(pool)]]
  assert sum(n for (n,) in sizes['progressive']) == len(pool) and len(sizes['progressive']) == 3
  alone = {'task', 'chat', 'synthetic', 'complexity', 'diversity', 'difficulty'}
  assert all(sizes[name] == [[12]] for name in alone)


# --- what came out ------------------------------------------------------------------------------------


def test_intervals_are_student_s():
  """Three values: t(0.975, 2) = 4.302653 in any table."""
  mean, half = report.interval([1.0, 2.0, 4.0])
  assert abs(mean - 7 / 3) < 1e-12 and abs(half - 4.302653 * np.sqrt(7 / 3 / 3)) < 1e-5
  assert report.interval([1.0]) == (1.0, None)


def test_differences_are_taken_seed_by_seed(tmp_path):
  one = lambda x, **more: dict(chat=x, task=x, synthetic=x, people=x, exact=x / 10) | more
  found = {
    'base': [one(5.0)],
    'task': [one(x, exact=0.9, records=3, mtld=50.0) for x in (1.0, 2.0, 3.0)],
    'synthetic': [one(x + 0.5, exact=0.1, records=3, mtld=50.0) for x in (1.0, 2.0, 3.0)],
  }
  summary = report.summarise(found, dict(seeds=3))
  told = {d['finding']: d for d in summary['differences']}
  assert abs(told['task data against synthetic, on task']['mean'] + 0.5) < 1e-9
  chat = told[
    'task data against synthetic, on chat'
  ]  # the same in every seed, though the seeds differ by far more
  assert abs(chat['mean'] + 0.5) < 1e-9 and chat['half'] < 1e-9 and chat['sure']
  report.write(summary, str(tmp_path))
  assert json.loads((tmp_path / 'results.json').read_text()) == summary
  rows = (tmp_path / 'results.md').read_text().splitlines()
  assert rows[3] == '| task | 3 | 50 | ' + '2.000 ± 2.484 | ' * 4 + '90.0 ± 0.0 |'
  assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'
