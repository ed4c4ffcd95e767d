"""Self-Instruct, Evol-Instruct, back-translation and self-chat with scripted models, and once with a small real one."""

import collections
import gzip
import json
import re

import jax
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import curate, evolve, synthesize
from llm_jax.data import vocab as vocab_lib
from llm_jax.data.synthesize import Task
from llm_jax.decode import generate
from tests.decode import kinds

KEY = jax.random.key(1)
THINGS = 'ant bear crane duck eel frog goat hawk ibex jay kite lynx'.split()
SEEDS = [
  Task(f'{verb} the {thing} in one {place}', i % 3 == 0, ((f'in {i}', f'out {i}'),))
  for i, (verb, thing, place) in enumerate(
    zip(
      ['Name', 'Sort', 'Count', 'Paint', 'Weigh', 'Feed'] * 2,
      THINGS,
      ['line', 'word', 'page', 'row'] * 3,
    )
  )
]


class Model:
  """Writes a list with new and old instructions, says of those with 'label' that they are classifications, and gives
  instances of which some contradict each other."""

  def __init__(self):
    self.asked = collections.defaultdict(list)
    self.count = 0

  def __call__(self, prompts, key):
    return [self.answer(p) for p in prompts]

  def answer(self, prompt):
    if prompt.startswith(synthesize.INSTRUCTIONS):
      self.asked['list'].append(prompt)
      self.count += 1
      n = self.count
      old = re.search(r'^1\. (.*)$', prompt, re.M)[1]
      return (
        f' Compute q{n} w{n} e{n} r{n}\n10. Label z{n} u{n} i{n} o{n}\n11. {old}\n12. Draw a p{n} s{n} d{n} picture\n'
        f'13. too short\n14. Cut off in the mid'
      )
    task = prompt.rpartition('Task: ')[2]
    if prompt.endswith('Labels:'):
      self.asked['kind'].append(prompt)
      return ' Yes\n' if task.startswith('Label') else ' No'
    self.asked['instances'].append(prompt)
    if prompt.endswith('Label:'):
      assert task.startswith('Label') and prompt.startswith(synthesize.OUTPUT_FIRST)
      said = ' good\nInput: fine\nLabel: bad\nInput: poor\nLabel: good\nInput: fine\n'
      return said + '\nTask: another\nLabel: x\nInput: y'
    assert prompt.startswith(synthesize.INPUT_FIRST)
    return ' none\nOutput: only\nInput: 1\nOutput: a\nInput: 1\nOutput: b\nInput: 2\nOutput: 2\nInput: 3\nOutput:\n'


def test_self_instruct_grows_the_pool():
  model = Model()
  made = synthesize.self_instruct(model, SEEDS, KEY, wanted=7, parallel=2)
  assert len(made.tasks) == 7 and made.rounds == 2
  texts = [t.instruction for t in made.tasks]
  assert len(set(texts)) == 7 and not any('mid' in t or 'picture' in t for t in texts)
  for task in made.tasks:
    if task.instruction.startswith('Label'):
      assert task.classification and task.instances == (('fine', 'good'), ('poor', 'bad'))
    else:
      assert not task.classification and task.instances == (('', 'only'),)
  assert made.refused == {'similar': 4, 'keyword': 4, 'length': 4, 'instance': 4 * 4 + 4 * 1}
  everything = [t.instruction for t in SEEDS] + texts
  for i, a in enumerate(everything):
    assert all(curate.rouge_l(a, b) < 0.7 for b in everything[i + 1 :])
  again = synthesize.self_instruct(Model(), SEEDS, KEY, wanted=7, parallel=2)
  assert again == made


def test_a_request_shows_six_human_and_two_own_instructions():
  model = Model()
  synthesize.self_instruct(model, SEEDS, KEY, wanted=12, parallel=2)
  human = {t.instruction for t in SEEDS}
  counts = []
  for prompt in model.asked['list']:
    lines = re.findall(r'^\d+\. (.*)$', prompt, re.M)
    assert len(lines) == len(set(lines)) == 8 and prompt.endswith('\n9.')
    counts.append(sum(line in human for line in lines))
  assert counts == [8, 8, 6, 6, 6, 6]
  assert len(set(model.asked['list'])) == 6  # another choice every time


def test_lists_are_read_to_their_last_whole_line():
  assert synthesize.numbered(' a b\n10. c\n d\n11) e', 9) == ['a b', 'c d']
  assert synthesize.numbered(' a b\n10. c\n', 9) == ['a b', 'c']
  assert synthesize.numbered(' only', 1) == ['only'] and synthesize.numbered('', 1) == []
  assert synthesize.listed(['x\ny', 'z']) == '1. x y\n2. z\n3.'


@pytest.mark.parametrize(
  'text, rule',
  [
    ('Translate this sentence to French', None),
    ('Do it now', 'length'),
    ('word ' * 151, 'length'),
    ('Describe what the picture shows here', 'keyword'),
    ('Write a program that sorts numbers', 'program'),
    ('"Translate this sentence to French"', 'beginning'),
    ('翻译 这个 句子 吧 谢谢', 'beginning'),
    ('Explain the mapping of two sets', None),
  ],
)
def test_rules_for_instructions(text, rule):
  assert synthesize.sound(text) == rule


def test_instances_that_contradict_each_other_go():
  pairs = [('a', 'b'), ('a', 'b'), ('c', 'd'), ('c', 'e'), ('f', 'f'), ('g', '')]
  assert synthesize.consistent(pairs) == [('a', 'b')]
  task = Task('do', False, (('x', 'y'), ('', 'z')))
  assert synthesize.records([task]) == [
    dict(instruction='do', input='x', output='y'),
    dict(instruction='do', input='', output='z'),
  ]


