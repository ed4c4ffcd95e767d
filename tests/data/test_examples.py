"""Instruction data as batches: against losses of the split conversations, SeqIO's rates, and counting."""

import functools
import json

import jax
import numpy as np
import pytest
import seqio

from llm_jax.data import batch as batch_lib
from llm_jax.data import examples, formats, stages, tasks, templates, vocab
from llm_jax.model import attention, block, ffn, norms, transformer
from llm_jax.objectives import language
from tests.data.conftest import model, says

TALKS = 60
WORDS = vocab.bytes_(extra_ids=0, modes=())


def words(text=None):
  return WORDS


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """TALKS conversations of one to three turns, whose answers say which they are."""
  file = tmp_path_factory.mktemp('talks') / 'talks.jsonl'
  say = lambda i, k: [
    dict(role='user', content=f'q{i}.{k}' + '?' * (i % 7)),
    dict(role='assistant', content=f'<{i}.{k}>' + '!' * (i * 5 % 11)),
  ]
  talks = [dict(messages=[m for k in range(1 + i % 3) for m in say(i, k)]) for i in range(TALKS)]
  file.write_text('\n'.join(map(json.dumps, talks)))
  return str(file)


def talks(path, **kw):
  told = dict(path=path, format=formats.messages, template='chatml', heldout=0.0)
  return functools.partial(examples.conversations, **told | kw)


def task(*sets, **kw):
  return functools.partial(examples.task, sets=sets, **dict(vocab=words) | kw)


def source(path, of=None, kind='causal', **kw):
  settings = dict(batch=4, length=256, task=task(of or talks(path)))
  return examples.make(model(kind), **settings | kw)


def answers(batch):
  """All texts that count, in the order of the rows."""
  text = [WORDS.decode(t[w > 0]) for t, w in zip(batch['targets'], batch['weights'], strict=True)]
  return [f'<{one}' for one in ''.join(text).split('<')[1:]]


def want(i):
  return [f'<{i}.{k}>' + '!' * (i * 5 % 11) for k in range(1 + i % 3)]


@pytest.mark.parametrize('rows', [batch_lib.pack, batch_lib.pad])
def test_one_pass_has_every_answer_once(path, rows):
  made = source(path, rows=rows)
  batches = list(made.once())
  found = [a for b in batches for a in answers(b)]
  assert sorted(found) == sorted(a for i in range(TALKS) for a in want(i))
  ends = sum(int(((b['targets'] == WORDS.eos) * b['weights']).sum()) for b in batches)
  assert ends == len(found)  # every answer is ended, and no question counts
  assert (len(batches) < 10) == (rows is batch_lib.pack)


def test_epochs_resumption_and_processes(path):
  make = functools.partial(source, path, length=160, seed=5)
  one, seen, states = make(), [], []
  for _ in range(48):
    states.append(json.loads(json.dumps(one.state())))
    seen.append(one())
  one.close()
  order = [int(a.split('.')[0][1:]) for b in seen for a in answers(b) if '.0>' in a]
  epochs = [order[:TALKS], order[TALKS : 2 * TALKS]]
  assert all(sorted(e) == list(range(TALKS)) for e in epochs) and epochs[0] != epochs[1]
  halves = [make(process_index=i, process_count=2) for i in range(2)]
  for k in (0, 9, 20):
    parts = []
    for half in halves:
      half.restore(states[k])
      parts.append(half())
    for name, value in seen[k].items():
      assert (np.concatenate([p[name] for p in parts]) == value).all()
  for half in halves:
    half.close()


@pytest.fixture(scope='module')
def tiny():
  """(model, parameters): two layers over the bytes."""
  layer = functools.partial(
    block.decoder,
    mixer=functools.partial(attention.SelfAttention, heads=2),
    ffn=functools.partial(ffn.Gated, hidden=24),
    norm=norms.RMSNorm,
    residual=norms.pre,
  )
  made = transformer.causal(vocab=WORDS.size, embed=16, layers=2, block=layer, length=512)
  return made, made.init(jax.random.key(0))


