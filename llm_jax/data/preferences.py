r"""Public formats of preference data: pairs of a better and a worse answer, rankings, and steps with ratings.

    for record in records.read('hh/*.jsonl.gz'):
      for pair in preferences.hh_rlhf(record):
        ...

As in `formats.py` a format is a function of one record, and what is missing raises `UserError` with file and line. All
answers of a prompt are messages: usually one of the assistant, more where two dialogues part earlier.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.data import formats, records
from llm_jax.data.records import Record

Messages = list[dict[str, str]]


class Ranking(NamedTuple):
  """Several answers to one prompt, the best first.

  prompt: messages, the last by the user. answers: for each the messages that follow. scores: of the answers,
  descending, () where only the order is known. id: of the comparison, None for none. where: 'FILE:LINE'.
  """

  prompt: Messages
  answers: list[Messages]
  scores: tuple[float, ...]
  id: str | None
  where: str


class Pair(NamedTuple):
  """A ranking of two. margin: how much better `chosen` is, in the data's own unit; chance: that it is better at all
  (a soft label, such as of `constitutional.label`), 0.5 to 1; both None where nobody said."""

  prompt: Messages
  chosen: Messages
  rejected: Messages
  margin: float | None
  id: str | None
  where: str
  chance: float | None = None


class Steps(NamedTuple):
  """A solution step by step. ratings: of each step 1 good, 0 neutral, -1 bad. told: other fields, for instance the
  right answer."""

  prompt: Messages
  steps: list[str]
  ratings: list[int]
  told: dict[str, Any]
  where: str


def hh_rlhf(record: Record) -> list[Pair]:
  r"""{chosen, rejected}: whole dialogues as '\n\nHuman: ... \n\nAssistant: ...' (Bai et al. 2022, arXiv:2204.05862).

  They share all but the last answer; in a few the last exchanges differ.
  """
  sides = [_dialogue(record, key) for key in ('chosen', 'rejected')]
  return [_pair(*sides, None, None, record.where)]


def shp(record: Record) -> list[Pair]:
  """{history, human_ref_A, human_ref_B, labels (1: A is better), score_ratio, post_id, c_root_id_A, c_root_id_B}
  (Stanford Human Preferences; Ethayarajh et al. 2022). The margin is the ratio of the two scores."""
  prompt = _asked(records.text(record, 'history'))
  a, b = (_answer(records.text(record, key)) for key in ('human_ref_A', 'human_ref_B'))
  label = records.need(record, 'labels', int)
  ratio = _number(record, 'score_ratio')
  names = ('post_id', 'c_root_id_A', 'c_root_id_B')
  known = [str(record.fields[name]) for name in names if record.fields.get(name) is not None]
  better, worse = (a, b) if label == 1 else (b, a)
  return [
    _pair(
      prompt + better, prompt + worse, ratio, '/'.join(known) or None, record.where, len(prompt)
    )
  ]


def chosen_rejected(record: Record) -> list[Pair]:
  """{prompt, chosen, rejected} (UltraFeedback and what follows it): the two are texts, or lists of {role, content} with
  or without the prompt's messages. `score_chosen` and `score_rejected` give the margin, `chance` is what it says,
  `prompt_id` or `id` is the id."""
  asked = record.fields.get('prompt')
  prompt = _asked(asked) if isinstance(asked, str) and asked.strip() else []
  sides = []
  for key in ('chosen', 'rejected'):
    if isinstance(record.fields.get(key), list):
      said = formats.turns(record, key)
      given = prompt if said and said[0]['role'] == 'assistant' else []
      sides.append(formats.checked([*given, *said], record.where).messages)
    else:
      sides.append((prompt or _missing(record, 'prompt')) + _answer(records.text(record, key)))
  scores = [_number(record, f'score_{key}') for key in ('chosen', 'rejected')]
  margin = None if None in scores else scores[0] - scores[1]
  chance = _number(record, 'chance')
  if chance is not None and not 0.5 <= chance <= 1:
    raise UserError(
      f"{record.where}: 'chance' is {chance}: choose 0.5 to 1, or turn the pair round"
    )
  made = _pair(*sides, margin, _id(record, 'prompt_id', 'id'), record.where)
  return [made._replace(chance=chance)]


def alpaca(record: Record) -> list[Pair]:
  """{instruction, input, chosen, rejected} (LLMs-from-scratch, chapter 7)."""
  given = records.need(record, 'input') if record.fields.get('input') is not None else ''
  asked = records.text(record, 'instruction')
  sides = [
    formats.task(asked, given, records.text(record, key), record.where).messages
    for key in ('chosen', 'rejected')
  ]
  return [_pair(*sides, None, _id(record, 'id'), record.where)]


def ultrafeedback(record: Record) -> list[Ranking]:
  """{instruction, completions: [{response, overall_score}, ...]} (Cui et al. 2023, arXiv:2310.01377)."""
  prompt = _asked(records.text(record, 'instruction'))
  scored = [
    (float(records.need(one, 'overall_score', float)), records.text(one, 'response'))
    for one in records.inner(record, 'completions')
  ]
  return _ranking(prompt, scored, _id(record, 'id'), record.where)


def stack_exchange(record: Record) -> list[Ranking]:
  """{qid, question, answers: [{text, pm_score}, ...]} (Askell et al. 2021, arXiv:2112.00861, section 4.1)."""
  prompt = _asked(records.text(record, 'question'))
  scored = [
    (float(records.need(one, 'pm_score', float)), records.text(one, 'text'))
    for one in records.inner(record, 'answers')
  ]
  return _ranking(prompt, scored, _id(record, 'qid'), record.where)


def oasst(record: Record) -> list[Ranking]:
  """A message tree of OpenAssistant: the ranked answers to every message of a user, with what came before it."""
  found: list[Ranking] = []

  def walk(path: Messages, message: Record) -> None:
    role = formats.ROLES.get(records.need(message, 'role'), '')
    path = [*path, dict(role=role, content=records.text(message, 'text'))]
    replies = formats.replies(message)
    if role == 'user':
      scored = [
        (-float(rank), records.text(reply, 'text'))
        for reply in replies
        if (rank := reply.fields.get('rank')) is not None
      ]
      where = f'{record.where} after message {len(path)}'
      ranked = _ranking(path, scored, _id(message, 'message_id'), where)
      found.extend(one._replace(scores=()) for one in ranked)
    for reply in replies:
      walk(path, reply)

  walk([], formats.root(record))
  return found


def prm800k(record: Record) -> list[Steps]:
  """{question: {problem, ground_truth_answer}, label: {steps: [{completions: [{text, rating}], chosen_completion,
  human_completion}]}} (Lightman et al. 2023, arXiv:2305.20050): the solution along the steps that were chosen.

  Where none was, it ends with the first completion, the one that was found wrong; a step nobody rated ends it before.
  """
  question = Record(records.need(record, 'question', dict), f'{record.where} question')
  label = Record(records.need(record, 'label', dict), f'{record.where} label')
  steps, ratings = [], []
  for step in records.inner(label, 'steps'):
    chosen = step.fields.get('chosen_completion')
    human = step.fields.get('human_completion')
    options = records.inner(step, 'completions') if step.fields.get('completions') else []
    if chosen is None and isinstance(human, dict):
      one = Record(human | dict(rating=human.get('rating', 1)), step.where)
    elif options and (chosen or 0) < len(options):
      one = options[chosen or 0]
    else:
      break
    if one.fields.get('rating') is None:
      break
    steps.append(records.text(one, 'text'))
    ratings.append(records.need(one, 'rating', int))
    if chosen is None and not isinstance(human, dict):
      break
  if not steps:
    return []
  told = dict(answer=question.fields.get('ground_truth_answer'))
  return [Steps(_asked(records.text(question, 'problem')), steps, ratings, told, record.where)]


def pairs_of(ranking: Ranking) -> list[Pair]:
  """All pairs of a ranking, K (K - 1) / 2 of them where no two score the same (InstructGPT; Ouyang et al. 2022,
  arXiv:2203.02155, section 3.5)."""
  scores = ranking.scores or tuple(range(len(ranking.answers), 0, -1))
  found = []
  for i, j in itertools.combinations(range(len(ranking.answers)), 2):
    if scores[i] > scores[j]:
      margin = float(scores[i] - scores[j]) if ranking.scores else None
      name = None if ranking.id is None else f'{ranking.id}/{i}-{j}'
      better, worse = ranking.answers[i], ranking.answers[j]
      found.append(Pair(ranking.prompt, better, worse, margin, name, ranking.where))
  return found


def ranking_of(pair: Pair) -> Ranking:
  """A pair as a ranking of two."""
  return Ranking(pair.prompt, [pair.chosen, pair.rejected], (), pair.id, pair.where)


def check_unique(found: Iterable[Pair | Ranking]) -> None:
  """Raises `UserError` with both places where two comparisons have one id."""
  seen: dict[str, str] = {}
  for one in found:
    if one.id is not None and one.id in seen:
      raise UserError(
        f'{one.where}: the id {one.id!r} is that of {seen[one.id]} too: remove one of the two'
      )
    if one.id is not None:
      seen[one.id] = one.where


def _dialogue(record: Record, key: str) -> Messages:
  """Turns of '\n\nHuman:' and '\n\nAssistant:'; what somebody says twice in a row is one turn."""
  said = re.split(r'\n\n(Human|Assistant):', records.text(record, key))
  if said[0].strip() or len(said) < 3:
    raise UserError(f'{record.where}: {key!r} does not begin with "\\n\\nHuman:"')
  turns: Messages = []
  for name, content in zip(said[1::2], said[2::2], strict=True):
    role = 'user' if name == 'Human' else 'assistant'
    if turns and turns[-1]['role'] == role:
      turns[-1]['content'] = f'{turns[-1]["content"]}\n\n{content.strip()}'.strip()
    else:
      turns.append(dict(role=role, content=content.strip()))
  try:
    return formats.checked(turns, record.where).messages
  except UserError as e:
    raise UserError(f'{e} in {key!r}') from e


def _pair(
  chosen: Messages,
  rejected: Messages,
  margin: float | None,
  name: str | None,
  where: str,
  shared: int | None = None,
) -> Pair:
  """shared: messages of the prompt; None for all that both sides begin with, up to one of the user."""
  if shared is None:
    same = itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    shared = len(list(same))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared and chosen[shared - 1]['role'] != 'user':
      shared -= 1
  if not shared:
    raise UserError(f"{where}: 'chosen' and 'rejected' answer different prompts")
  for key, side in (('chosen', chosen), ('rejected', rejected)):
    if side[-1]['role'] != 'assistant':
      raise UserError(f'{where}: {key!r} does not end with an answer of the assistant')
  if chosen[shared:] == rejected[shared:]:
    raise UserError(f"{where}: 'chosen' and 'rejected' are the same text")
  return Pair(chosen[:shared], chosen[shared:], rejected[shared:], margin, name, where)


def _ranking(
  prompt: Messages, scored: Sequence[tuple[float, str]], name: str | None, where: str
) -> list[Ranking]:
  """Nothing where fewer than two answers can be compared."""
  order = sorted(scored, key=lambda one: -one[0])
  if len({score for score, _ in order}) < 2:
    return []
  answers = [_answer(text) for _, text in order]
  return [Ranking(prompt, answers, tuple(score for score, _ in order), name, where)]


def _asked(text: str) -> Messages:
  return [dict(role='user', content=text)]


def _answer(text: str) -> Messages:
  return [dict(role='assistant', content=text)]


def _id(record: Record, *keys: str) -> str | None:
  return next((str(record.fields[k]) for k in keys if record.fields.get(k) is not None), None)


def _number(record: Record, key: str) -> float | None:
  return None if record.fields.get(key) is None else float(records.need(record, key, float))


def _missing(record: Record, key: str) -> Any:
  records.text(record, key)
  raise UserError(f'{record.where}: {key!r} is empty')
