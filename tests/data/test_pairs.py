"""Sources of pairs, rankings, single answers and prompts: what lies in the rows, and that they come back the same."""

import functools
import json

import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.data import pairs, preferences, vocab
from tests.data.conftest import model, says

COMPARED = 37


def words(text=None):
  return vocab.bytes_(extra_ids=0, modes=())


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """COMPARED pairs whose texts say which they are; the margin is the number."""
  file = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
  lines = [
    dict(prompt=f'question {i}', chosen=f'good {i}', rejected=f'bad and longer {i}', id=i)
    | dict(score_chosen=i, score_rejected=0.0)
    for i in range(COMPARED)
  ]
  file.write_text('\n'.join(map(json.dumps, lines)))
  return str(file)


def data(path, heldout=0.0, template='vicuna', **kw):
  told = dict(path=path, format=preferences.chosen_rejected, heldout=heldout, template=template)
  return lambda: pairs.files(vocab=words, **told | kw)


def learned(batch, row, side=''):
  """The text of the targets that count."""
  keep = batch[f'{side}weights'][row] > 0
  return words().decode(batch[f'{side}targets'][row][keep])


def test_both_sides_of_a_pair_lie_in_one_row(path):
  source = pairs.pairs(model(), data=data(path), batch=4, length=240, shuffle=False)
  batch = source()
  source.close()
  for row in range(4):
    assert learned(batch, row, 'chosen/') == f' good {row}'
    assert learned(batch, row, 'rejected/') == f' bad and longer {row}'
    assert batch['margin'][row] == row and batch['margin'].dtype == np.float32
    for side in ('chosen', 'rejected'):
      part = {k.partition('/')[2]: v[row] for k, v in batch.items() if k.startswith(side)}
      n = int(part['segments'].sum())
      text = words().decode(part['targets'][:n])
      assert text.endswith(f'USER: question {row} ASSISTANT:' + learned(batch, row, f'{side}/'))
      assert part['inputs'][0] == 0 and (part['inputs'][1:n] == part['targets'][: n - 1]).all()
      assert part['targets'][n - 1] == words().eos and part['weights'][n - 1] == 1
      assert (part['positions'][:n] == np.arange(n)).all() and not part['targets'][n:].any()


def test_sources_say_how_many_texts_a_row_holds(path):
  told = dict(data=data(path), batch=4, length=240)
  made = pairs.pairs, functools.partial(pairs.rankings, answers=3), pairs.unpaired, pairs.prompts
  for make, texts in zip(made, (2, 3, 1, 1), strict=True):
    source = make(model(), **told)
    assert source.texts == texts
    batch = source()
    source.close()
    slots = sum(x.size for name, x in batch.items() if name.split('/')[-1] in ('inputs', 'prompts'))
    assert slots == texts * 4 * 240


def test_trimmed_batches_lose_padding_alone(path):
  told = dict(data=data(path), batch=4, length=240, shuffle=False)
  whole, short = (pairs.pairs(model(), **told, trim=trim).once() for trim in (None, 32))
  for a, b in zip(whole, short, strict=True):
    size = b['chosen/inputs'].shape[1]
    used = max(int(a[f'{side}/segments'].sum(1).max()) for side in ('chosen', 'rejected'))
    assert size % 32 == 0 and size - 32 < used <= size < 240
    for name, x in a.items():
      assert not x.ndim > 1 or not x[:, size:].any() or name.endswith('positions')
      np.testing.assert_array_equal(b[name], x[:, :size] if x.ndim > 1 else x)
  with pytest.raises(UserError, match='several processes'):
    pairs.pairs(model(), **told, trim=32, process_index=0, process_count=2)


def test_encoder_decoder_pairs_have_the_prompt_in_the_encoder(path):
  told = dict(batch=2, length=32, encoder_length=240, shuffle=False)
  source = pairs.pairs(model('encoder_decoder'), data=data(path), **told)
  batch = source()
  source.close()
  assert words().decode(batch['chosen/encoder/inputs'][1]).endswith('USER: question 1 ASSISTANT:')
  n = int(batch['chosen/weights'][1].sum())
  assert words().decode(batch['chosen/targets'][1]) == ' good 1'
  assert (batch['chosen/inputs'][1][1:n] == batch['chosen/targets'][1][: n - 1]).all()


def test_every_epoch_has_every_pair_and_resumes_anywhere(path):
  made = lambda **kw: pairs.pairs(model(), data=data(path), batch=4, length=240, seed=3, **kw)
  source, seen, states = made(), [], []
  for _ in range(2 * COMPARED):
    states.append(json.loads(json.dumps(source.state())))
    seen.append(source())
  source.close()
  order = np.concatenate([b['margin'] for b in seen]).astype(int)
  for epoch in range(8):
    assert sorted(order[epoch * COMPARED : (epoch + 1) * COMPARED]) == list(range(COMPARED))
  assert (order[:COMPARED] != order[COMPARED : 2 * COMPARED]).any()
  halves = [made(process_index=i, process_count=2) for i in range(2)]
  again = made()
  for k in (0, 17, 40):
    for one in (*halves, again):
      one.restore(states[k])
    whole, parts = again(), [half() for half in halves]
    for name, value in seen[k].items():
      assert (whole[name] == value).all()
      assert (np.concatenate([p[name] for p in parts]) == value).all()
  for one in (*halves, again):
    one.close()


