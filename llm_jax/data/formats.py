"""Public formats of instruction data as conversations: lists of dicts of role ('system', 'user', 'assistant') and
content.

A format is a function of one record that returns the conversations in it, usually one:

    for record in records.read('alpaca_data.json'):
      for conversation in formats.alpaca(record):
        ...

What is missing, empty, or out of turn raises `UserError` with file and line. Preferences are in `preferences.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import chat, records
from llm_jax.data.records import Record

ROLES = {
  'human': 'user',
  'user': 'user',
  'prompter': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'chatgpt': 'assistant',
  'bing': 'assistant',
  'bard': 'assistant',
  'system': 'system',
}


class Conversation(NamedTuple):
  """messages: dicts of role and content, and of what else a template may read (`instruction`, `input`). where:
  'FILE:LINE'. told: other fields of the record, for instance the right answer. first: messages before this one are not
  learned."""

  messages: list[dict[str, str]]
  where: str
  told: dict[str, Any]
  first: int = 0


def checked(
  messages: Sequence[Mapping[str, Any]], where: str, told: Mapping[str, Any] | None = None
) -> Conversation:
  """A conversation whose turns alternate, after at most one system message, and hold text. Raises `UserError`."""
  for i, message in enumerate(messages):
    role, content = message.get('role'), message.get('content')
    turn = i - (messages[0].get('role') == 'system')
    want = 'system' if turn < 0 else ('user', 'assistant')[turn % 2]
    if role != want:
      raise UserError(f'{where}: message {i + 1} is by {role!r}, where {want!r} has its turn')
    if not isinstance(content, str):
      raise UserError(f'{where}: message {i + 1} holds {type(content).__name__}, not text')
    if not content.strip():
      raise UserError(f'{where}: message {i + 1}, by {role!r}, is empty')
  if not messages or messages[-1]['role'] == 'system':
    raise UserError(f'{where}: the conversation is empty')
  return Conversation([dict(m) for m in messages], where, dict(told or {}))


def task(
  instruction: str, given: str, output: str, where: str, told: Mapping[str, Any] | None = None
) -> Conversation:
  """One question and its answer. given: what the instruction is about, or ''."""
  asked = f'{instruction}\n\n{given}' if given.strip() else instruction
  user = dict(role='user', content=asked, instruction=instruction, input=given)
  return checked([user, dict(role='assistant', content=output)], where, told)


def alpaca(record: Record) -> list[Conversation]:
  """{instruction, input (may be empty or absent), output} (Taori et al. 2023)."""
  given = records.need(record, 'input') if record.fields.get('input') is not None else ''
  instruction, output = records.text(record, 'instruction'), records.text(record, 'output')
  return [task(instruction, given, output, record.where, _rest(record, 'instruction', 'input'))]


def dolly(record: Record) -> list[Conversation]:
  """{instruction, context (may be empty), response, category} (databricks-dolly-15k, 2023)."""
  given = records.need(record, 'context')
  instruction, output = records.text(record, 'instruction'), records.text(record, 'response')
  return [task(instruction, given, output, record.where, _rest(record, 'instruction', 'context'))]


def messages(record: Record) -> list[Conversation]:
  """{messages: [{role, content}, ...]}, as OpenAI's API has them."""
  return [checked(turns(record, 'messages'), record.where, _rest(record, 'messages'))]


def turns(record: Record, key: str) -> list[dict[str, str]]:
  """The list of {role, content} under `key`."""
  return [
    dict(role=records.need(turn, 'role'), content=records.text(turn, 'content'))
    for turn in records.inner(record, key)
  ]


def sharegpt(record: Record) -> list[Conversation]:
  """{conversations: [{from, value}, ...]} (ShareGPT, Vicuna). What an assistant says before anybody asked is left out,
  as in FastChat."""
  said = []
  for turn in records.inner(record, 'conversations'):
    name = records.need(turn, 'from')
    if name not in ROLES:
      raise UserError(f'{turn.where}: nobody is called {name!r}; {nearest(name, ROLES)}')
    said.append(dict(role=ROLES[name], content=records.text(turn, 'value')))
  first = next((i for i, turn in enumerate(said) if turn['role'] != 'system'), 0)
  if said and said[first]['role'] == 'assistant':
    del said[first]
  return [checked(said, record.where, _rest(record, 'conversations'))]


def self_instruct(record: Record) -> list[Conversation]:
  """{instruction, instances: [{input, output}, ...]} (Wang et al. 2022, arXiv:2212.10560): one for each instance."""
  instruction = records.text(record, 'instruction')
  return [
    task(
      instruction,
      records.need(one, 'input'),
      records.text(one, 'output'),
      one.where,
      _rest(record, 'instances'),
    )
    for one in records.inner(record, 'instances')
  ]


