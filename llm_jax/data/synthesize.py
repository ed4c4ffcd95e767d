r"""Instructions from a model: Self-Instruct, Evol-Instruct, back-translation, self-chat.

    pool = synthesize.self_instruct(write, synthesize.read_seeds('seed_tasks.jsonl'), key, wanted=100)

write: (prompts, key) -> texts, whatever writes them: `rl/feedback.of_model` of our own engine, or a client of another.
Every function is a data maker: records with `instruction`, `input`, `output` come out, what the model wrote badly is
left out and counted. The requests are our own wording of what the papers ask.
"""

import collections
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.data import curate

Write = Callable[[Sequence[str], jax.Array], list[str]]
Records = list[dict[str, Any]]


class Task(NamedTuple):
  """classification: whether the outputs are a few labels. instances: (input, output), the input may be empty."""

  instruction: str
  classification: bool
  instances: tuple[tuple[str, str], ...]


def read_seeds(path: str) -> list[Task]:
  """Tasks in the format of the 175 of Self-Instruct: lines with instruction, instances and is_classification."""
  found = []
  opened = (
    gzip.open(path, 'rt', encoding='utf-8')
    if path.endswith('.gz')
    else open(path, encoding='utf-8')
  )
  with opened as f:
    for number, line in enumerate(f, 1):
      try:
        record = json.loads(line)
        pairs = tuple((one['input'], one['output']) for one in record['instances'])
        found.append(Task(record['instruction'], bool(record['is_classification']), pairs))
      except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path}:{number} is no seed task: {type(e).__name__} {e}') from e
  return found


# --- Self-Instruct ------------------------------------------------------------------------------------

INSTRUCTIONS = 'Write a list of different tasks.\n\n'
KIND = 'Can the answer to this task only be one of a few fixed labels?\n\n'
INPUT_FIRST = 'Write an input for each task where it needs one, and the correct output.\n\n'
OUTPUT_FIRST = (
  'For each classification task write every label, and an input that has this label.\n\n'
)
# What a text model cannot do (Wang et al. 2022, appendix A.2).
KEYWORDS = 'image images graph graphs picture pictures file files map maps draw plot video audio music'.split()


class Made(NamedTuple):
  """tasks: the new ones. refused: how many candidates each rule refused. rounds: how often the model was asked."""

  tasks: list[Task]
  refused: dict[str, int]
  rounds: int


def self_instruct(
  write: Write,
  seeds: Sequence[Task],
  key: jax.Array,
  *,
  wanted: int = 100,
  human: int = 6,
  made: int = 2,
  parallel: int = 8,
  limit: float = 0.7,
  rounds: int = 1000,
) -> Made:
  """Self-Instruct (Wang et al. 2022, arXiv:2212.10560): the pool grows by what the model writes from the pool.

  A round shows the model `human` instructions of the seeds and `made` of its own (8 of the seeds at first), `parallel`
  times; keeps those that pass `sound` and have ROUGE-L below `limit` with every one in the pool; asks whether they are
  classifications; and has instances written, the input first, or the label first for classifications, where else one
  label would be written again and again. Ends with `wanted` new tasks or after `rounds`.
  """
  if len(seeds) < human + made:
    raise UserError(f'{len(seeds)} seeds: each request shows {human + made}, so give as many')
  pool = curate.Pool(task.instruction for task in seeds)
  new: list[Task] = []
  refused: collections.Counter = collections.Counter()
  number = 0
  for number in range(1, rounds + 1):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, number))))
    keys = jax.random.split(jax.random.fold_in(key, number), 3)
    shown = [_shown(seeds, new, human, made, rng) for _ in range(parallel)]
    asked = [INSTRUCTIONS + listed(s) for s in shown]
    candidates = []
    for text, s in zip(write(asked, keys[0]), shown, strict=True):
      for instruction in numbered(text, len(s) + 1):
        rule = sound(instruction) or ('similar' if pool.similar(instruction, limit) else None)
        if rule:
          refused[rule] += 1
        else:
          pool.add(instruction)
          candidates.append(instruction)
    tasks, lost = instances(write, seeds, candidates, keys[1:], rng)
    refused.update(lost)
    new += tasks[: wanted - len(new)]
    if len(new) == wanted:
      break
  return Made(new, dict(refused), number)


def _shown(
  seeds: Sequence[Task], new: Sequence[Task], human: int, made: int, rng: np.random.Generator
) -> list[str]:
  own = min(made, len(new))
  first = rng.choice(len(seeds), human + made - own, replace=False)
  chosen = [seeds[i] for i in first] + [
    new[i] for i in rng.choice(max(len(new), 1), own, replace=False)
  ]
  return [chosen[i].instruction for i in rng.permutation(len(chosen))]


