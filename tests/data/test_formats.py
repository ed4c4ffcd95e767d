"""Public formats of instruction data, as their publishers write them, and what is wrong in them."""

import jinja2
import pytest

from llm_jax.data import batch, examples, formats, records, templates, vocab
from llm_jax.data.records import Record
from tests.data.conftest import says


def record(**fields):
  return Record(fields, 'f.jsonl:3')


def said(conversation):
  return ' / '.join(f'{m["role"][0]}:{m["content"]}' for m in conversation.messages)


def test_tasks_with_and_without_an_input():
  full = dict(instruction='Add.', input='1 2', output='3')
  (one,) = formats.alpaca(record(**full))
  assert said(one) == 'u:Add.\n\n1 2 / a:3' and one.messages[0]['input'] == '1 2'
  for fields in (dict(input=''), dict(input=None), {}):
    (one,) = formats.alpaca(record(instruction='Say.', output='x', **fields))
    assert said(one) == 'u:Say. / a:x'
  (one,) = formats.dolly(record(instruction='Q', context='C', response='A', category='qa'))
  assert said(one) == 'u:Q\n\nC / a:A' and one.told['category'] == 'qa'
  (one,) = formats.natural_instructions(record(task='t', prefix='P', input='I', target=['A', 'B']))
  assert said(one) == 'u:P\n\nI / a:A' and one.told['target'] == ['A', 'B']
  says("f.jsonl:3: 'output' is empty", lambda: formats.alpaca(record(**full | dict(output=' '))))
  says("no key 'context'", lambda: formats.dolly(record(instruction='Q', response='A')))


def test_sharegpt():
  turn = lambda name, value: {'from': name, 'value': value}
  talk = [turn('system', 's'), turn('human', 'q'), turn('gpt', 'a'), turn('user', 'r')]
  (one,) = formats.sharegpt(record(id='i', conversations=talk))
  assert said(one) == 's:s / u:q / a:a / u:r' and one.told == dict(id='i')
  (one,) = formats.sharegpt(record(conversations=[turn('gpt', 'hello'), *talk[1:]]))
  assert said(one) == 'u:q / a:a / u:r'
  twice = record(conversations=[talk[1], talk[1]])
  says("message 2 is by 'user', where 'assistant' has its turn", lambda: formats.sharegpt(twice))
  says(
    "nobody is called 'gtp'; did you mean 'gpt'?",
    lambda: formats.sharegpt(record(conversations=[talk[1], turn('gtp', 'a')])),
  )


def test_self_instruct_seeds():
  found = records.read(records.bundled('self_instruct/seed_tasks.jsonl.gz'))
  made = [c for r in found for c in formats.self_instruct(r)]
  assert len(found) == len(made) == 175
  two = dict(instruction='I', instances=[dict(input='', output='a'), dict(input='x', output='b')])
  assert [said(c) for c in formats.self_instruct(record(**two))] == ['u:I / a:a', 'u:I\n\nx / a:b']


def test_super_natural_instructions_shows_examples():
  shown = [dict(input=f'i{k}', output=f'o{k}', explanation='') for k in range(3)]
  task = {'Definition': ['Do it.'], 'Positive Examples': shown}
  task['Instances'] = [dict(id='n', input='x', output=['y', 'z']), dict(input='u', output=['v'])]
  first, second = formats.super_natural_instructions(Record(task, 'f'), examples=2)
  assert said(first) == (
    'u:Do it.\n\nPositive Example 1 -\nInput: i0\nOutput: o0\n\nPositive Example 2 -\nInput: i1\nOutput: o1'
    '\n\nNow complete the following example -\nInput: x\nOutput: / a:y'
  )
  assert first.told['outputs'] == ['y', 'z'] and said(second).endswith('/ a:v')


def test_chains_of_thought(tmp_path):
  (tmp_path / 'cot.tsv').write_text('How many?\\nOptions: 1\tyes\tBecause.\n')
  (one,) = records.read(str(tmp_path / 'cot.tsv'), columns=('question', 'answer', 'rationale'))
  (made,) = formats.flan_cot(one)
  assert said(made) == (
    "u:How many?\nOptions: 1\nLet's think step by step. / a:Because. The answer is yes."
  )
  (made,) = formats.flan_cot(one, ask='{question}', answer='{answer}')
  assert said(made) == 'u:How many?\nOptions: 1 / a:yes' and made.told == dict(answer='yes')


