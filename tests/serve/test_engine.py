"""The engine against plain generation, and every answer against itself in other company: to the bit."""

import functools
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.decode.generate import generate
from llm_jax.decode.logits import Sampling
from llm_jax.model import attention, block, ffn, moe, positions, stack, transformer
from llm_jax.model.recurrent import mamba
from llm_jax.serve.device import buckets, slot_bytes
from llm_jax.serve.engine import Engine
from llm_jax.serve.requests import Full, Request
from tests.variants import variants

VOCAB, LENGTH, EMBED, PAGES = 96, 160, 64, 80
DRAWN = Sampling(temperature=0.9, top_p=0.95)


@functools.cache
def make(kind: str = 'attention'):
  """(model, weights with its layers apart), random but large enough that no argmax is a near tie."""
  mixer = functools.partial(attention.SelfAttention, heads=4, groups=2)
  feed = functools.partial(ffn.Gated, hidden=96)
  settings = dict(vocab=VOCAB, embed=EMBED, layers=2, length=LENGTH)
  if kind == 'window':
    mixer = functools.partial(mixer, window=24, sinks=2)
  if kind == 'experts':
    settings['layers'] = 1
    feed = functools.partial(moe.MoE, 4, functools.partial(ffn.Gated, hidden=32))
  if kind == 'alibi':
    mixer, settings = functools.partial(mixer, rotate=None), settings | dict(bias=positions.Alibi)
  if kind == 'relative':
    mixer = functools.partial(mixer, rotate=None, relative=positions.TransformerXL)
  layer = functools.partial(block.decoder, mixer=mixer, ffn=feed)
  if kind == 'mamba':
    layer = functools.partial(block.mixers, mixer=mamba.Mamba)
  model = transformer.causal(block=layer, **settings)
  params, rng = model.init(jax.random.key(0)), np.random.default_rng(1)
  more = lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.08, x.dtype)
  return model, stack.apart(jax.tree.map(more, params))


def prompt(seed: int, length: int) -> tuple[int, ...]:
  return tuple(np.random.default_rng(seed).integers(1, VOCAB, length).tolist())


def together(engine: Engine, requests: list[Request]) -> list[list]:
  """The tokens of all answers, asked at once."""
  found, done = [[] for _ in requests], threading.Semaphore(0)

  def hear(mine, token):
    mine.append(token)
    if token.end is not None:
      done.release()

  for request, mine in zip(requests, found, strict=True):
    engine.submit(request, functools.partial(hear, mine))
  for _ in requests:
    assert done.acquire(timeout=120)
  return found


@pytest.fixture(scope='module')
def engine():
  with Engine(*make(), rows=12, length=LENGTH, pages=PAGES) as made:
    yield made


MIXED = [
  Request(prompt(0, 5), 20, Sampling(temperature=0.0)),
  Request(prompt(1, 70), 12, DRAWN, seed=3),
  Request(prompt(2, 33), 30, Sampling(temperature=1.3, top_k=7, min_p=0.01), seed=4, top=3),
  Request(prompt(3, 32), 15, Sampling(repetition=1.3, presence=0.5, frequency=0.2), seed=5),
  Request(prompt(4, 1), 40, Sampling(typical=0.8), seed=6, bias=((3, 2.0), (9, -100.0))),
  Request(prompt(5, 100), 5, Sampling(eta=3e-3, epsilon=1e-4), seed=7),
]


KINDS = ('attention', 'window', 'mamba', 'experts', 'alibi')


@pytest.mark.parametrize('kind', variants(KINDS, ['attention']))
def test_answers_are_those_of_generate(kind):
  model, params = make(kind)
  asked = [MIXED[i]._replace(bias=(), top=0) for i in range(6)]
  with Engine(model, params, rows=4, length=LENGTH, pages=PAGES) as engine:
    found = together(engine, asked)
  for request, tokens in zip(asked, found, strict=True):
    told = dict(max_new=request.max_new, eos=None, start=None, **request.sampling._asdict())
    ids, lengths = np.array([request.prompt]), [len(request.prompt)]
    out = generate(model, params, ids, lengths, jax.random.key(request.seed), **told)
    assert [t.id for t in tokens] == np.asarray(out.tokens)[0].tolist()
    np.testing.assert_allclose([t.logp for t in tokens], np.asarray(out.logp)[0], atol=2e-4)
    assert [t.end for t in tokens] == [None] * (request.max_new - 1) + ['length']


def test_an_answer_depends_on_nobody_else_to_the_bit(engine):
  alone = [engine.answer(request) for request in MIXED]
  crowd = [Request(prompt(100 + i, 3 + 9 * i), 25, DRAWN, seed=i) for i in range(14)]
  for order in (MIXED + crowd, crowd + MIXED[::-1], crowd[:5] + MIXED + crowd[5:]):
    found = dict(zip(order, together(engine, order), strict=True))
    assert [found[request] for request in MIXED] == alone  # floats too
  before = engine.stats()['compilations_total']
  assert before == 0 and engine.stats()['blocks_used'] == 0