def listed(instructions: Sequence[str]) -> str:
  """'1. ...', '2. ...', and the number of the next one."""
  lines = [f'{i}. {" ".join(text.split())}\n' for i, text in enumerate(instructions, 1)]
  return ''.join(lines) + f'{len(instructions) + 1}.'


def numbered(text: str, start: int) -> list[str]:
  """The instructions of a list that goes on at number `start`; the last one only if its line has ended."""
  parts = re.split(r'\n\s*\d+\s?[.)]\s*', f'\n{start}. {text}')[1:]
  whole = text.endswith('\n') or len(parts) == 1
  found = [' '.join(part.split()) for part in (parts if whole else parts[:-1])]
  return [part for part in found if part]


def sound(instruction: str) -> str | None:
  """The rule that refuses an instruction, None if none does: its length, what a text model cannot do, its first letter
  (section 2.2 and appendix A.2)."""
  found = instruction.split()
  if not 3 < len(found) <= 150:
    return 'length'
  if set(curate.words(instruction)).intersection(KEYWORDS):
    return 'keyword'
  if instruction.lower().startswith('write a program'):
    return 'program'
  return None if instruction[0].isascii() and instruction[0].isalnum() else 'beginning'


def instances(
  write: Write,
  seeds: Sequence[Task],
  candidates: Sequence[str],
  keys: Sequence[jax.Array],
  rng: np.random.Generator,
) -> tuple[list[Task], dict[str, int]]:
  """Tasks of instructions: their kind, then their instances; without those of which no instance is sound."""
  if not candidates:
    return [], {}
  examples = [seeds[i] for i in rng.permutation(len(seeds))]
  answer = lambda yes: 'Yes' if yes else 'No'
  head = KIND + ''.join(
    f'Task: {t.instruction}\nLabels: {answer(t.classification)}\n\n' for t in _mixed(examples)
  )
  asked = [f'{head}Task: {text}\nLabels:' for text in candidates]
  kinds = [text.strip().lower().startswith('yes') for text in write(asked, keys[0])]
  prompts = [_request(examples, text, kind) for text, kind in zip(candidates, kinds, strict=True)]
  made, refused = [], collections.Counter()
  for text, kind, said in zip(candidates, kinds, write(prompts, keys[1]), strict=True):
    found = list(_labelled(said) if kind else _paired(said))
    kept = consistent(found)
    refused['instance'] += len(found) - len(kept)
    if kept:
      made.append(Task(text, kind, tuple(kept)))
    else:
      refused['no instance'] += 1
  return made, {name: count for name, count in refused.items() if count}


def _mixed(examples: Sequence[Task], each: int = 4) -> list[Task]:
  yes = [t for t in examples if t.classification][:each]
  no = [t for t in examples if not t.classification][:each]
  return [t for pair in zip(yes, no, strict=False) for t in pair] or (yes or no)


def _request(examples: Sequence[Task], instruction: str, kind: bool, count: int = 4) -> str:
  """The few-shot request for instances: input first, or label first for classifications."""
  shown = [t for t in examples if t.classification == kind][:count]
  blocks = []
  for task in shown:
    lines = [f'Task: {task.instruction}\n']
    for given, said in task.instances[:2]:
      given, said = ' '.join(given.split()), said.strip()
      lines.append(
        f'Label: {said}\nInput: {given}\n'
        if kind
        else f'Input: {given or "none"}\nOutput: {said}\n'
      )
    blocks.append(''.join(lines) + '\n')
  first = 'Label:' if kind else 'Input:'
  return (OUTPUT_FIRST if kind else INPUT_FIRST) + ''.join(blocks) + f'Task: {instruction}\n{first}'


def _paired(text: str) -> Iterator[tuple[str, str]]:
  for part in re.split(r'^Input:', text.partition('\nTask:')[0], flags=re.M):
    given, found, said = part.partition('\nOutput:')
    if found:
      given = given.strip()
      yield '' if given.lower().rstrip('.') in ('none', 'n/a') else given, said.strip()


def _labelled(text: str) -> Iterator[tuple[str, str]]:
  for part in re.split(r'^Label:', text.partition('\nTask:')[0], flags=re.M):
    label, found, given = part.partition('\nInput:')
    if found:
      yield given.strip(), label.strip()


def consistent(found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
  """Instances with an output that is not their input, each once, and none of those with one input and two outputs."""
  outputs = collections.defaultdict(set)
  for given, said in found:
    outputs[given].add(said)
  good = lambda given, said: said and said != given and len(outputs[given]) == 1
  return list(dict.fromkeys(pair for pair in found if good(*pair)))


def records(tasks: Sequence[Task]) -> Records:
  """One record per instance, in Alpaca's form: instruction, input, output."""
  return [
    dict(instruction=task.instruction, input=given, output=said)
    for task in tasks
    for given, said in task.instances
  ]