def test_oasst_paths():
  reply = lambda text, rank, *below: dict(
    role='assistant', text=text, rank=rank, replies=list(below)
  )
  ask = lambda text, *below: dict(role='prompter', text=text, replies=list(below))
  tree = ask('q', reply('b', 1, ask('left')), reply('a', 0, ask('more', reply('x', 0))))
  one = record(message_tree_id='t', prompt=tree)
  assert [said(c) for c in formats.oasst_best(one)] == ['u:q / a:a / u:more / a:x']
  assert sorted(said(c) for c in formats.oasst_all(one)) == [
    'u:q / a:a / u:more / a:x',
    'u:q / a:b',
  ]
  assert formats.oasst_best(record(prompt=ask('alone'))) == []


YAML = r"""dataset: ag_news
templates:
  24e44a81: !Template
    answer_choices: World politics ||| Sports ||| Business
    id: 24e44a81
    jinja: "What label best describes this news article?\n{{text}} ||| \n{{answer_choices[label]\
      \ }}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      original_task: true
    name: classify
    reference: ''
  00000001: !Template
    answer_choices: null
    id: '00000001'
    jinja: "{% if label == 1 %}\nSports? {{ text }}\n|||\nyes\n{% endif %}"
    metadata: !TemplateMetadata {}
    name: sports
    reference: ''
"""


def test_promptsource_templates(tmp_path):
  """The first template is one of P3's for AG News; rendered by plain Jinja and cut at the bars."""
  (tmp_path / 'templates.yaml').write_text(YAML)
  path = str(tmp_path / 'templates.yaml')
  for label, choice in enumerate(['World politics', 'Sports', 'Business']):
    one = record(text='A ||| B won.', label=label)
    (made,) = formats.p3(one, path=path, name='classify')
    question = 'What label best describes this news article?\nA ||| B won.'
    assert said(made) == f'u:{question} / a:{choice}'
    assert made.told['choices'] == ['World politics', 'Sports', 'Business']
    program = formats.promptsource(path)['sports'].program
    plain = jinja2.Environment().from_string(program).render(text='x', label=label).split('|||')
    found = formats.p3(record(text='x', label=label), path=path, name='sports')
    want = [f'u:{plain[0].strip()} / a:{plain[1].strip()}'] if label == 1 else []
    assert [said(c) for c in found] == want
  says(
    "no prompt 'sport'; did you mean 'sports'?", lambda: formats.p3(one, path=path, name='sport')
  )
  wrong = formats.Template('halves', '{{ label / 0 }} ||| a', '')
  says("f.jsonl:3: the prompt 'halves' does not fit", lambda: formats.worded(one, wrong))
  (tmp_path / 'templates.yaml').write_text('a: [')
  says('holds no templates of promptsource', lambda: formats.promptsource(path))


def test_an_instance_inverted_twice_is_the_instance():
  one = formats.task('Who wrote it?', '', 'Ada.', 'f:1')
  back = formats.inverted(one)
  assert said(back) == (
    'u:Please generate a question based on the answer:\n\nAda. / a:Who wrote it?'
  )
  assert said(formats.inverted(back)) == said(one)


def test_ghost_attention_keeps_the_instruction_once():
  """Only the last answer is learned, though the instruction stood before every question when it was sampled."""
  turns = ['q1', 'a1', 'q2', 'a2']
  plain = [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(turns)]
  one = formats.checked(plain, 'f:1')
  sampled = formats.reminded(one, instruction='Rhyme.')
  assert said(sampled) == 'u:Rhyme.\n\nq1 / a:a1 / u:Rhyme.\n\nq2 / a:a2'
  made = formats.ghost(sampled, instruction='Rhyme.')
  assert said(made) == 'u:Rhyme.\n\nq1 / a:a1 / u:q2 / a:a2'
  words = vocab.bytes_(extra_ids=0, modes=())
  layout = batch.Layout('causal', 256, 0, True, words.first, words.eos)
  fit = lambda length: examples.fitted(
    words, [made], templates.CHATML, layout._replace(length=length), examples.trailing_turns, 0, 'f'
  )
  (example,) = fit(256)
  assert words.decode(example.targets[example.weights > 0]) == 'a2'
  says('do not fit', lambda: fit(100))  # without its last turn there is nothing to learn


@pytest.mark.parametrize('name', ['messages', 'conversations'])
def test_what_is_wrong_is_named(name):
  of = formats.messages if name == 'messages' else formats.sharegpt
  says(f"f.jsonl:3: no key '{name}' (it has: x)", lambda: of(record(x=1)))
  says(f"f.jsonl:3: '{name}' holds str, not a list", lambda: of(record(**{name: 'x'})))
  says(f'f.jsonl:3 {name}[0] holds int, not a record', lambda: of(record(**{name: [1]})))
