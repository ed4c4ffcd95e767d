r"""Chat templates, and conversations as ids with weights on what the assistant says.

A template is a Jinja program. A model's own tokenizer brings one; those below are for models without. All are rendered
by `chat.py`, and `encode` finds the assistant's tokens by rendering prefixes, so that it needs to know nothing of them:

    ids, weights = templates.encode(vocab, messages)                     # the tokenizer's own template
    ids, weights = templates.encode(vocab, messages, templates.ALPACA)

A template of ours begins with `{{ bos_token }}`, which is what the model reads before a text (`vocab.start`), or
nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import chat

# Alpaca (Taori et al. 2023), with and without an input; more turns follow in the same form.
ALPACA = (
  '{{ bos_token }}'
  "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
  '{% for message in messages %}'
  "{% if message['role'] == 'user' %}"
  "{% set own = message.get('instruction', message['content']) %}"
  "{% set given = message.get('input', '') %}"
  '{% if loop.first or (loop.index0 == 1 and system is not none) %}'
  '{% if system is not none %}{{ system }}'
  '{% elif given %}Below is an instruction that describes a task, paired with an input that provides further context. '
  'Write a response that appropriately completes the request.'
  '{% else %}Below is an instruction that describes a task. '
  'Write a response that appropriately completes the request.{% endif %}'
  '{% endif %}'
  "{{ '\n\n### Instruction:\n' + own }}"
  "{% if given %}{{ '\n\n### Input:\n' + given }}{% endif %}"
  "{{ '\n\n### Response:' }}"
  "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
  '{% endfor %}'
)

# Vicuna v1.1 (Chiang et al. 2023): the words of FastChat's conversation template `vicuna_v1.1`.
VICUNA = (
  '{{ bos_token }}'
  "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
  '{% else %}A chat between a curious user and an artificial intelligence assistant. '
  "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
  '{% for message in messages %}'
  "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
  "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
  '{% endfor %}'
)

# LLaMA 2 chat (Touvron et al. 2023, arXiv:2307.09288): the system message inside the first turn.
LLAMA2 = (
  "{% if messages[0]['role'] == 'system' %}"
  "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
  "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
  '{% for message in turns %}'
  "{% if message['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
  "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
  '{% endfor %}'
)

# ChatML (OpenAI 2023), whose end of a message is the end of a text; SmolLM2's own adds a system message.
CHATML = (
  '{{ bos_token }}'
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The survey's own prompt (Zhao et al., arXiv:2303.18223, section 5.1.4), of YuLan-Chat.
SURVEY = (
  '{{ bos_token }}'
  "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
  '{% else %}The following is a conversation between a human and an AI assistant. '
  "The AI assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
  '{% for message in messages %}'
  "{% if message['role'] == 'user' %}{{ '\n[|Human|]:' + message['content'] }}"
  "{% elif message['role'] == 'assistant' %}{{ '\n[|AI|]:' + message['content'] + eos_token }}{% endif %}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '\n[|AI|]:' }}{% endif %}"
)

# A dialogue that a base model goes on with as the assistant (Askell et al. 2021, arXiv:2112.00861, in a lecture's
# words).
DIALOGUE = (
  '{{ bos_token }}The following is a conversation between a Human and a helpful, honest and harmless AI Assistant.\n\n'
  "[Human]\nHi, how are you?\n\n[Assistant]\nI'm great, thank you for asking. How can I help you today?\n\n"
  '{% for message in messages %}'
  "{% if message['role'] == 'user' %}{{ '[Human]\n' + message['content'] + '\n\n' }}"
  "{% elif message['role'] == 'assistant' %}{{ '[Assistant]\n' + message['content'] + '\n\n' }}{% endif %}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '[Assistant]\n' }}{% endif %}"
)

_BOS, _EOS = '\ue0f0', '\ue0f1'  # how a vocabulary without spellings writes its start and its end


class Encoded(NamedTuple):
  """ids: int32 [n], all that is read and said. weights: f32 [n], 1 on what the assistant says and what ends it."""

  ids: np.ndarray
  weights: np.ndarray


ALL = dict(
  alpaca=ALPACA, vicuna=VICUNA, llama2=LLAMA2, chatml=CHATML, survey=SURVEY, dialogue=DIALOGUE
)


def named(name: str | None) -> str | None:
  """The template of that name; None, the tokenizer's own, for None."""
  if name is not None and name not in ALL:
    raise UserError(f'no chat template {name!r}; {nearest(name, ALL)}')
  return None if name is None else ALL[name]


