"""Every endpoint as OpenAI's own client sees it, in front of an engine whose answers are known."""

import base64

import numpy as np
import openai
import pytest

from llm_jax.decode.logits import Sampling
from tests.serve import fake
from tests.serve.conftest import serving, until

USER = [dict(role='user', content='say:To be, or not to be — that is the question.')]
LINE = 'To be, or not to be — that is the question.'


def streamed(client, **asked):
  """A chat completion put together from its stream: one dict per choice, and the usage."""
  found, usage = {}, None
  chunks = client.create(**asked, stream=True, stream_options=dict(include_usage=True))
  for chunk in chunks:
    usage = chunk.usage or usage
    for choice in chunk.choices:
      own = found.setdefault(choice.index, dict(text='', tokens=[], calls=[], end=None))
      if hasattr(choice, 'delta'):
        own['text'] += choice.delta.content or ''
        own['calls'] += [
          (c.function.name, c.function.arguments) for c in choice.delta.tool_calls or ()
        ]
        own['tokens'] += (choice.logprobs and choice.logprobs.content) or []
      else:
        own['text'] += choice.text
        own['tokens'] += zip(*choice.logprobs.model_dump().values()) if choice.logprobs else []
      assert own['end'] is None
      own['end'] = choice.finish_reason
  return [found[i] for i in sorted(found)], usage


def whole(client, **asked):
  """The same of a response that was not streamed."""
  answer, found = client.create(**asked), []
  for choice in answer.choices:
    if hasattr(choice, 'message'):
      calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
      text, tokens = (
        choice.message.content or '',
        (choice.logprobs and choice.logprobs.content) or [],
      )
    else:
      text, calls = choice.text, []
      tokens = list(zip(*choice.logprobs.model_dump().values())) if choice.logprobs else []
    found.append(dict(text=text, tokens=tokens, calls=calls, end=choice.finish_reason))
  return found, answer.usage


# --- chat ---------------------------------------------------------------------------------------------


def test_a_conversation_is_written_by_the_template_and_answered(served):
  said = [
    dict(role='developer', content='Be short.'),
    dict(role='user', content=[dict(type='text', text='one '), dict(type='text', text='two')]),
    dict(role='assistant', content='three'),
    *USER,
  ]
  answer = served.ai.chat.completions.create(model='fake', messages=said)
  choice = answer.choices[0]
  assert (choice.message.role, choice.message.content, choice.finish_reason) == (
    'assistant',
    LINE,
    'stop',
  )
  text = (
    '<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\none two<|im_end|>\n'
    f'<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\n{USER[0]["content"]}<|im_end|>\n'
    '<|im_start|>assistant\n'
  )
  assert served.engine.requests[-1].prompt == tuple(served.engine.words.encode(text))
  prompt, made = len(text.encode()), len(LINE.encode()) + 1  # and the token that ends it
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
    prompt,
    made,
    prompt + made,
  )


@pytest.mark.parametrize(
  'more',
  [
    {},
    dict(n=3, temperature=1.0, seed=5, max_tokens=40, messages=[dict(role='user', content='hm')]),
    dict(logprobs=True, top_logprobs=3),
    dict(stop=['be —', 'not'], logprobs=True),
    dict(stop='question.x'),
    dict(max_completion_tokens=24, logprobs=True),
    dict(messages=[dict(role='user', content='say:')]),
  ],
  ids=str,
)
def test_a_stream_says_what_the_whole_answer_says(served, more):
  asked = dict(dict(model='fake', messages=USER), **more)
  client = served.ai.chat.completions
  assert streamed(client, **asked) == whole(client, **asked)


@pytest.mark.parametrize(
  'more',
  [
    dict(prompt='hm', seed=1, n=2),
    dict(prompt=['hm', 'say:é — ü'], logprobs=2, echo=True, seed=1),
    dict(prompt='say:one, two', stop=', ', logprobs=0),
    dict(prompt='hm', echo=True, max_tokens=0, logprobs=1),
  ],
  ids=str,
)
def test_a_stream_of_a_completion_too(served, more):
  asked = dict(model='fake', **more)
  assert streamed(served.ai.completions, **asked) == whole(served.ai.completions, **asked)