def total(tiny, batches):
  """(sum of losses, sum of weights) over batches."""
  score = jax.jit(lambda params, batch: language.next_token(tiny[0], params, batch, None))
  losses = [score(tiny[1], batch) for batch in batches]
  return sum(float(x.sum) for x in losses), sum(float(x.weight) for x in losses)


def test_many_turns_in_one_pass_are_the_turns_one_by_one(path, tiny):
  """Vicuna's way: sum over answers of -log p(answer | all before it)."""
  layout = batch_lib.Layout('causal', 256, 0, True, WORDS.first, WORDS.eos)
  split = batch_lib.empty(layout, 2 * TALKS)
  row = 0
  for one in examples.parsed(path, formats.messages, 0):
    for stop in range(2, len(one.messages) + 1, 2):
      encoded = templates.encode(WORDS, one.messages[:stop], templates.CHATML, first=stop - 1)
      (example,) = examples.of(encoded, layout, WORDS, one.where)
      batch_lib.put(split, layout, row, 1, 0, 0, example)
      row += 1
  assert row == 2 * TALKS  # one, two and three turns
  apart, once = total(tiny, [split]), total(tiny, source(path).once())
  assert apart[1] == once[1]
  np.testing.assert_allclose(once[0], apart[0], rtol=1e-5)


def test_packed_is_padded(path, tiny):
  """No token of a row looks at another conversation."""
  packed, padded = (
    total(tiny, source(path, rows=rows).once()) for rows in (batch_lib.pack, batch_lib.pad)
  )
  assert packed[1] == padded[1]
  np.testing.assert_allclose(packed[0], padded[0], rtol=1e-5)


def test_a_prefix_decoder_sees_the_first_prompt(path):
  batch = next(iter(source(path, kind='prefix', rows=batch_lib.pad).once()))
  for row in range(4):
    n = int(batch['prefix'][row].sum())
    assert batch['prefix'][row, :n].all() and not batch['weights'][row, : n - 1].any()
    assert batch['weights'][row, n - 1] == 1  # the last token of the prompt predicts the answer
    assert WORDS.decode(batch['inputs'][row, :n]).endswith('<|im_start|>assistant\n')


def test_an_encoder_reads_all_before_each_answer(path):
  made = source(path, kind='encoder_decoder', encoder_length=512, length=64, rows=batch_lib.pad)
  batches = list(made.once())
  found = []
  for batch in batches:
    for row in range(4):
      said = WORDS.decode(batch['targets'][row])
      if said:
        found.append(said)
        read = WORDS.decode(batch['encoder/inputs'][row])
        assert read.endswith('<|im_start|>assistant\n') and f'q{said[1:].split(">")[0]}' in read
        assert (batch['targets'][row] > 0).tolist() == (batch['weights'][row] > 0).tolist()
        assert batch['encoder/inputs'][row, 0] != 0  # the decoder has the start
  assert sorted(found) == sorted(a for i in range(TALKS) for a in want(i))


def test_long_conversations_lose_whole_turns(path, capsys):
  """At 100 slots only whole answers remain; what is left out is counted."""
  batches = list(source(path, length=100, rows=batch_lib.pad).once())
  found = [a for b in batches for a in answers(b)]
  every = {a for i in range(TALKS) for a in want(i)}
  assert set(found) <= every and len(found) == len(set(found)) < len(every)
  assert {a.split('.')[0][1:] for a in found} == {str(i) for i in range(TALKS)}
  told = capsys.readouterr().err
  cut = sum(f'<{i}.{i % 3}>' not in ''.join(found) for i in range(TALKS))
  assert f'{cut} of 60 conversations are too long and have lost their last turns' in told
  says(
    ('talks.jsonl:', 'prompt and answer have', 'do not fit', 'left_out=0.0'),
    lambda: source(path, of=talks(path, overlong=examples.whole), length=100),
  )
  says('talks.jsonl:1: the prompt alone has', lambda: source(path, length=30))
  kept = source(path, of=talks(path, overlong=examples.whole, left_out=0.7), length=100)
  assert all(len([a for a in answers(b) if '.1>' in a]) == 0 for b in kept.once())


