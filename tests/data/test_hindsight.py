"""Chains of hindsight: both answers are learnt, each after what it is called, and nothing else is."""

from llm_jax.data import hindsight, preferences, templates, vocab
from llm_jax.data.records import Record

TALK = '\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Salt?\n\nAssistant:'
RECORD = Record(dict(chosen=f'{TALK} Here you are.', rejected=f'{TALK} No!'), 'hh.jsonl:3')


def test_both_answers_follow_what_they_are_called():
  (one,) = hindsight.chain(RECORD)
  said = [(m['role'], m['content']) for m in one.messages]
  assert said == [
    ('user', 'Hello.'),
    ('assistant', 'Hi.'),
    ('user', 'Salt?\n\nA helpful answer:'),
    ('assistant', 'Here you are.'),
    ('user', 'An unhelpful answer:'),
    ('assistant', 'No!'),
  ]
  assert one.where == 'hh.jsonl:3'


def test_the_loss_is_on_the_answers_alone():
  (one,) = hindsight.chain(RECORD)
  words = vocab.bytes_(extra_ids=0, modes=())
  encoded = templates.encode(words, one.messages[2:], templates.named('chatml'))
  learnt = [i for i, w in zip(encoded.ids.tolist(), encoded.weights, strict=True) if w]
  text = words.decode(learnt)
  assert 'Here you are.' in text and 'No!' in text
  assert 'answer' not in text and 'Salt' not in text


def test_a_ranking_gives_a_chain_for_each_of_its_pairs():
  answers = [dict(text=f'{s}', pm_score=s) for s in (3, 2, 1)]
  record = Record(dict(qid=1, question='q', answers=answers), 'se.jsonl:1')
  found = hindsight.chain(record, format=preferences.stack_exchange, good='good:', bad='bad:')
  assert [(c.messages[1]['content'], c.messages[3]['content']) for c in found] == [
    ('3', '2'),
    ('3', '1'),
    ('2', '1'),
  ]


def test_the_bundled_pairs_become_sets():
  made = hindsight.politeness(template='chatml')
  assert made.size > 900
