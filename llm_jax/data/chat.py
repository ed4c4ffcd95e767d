"""Conversations as text: a model's own chat template, a Jinja program that came with its weights.

    chat.render(words, [dict(role='user', content='What is 2+2?')])

A template is somebody else's program, so it runs in Jinja's sandbox, with what transformers gives it: blocks trimmed,
`raise_exception`, `tojson` that keeps characters as they are, `strftime_now`, loop controls, the special tokens.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.errors import UserError


def render(
  vocab: Any,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool = True,
  **told: Any,
) -> str:
  """The text of a conversation as the model learned to read it.

  vocab: with `template` and `spelling` (see data/tokenizer.py). messages: dicts of role ('system', 'user',
  'assistant') and content. add_generation_prompt: whether the beginning of the answer follows. told: what else the
  template may read, such as `tools` (see `takes`). Raises `UserError` when there is no template, or it refuses the
  messages.
  """
  if vocab.template is None:
    raise UserError(
      'this model has no chat template, so it was not taught to converse: leave out --chat, convert a model that has '
      'one (make smollm2), or tune this one (configs/tune/sft.py)'
    )
  told = told | vocab.spelling
  told |= dict(messages=list(messages), add_generation_prompt=add_generation_prompt)
  return write(vocab.template, 'the chat template refuses these messages', told)


def write(program: str, refuses: str, told: Mapping[str, Any], *, trim: bool = True) -> str:
  """What a Jinja program makes of the variables `told`.

  refuses: how the `UserError` begins when it cannot. trim: whether the white space around a block's line is dropped, as
  in chat templates.
  """
  import jinja2

  try:
    return _compiled(program, trim).render(**told)
  except (
    jinja2.exceptions.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
  ) as e:
    said = ' '.join(str(e).split())
    raise UserError(f'{refuses}: {said}') from e


@functools.cache
def takes(template: str, name: str) -> bool:
  """Whether the template reads the variable `name`, for instance 'tools'."""
  import jinja2.meta

  environment = _compiled(template).environment
  return name in jinja2.meta.find_undeclared_variables(environment.parse(template))


@functools.cache
def _compiled(template: str, trim: bool = True) -> Any:
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

  def tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  class Generation(jinja2.ext.Extension):
    """Takes `{% generation %}`, with which some templates mark what the assistant says, as if it were not there."""

    tags = frozenset({'generation'})

    def parse(self, parser: Any) -> list:
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=trim, lstrip_blocks=trim, extensions=['jinja2.ext.loopcontrols', Generation]
  )
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)
