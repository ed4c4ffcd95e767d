"""Conversations as ids and masks, against transformers and the published templates.

The oracle lies in `templates.json.gz` and was written by `make_templates.py`; LLM_JAX_REFERENCE names a folder with a
fresh one (`make parity`).
"""

import gzip
import json
import os
import pathlib

import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import chat, formats, records, templates, tokenizer, vocab

FOLDER = os.environ.get('LLM_JAX_REFERENCE') or os.path.dirname(__file__)
STORED = json.loads(gzip.decompress((pathlib.Path(FOLDER) / 'templates.json.gz').read_bytes()))
ROLES = dict(bos=3, eos=2)
QUESTION, ANSWER = dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')
SYSTEM = dict(role='system', content='S.')
TALK = [QUESTION, ANSWER, dict(role='user', content='Bye'), dict(role='assistant', content='OK')]
BYTES = vocab.bytes_(extra_ids=0, modes=())


def words(name=None, roles=ROLES):
  template = name and STORED['templates'][name]
  return tokenizer.Tokenizer(STORED['tokenizer'], roles=roles, template=template)


@pytest.mark.parametrize('name', STORED['templates'])
def test_ids_and_masks_are_those_of_transformers(name):
  made = words(name)
  cases = [case for case in STORED['cases'] if case['template'] == name]
  assert len(cases) == 50
  for case in cases:
    ids, weights = templates.encode(made, case['messages'])
    assert ids.tolist() == case['ids']
    assert weights.tolist() == case['mask'] and weights.any()
    before = case['messages'][: len(case['messages']) - 1]
    assert templates.prompt(made, before) == case['prompt'] == case['ids'][: len(case['prompt'])]


def shown(template, messages, **kw):
  spelling = dict(bos_token='<s>', eos_token='</s>')
  given = type('Words', (), dict(template=template, spelling=spelling))
  return chat.render(given, messages, **kw)


