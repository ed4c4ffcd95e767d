"""Rewards that can be computed: the right number, code that passes its tests, a form that is kept, a length.

Every one is a reward function (rl/reward.py): `reward(prompts, answers, told) -> f32 [n]`, `told` being the other
fields of each prompt's record.

    verify.math(['2+2?'], ['It is #### 4'], [dict(answer='4')])      # [1.]
    verify.code([''], ['def f(x): return x'], [dict(tests=['assert f(1) == 1'])])
"""

import fractions
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError, nearest
from llm_jax.rl import sandbox

Told = Sequence[Mapping[str, Any]]

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+|\d+)'
_DECIMAL = rf'{_DIGITS}(?:\.\d+)?|\.\d+'
_NUMBER = re.compile(rf'(?<![\w.])-?\$?(?:{_DECIMAL})(?:\s?/\s?\d+(?!\d*[./]\d))?%?')
_SAID = re.compile(r'(?:\banswer is\b|\banswer:|^A:)[ \t]*(.+)$', re.I | re.M)
_FRACTION = re.compile(r'\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))')
_WRAPPERS = re.compile(
  r'\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\(?:left|right|displaystyle)(?![a-z])|\\[!,;: ]|\\?\$|~'
)
_NAMED = re.compile(r'^[A-Za-z]\s*=')  # x = 5 says 5
_CODE = re.compile(r'```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)', re.S | re.I)


# --- mathematics --------------------------------------------------------------------------------------


def extract(text: str) -> str | None:
  r"""The final answer of a solution: what the last \boxed{} holds, else what follows the last `####`, else the last
  'answer is', 'answer:' or line that begins with 'A:', else the last number. None: nothing of these."""
  if (boxed := _boxed(text)) is not None:
    return boxed
  if '####' in text:
    return text.rpartition('####')[2].strip().partition('\n')[0].strip() or None
  if said := _SAID.findall(text):
    found = said[-1].strip()
    numbers = _NUMBER.findall(found)
    return numbers[0] if numbers and '\\' not in found else found.rstrip('.')
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else None


def _boxed(text: str) -> str | None:
  start = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
  if start < 0:
    return None
  rest = text[start:].partition('box')[2].removeprefix('ed').lstrip()
  if not rest.startswith('{'):
    return rest.split('$')[0].split()[0] if rest.split('$')[0].split() else None
  depth = 0
  for i, c in enumerate(rest):
    depth += (c == '{') - (c == '}')
    if depth == 0:
      return rest[1:i]
  return None


def number(text: str) -> fractions.Fraction | None:
  r"""The value of an answer, exactly: signs of thousands, currency and per cent, decimals, a/b, \frac{a}{b}, mixed
  numbers such as 1 1/2; a word behind it, such as its unit, is ignored. None when it is not a number. 50% is 50."""
  text = _NAMED.sub('', plain(text)).rstrip('.').strip()
  found = re.fullmatch(
    rf'([-+]?)\s*({_DECIMAL})?(?:\s*(?<=\d)\s+(\d+)\s*/\s*(\d+)|\s*/\s*(\d+))?(\s*%|\s+[A-Za-z]{{2}}[A-Za-z .^2]*)?',
    text,
  )
  if not found or found[2] is None:
    return None
  value = fractions.Fraction(found[2].replace(',', ''))
  if found[4]:
    value = value + fractions.Fraction(int(found[3]), int(found[4])) if int(found[4]) else None
  elif found[5]:
    value = value / int(found[5]) if int(found[5]) else None
  return value if value is None or found[1] != '-' else -value


def plain(text: str) -> str:
  r"""Without LaTeX's marks that change no value: `\text{}`, spacing, dollar signs, `\left`; \frac{a}{b} as a/b."""
  text = text.strip().replace('\\%', '%').replace(',\\!', ',')
  text = re.sub(r'\\sqrt\s*(\w)', r'\\sqrt{\1}', text)
  text = re.sub(r'(?<=\d)(?=\s*\\[dt]?frac)', ' ', text)
  text = _FRACTION.sub(lambda m: f'{_own(m[1] or m[2])}/{_own(m[3] or m[4])}', text)
  text = _WRAPPERS.sub(lambda m: m[1] or '', text)
  return text.replace('^{\\circ}', '').replace('^\\circ', '').replace('\\degree', '').strip()


def _own(text: str) -> str:
  return text.strip() if re.fullmatch(r'\s*-?[\w.]+\s*', text) else f'({text.strip()})'


def same(answer: str, right: str) -> bool:
  """Whether two final answers say the same: as numbers where both are, else letter by letter but for spaces, case and
  LaTeX's wrappers. A fraction of one that stands for a per cent counts as it: 50% is 50 and 0.5."""
  a, b = number(answer), number(right)
  if a is not None and b is not None:
    marked = ('%' in answer) != ('%' in right)
    return a == b or (marked and a == (b * 100 if '%' in answer else b / 100))
  strip = lambda text: re.sub(r'\s+', '', _NAMED.sub('', plain(text))).rstrip('.').lower()
  return strip(answer) == strip(right)


def math(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  field: str = 'answer',
  right: float = 1.0,
  wrong: float = 0.0,
) -> np.ndarray:
  """`right` where the answer's final number or expression is that of told[field], which may be a whole solution."""
  del prompts
  golds = [_field(record, field) for record in told]
  found = []
  for answer, gold in zip(answers, golds, strict=True):
    own, true = extract(answer), extract(str(gold)) if _solution(str(gold)) else str(gold)
    found.append(right if own is not None and true is not None and same(own, true) else wrong)
  return np.array(found, np.float32)


