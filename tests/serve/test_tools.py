"""Tool calls and structured answers: what the model is shown, what is read from it, how it is held to a schema."""

import itertools
import json
import types

import jsonschema_rs
import numpy as np
import openai
import pytest

import llm_jax.decode
from llm_jax.core.errors import UserError
from llm_jax.serve import api, tools
from tests.serve import fake
from tests.serve.conftest import serving
from tests.serve.test_server import streamed, whole

WEATHER = dict(
  name='weather',
  description='The weather of a town.',
  parameters=dict(type='object', properties=dict(town=dict(type='string')), required=['town']),
)
TIME = dict(
  name='time',
  parameters=dict(type='object', properties=dict(hour=dict(type='integer')), required=['hour']),
)
TOOLS = [dict(type='function', function=f) for f in (WEATHER, TIME)]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
NATIVE = '{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m | tojson }}\n{% endfor %}'


@pytest.fixture(scope='module')
def served():
  with serving(length=2048) as found:
    yield found


def read(pieces):
  """(what is said, (name, arguments) of the calls) of a text that comes in pieces."""
  reader, said, calls = tools.Reader(), '', []
  for piece in pieces:
    more, some = reader.add(piece)
    said, calls = said + more, calls + some
  more, some = reader.end()
  return said + more, [(c.name, c.arguments) for c in calls + some]


@pytest.mark.parametrize(
  'text, said, calls',
  [
    ('just text', 'just text', 0),
    (CALL, '', 1),
    ('Let me look.\n\n' + CALL, 'Let me look.', 1),
    (CALL + '\n' + CALL + '\n', '', 2),
    (CALL + ' done', 'done', 1),
    (CALL.removesuffix('</tool_call>'), '', 1),  # some models end their turn instead
    ('a <tool_call> of no shape </tool_call> b', 'a<tool_call> of no shape </tool_call> b', 0),
    ('<tool_call>{"name": 1}', '<tool_call>{"name": 1}', 0),
    ('1 < 2 <tool', '1 < 2 <tool', 0),
    ('ends in white \n', 'ends in white \n', 0),
  ],
)
def test_calls_are_read_however_the_text_is_cut(text, said, calls):
  expected = said, [('weather', '{"town": "Zürich"}')] * calls
  assert read([text]) == read(text) == expected
  for cut in range(len(text)):
    assert read([text[:cut], text[cut:]]) == expected


def test_a_call_in_openais_shape(served):
  said = [dict(role='user', content='say:Wait.\n' + CALL)]
  answer = served.ai.chat.completions.create(model='fake', messages=said, tools=TOOLS)
  choice = answer.choices[0]
  assert (choice.message.content, choice.finish_reason) == ('Wait.', 'tool_calls')
  (call,) = choice.message.tool_calls
  assert call.type == 'function' and call.id.startswith('call_')
  assert (call.function.name, json.loads(call.function.arguments)) == (
    'weather',
    dict(town='Zürich'),
  )


@pytest.mark.parametrize('logprobs', [None, True])
def test_a_stream_of_calls_is_the_whole(served, logprobs):
  said = [dict(role='user', content=f'say:a\n{CALL} \n{CALL}')]
  asked = dict(model='fake', messages=said, tools=TOOLS, logprobs=logprobs)
  found = streamed(served.ai.chat.completions, **asked)
  assert found == whole(served.ai.chat.completions, **asked) and len(found[0][0]['calls']) == 2


def test_without_tools_a_call_is_text(served):
  said = [dict(role='user', content='say:' + CALL)]
  for more in ({}, dict(tools=TOOLS, tool_choice='none')):
    choice = served.ai.chat.completions.create(model='fake', messages=said, **more).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)


HISTORY = [
  dict(role='user', content='How is it?'),
  dict(
    role='assistant',
    content=None,
    tool_calls=[
      dict(id='call_1', type='function', function=dict(name='time', arguments='{"hour": 3}'))
    ],
  ),
  dict(role='tool', tool_call_id='call_1', content='dark'),
]


def test_a_template_without_tools_is_told_by_a_system_message(served):
  served.ai.chat.completions.create(model='fake', messages=HISTORY, tools=TOOLS, max_tokens=5)
  text = served.engine.words.decode(served.engine.requests[-1].prompt)
  for tool in TOOLS:
    assert json.dumps(tool) in text
  assert text.startswith('<|im_start|>system\nYou can call functions.')
  assert '<tool_call>\n{"name": "time", "arguments": {"hour": 3}}\n</tool_call><|im_end|>' in text
  assert '<|im_start|>user\n<tool_response>\ndark\n</tool_response><|im_end|>' in text
  with_system = [dict(role='system', content='Be kind.'), *HISTORY]
  served.ai.chat.completions.create(model='fake', messages=with_system, tools=TOOLS, max_tokens=5)
  text = served.engine.words.decode(served.engine.requests[-1].prompt)
  assert text.startswith('<|im_start|>system\nBe kind.\n\nYou can call functions.')