@pytest.mark.parametrize(
  ('widths', 'expected'),
  [((64, 96), (8, 32)), ((128, 1024), (32,)), ((576, 511), (32,)), ((512, 4096), (8, 32))],
)
def test_steps_have_numbers_of_rows_for_which_sums_have_one_order(widths, expected):
  assert buckets(*widths) == expected
  total = jax.jit(lambda x: x.sum(-1))
  for n in widths:
    x = np.random.default_rng(n).normal(size=(32, 1, n)).astype(np.float32)
    some = {rows: np.asarray(total(x[:rows]))[:8] for rows in expected}
    assert all((found == some[32]).all() for found in some.values())


def test_preempted_requests_go_on_as_if_nothing_had_been():
  asked = [Request(prompt(20 + i, 40), 60, DRAWN, seed=i) for i in range(6)]
  with Engine(*make(), rows=6, length=LENGTH, pages=PAGES) as roomy:
    expected = together(roomy, asked)
    assert roomy.stats()['preemptions_total'] == 0
  with Engine(*make(), rows=6, length=LENGTH, pages=16) as narrow:
    assert together(narrow, asked) == expected
    stats = narrow.stats()
    assert stats['preemptions_total'] > 0 and stats['blocks_used'] == 0


def test_prompts_with_the_same_beginning_share_what_was_read(engine):
  begin = prompt(50, 64)
  asked = [Request(begin + prompt(51 + i, 7), 9, DRAWN, seed=i) for i in range(3)]
  with Engine(*make(), rows=4, length=LENGTH, pages=PAGES, prefix_cache=False) as plain:
    expected = [plain.answer(request) for request in asked]
    assert plain.stats()['prefix_hits_total'] == 0
  before = engine.stats()
  assert [engine.answer(request) for request in asked] == expected
  after = engine.stats()
  assert after['prefix_hits_total'] - before['prefix_hits_total'] == 2
  assert after['prefix_hit_tokens_total'] - before['prefix_hit_tokens_total'] == 2 * 64
  assert after['prompt_tokens_total'] - before['prompt_tokens_total'] == 71 + 7 + 7


def test_samples_of_one_prompt_share_its_pages_until_they_write(engine):
  asked = [Request(prompt(60, 45), 20, DRAWN, seed=i) for i in range(5)]
  alone = [engine.answer(request) for request in asked]
  before = engine.stats()
  assert together(engine, asked) == alone
  after = engine.stats()
  assert after['forks_total'] - before['forks_total'] == 4
  assert (
    after['copies_total'] - before['copies_total'] == 4
  )  # the last to write has the page for itself
  assert len({tuple(t.id for t in tokens) for tokens in alone}) > 1


def test_the_cache_gives_its_pages_up():
  with Engine(*make(), rows=2, length=LENGTH, pages=16) as engine:
    for i in range(9):
      assert len(engine.answer(Request(prompt(70 + i, 100), 8))) == 8
    assert engine.stats()['prefix_hits_total'] == 0
    engine.answer(
      Request(prompt(78, 100), 8)
    )  # the last one asked is there still, the first has gone
    assert engine.stats()['prefix_hits_total'] == 1
    engine.answer(Request(prompt(70, 100), 8))
    assert engine.stats()['prefix_hits_total'] == 1


def test_log_probabilities_are_the_models(engine):
  model, params = make()
  request = Request(prompt(80, 50), 6, DRAWN, seed=1, top=4, prompt_logp=True)
  tokens: queue.Queue = queue.Queue()
  ticket = engine.submit(request, tokens.put)
  found = [tokens.get(timeout=60) for _ in range(6)]
  ids = [*request.prompt, *(t.id for t in found)]
  x = model.hidden(params, dict(inputs=np.array([ids]))).x
  logp = np.asarray(jax.nn.log_softmax(model.logits(params, x)))[0]
  own = logp[np.arange(len(ids) - 1), ids[1:]]
  assert ticket.prompt_logp[0] is None
  np.testing.assert_allclose(ticket.prompt_logp[1:], own[:49], atol=1e-4)
  np.testing.assert_allclose([t.logp for t in found], own[49:], atol=1e-4)
  for at, token in enumerate(found, 49):
    best = np.argsort(-logp[at], kind='stable')[:4]
    assert [i for i, _ in token.top] == best.tolist()
    np.testing.assert_allclose([p for _, p in token.top], logp[at][best], atol=1e-4)


def test_embeddings_are_the_mean_of_the_outputs(engine):
  model, params = make()
  prompts = [prompt(90, 3), prompt(91, 77), prompt(92, 32)]
  for found, ids in zip(engine.embed(prompts), prompts, strict=True):
    x = np.asarray(model.hidden(params, dict(inputs=np.array([ids]))).x)[0].mean(0)
    np.testing.assert_allclose(found, x / np.linalg.norm(x), atol=1e-5)


