"""Public preference formats, as their publishers write them, and what is wrong in them."""

import itertools
import json

import pytest

from llm_jax.data import preferences, records
from llm_jax.data.records import Record
from tests.data.conftest import says


def record(**fields):
  return Record(fields, 'f.jsonl:3')


def said(messages):
  return ' / '.join(f'{m["role"][0]}:{m["content"]}' for m in messages)


def test_hh_rlhf_is_cut_at_the_last_answer():
  """Against the way DPO's own code cuts the texts: after the last '\n\nAssistant:'."""
  path, mark = records.bundled('hh_harmless/harmless-base_test.jsonl.gz'), '\n\nAssistant:'
  found, apart = 0, 0
  for one in records.read(path):
    chosen, rejected = (one.fields[key].rpartition(mark) for key in ('chosen', 'rejected'))
    if not chosen[2].strip() or not rejected[2].strip():
      says("by 'assistant', is empty in", lambda one=one: preferences.hh_rlhf(one))
      continue
    (pair,) = preferences.hh_rlhf(one)
    found += 1
    for key, answer in (('chosen', pair.chosen), ('rejected', pair.rejected)):
      text = one.fields[key].replace('\n\nHuman:', '').replace(mark, '')
      assert ''.join(''.join(m['content'] for m in pair.prompt + answer).split()) == ''.join(
        text.split()
      )
    if chosen[0] != rejected[0]:  # the dialogues part before their last answers
      apart += 1
      continue
    turns = one.fields['chosen'].count('\n\nHuman:') + one.fields['chosen'].count(mark)
    assert len(pair.prompt) <= turns - 1 and pair.prompt[-1]['role'] == 'user'
    assert said(pair.chosen) == f'a:{chosen[2].strip()}'
    assert said(pair.rejected) == f'a:{rejected[2].strip()}'
  assert (found, apart) == (2308, 5)


def test_hh_rlhf_whose_histories_differ():
  two = lambda a, b: f'\n\nHuman: q\n\nAssistant: {a}\n\nHuman: r\n\nAssistant: {b}'
  (pair,) = preferences.hh_rlhf(record(chosen=two('x', 'good'), rejected=two('y', 'bad')))
  assert said(pair.prompt) == 'u:q'
  assert said(pair.chosen) == 'a:x / u:r / a:good' and said(pair.rejected) == 'a:y / u:r / a:bad'
  for wrong, message in (
    (dict(chosen='Human: q', rejected='x'), "'chosen' does not begin with"),
    (dict(chosen=two('x', 'a')), "no key 'rejected' (it has: chosen)"),
    (dict(chosen=two('x', 'a'), rejected=two('x', 'a')), 'are the same text'),
    (dict(chosen=two('x', 'a'), rejected='\n\nHuman: z\n\nAssistant: a'), 'different prompts'),
    (
      dict(chosen=two('x', 'a'), rejected=two('x', 'a') + '\n\nHuman: s'),
      "'rejected' does not end",
    ),
  ):
    says(('f.jsonl:3', message), lambda wrong=wrong: preferences.hh_rlhf(record(**wrong)))


def test_shp():
  fields = dict(history='q', human_ref_A='a', human_ref_B='b', score_ratio=2.5, post_id='p')
  fields |= dict(c_root_id_A='1', c_root_id_B='2')
  for label, better in ((1, 'a:a'), (0, 'a:b')):
    (pair,) = preferences.shp(record(labels=label, **fields))
    assert said(pair.prompt) == 'u:q' and said(pair.chosen) == better
    assert pair.margin == 2.5 and pair.id == 'p/1/2'
  says(
    "'labels' holds str, not a whole number", lambda: preferences.shp(record(labels='A', **fields))
  )


@pytest.mark.parametrize('whole', [True, False])
def test_chosen_and_rejected_lists(whole):
  """The binarised UltraFeedback repeats the prompt in both lists, others do not."""
  ask, answer = dict(role='user', content='q'), lambda c: dict(role='assistant', content=c)
  lists = {k: [ask] * whole + [answer(k)] for k in ('chosen', 'rejected')}
  (pair,) = preferences.chosen_rejected(
    record(prompt='q', prompt_id='7', score_chosen=8.5, score_rejected=6.0, **lists)
  )
  assert said(pair.prompt) == 'u:q' and said(pair.chosen) == 'a:chosen'
  assert (pair.margin, pair.id) == (2.5, '7')