def test_a_template_with_tools_is_given_them():
  with serving(words=fake.words(NATIVE), length=2048) as served:
    served.ai.chat.completions.create(model='fake', messages=HISTORY, tools=TOOLS, max_tokens=5)
    lines = served.engine.words.decode(served.engine.requests[-1].prompt).splitlines()
  assert [json.loads(x) for x in lines[:2]] == TOOLS
  calls = [dict(type='function', function=dict(name='time', arguments=dict(hour=3)))]
  assert [json.loads(x) for x in lines[2:]] == [
    HISTORY[0],
    dict(role='assistant', content='', tool_calls=calls),
    dict(role='tool', content='dark'),
  ]


def test_a_template_that_fails_is_400():
  with serving(words=fake.words('{{ messages[0].content + 1 }}')) as served:
    with pytest.raises(openai.BadRequestError, match='refuses these messages'):
      served.ai.chat.completions.create(model='fake', messages=HISTORY)


# --- held to a schema ---------------------------------------------------------------------------------


def instance(schema):
  """Something of the schema."""
  if 'anyOf' in schema:
    return instance(schema['anyOf'][-1])
  if 'const' in schema:
    return schema['const']
  if schema.get('type') == 'object':
    return {k: instance(v) for k, v in schema.get('properties', {}).items()}
  return dict(string='x', integer=7)[schema['type']]


class Literal:
  """A constraint that leaves one text."""

  def __init__(self, words, schema, *, end):
    assert end == words.turn
    if schema.get('type') == 'nonsense':
      raise UserError('no such type')
    self.left, self.size = words.encode(json.dumps(instance(schema))), words.size

  @property
  def done(self):
    return not self.left

  def allowed(self):
    return np.arange(self.size) == self.left[0]

  def advance(self, token):
    assert token == self.left.pop(0)


@pytest.fixture
def constrained(monkeypatch):
  made = types.SimpleNamespace(json_schema=Literal)
  monkeypatch.setattr(llm_jax.decode, 'constrain', made, raising=False)


@pytest.mark.parametrize(
  'choice, call',
  [
    ('required', ('time', dict(hour=7))),
    (dict(type='function', function=dict(name='weather')), ('weather', dict(town='x'))),
  ],
)
def test_a_call_that_has_to_be_is_held_to_its_schema(served, constrained, choice, call):
  asked = dict(model='fake', messages=HISTORY, tools=TOOLS, tool_choice=choice, n=2)
  found, _ = whole(served.ai.chat.completions, **asked)
  for one in found:
    ((name, arguments),) = one['calls']
    assert (name, json.loads(arguments), one['text'], one['end']) == (*call, '', 'tool_calls')
  assert streamed(served.ai.chat.completions, **asked)[0] == found
  cut, _ = whole(served.ai.chat.completions, **asked, max_tokens=5)
  assert (cut[0]['text'], cut[0]['calls'], cut[0]['end']) == ('{"nam', [], 'length')


def test_a_response_format_is_a_constraint(served, constrained):
  schema = dict(type='object', properties=dict(a=dict(type='integer'), b=dict(type='string')))
  form = dict(type='json_schema', json_schema=dict(name='n', schema=schema, strict=True))
  ask = lambda form: whole(
    served.ai.chat.completions, model='fake', messages=HISTORY, response_format=form, n=2
  )[0]
  found = ask(form)
  assert [json.loads(c['text']) for c in found] == [dict(a=7, b='x')] * 2 and found[0][
    'end'
  ] == 'stop'
  assert ask(dict(type='json_object'))[0]['text'] == '{}'
  form['json_schema']['schema'] = dict(type='nonsense')
  with pytest.raises(openai.BadRequestError, match='no such type'):
    ask(form)


def test_the_schema_of_a_call_takes_the_calls_and_nothing_else():
  made = tools.schema([api.Signature(**WEATHER), api.Signature(**TIME)])
  valid = jsonschema_rs.validator_for(made).is_valid
  assert valid(dict(name='weather', arguments=dict(town='a'))) and valid(
    dict(name='time', arguments=dict(hour=1))
  )
  for name, arguments in itertools.product(
    ('weather', 'time', 'x'), ({}, dict(town=1), dict(hour='a'))
  ):
    assert not valid(dict(name=name, arguments=arguments))
  assert not valid(dict(name='time', arguments=dict(hour=1), more=1)) and not valid(
    dict(name='time')
  )