def test_one_pass_ends_with_padding(path):
  source = pairs.pairs(model(), data=data(path), batch=8, length=240)
  batches = list(source.once())
  assert len(batches) == 5
  margins = [b['margin'][b['chosen/weights'].sum(1) > 0] for b in batches]
  assert np.concatenate(margins).tolist() == list(range(COMPARED))
  assert not batches[-1]['chosen/weights'][5:].any()


def test_held_out_prompts_are_in_one_split_only(path):
  made = data(path, heldout=0.3)()
  train, held = (
    {one.prompt[0]['content'] for one in made.splits[s]} for s in ('train', 'validation')
  )
  assert train and held and not train & held and len(train) + len(held) == COMPARED


@pytest.fixture(scope='module')
def ranked(tmp_path_factory):
  file = tmp_path_factory.mktemp('pairs') / 'ranked.jsonl'
  lines = [
    dict(qid=n, question=f'q{n}', answers=[dict(text=f'{n}-{s}', pm_score=s) for s in range(n)])
    for n in (2, 3, 6)
  ]
  file.write_text('\n'.join(map(json.dumps, lines)))
  return data(str(file), format=preferences.stack_exchange)


def test_rankings_lie_in_one_row(ranked):
  source = pairs.rankings(model(), data=ranked, answers=4, batch=3, length=240, shuffle=False)
  batch = source()
  source.close()
  assert batch['ranked'].tolist() == [[True] * 2 + [False] * 2, [True] * 3 + [False], [True] * 4]
  names = [[learned(batch, row, f'answer{k}/') for k in range(4)] for row in range(3)]
  assert names[0] == [' 2-1', ' 2-0', '', ''] and names[1] == [' 3-2', ' 3-1', ' 3-0', '']
  assert names[2] == [' 6-5', ' 6-3', ' 6-2', ' 6-0']  # the best, the worst, two between
  assert (batch['answer3/weights'].sum(1) > 0).tolist() == batch['ranked'][:, 3].tolist()
  says('answers=1', lambda: pairs.rankings(model(), data=ranked, answers=1))


def test_a_ranking_gives_all_its_pairs(ranked):
  source = pairs.pairs(model(), data=ranked, batch=1, length=240)
  assert len(list(source.once())) == 1 + 3 + 15


def test_single_answers_are_marked(path):
  source = pairs.unpaired(model(), data=data(path), batch=2, length=240, shuffle=False)
  batch = source()
  source.close()
  assert batch['desirable'].tolist() == [True, False]
  assert [learned(batch, row) for row in range(2)] == [' good 0', ' bad and longer 0']


def test_prompts_are_what_a_model_answers(path):
  source = pairs.prompts(model(), data=data(path), batch=2, length=240, shuffle=False)
  batch = source()
  source.close()
  for row in range(2):
    n, one = batch['lengths'][row], source.prompts[batch['index'][row]]
    assert batch['prompts'][row, :n].tolist() == one.ids and one.text == f'question {row}'
    assert one.ids[0] == 0  # the start is among the ids
    assert words().decode(one.ids).endswith(f'USER: question {row} ASSISTANT:')


def test_what_does_not_fit_is_refused_or_counted(path, capsys):
  make = lambda **kw: pairs.pairs(model(), data=data(path), batch=4, **kw)
  says(('pairs.jsonl:1', 'the prompt alone has', 'the context 20'), lambda: make(length=20))
  need = max(
    int(b[f'{s}/segments'].sum())
    for b in pairs.pairs(model(), data=data(path), batch=1, length=240).once()
    for s in pairs.SIDES
  )
  says(('pairs.jsonl:11', '27 of 37 do not fit'), lambda: make(length=need - 1))
  source = make(length=need - 1, left_out=0.8)
  assert sum(int((b['chosen/weights'].sum(1) > 0).sum()) for b in source.once()) == 10
  assert '27 of 37 are too long and left out' in capsys.readouterr().err


def test_errors_name_what_is_wrong(path, tmp_path):
  made = lambda **kw: lambda: pairs.pairs(model(), **dict(data=data(path), length=240) | kw)
  says('no split', made(split='tests'))
  says('the validation split of', made(split='validation'))
  says('does not divide over 3 processes', made(process_index=0, process_count=3))
  says('259 ids, the model 100 rows', lambda: pairs.pairs(model(vocab=100), data=data(path)))
  says("no chat template 'vicunia'; did you mean 'vicuna'?", data(path, template='vicunia'))
  says('has no chat template', made(data=data(path, template=None)))
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('\n'.join([*open(path).read().splitlines(), '{"prompt": "q", "chosen": "a"}']))
  says(("bad.jsonl:38: no key 'rejected'",), data(str(bad)))
  assert len(data(str(bad), bad=1)().splits['train']) == COMPARED


def test_the_bundled_pairs():
  harmless = pairs.hh_harmless(vocab=words)
  assert sum(map(len, harmless.splits.values())) == 2308
  assert sum(map(len, pairs.politeness(vocab=words).splits.values())) == 1094