def test_seeds_are_read_and_wrong_ones_named(tmp_path):
  line = dict(
    instruction='i', instances=[dict(input='a', output='b')], is_classification=True, id='0'
  )
  for path, opened in ((tmp_path / 's.jsonl', open), (tmp_path / 's.jsonl.gz', gzip.open)):
    with opened(path, 'wt', encoding='utf-8') as f:
      f.write(json.dumps(line) + '\n')
    assert synthesize.read_seeds(str(path)) == [Task('i', True, (('a', 'b'),))]
  bad = tmp_path / 'bad.jsonl'
  bad.write_text(
    json.dumps(line) + '\n' + json.dumps(dict(line, instances=[dict(input='a')])) + '\n'
  )
  with pytest.raises(UserError, match=r"bad.jsonl:2 is no seed task: KeyError 'output'"):
    synthesize.read_seeds(str(bad))
  with pytest.raises(UserError, match='3 seeds: each request shows 8'):
    synthesize.self_instruct(Model(), SEEDS[:3], KEY)


def test_a_real_model_that_writes_noise_yields_nothing_and_ends():
  words = vocab_lib.Bytes(extra_ids=0, modes=())
  model, params = kinds.make('causal', vocab=words.size)
  write = lambda prompts, key: generate.text(model, params, words, prompts, key, max_new=8, batch=4)
  made = synthesize.self_instruct(write, SEEDS, KEY, wanted=2, parallel=2, rounds=2)
  assert made.rounds == 2 and made.tasks == []


# --- Evol-Instruct ------------------------------------------------------------------------------------


def test_instructions_evolve_or_stay():
  asked = []

  def write(prompts, key):
    asked.extend(prompts)
    if prompts[0].startswith('Rewrite'):
      olds = [p.split('Given prompt:\n')[1].split('\n')[0] for p in prompts]
      return [{'same': o, 'leak': 'Rewritten prompt: x'}.get(o, f' harder {o} ') for o in olds]
    return [
      {'harder no': 'Sorry, I cannot.', 'harder dots': '... and the'}.get(p, f'{p}!')
      for p in prompts
    ]

  told = [dict(instruction=i, output='o') for i in ('yes', 'same', 'leak', 'no', 'dots')]
  made, refused = evolve.evolve(write, told, KEY)
  assert refused == {'nothing new': 1, 'leaked': 1, 'refusal': 1, 'empty answer': 1}
  assert made[0] | dict(operator='') == dict(
    instruction='harder yes', output='harder yes!', operator='', evolved=True
  )
  assert [r['instruction'] for r in made[1:]] == ['same', 'leak', 'no', 'dots']
  assert all(r['output'] == 'o' and not r['evolved'] for r in made[1:])
  for record, prompt in zip(made, asked):
    assert evolve.OPERATORS[record['operator']] in prompt


def test_operators_are_drawn_evenly():
  n = 600
  write = lambda prompts, key: [f'x{i}' for i in range(len(prompts))]
  made, _ = evolve.evolve(write, [dict(instruction='a b', output='c')] * n, KEY)
  counts = collections.Counter(r['operator'] for r in made)
  assert set(counts) == set(evolve.OPERATORS)
  assert all(abs(c - n / 6) < 4 * (n * 5 / 36) ** 0.5 for c in counts.values())


def test_a_long_answer_may_say_sorry():
  assert evolve.eliminated('a', 'b', 'sorry ' + 'word ' * 79, lambda a, b: False) is None
  assert evolve.eliminated('a', 'b', 'sorry ' + 'word ' * 70, lambda a, b: False) == 'refusal'


def test_topics():
  write = lambda prompts, key: [' ' + p.split('about ')[1].split(',')[0] for p in prompts]
  made = evolve.topics(write, ['x'] * 50, ['sea', 'sky'], KEY)
  assert all(text == topic for text, topic in made) and {t for _, t in made} == {'sea', 'sky'}


# --- back-translation and self-chat -------------------------------------------------------------------


def test_back_translation_augments_and_curates():
  def backward(prompts, key):
    texts = [p.split('Text:\n')[1].split('\n')[0] for p in prompts]
    return ['' if t == 'nothing' else f' Write {t}. ' for t in texts]

  def rate(prompts, key):
    said = dict(
      good='Score: 3? no, Score: 5',
      fair='Score: 4',
      odd='five',
      nothing='Score: 5',
      high='score: 9',
    )
    outputs = [p.split('Answer:\n')[1].split('\n')[0] for p in prompts]
    assert all(f'Write {o}.' in p or o == 'nothing' for o, p in zip(outputs, prompts))
    return [said[o] for o in outputs]

  made, refused = evolve.back_translate(
    backward, rate, ['good', 'fair', 'odd', 'nothing', 'high'], KEY
  )
  assert made == [dict(instruction='Write good.', output='good', score=5.0)]
  assert refused == dict(score=1, unrated=2, empty=1)


def test_a_model_talks_to_itself():
  said = dict(
    good=' Why? [AI] Because.\n[Human] Sure? [AI] Yes. [Human] And',
    twice=' Why? [Human] Why? [AI] So.',
    silent=' Why?',
    empty=' [AI] So.',
  )
  write = lambda prompts, key: [said[re.search('Topic: (.*)', p)[1]] for p in prompts]
  made, refused = evolve.self_chat(write, list(said), KEY)
  roles = ['user', 'assistant'] * 2
  contents = ['Why?', 'Because.', 'Sure?', 'Yes.']
  assert made == [dict(messages=[dict(role=r, content=c) for r, c in zip(roles, contents)])]
  assert refused == 3
  assert evolve.self_chat(write, ['good'], KEY, least=3) == ([], 1)