def _solution(text: str) -> bool:
  return any(mark in text for mark in ('####', '\\boxed')) or bool(_SAID.search(text))


# --- code ---------------------------------------------------------------------------------------------


def code(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  seconds: float = 5.0,
  memory: int = 256 << 20,
  workers: int = 2,
) -> np.ndarray:
  """1 where the program in the answer passes told['tests'], a text or a list of asserts; else 0.

  The program is the answer's last block between ``` marks, or the whole answer. told['before'], where there is one, is
  code that the answer continues. told['entry_point']: the name that must be defined, else 0; an answer that defines it
  itself stands alone but for the imports of `before`. Raises `UserError` where code cannot be isolated.
  """
  del prompts
  programs = []
  for answer, record in zip(answers, told, strict=True):
    tests = _field(record, 'tests')
    tests = tests if isinstance(tests, str) else '\n'.join(tests)
    name, before = record.get('entry_point'), record.get('before', '')
    program = written(answer)
    if not name or not re.search(rf'^(async )?def {name}\b', program, re.M):
      program = before + program
    else:
      program = '\n'.join([*re.findall(r'^(?:from|import) .*$', before, re.M), program])
    programs.append((program, f'{name}\n{tests}' if name else tests))
  settings = dict(seconds=seconds, memory=memory)
  found = sandbox.run_all(programs, workers=workers, **settings)
  return np.array([r.passed for r in found], np.float32)


def program(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  seconds: float = 5.0,
  memory: int = 256 << 20,
  workers: int = 2,
) -> np.ndarray:
  """The share of told['cases'], pairs (standard input, expected output), that the program in the answer gets right.

  What it prints is compared outside, without spaces at the ends of lines: the program cannot see what is expected.
  """
  del prompts
  cases = [_field(record, 'cases') for record in told]
  texts = [written(answer) for answer in answers]
  jobs = [(text, None, given) for text, own in zip(texts, cases, strict=True) for given, _ in own]
  found = iter(sandbox.run_all(jobs, workers=workers, seconds=seconds, memory=memory))
  lines = lambda text: [line.rstrip() for line in text.strip().splitlines()]
  scores = []
  for own in cases:
    results = [(next(found), expected) for _, expected in own]
    good = [r.passed and lines(r.output) == lines(expected) for r, expected in results]
    scores.append(np.mean(good) if good else 0.0)
  return np.array(scores, np.float32)


def written(answer: str) -> str:
  """The Python of an answer: its last block between ``` marks, else all of it."""
  blocks = _CODE.findall(answer)
  return blocks[-1] if blocks else answer


def human_eval(record: Mapping[str, str]) -> dict[str, str]:
  """The fields of `code` for a record of HumanEval (prompt, test, entry_point; Chen et al. 2021, arXiv:2107.03374)."""
  test, name = _field(record, 'test'), _field(record, 'entry_point')
  return dict(before=_field(record, 'prompt'), tests=f'{test}\ncheck({name})\n', entry_point=name)


def mbpp(record: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `code` for a record of MBPP (test_list, test_setup_code; Austin et al. 2021, arXiv:2108.07732)."""
  setup = record.get('test_setup_code') or '\n'.join(record.get('test_imports', ()))
  return dict(tests=[setup, *_field(record, 'test_list')])


# --- form ---------------------------------------------------------------------------------------------


def matches(
  prompts: Sequence[str], answers: Sequence[str], told: Told, *, pattern: str
) -> np.ndarray:
  """1 where the whole answer matches the regular expression, in which a dot is also a new line."""
  del prompts, told
  try:
    expression = re.compile(pattern, re.S)
  except re.error as e:
    raise UserError(f'pattern={pattern!r} is no regular expression: {e}') from e
  return np.array(
    [expression.fullmatch(answer.strip()) is not None for answer in answers], np.float32
  )


def tags(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  names: Sequence[str] = ('think', 'answer'),
) -> np.ndarray:
  """1 where the answer is `<think>...</think> <answer>...</answer>`, each of `names` once, in this order, and nothing
  but spaces outside (DeepSeek-R1, arXiv:2501.12948, section 2.2)."""
  del prompts, told
  form = re.compile(r'\s*' + r'\s*'.join(rf'<{n}>(.*?)</{n}>' for n in names) + r'\s*', re.S)
  marks = [mark for n in names for mark in (f'<{n}>', f'</{n}>')]
  good = lambda a: form.fullmatch(a) is not None and all(a.count(mark) == 1 for mark in marks)
  return np.array([good(answer) for answer in answers], np.float32)


def words(text: str) -> int:
  """How many words a text has."""
  return len(text.split())


def length(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  limit: int = 100,
  slack: int = 20,
  count: Callable[[str], int] = words,
) -> np.ndarray:
  """0 up to `limit - slack`, then falling in a line to -1 at `limit`, and -1 beyond it (DAPO, arXiv:2503.14476,
  equation 13). count: what is counted of an answer."""
  del prompts, told
  if not 0 < slack <= limit:
    raise UserError(f'slack={slack} must be between 1 and limit={limit}')
  sizes = np.array([count(answer) for answer in answers], np.float32)
  return np.clip((limit - slack - sizes) / slack, -1, 0).astype(np.float32)


def _field(record: Mapping[str, Any], name: str) -> Any:
  if name not in record:
    raise UserError(f'a record has no field {name!r}: {nearest(name, record)}')
  return record[name]