def encode(
  vocab: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None, *, first: int = 0
) -> Encoded:
  """A conversation as ids, the same as of its whole text, and which of them are to be learned.

  template: None for the vocabulary's own. first: messages before this one carry no weight. Raises `UserError` when the
  text up to a message is not how the text of the whole begins (templates that rewrite what came before, for example by
  dropping earlier thoughts): then nobody can say which tokens are the answer's.
  """
  words = _words(vocab, template)
  _check(messages)
  text = chat.render(words, messages, add_generation_prompt=False)
  spans = []
  for i, message in enumerate(messages):
    if message['role'] == 'assistant' and i >= first:
      before = chat.render(words, messages[:i])
      after = chat.render(words, messages[: i + 1], add_generation_prompt=False)
      if not (text.startswith(after) and after.startswith(before)):
        raise UserError(
          f'the chat template writes the beginning of a conversation otherwise once message {i + 1} follows: train on '
          'single turns, or choose another template'
        )
      spans.append((len(before), len(after)))
  found = list(_located(vocab, words, text))
  ids = np.array([i for i, _, _ in found], np.int32)
  starts, stops = (np.array([one[k] for one in found], np.int64) for k in (1, 2))
  weights = np.zeros(len(ids), np.float32)
  ends = np.isin(ids, (vocab.eos, vocab.turn))
  for start, stop in spans:
    inside = (starts < stop) & (stops > start)
    last = np.flatnonzero(inside & ends)
    if (
      len(last) and not text[stops[last[-1]] : stop].strip()
    ):  # a line break after the end is not said
      inside[last[-1] + 1 :] = False
    weights[inside] = 1
  return Encoded(ids, weights)


def prompt(
  vocab: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None, **told: Any
) -> list[int]:
  """The ids after which the model answers, whose beginning is its own: generate with `start=None`. The answer ends with
  `vocab.turn`. told: what else the template may read.
  """
  words = _words(vocab, template)
  _check(messages)
  text = chat.render(words, messages, **told)
  if words.eos is None:
    return list(vocab.encode(text))
  return [i for i, _, _ in _located(vocab, words, text)]


def learned(vocab: Any, used: Collection[str | None]) -> Any:
  """The vocabulary with the template that a model is tuned with, so that it goes where the weights go.

  used: the templates of the data, None for the vocabulary's own. Of several none is the model's, so it keeps its own.
  """
  different = set(used)
  if len(different) != 1 or None in different:
    return vocab
  return vocab.taught(different.pop())


def identify(messages: Sequence[Mapping[str, Any]], name: str, developer: str) -> list[dict]:
  """The conversation after a system message that says who the assistant is (section 5.1.4 of the survey)."""
  said = (
    'The following is a conversation between a human and an AI assistant called '
    f'{name}, developed by {developer}.'
  )
  return [dict(role='system', content=said), *(m for m in messages if m['role'] != 'system')]


class _Words(NamedTuple):
  """What `chat.render` looks at. bos, eos: the ids that the two spellings stand for, None where they encode as such."""

  template: str | None
  spelling: dict[str, str]
  bos: int | None
  eos: int | None


def _words(vocab: Any, template: str | None) -> _Words:
  chosen = vocab.template if template is None else template
  if chosen is None or (chosen == vocab.template and chosen not in ALL.values()):
    return _Words(chosen, getattr(vocab, 'spelling', {}), None, None)
  bos = '' if vocab.start is None else _BOS
  return _Words(chosen, dict(bos_token=bos, eos_token=_EOS), vocab.start, vocab.turn)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
  said = (message.get('content') or '' for message in messages)
  if any(letter in text for text in said for letter in (_BOS, _EOS)):
    raise UserError(
      'a message holds U+E0F0 or U+E0F1, which stand for the start and the end of a text here: remove them'
    )


def _located(vocab: Any, words: _Words, text: str) -> list[tuple[int, int, int]]:
  """(id, start, stop): all ids of `text` and the characters each stands for."""
  if words.eos is None:
    return vocab.located(text)
  found, at = [], 0
  for stop, letter in [*((k, c) for k, c in enumerate(text) if c in (_BOS, _EOS)), (len(text), '')]:
    found += [(i, at + a, at + b) for i, a, b in vocab.located(text[at:stop])]
    if letter:
      found.append((words.bos if letter == _BOS else words.eos, stop, stop + 1))
    at = stop + 1
  return found