def test_chosen_and_rejected_texts():
  (pair,) = preferences.chosen_rejected(record(prompt='q', chosen='a', rejected='b'))
  assert (said(pair.prompt), said(pair.rejected), pair.margin, pair.id) == (
    'u:q',
    'a:b',
    None,
    None,
  )
  says("no key 'prompt'", lambda: preferences.chosen_rejected(record(chosen='a', rejected='b')))
  empty = record(prompt='q', chosen='a', rejected=' ')
  says("'rejected' is empty", lambda: preferences.chosen_rejected(empty))


def test_scores_become_rankings():
  answers = [dict(text=t, pm_score=s) for t, s in (('b', 1), ('a', 7), ('c', 0), ('d', 0))]
  (one,) = preferences.stack_exchange(record(qid=5, question='q', answers=answers))
  assert [said(a) for a in one.answers] == ['a:a', 'a:b', 'a:c', 'a:d']
  assert one.scores == (7, 1, 0, 0) and one.id == '5'
  made = preferences.pairs_of(one)
  want = [('a', 'b', 6), ('a', 'c', 7), ('a', 'd', 7), ('b', 'c', 1), ('b', 'd', 1)]
  assert [(p.chosen[0]['content'], p.rejected[0]['content'], p.margin) for p in made] == want
  assert len({p.id for p in made}) == 5
  scored = [dict(response=t, overall_score=s) for t, s in (('b', 6.5), ('a', 7.0))]
  (one,) = preferences.ultrafeedback(record(instruction='q', completions=scored))
  assert one.scores == (7.0, 6.5)
  same = [dict(response=t, overall_score=7) for t in 'ab']
  assert preferences.ultrafeedback(record(instruction='q', completions=same)) == []


def test_oasst_ranks_the_answers_to_every_message():
  reply = lambda text, rank, *below: dict(
    role='assistant', text=text, rank=rank, replies=list(below)
  )
  follow = dict(role='prompter', text='more', replies=[reply('y', 1), reply('x', 0)])
  gone = dict(role='assistant', text='gone', rank=5, deleted=True, replies=[])
  root = dict(role='prompter', text='q', message_id='m')
  tree = root | dict(replies=[reply('b', 1), reply('a', 0, follow), reply('c', 2), gone])
  first, second = preferences.oasst(record(message_tree_id='t', prompt=tree))
  assert [said(a) for a in first.answers] == ['a:a', 'a:b', 'a:c'] and first.id == 'm'
  assert said(second.prompt) == 'u:q / a:a / u:more' and said(second.answers[0]) == 'a:x'
  chosen = [(p.chosen[0]['content'], p.rejected[0]['content']) for p in preferences.pairs_of(first)]
  assert chosen == list(itertools.combinations('abc', 2)) and first.scores == ()


def test_politeness_pairs_are_bundled():
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  found, same = [], 0
  for one in records.read(path):
    if one.fields['chosen'] == one.fields['rejected']:
      same += 1
      says('are the same text', lambda one=one: preferences.alpaca(one))
    else:
      found += preferences.alpaca(one)
  assert (len(found), same) == (1094, 6)
  first = 'Evaluate the following phrase by transforming it into the spelling given.'
  assert found[0].prompt[0]['content'] == f'{first}\n\nfreind --> friend'


def test_prm800k_follows_the_chosen_steps():
  option = lambda text, rating: dict(text=text, rating=rating)
  steps = [
    dict(completions=[option('s1', 1)], chosen_completion=0, human_completion=None),
    dict(completions=[option('no', -1), option('s2', 0)], chosen_completion=1),
    dict(completions=[option('no', -1)], human_completion=dict(text='s3', rating=None)),
    dict(completions=[option('s4', -1)], chosen_completion=None, human_completion=None),
    dict(completions=[option('never', 1)], chosen_completion=0),
  ]
  steps[2]['human_completion'].pop('rating')
  question = dict(problem='p', ground_truth_answer='4')
  (one,) = preferences.prm800k(record(question=question, label=dict(steps=steps)))
  assert one.steps == ['s1', 's2', 's3', 's4'] and one.ratings == [1, 0, 1, -1]
  assert said(one.prompt) == 'u:p' and one.told == dict(answer='4')
  says("no key 'label'", lambda: preferences.prm800k(record(question=question)))


def test_two_comparisons_with_one_id_are_refused(tmp_path):
  lines = [
    dict(prompt='q', chosen='a', rejected=r, id=i) for r, i in (('b', 1), ('c', 2), ('d', 1))
  ]
  path = tmp_path / 'pairs.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  found = [p for r in records.read(str(path)) for p in preferences.chosen_rejected(r)]
  says(
    ('pairs.jsonl:3', "the id '1' is that of", 'pairs.jsonl:1'),
    lambda: preferences.check_unique(found),
  )
  preferences.check_unique(found[:2])
