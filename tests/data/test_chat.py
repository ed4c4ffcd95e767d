"""Chat templates, against what transformers' `apply_chat_template` makes of them (`chat.json`)."""

import json
import pathlib
import types

import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import chat, vocab

STORED = json.loads(pathlib.Path(__file__).with_name('chat.json').read_text(encoding='utf-8'))


def words(template):
  """What `render` looks at in a vocabulary."""
  return types.SimpleNamespace(template=template, spelling=dict(bos_token='<s>', eos_token='</s>'))


@pytest.mark.parametrize(
  'case', STORED['cases'], ids=lambda c: f'{c["template"]}-{len(c["messages"])}'
)
def test_transformers(case):
  said = chat.render(
    words(STORED['templates'][case['template']]),
    case['messages'],
    add_generation_prompt=case['prompt'],
    **case.get('told', {}),
  )
  assert said == case['text']


def test_what_a_template_reads():
  assert chat.takes(STORED['templates']['tools'], 'tools')
  assert not any(chat.takes(STORED['templates'][t], 'tools') for t in ('chatml', 'inst', 'json'))
  assert not chat.takes('{% set tools = 1 %}{{ tools }}', 'tools')


def test_a_template_that_refuses_or_breaks_says_so_in_one_line():
  turns = [dict(role='assistant', content='a')]
  for template, message in (
    (STORED['templates']['inst'], 'refuses these messages: Roles must alternate'),
    ('{% for %}', 'refuses these messages: Expected'),
    ('{{ messages.nothing.more }}', 'refuses these messages'),
    ("{{ ''.__class__.__mro__ }}", 'refuses these messages: .*unsafe'),
    ('{{ messages.append(1) }}', 'refuses these messages: .*unsafe|not safely callable'),
  ):
    with pytest.raises(UserError, match=message) as e:
      chat.render(words(template), turns)
    assert '\n' not in str(e.value)


def test_a_model_without_a_template():
  with pytest.raises(UserError, match='no chat template, .* leave out --chat'):
    chat.render(vocab.bytes_(), [dict(role='user', content='a')])