def test_logprobs_are_the_engines(served):
  asked = dict(model='fake', messages=[dict(role='user', content='say:né')])
  found = served.ai.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
  tokens = found.choices[0].logprobs.content
  ids = served.engine.words.encode('né')
  assert [t.logprob for t in tokens] == [-0.1 - i % 10 / 10 for i in ids]
  assert [t.token for t in tokens] == ['n', '\ufffd', '\ufffd']
  assert [t.bytes for t in tokens] == [[110], None, None]  # a part of a character has no text
  assert [(a.token, a.logprob) for a in tokens[0].top_logprobs] == [('n', -0.1), ('o', -1.1)]


def test_settings_reach_the_engine(served):
  own = dict(
    top_k=7, min_p=0.1, typical=0.9, epsilon=1e-3, eta=1e-4, repetition=1.2, no_repeat_ngram=3
  )
  served.ai.chat.completions.create(
    model='fake', messages=USER, temperature=0.5, top_p=0.9, presence_penalty=0.3, frequency_penalty=-0.2,
    logit_bias={'70': 5, '71': -100}, seed=11, max_tokens=9, top_logprobs=4, logprobs=True, extra_body=own,
  )  # fmt: skip
  asked = served.engine.requests[-1]
  assert asked.sampling == Sampling(temperature=0.5, top_p=0.9, presence=0.3, frequency=-0.2, **own)
  assert asked.bias == ((70, 5.0), (71, -100.0)) and (asked.seed, asked.max_new, asked.top) == (
    11,
    9,
    4,
  )
  served.ai.chat.completions.create(model='fake', messages=USER)
  asked = served.engine.requests[-1]
  assert asked.sampling == Sampling() and asked.max_new == served.engine.length - len(asked.prompt)


def test_one_seed_one_answer(served):
  ask = lambda **more: whole(
    served.ai.completions, **dict(dict(model='fake', prompt='hm', max_tokens=40), **more)
  )[0]
  assert ask(seed=3) == ask(seed=3) != ask(seed=4)
  assert ask(seed=3, n=2)[0] == ask(seed=3)[0] != ask(seed=3, n=2)[1]
  assert ask(seed=3, prompt=['no', 'hm'])[1] == ask(seed=3)[0]  # whoever stands beside it
  assert ask(seed=3, temperature=0) == ask(seed=4, temperature=0)
  assert ask() != ask()
  assert ask(seed=-1) == ask(seed=-1)


# --- completions --------------------------------------------------------------------------------------


def test_prompts_of_all_kinds(served):
  words = served.engine.words
  ask = lambda prompt: [
    c.text
    for c in served.ai.completions.create(model='fake', prompt=prompt, n=2, max_tokens=99).choices
  ]
  assert ask('say:abc') == ['abc'] * 2
  assert ask(['say:abc', 'say:de']) == ['abc'] * 2 + ['de'] * 2
  assert ask(words.encode('say:abc')) == ['abc'] * 2
  assert ask([words.encode('say:abc'), words.encode('say:x')]) == ['abc'] * 2 + ['x'] * 2
  start = served.engine.requests[-1].prompt[0]
  assert start == words.start == 0  # in front of every prompt, as in training


def test_echo_scores_the_prompt(served):
  found = served.ai.completions.create(
    model='fake', prompt='say:hey', echo=True, logprobs=1, max_tokens=0
  )
  choice = found.choices[0]
  assert (choice.text, choice.finish_reason, found.usage.completion_tokens) == (
    'say:hey',
    'length',
    0,
  )
  assert choice.logprobs.tokens == list('say:hey') and choice.logprobs.text_offset == list(range(7))
  ids = served.engine.words.encode(
    'say:hey'
  )  # what the fake says of a prompt; the start token is not shown
  assert choice.logprobs.token_logprobs == [-0.25 * (i % 8) for i in ids]
  found = served.ai.completions.create(model='fake', prompt='say:hey', echo=True, logprobs=1)
  logprobs = found.choices[0].logprobs
  assert found.choices[0].text == 'say:heyhey' and logprobs.tokens == list('say:heyhey')
  assert logprobs.text_offset == list(range(10)) and logprobs.top_logprobs[-1] == {'y': -0.1}


def test_best_of_keeps_the_likeliest_per_token(served):
  asked = dict(model='fake', prompt='hm', max_tokens=5, seed=9, logprobs=0)
  every = served.ai.completions.create(n=6, **asked).choices
  ranked = sorted(every, key=lambda c: np.mean(c.logprobs.token_logprobs), reverse=True)
  best = served.ai.completions.create(n=2, best_of=6, **asked)
  assert [c.text for c in best.choices] == [c.text for c in ranked[:2]]
  assert best.usage.completion_tokens == 30