def natural_instructions(record: Record) -> list[Conversation]:
  """{prefix, input, target} (a task's definition, an instance, its answer or answers; the first is taken)."""
  target = record.fields.get('target')
  target = target[0] if isinstance(target, list) and target else target
  one = record._replace(fields=record.fields | dict(target=target))
  told = _rest(record, 'prefix', 'input')
  return [
    task(
      records.text(one, 'prefix'),
      records.text(one, 'input'),
      records.text(one, 'target'),
      record.where,
      told,
    )
  ]


def super_natural_instructions(record: Record, *, examples: int = 2) -> list[Conversation]:
  """A task file of Super-NaturalInstructions (Wang et al. 2022, arXiv:2204.07705): its definition, the first `examples`
  of its positive examples, and one conversation per instance, with the first of its outputs."""
  definition = ' '.join(records.need(record, 'Definition', list))
  shown = [definition]
  for i, one in enumerate(records.inner(record, 'Positive Examples')[:examples], 1):
    said = f'Input: {records.text(one, "input")}\nOutput: {records.text(one, "output")}'
    shown.append(f'Positive Example {i} -\n{said}')
  found = []
  for one in records.inner(record, 'Instances'):
    outputs = records.need(one, 'output', list)
    if not outputs:
      raise UserError(f"{one.where}: 'output' is empty")
    given = f'Now complete the following example -\nInput: {records.text(one, "input")}\nOutput:'
    told = dict(outputs=outputs, id=one.fields.get('id'))
    found.append(task('\n\n'.join(shown), given, outputs[0], one.where, told))
  return found


def flan_cot(
  record: Record,
  *,
  ask: str = "{question}\nLet's think step by step.",
  answer: str = '{rationale} The answer is {answer}.',
) -> list[Conversation]:
  r"""{question, answer, rationale}: chains of thought of the Flan collection (Longpre et al. 2023, arXiv:2301.13688).

  Its files have no header: `records.read(path, columns=('question', 'answer', 'rationale'))`; a line break is written
  `\n` there. ask, answer: what is asked and said, with the names of the columns in braces.
  """
  names = ('question', 'answer', 'rationale')
  fields = {name: records.text(record, name).replace('\\n', '\n') for name in names}
  told = dict(answer=fields['answer'])
  return [task(ask.format(**fields), '', answer.format(**fields), record.where, told)]


def oasst_best(record: Record) -> list[Conversation]:
  """A message tree of OpenAssistant (Köpf et al. 2023, arXiv:2304.07327): the path of the best-ranked replies."""
  path, below = [], [root(record)]
  while below:
    path.append(min(below, key=_rank))
    below = replies(path[-1])
  return _oasst(record, [path])


def oasst_all(record: Record) -> list[Conversation]:
  """A message tree of OpenAssistant: the path to every last answer, several of which begin alike."""
  paths: list[list[Record]] = []

  def walk(path: list[Record]) -> bool:
    """Whether an answer lies at the end of `path` or below it."""
    below = [walk([*path, reply]) for reply in replies(path[-1])]
    if records.need(path[-1], 'role') == 'assistant' and not any(below):
      paths.append(path)
      return True
    return any(below)

  walk([root(record)])
  return _oasst(record, paths)


class Template(NamedTuple):
  """A prompt of promptsource (Bach et al. 2022, arXiv:2202.01279): a Jinja program that writes `question ||| answer`.
  choices: another, that writes the answers to choose from, or ''."""

  name: str
  program: str
  choices: str


def promptsource(path: str) -> dict[str, Template]:
  """The prompts in a `templates.yaml` of promptsource by name."""
  import yaml

  class Loader(yaml.SafeLoader):
    """Reads the tags `!Template` and `!TemplateMetadata` as plain mappings."""

  Loader.add_multi_constructor(
    '!', lambda loader, tag, node: loader.construct_mapping(node, deep=True)
  )
  with open(path, encoding='utf-8') as f:
    try:
      read = yaml.load(f, Loader)['templates'].values()
      return {t['name']: Template(t['name'], t['jinja'], t['answer_choices'] or '') for t in read}
    except (yaml.YAMLError, KeyError, TypeError) as e:
      said = ' '.join(str(e).split())
      raise UserError(f'{path} holds no templates of promptsource ({said})') from e


def p3(record: Record, *, path: str, name: str) -> list[Conversation]:
  """A record of a task data set as the prompt `name` in promptsource's file `path` words it; none where the prompt does
  not apply to the record. `told` has the `choices`, for scoring by rank."""
  known = promptsource(path)
  if name not in known:
    raise UserError(f'{path} has no prompt {name!r}; {nearest(name, known)}')
  return worded(record, known[name])