def test_int8_keys_and_values_are_close_and_take_a_quarter():
  model, params = make()
  request = Request(prompt(95, 90), 1, Sampling(temperature=0.0), top=20)
  with Engine(model, params, rows=2, length=LENGTH, pages=PAGES) as exact:
    expected = exact.answer(request)[0]
    bytes_exact = sum(x.nbytes for x in jax.tree.leaves(exact._device._states))
  with Engine(model, params, rows=2, length=LENGTH, pages=PAGES, kv='int8') as small:
    found = small.answer(request)[0]
    bytes_small = sum(x.nbytes for x in jax.tree.leaves(small._device._states))
  assert found.id == expected.id and found.logp != expected.logp
  assert abs(found.logp - expected.logp) < 0.05
  head_dim = EMBED // 4
  assert bytes_small / bytes_exact == pytest.approx((head_dim + 4) / (4 * head_dim))


class Even:
  """Only even ids, three of them."""

  def __init__(self):
    self.heard = []

  @property
  def done(self):
    return len(self.heard) == 3

  def allowed(self):
    return np.arange(VOCAB) % 2 == 0

  def advance(self, token):
    self.heard.append(token)


def test_ends_biases_and_constraints(engine):
  free = engine.answer(Request(prompt(97, 9), 12, DRAWN, seed=2))
  third = free[2].id
  cut = engine.answer(Request(prompt(97, 9), 12, DRAWN, seed=2, ends=(third,)))
  assert cut[:2] == free[:2] and cut[2] == free[2]._replace(end='stop') and len(cut) == 3
  forced = engine.answer(Request(prompt(97, 9), 4, DRAWN, bias=((11, 1e4),)))
  assert [t.id for t in forced] == [11] * 4
  even = Even()
  found = engine.answer(Request(prompt(97, 9), 12, DRAWN, constraint=even))
  assert [t.id for t in found] == even.heard and all(t.id % 2 == 0 for t in found)
  assert [t.end for t in found] == [None, None, 'stop']


def test_cancelled_requests_leave_nothing(engine):
  heard: queue.Queue = queue.Queue()
  ticket = engine.submit(Request(prompt(98, 20), 130), heard.put)
  heard.get(timeout=60)
  ticket.cancel()
  while (token := heard.get(timeout=60)).end is None:
    pass
  assert token.end == 'cancelled' and token.id == -1
  engine.answer(Request(prompt(99, 3), 1))
  assert engine.stats()['blocks_used'] == 0 and engine.stats()['running'] == 0


def test_a_listener_that_raises_hurts_nobody_else(engine):
  def fail(token):
    raise RuntimeError('gone')

  engine.submit(Request(prompt(98, 20), 130), fail)
  assert len(engine.answer(Request(prompt(1, 9), 30))) == 30
  assert engine.stats()['blocks_used'] == 0


def test_a_full_queue_says_when_to_come_back():
  with Engine(*make(), rows=1, length=LENGTH, pages=PAGES, queue=2) as engine:
    heard: queue.Queue = queue.Queue()
    tickets = []
    with pytest.raises(Full) as full:
      for i in range(9):
        tickets.append(engine.submit(Request(prompt(i, 30), 100), heard.put))
    assert full.value.retry_after >= 1 and len(tickets) < 9
    for ticket in tickets:
      ticket.cancel()


def test_closing_lets_those_there_finish():
  engine = Engine(*make(), rows=2, length=LENGTH, pages=PAGES)
  heard: queue.Queue = queue.Queue()
  engine.submit(Request(prompt(1, 30), 20), heard.put)
  engine.close(drain=60)
  assert [heard.get_nowait().end for _ in range(20)][-1] == 'length'
  with pytest.raises(Full):
    engine.submit(Request(prompt(1, 30), 20), heard.put)


@pytest.mark.parametrize(
  ('request_', 'word'),
  [
    (Request(()), 'at least one token'),
    (Request((1,), 0), 'max_new'),
    (Request((1,) * LENGTH), 'shorten it'),
    (Request((1, VOCAB)), f'no token {VOCAB}'),
    (Request((1,), bias=((-1, 1.0),)), 'no token -1'),
    (Request((1,), sampling=Sampling(top_p=0.0)), 'top_p'),
    (Request((1,), sampling=Sampling(no_repeat_ngram=2)), 'no_repeat_ngram'),
  ],
)
def test_what_can_never_be_answered(engine, request_, word):
  with pytest.raises(UserError, match=word):
    engine.submit(request_, print)


def test_the_pool_fits_into_its_memory_but_holds_a_row_at_least():
  slot = 2 * 2 * 2 * (EMBED // 4) * 4  # layers, keys and values, groups, head_dim, bytes
  assert slot_bytes(*make(), None) == slot and slot_bytes(*make(), 'int8') == slot // 4 * 1.25
  for memory, pages in ((1.0, 3 * LENGTH // 8), (40 * 8 * slot / 2**30, 40), (1e-9, LENGTH // 8)):
    with Engine(*make(), rows=3, memory=memory) as engine:
      assert engine.stats()['blocks_total'] == pages and engine.length == LENGTH


def test_models_it_does_not_serve():
  with pytest.raises(UserError, match='llm-jax generate'):
    Engine(*make('relative'), rows=1, length=LENGTH)
  with pytest.raises(UserError, match='page=12'):
    Engine(*make(), page=12)