# --- stop strings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'stop, text',
  [('that', 'To be, or not to be — '), (['zzz', '— t'], 'To be, or not to be '), ('To', '')],
)
def test_a_stop_string_may_lie_across_tokens(served, stop, text):
  """Every token here is a byte."""
  before = served.engine.cancelled
  answer = served.ai.chat.completions.create(model='fake', messages=USER, stop=stop, logprobs=True)
  choice = answer.choices[0]
  assert (choice.message.content, choice.finish_reason) == (text, 'stop')
  shown = bytes(b for t in choice.logprobs.content for b in t.bytes or ())
  assert shown == text.encode().replace('—'.encode(), b'')  # not the tokens of the stop string
  assert served.engine.cancelled == before + 1  # the engine need not go on


def test_the_beginning_of_a_stop_string_is_given_out_if_nothing_comes_of_it(served):
  for asked in (dict(stop='question.!'), dict(stop='questions')):
    answer = served.ai.chat.completions.create(model='fake', messages=USER, **asked)
    assert answer.choices[0].message.content == LINE


# --- the others ---------------------------------------------------------------------------------------


def test_embeddings_are_the_engines_in_both_encodings(served):
  words = served.engine.words
  expected = served.engine.embed([[0, *words.encode(t)] for t in ('a', 'bc')])
  create = served.ai.embeddings.create
  for form in ('float', 'base64'):
    found = create(model='fake', input=['a', 'bc'], encoding_format=form)
    rows = [d.embedding for d in found.data]
    if form == 'base64':
      rows = [np.frombuffer(base64.b64decode(r), '<f4') for r in rows]
    np.testing.assert_array_equal(np.array(rows, np.float32), expected)
    assert found.usage.prompt_tokens == 5
  assert create(model='fake', input='a').data[0].embedding == expected[0].tolist()
  found = create(model='fake', input=[words.encode('a'), words.encode('bc')]).data
  np.testing.assert_array_equal([d.embedding for d in found], expected.tolist())


def test_models(served):
  (found,) = served.ai.models.list()
  assert found.id == 'fake' and served.ai.models.retrieve('fake').id == 'fake'
  assert (found.chat, found.length) == (True, 512)
  with pytest.raises(openai.NotFoundError, match='no model'):
    served.ai.models.retrieve('gpt-4')


def test_a_model_without_a_template_completes_and_does_not_converse():
  with serving(words=fake.words(None)) as served:
    with pytest.raises(openai.BadRequestError, match='/v1/completions'):
      served.ai.chat.completions.create(model='fake', messages=USER)
    found = served.ai.completions.create(model='fake', prompt='say:x')
    assert found.choices[0].text == 'x'
    assert next(iter(served.ai.models.list())).chat is False


def test_health_and_metrics(served):
  assert served.http.get('/health').json() == dict(status='ok')
  assert served.http.get('/ready').json() == dict(status='ready')

  def read():
    lines = served.http.get('/metrics').text.splitlines()
    return {k: float(v) for k, _, v in (x.rpartition(' ') for x in lines if x[0] != '#')}

  before = read()
  served.ai.completions.create(model='fake', prompt='say:abc')
  list(served.ai.completions.create(model='fake', prompt='say:abc', stream=True))
  until(lambda: read()['llm_jax_open_requests'] == 1)  # that which asks
  after = read()
  gained = lambda name: after[name] - before.get(name, 0)
  assert gained('llm_jax_requests_total{route="/v1/completions",status="200"}') == 2
  assert (
    gained('llm_jax_engine_tokens_total') == 8
    and gained('llm_jax_engine_prompt_tokens_total') == 16
  )
  assert gained('llm_jax_first_piece_seconds_count') == 1
  assert after['llm_jax_engine_blocks_used'] == after['llm_jax_engine_running'] == 0
  assert after['llm_jax_engine_blocks'] == 512 and 'llm_jax_engine_blocks_total' not in after


def test_the_document_says_what_may_be_sent(served):
  document = served.http.get('/openapi.json').json()
  assert set(document['paths']) >= {'/v1/chat/completions', '/v1/completions', '/v1/embeddings'}
  for path in document['paths'].values():
    for operation in path.values():
      assert '422' not in operation['responses'] and '400' in operation['responses']
  fields = document['components']['schemas']['Chat']['properties']
  assert fields['top_k']['description'] and 'response_format' in fields
