"""Tool calls: how functions are shown to a model, and how its calls are read from what it writes.

The form is that of the Hermes models, which many chat templates adopted: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`. A template that takes `tools` shows the functions its own way; for others a system message
describes them. Where a call is required, the answer is held to a JSON schema instead of being searched for calls.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_jax.serve import api

OPEN, CLOSE = '<tool_call>', '</tool_call>'

INTRODUCTION = """You can call functions. They are described here, one JSON object a line:
<tools>
{functions}
</tools>
To call one, write nothing but its name and its arguments as JSON inside these tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


class Call(NamedTuple):
  """One call of a function; arguments: JSON text."""

  id: str
  name: str
  arguments: str

  def shape(self) -> dict[str, Any]:
    """As OpenAI's API writes it."""
    return dict(
      id=self.id, type='function', function=dict(name=self.name, arguments=self.arguments)
    )


def wanted(body: api.Chat) -> tuple[list[api.Signature], bool]:
  """(the functions that may be called, whether one has to be). Raises `Refused` for a choice that is not there."""
  functions, choice = [t.function for t in body.tools or ()], body.tool_choice
  if not functions:
    if choice not in (None, 'none', 'auto'):
      raise api.Refused(400, 'tool_choice needs tools', param='tool_choice')
    return [], False
  if choice == 'none':
    return [], False
  if isinstance(choice, api.Chosen):
    named = [f for f in functions if f.name == choice.function.name]
    if not named:
      words = f'tool_choice names {choice.function.name!r}, which is not among the tools'
      raise api.Refused(400, words, param='tool_choice')
    return named[:1], True
  return functions, choice == 'required'


def schema(functions: Sequence[api.Signature]) -> dict[str, Any]:
  """The JSON schema of one call of one of the functions."""

  def one(function: api.Signature) -> dict[str, Any]:
    arguments = function.parameters or dict(type='object')
    return dict(
      type='object',
      properties=dict(name=dict(const=function.name), arguments=arguments),
      required=['name', 'arguments'],
      additionalProperties=False,
    )

  shapes = [one(f) for f in functions]
  return shapes[0] if len(shapes) == 1 else dict(anyOf=shapes)


def messages(
  body: api.Chat, functions: Sequence[api.Signature], native: bool
) -> list[dict[str, Any]]:
  """The conversation as a chat template reads it. native: whether the template knows of tools and calls."""
  found = []
  for message in body.messages:
    role, content = message.role, _text(message)
    calls = message.tool_calls or ()
    if native:
      said = dict(role='system' if role == 'developer' else role, content=content)
      if calls:
        said['tool_calls'] = [
          dict(
            type='function',
            function=dict(name=c.function.name, arguments=_loads(c.function.arguments)),
          )
          for c in calls
        ]
      found.append(said)
      continue
    for call in calls:
      written = dict(name=call.function.name, arguments=_loads(call.function.arguments))
      content += f'\n{OPEN}\n{json.dumps(written, ensure_ascii=False)}\n{CLOSE}'
    if role == 'tool':
      role, content = 'user', f'<tool_response>\n{content}\n</tool_response>'
    found.append(dict(role='system' if role == 'developer' else role, content=content.lstrip('\n')))
  if functions and not native:
    lines = '\n'.join(json.dumps(listed(f), ensure_ascii=False) for f in functions)
    told = INTRODUCTION.format(functions=lines)
    if found[0]['role'] == 'system':
      found[0]['content'] += '\n\n' + told
    else:
      found.insert(0, dict(role='system', content=told))
  return found


def listed(function: api.Signature) -> dict[str, Any]:
  """The description of a function that templates and models are given."""
  return dict(type='function', function=function.model_dump(exclude_none=True, exclude={'strict'}))


def _text(message: api.Message) -> str:
  if message.content is None or isinstance(message.content, str):
    return message.content or ''
  wrong = [part.type for part in message.content if part.type != 'text' or part.text is None]
  if wrong:
    words = f'a message has a part of type {wrong[0][:40]!r}: the model reads text alone'
    raise api.Refused(400, words, param='messages')
  return ''.join(part.text or '' for part in message.content)


def _loads(text: str) -> Any:
  """Arguments as the object that they are; what is no JSON stays text."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return text


def _call(text: str) -> Call | None:
  """The call that the text between the tags says, None if it says none."""
  found = _loads(text)
  if not isinstance(found, dict) or not isinstance(found.get('name'), str):
    return None
  arguments = found.get('arguments', {})
  if not isinstance(arguments, str):
    arguments = json.dumps(arguments, ensure_ascii=False)
  return Call('call_' + secrets.token_hex(12), found['name'], arguments)


class Reader:
  """Divides the text of an answer, as it comes, into what is said and what is called.

  Held back: white space, which is dropped in front of a call and at the end after one, and what may become a tag. What
  stands between tags and is no call is said as it was written.
  """

  def __init__(self):
    self._pending, self._inside, self.called = '', False, False

  def add(self, text: str) -> tuple[str, list[Call]]:
    """(what is said, what is called) that is certain once `text` has come."""
    self._pending += text
    said, calls = '', []
    while True:
      tag = CLOSE if self._inside else OPEN
      before, found, after = self._pending.partition(tag)
      if not found:
        break
      if not self._inside:
        said, self._pending, self._inside = said + self._said(before.rstrip()), after, True
        continue
      call = _call(before)
      calls += [call] if call else []
      said += '' if call else self._said(OPEN + before + CLOSE)
      self.called |= call is not None
      self._pending, self._inside = after, False
    if not self._inside:
      keep = self._unsure()
      said += self._said(self._pending[: len(self._pending) - keep])
      self._pending = self._pending[len(self._pending) - keep :]
    return said, calls

  def end(self) -> tuple[str, list[Call]]:
    """What was held back. A call without its closing tag counts where it is whole."""
    rest, self._pending = self._pending, ''
    if self._inside:
      call = _call(rest)
      self.called |= call is not None
      return ('', [call]) if call else (OPEN + rest, [])
    return ('' if self.called else rest), []

  def _said(self, text: str) -> str:
    return text.lstrip() if self.called else text

  def _unsure(self) -> int:
    """The length of the end that may be white space before a call, or the beginning of a tag."""
    text = self._pending
    begun = max((n for n in range(1, len(OPEN)) if text.endswith(OPEN[:n])), default=0)
    kept = text[: len(text) - begun]
    return begun + len(kept) - len(kept.rstrip())


class Forced:
  """The same where the whole answer is one call, held to `schema`."""

  def __init__(self):
    self._text, self.called = '', False

  def add(self, text: str) -> tuple[str, list[Call]]:
    """Nothing is certain before the end."""
    self._text += text
    return '', []

  def end(self) -> tuple[str, list[Call]]:
    """The call, or what there is of it if the answer was cut short."""
    call = _call(self._text)
    self.called = call is not None
    return ('', [call]) if call else (self._text, [])


class Plain:
  """The same where nothing can be called."""

  called = False

  def add(self, text: str) -> tuple[str, list[Call]]:
    """Everything is said."""
    return text, []

  def end(self) -> tuple[str, list[Call]]:
    """Nothing was held back."""
    return '', []