def test_no_prompt_is_in_both_splits(path):
  found = examples.parsed(path, formats.messages, 0) * 2
  train, held = examples.held_out(found, 0.2)
  asked = [{c.messages[0]['content'] for c in part} for part in (train, held)]
  assert not asked[0] & asked[1] and len(train) + len(held) == 2 * TALKS
  many = [formats.task(f'question {i}', '', 'a', '') for i in range(4000)]
  share = len(examples.held_out(many, 0.2)[1]) / 4000
  assert abs(share - 0.2) < 3 * (0.2 * 0.8 / 4000) ** 0.5
  again = examples.held_out(list(reversed(many)), 0.2)[1]
  assert {c.messages[0]['content'] for c in again} == {
    c.messages[0]['content'] for c in examples.held_out(many, 0.2)[1]
  }


class Counted(seqio.Task):
  """A SeqIO task that is nothing but its number of examples."""

  cache_dir = 'somewhere'

  def __init__(self, examples):
    self.count = examples

  def get_cached_stats(self, split='train'):
    return dict(examples=self.count)


@pytest.mark.parametrize(
  ('maximum', 'temperature'), [(None, 1.0), (30_000, 1.0), (500, 2.0), (None, 3.5)]
)
def test_rates_are_those_of_seqio(maximum, temperature):
  sizes = (7, 400, 30_001, 2_000_000)
  rate = functools.partial(seqio.mixing_rate_num_examples, maximum=maximum, temperature=temperature)
  np.testing.assert_allclose(
    examples.proportional(sizes, maximum=maximum, temperature=temperature),
    [rate(Counted(n)) for n in sizes],
    rtol=1e-12,
  )


def test_sets_are_drawn_at_their_rates(path, tmp_path):
  """60 conversations and 12 tasks; the cap of 24 makes the draws 2 : 1."""
  few = tmp_path / 'tasks.jsonl'
  few.write_text(
    '\n'.join(json.dumps(dict(instruction=f'do {i}', output=f'<t{i}>')) for i in range(12))
  )
  sets = (talks(path), functools.partial(talks(str(few)), format=formats.alpaca))
  made = examples.make(
    model(), task=task(*sets, maximum=24), batch=4, length=256, rows=batch_lib.pad
  )
  drawn = [a for _ in range(90) for a in answers(made())]
  made.close()
  tasks_drawn = sum(a.startswith('<t') for a in drawn)
  talks_drawn = sum('.0>' in a for a in drawn)
  assert tasks_drawn + talks_drawn == 360 and abs(tasks_drawn - 120) <= 1
  says('one positive rate for each', lambda: task(*sets, rates=(1.0,))())


def test_plain_text_is_mixed_in(path):
  """All of it counts, and none of it lies within a conversation."""
  plain = functools.partial(
    examples.text, task=functools.partial(tasks.tiny_shakespeare, vocab=None)
  )
  made = examples.make(
    model(), task=task(talks(path), plain, rates=(0.75, 0.25)), batch=4, length=128
  )
  seen = [made() for _ in range(40)]
  made.close()
  text = conversation = 0
  for batch in seen:
    for row in range(4):
      for segment in range(1, batch['segments'][row].max() + 1):
        here = batch['segments'][row] == segment
        whole = bool(batch['weights'][row][here].all())
        text += whole
        conversation += not whole
        assert whole != ('im_start' in WORDS.decode(batch['targets'][row][here]))
  assert abs(text / (text + conversation) - 0.25) < 0.03
  says('nobody said how many examples', lambda: task(talks(path), plain)())


