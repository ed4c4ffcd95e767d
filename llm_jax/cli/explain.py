"""`llm-jax generate --explain`: a table for each token, with what every processor did to the likeliest ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from llm_jax.core.errors import UserError
from llm_jax.decode import explain
from llm_jax.decode import prompts as prompts_lib

WIDTH, NAME, DRAWN = 100, 22, '  <- drawn'  # columns of the terminal and of the tokens' spelling


def show(
  model: Any, params: Any, words: Any, prompts: Sequence[str], key: jax.Array, **settings: Any
) -> None:
  """Prints the tables of the tokens that follow the prompt, and the text. settings: those of `generate.text`."""
  if len(prompts) > 1:
    raise UserError('--explain shows one --prompt: leave out the others, --num and --prompts_file')
  ids, stop = prompts_lib.encode(model, words, prompts[0]), settings.pop('stop')
  told = dict(eos=words.eos, start=words.start, allowed=prompts_lib.drawable(model, words))
  made: list[int] = []
  before = prompts_lib.shown(model, ids)
  for step in explain.steps(model, params, ids, key, **settings, **told):
    print(f'token {len(made) + 1}, after {_end(words.decode([*before, *made]))}')
    print('\n'.join(table(step, lambda i: spelling(words, i))), end='\n\n', flush=True)
    made.append(step.token)
    text = ''.join(prompts_lib.pieces(words, before, [made], words.eos))
    if any(s in text for s in stop):
      break
  text = ''.join(prompts_lib.pieces(words, before, [made], words.eos, stop))
  print(f'{prompts[0] if before else ""}{text}')


def table(step: explain.Step, spelt: Any) -> list[str]:
  """The lines of one step, none longer than WIDTH. spelt: from an id to how it is shown.

  A column for each stage that changes what is shown, in per cent, `-` for ruled out; the others are named below.
  """
  told, idle = [0], []
  for i in range(1, len(step.stages)):
    column = lambda stage: [_percent(c.probabilities[stage]) for c in step.candidates]
    same = column(i) == column(i - 1) and step.left[i] == step.left[i - 1]
    (idle if same else told).append(i)
  lines = []
  blocks = list(_blocks(step.stages, told))
  for part in blocks:
    sizes = [max(len(step.stages[i]), 9) for i in part]
    row = lambda name, cells: '  '.join(
      [f'{name:<{NAME}}', *(f'{c:>{n}}' for c, n in zip(cells, sizes, strict=True))]  # noqa: B023
    )
    lines.append(row('', [step.stages[i] for i in part]))
    for c in step.candidates:
      line = row(spelt(c.token), [_percent(c.probabilities[i]) for i in part])
      lines.append(line + DRAWN * (part is blocks[-1] and c.token == step.token))
    lines.append(row('ids left', [f'{step.left[i]:,}' for i in part]))
  if idle:
    lines.append(f'changed nothing: {", ".join(step.stages[i] for i in idle)}')
  return lines


def spelling(words: Any, i: int) -> str:
  """How an id is shown: its text in quotes, its bytes where they are no text, or its role."""
  if i == words.eos:
    return '<end>'
  piece = words.pieces[i] if i < words.size else b''
  if not piece:
    return f'<id {i}>'
  try:
    return _cut(repr(piece.decode()))
  except UnicodeDecodeError:
    return _cut(repr(piece))


def _blocks(stages: Sequence[str], told: list[int]) -> Iterator[list[int]]:
  """The columns, broken where a line would become too long."""
  part, used = [], NAME + len(DRAWN)
  for i in told:
    size = 2 + max(len(stages[i]), 9)
    if part and used + size > WIDTH:
      yield part
      part, used = [], NAME + len(DRAWN)
    part.append(i)
    used += size
  yield part


def _percent(probability: float) -> str:
  return '-' if probability == 0 else f'{100 * probability:.2f} %'


def _cut(text: str) -> str:
  return text if len(text) <= NAME else text[: NAME - 1] + '…'


def _end(text: str) -> str:
  """The last characters of a text, in quotes."""
  shown = repr(text)
  return shown if len(shown) <= 60 else f"'…{shown[-58:]}"