TASK = 'Below is an instruction that describes a task'
REQUEST = 'Write a response that appropriately completes the request.'
POLITE = (
  'A chat between a curious user and an artificial intelligence assistant. '
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PUBLISHED = {
  # FastChat's get_conv_template('vicuna_v1.1').get_prompt()
  'vicuna': f'<s>{POLITE} USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT: OK</s>',
  # llama/generation.py of LLaMA 2
  'llama2': '<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST] OK </s>',
  'chatml': '<s><|im_start|>user\nHi</s>\n<|im_start|>assistant\nHello.</s>\n'
  '<|im_start|>user\nBye</s>\n<|im_start|>assistant\nOK</s>\n',
  # section 5.1.4 of the survey
  'survey': '<s>The following is a conversation between a human and an AI assistant. The AI assistant gives helpful, '
  "detailed, and polite answers to the user's questions."
  '\n[|Human|]:Hi\n[|AI|]:Hello.</s>\n[|Human|]:Bye\n[|AI|]:OK</s>',
  'alpaca': f'<s>{TASK}. {REQUEST}\n\n### Instruction:\nHi\n\n### Response:Hello.</s>'
  '\n\n### Instruction:\nBye\n\n### Response:OK</s>',
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_templates_are_as_published(name):
  assert shown(templates.ALL[name], TALK, add_generation_prompt=False) == PUBLISHED[name]
  first = shown(templates.ALL[name], TALK[:1])
  assert PUBLISHED[name].startswith(first) and PUBLISHED[name][len(first) :].lstrip()[:5] == 'Hello'


def test_the_system_message_has_its_place():
  with_system = [SYSTEM, *TALK[:2]]
  assert shown(templates.LLAMA2, with_system) == (
    '<s>[INST] <<SYS>>\nS.\n<</SYS>>\n\nHi [/INST] Hello. </s>'
  )
  assert shown(templates.VICUNA, with_system) == '<s>S. USER: Hi ASSISTANT: Hello.</s>'
  assert shown(templates.SURVEY, with_system).startswith('<s>S.\n[|Human|]:Hi\n[|AI|]:')
  named = templates.identify([QUESTION], 'Ada', 'us')
  assert named[0]['content'] == (
    'The following is a conversation between a human and an AI assistant called Ada, developed by us.'
  )
  assert named[1:] == [QUESTION]


def test_alpaca_shows_the_input_apart():
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  (first,) = formats.alpaca(records.read(path)[0])
  text = shown(templates.ALPACA, first.messages[:1])
  assert text == (
    f'<s>{TASK}, paired with an input that provides further context. {REQUEST}'
    '\n\n### Instruction:\nEvaluate the following phrase by transforming it into the spelling given.'
    '\n\n### Input:\nfreind --> friend\n\n### Response:'
  )


def test_a_base_model_is_shown_a_dialogue():
  text = shown(templates.DIALOGUE, TALK[:1])
  assert text.startswith('<s>The following is a conversation between a Human and a helpful, honest')
  assert text.endswith('\n\n[Human]\nHi\n\n[Assistant]\n')


@pytest.mark.parametrize('name', templates.ALL)
@pytest.mark.parametrize('made', [BYTES, words(), words(roles=ROLES | dict(start=3))])
def test_only_answers_and_their_ends_count(name, made):
  """The start is the model's own, or nothing; the prompt's ids begin the whole's; what counts is said and ended."""
  ids, weights = templates.encode(made, [SYSTEM, *TALK], templates.ALL[name])
  before = templates.prompt(made, [SYSTEM, *TALK[:3]], templates.ALL[name])
  assert before == ids[: len(before)].tolist()
  counted = [i for i, w in zip(ids.tolist(), weights, strict=True) if w]
  assert made.decode(counted).replace(' ', '').replace('\n', '') == 'Hello.OK'
  ends = counted.count(made.eos)
  assert ends == (0 if name == 'dialogue' else 2)
  if name != 'dialogue':
    assert counted[-1] == made.eos
  if made.start is None:
    assert words().roles['bos'] not in ids
  else:
    assert ids[0] == made.start


def test_what_came_before_carries_no_weight():
  whole, last = (templates.encode(BYTES, TALK, templates.VICUNA, first=n) for n in (0, 3))
  assert (whole.ids == last.ids).all() and 0 < last.weights.sum() < whole.weights.sum()
  assert BYTES.decode(last.ids[last.weights > 0]) == ' OK'


def test_templates_that_rewrite_the_past_are_refused():
  """Some drop the thoughts of earlier answers, so that no prefix of a conversation begins the whole."""
  template = (
    "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }}{% endfor %}"
  )
  with pytest.raises(UserError, match='otherwise once message 2 follows'):
    templates.encode(BYTES, TALK, template)
  with pytest.raises(UserError, match='U.E0F0'):
    templates.encode(BYTES, [dict(role='user', content='\ue0f1'), ANSWER], templates.VICUNA)
  with pytest.raises(UserError, match="no chat template 'alpacca'; did you mean 'alpaca'"):
    templates.named('alpacca')


@pytest.mark.parametrize('text', ['', 'a é 🙂 日本', ' [R]x<extra_id_0>é '])
def test_ids_know_their_characters(text, pieces):
  for made in (BYTES, vocab.bytes_(), pieces, words()):
    found = made.located(text)
    assert [i for i, _, _ in found] == made.encode(text)
    covered = set()
    for i, start, stop in found:
      covered |= set(range(start, stop))
      if len(made.decode([i])) == stop - start and '\ufffd' not in made.decode([i]):
        assert made.decode([i]) == text[start:stop]
    assert covered == set(range(len(text)))


PIECES = vocab.sentencepiece(
  vocab.text_of(['Hi there. Hello, who are you? ' * 9]), size=300, extra_ids=0, modes=()
)


@pytest.mark.parametrize('name', templates.ALL)
@pytest.mark.parametrize(
  'made', [BYTES, PIECES, words(), words(roles=ROLES | dict(start=3)), words('smollm2')]
)
def test_a_template_goes_where_the_vocabulary_goes(name, made, tmp_path):
  """What is learned with a named template is asked with the saved vocabulary's own, to the id."""
  taught = templates.learned(made, [templates.ALL[name]] * 2)
  taught.save(str(tmp_path))
  again = vocab.load(str(tmp_path))
  assert again.template == templates.ALL[name] and again.fingerprint == made.fingerprint
  for said in (TALK[:1], [SYSTEM, *TALK[:3]]):
    asked = templates.prompt(again, said)
    answered = [*said, ANSWER]
    ids, weights = templates.encode(made, answered, templates.ALL[name], first=len(said))
    assert (
      asked == ids[: len(asked)].tolist()
      and weights[len(asked)]
      and not weights[: len(asked)].any()
    )
    same, _ = templates.encode(again, answered)
    assert same.tolist() == ids.tolist()
  made.save(str(tmp_path))  # another run in the same folder
  assert vocab.load(str(tmp_path)).template == made.template


def test_the_prompt_of_a_template_of_ours_in_bytes():
  taught = templates.learned(BYTES, [templates.CHATML])
  text = '<|im_start|>user\nHi\x01\n<|im_start|>assistant\n'
  expected = [0, *(1 if letter == 1 else 3 + letter for letter in text.encode())]
  assert templates.prompt(taught, [QUESTION]) == expected
  with pytest.raises(UserError, match='U\\+E0F1'):
    templates.prompt(taught, [dict(role='user', content='Hi\ue0f1')])


def test_a_vocabulary_learns_one_template_or_none():
  own = words('smollm2')
  assert templates.learned(own, [None, templates.ALPACA]) is own
  assert templates.learned(own, [templates.VICUNA, templates.ALPACA]) is own
  assert templates.learned(own, [None]) is templates.learned(own, []) is own
  assert templates.learned(BYTES, [templates.ALPACA]).template == templates.ALPACA
  assert BYTES.template is None