def test_stages_follow_one_another(path, tmp_path):
  other = tmp_path / 'tasks.jsonl'
  other.write_text(
    '{"instruction": "do", "output": "<task>"}\n{"instruction": "o", "output": "<task>"}'
  )
  first = functools.partial(
    examples.make, task=task(functools.partial(talks(str(other)), format=formats.alpaca))
  )
  second = functools.partial(examples.make, task=task(talks(path)))
  make = functools.partial(
    stages.make, model(), sources=(first, second), until=(3,), batch=4, length=256
  )
  made, kinds, states, seen = make(), [], [], []
  for _ in range(6):
    states.append(json.loads(json.dumps(made.state())))
    seen.append(made())
    kinds.append('<task>' in answers(seen[-1]))
  assert kinds == [True] * 3 + [False] * 3
  for k in (1, 3, 5):
    made.restore(states[k])
    assert all(
      (made()[name] == value).all() for name, value in seen[k].items() if name == 'targets'
    )
  made.close()
  for k in (2, 3, 5):
    fresh = make()
    fresh.skip(1)
    fresh.skip(k - 1)
    assert (fresh()['targets'] == seen[k]['targets']).all()
    fresh.close()
  assert '<0.0>' in {a for b in made.once() for a in answers(b)}
  says('ascending steps', lambda: make(until=(3, 2)))
  says('not the state of 2 stages', lambda: made.restore(dict(block=0, row=0, batch=0)))
  bytes_ = functools.partial(vocab.bytes_, extra_ids=1)
  odd = functools.partial(examples.make, task=task(talks(path), vocab=bytes_))
  says('different vocabularies', lambda: make(sources=(first, odd)))


def test_errors_name_file_and_line(path, tmp_path):
  lines = open(path).read().splitlines()

  def spoilt(line):
    file = tmp_path / 'bad.jsonl'
    file.write_text('\n'.join([*lines[:4], json.dumps(line), *lines[4:]]))
    return str(file)

  turn = lambda role, content: dict(role=role, content=content)
  for messages, message in (
    ([turn('user', 'q'), turn('assistant', ' ')], "bad.jsonl:5 messages[1]: 'content' is empty"),
    (
      [turn('user', 'q'), turn('user', 'q')],
      "message 2 is by 'user', where 'assistant' has its turn",
    ),
    ([turn('user', 'q'), dict(role='assistant')], "bad.jsonl:5 messages[1]: no key 'content'"),
    ([turn('user', 'q')], 'bad.jsonl:5: the conversation has no answer to learn'),
    ([turn('system', 'q')], 'bad.jsonl:5: the conversation is empty'),
    ('q', "bad.jsonl:5: 'messages' holds str, not a list"),
  ):
    says(message, lambda m=messages: source(spoilt(dict(messages=m))))
  bad = spoilt(dict(text='x'))
  says("bad.jsonl:5: no key 'messages' (it has: text)", lambda: source(bad))
  assert examples.parsed(bad, formats.messages, 1)
  says('are not windows of a stream', lambda: source(path, rows=batch_lib.concatenate))
  says('the validation split of', lambda: source(path, split='validation'))


@pytest.mark.parametrize('made', [examples.instructions, examples.seeds, examples.identity])
def test_the_bundled_sets(made):
  one = made(template='alpaca', left_out=0.02)
  whole = dict(instructions=1100, seeds=175, identity=500)[one.name]
  layout = batch_lib.Layout('causal', 2048, 0, True, WORDS.first, WORDS.eos)
  sizes = [one.open(WORDS, split, layout, 0).units for split in ('train', 'validation')]
  assert 0.98 * whole <= sum(sizes) <= whole and sizes[1] > 0


def test_an_assistant_gets_its_own_name():
  one = examples.identity(assistant='Ada', developer='Grace', heldout=0.0)
  text = ''.join(one.texts())
  assert 'Ada' in text and 'Grace' in text and 'Vicuna' not in text and 'LMSYS' not in text