def worded(record: Record, template: Template) -> list[Conversation]:
  """A record as a prompt words it. Where the prompt says `choice`, the record decides which."""
  bar = '|||'
  guard = '\u241f'  # a text's own bars, while the rendered text is split at the template's
  safe = {k: _deep(v, lambda s: s.replace(bar, guard)) for k, v in record.fields.items()}
  draw = sum(map(ord, record.where))
  safe |= dict(choice=lambda options: options[draw % len(options)], zip=zip)

  def split(program: str, told: Mapping[str, Any]) -> list[str]:
    refuses = f'{record.where}: the prompt {template.name!r} does not fit'
    said = chat.write(program, refuses, told, trim=False)
    return [part.strip().replace(guard, bar) for part in said.split(bar)]

  choices = split(template.choices, safe) if template.choices else None
  parts = split(template.program, safe | dict(answer_choices=choices))
  if len(parts) < 2 or not all(parts[:2]):
    return []
  return [task(parts[0], '', parts[1], record.where, dict(choices=choices, template=template.name))]


def inverted(
  conversation: Conversation,
  *,
  ask: str = 'Please generate a question based on the answer:',
) -> Conversation:
  """The first question as the answer to the first answer; of one that was inverted, the original (MVP; Tang et al.
  2022, arXiv:2206.12131)."""
  question, answer = (
    next(m['content'] for m in conversation.messages if m['role'] == role)
    for role in ('user', 'assistant')
  )
  start = f'{ask}\n\n'
  asked = question.removeprefix(start)
  if asked != question:
    return task(answer, '', asked, conversation.where, conversation.told)
  return task(ask, answer, question, conversation.where, conversation.told)


def renamed(conversation: Conversation, *, names: Mapping[str, str]) -> Conversation:
  """The conversation with other names in it: self-identification data of somebody else for an assistant of one's
  own."""

  def change(said: str) -> str:
    for old, new in names.items():
      said = said.replace(old, new)
    return said

  said = [dict(m, content=change(m['content'])) for m in conversation.messages]
  return conversation._replace(messages=said)


def reminded(conversation: Conversation, *, instruction: str) -> Conversation:
  """The conversation with the instruction in front of everything the user says: what GAtt samples answers for."""
  said = [
    dict(m, content=f'{instruction}\n\n{m["content"]}') if m['role'] == 'user' else m
    for m in conversation.messages
  ]
  return conversation._replace(messages=said)


def ghost(conversation: Conversation, *, instruction: str) -> Conversation:
  """GAtt (LLaMA 2, arXiv:2307.09288, section 3.3): of a conversation sampled with `reminded`, the instruction once,
  before the first message, and only the last answer to be learned."""
  said = [
    dict(m, content=m['content'].removeprefix(f'{instruction}\n\n')) if m['role'] == 'user' else m
    for m in conversation.messages
  ]
  at = next(i for i, m in enumerate(said) if m['role'] == 'user')
  said[at] = dict(said[at], content=f'{instruction}\n\n{said[at]["content"]}')
  last = max(i for i, m in enumerate(said) if m['role'] == 'assistant')
  return conversation._replace(messages=said, first=last)


def _rest(record: Record, *used: str) -> dict[str, Any]:
  return {name: value for name, value in record.fields.items() if name not in used}


def _deep(value: Any, change: Callable[[str], str]) -> Any:
  if isinstance(value, str):
    return change(value)
  if isinstance(value, list):
    return [_deep(v, change) for v in value]
  if isinstance(value, dict):
    return {k: _deep(v, change) for k, v in value.items()}
  return value


def root(record: Record) -> Record:
  """The first message of a tree of OpenAssistant."""
  return Record(records.need(record, 'prompt', dict), f'{record.where} prompt')


def replies(message: Record) -> list[Record]:
  """The replies that were not deleted."""
  if not message.fields.get('replies'):
    return []
  return [r for r in records.inner(message, 'replies') if not r.fields.get('deleted')]


def _rank(message: Record) -> float:
  rank = message.fields.get('rank')
  return float('inf') if rank is None else rank


def _oasst(record: Record, paths: Sequence[Sequence[Record]]) -> list[Conversation]:
  return [
    checked(found, record.where, dict(id=record.fields.get('message_tree_id')))
    for path in paths
    if (found := list(_turns(path)))
  ]


def _turns(path: Sequence[Record]) -> Iterator[dict[str, str]]:
  """The messages of a path up to its last answer."""
  roles = [ROLES.get(records.need(m, 'role'), '') for m in path]
  last = max((i for i, role in enumerate(roles) if role == 'assistant'), default=-1)
  for role, message in zip(roles[: last + 1], path, strict=False):
    yield dict(role=role, content=records.text(message, 'text'))
