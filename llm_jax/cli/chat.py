"""`llm-jax generate --chat`: one answer to a prompt, or a conversation line by line."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from llm_jax.core.errors import UserError
from llm_jax.data import templates
from llm_jax.decode import generate

YOU, MODEL = 'you: ', 'model: '


def converse(
  model: Any, params: Any, words: Any, prompts: Sequence[str], seed: int, settings: dict[str, Any]
) -> int:
  """Answers the prompt, or every line of the input with all that was said before; returns the exit code.

  prompts: the one of the command line, [''] for none. settings: those of `generate.text`.
  """
  if len(prompts) > 1:
    raise UserError('--chat answers one --prompt: leave out the others, --num and --prompts_file')
  asked, terminal = prompts[0], sys.stdin.isatty()
  templates.prompt(
    words, [dict(role='user', content=asked)]
  )  # refuses a model without a template now
  said: list[dict[str, str]] = []
  for turn, line in enumerate([asked] if asked else _lines(terminal)):
    said.append(dict(role='user', content=line))
    key = jax.random.fold_in(jax.random.key(seed), turn)
    ids = templates.prompt(words, said)
    pieces = generate.stream_answer(model, params, words, ids, key, **settings)
    answer = ''
    for piece in pieces:
      if not answer and not asked and terminal:
        print(MODEL, end='')
      print(piece, end='', flush=True)
      answer += piece
    print(flush=True)
    said.append(dict(role='assistant', content=answer))
  return 0


def _lines(terminal: bool) -> Iterator[str]:
  """The lines of the input that say something, asked for where a person types them."""
  while True:
    if terminal:
      print(YOU, end='', flush=True)
    line = sys.stdin.readline()
    if not line:
      if terminal:
        print()
      return
    if line.strip():
      yield line.rstrip('\n')
