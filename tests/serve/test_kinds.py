"""Models that read a prompt at once, by an encoder or in both directions, served as causal ones are: to the bit."""

import functools
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.errors import UserError
from llm_jax.decode.generate import generate
from llm_jax.decode.logits import Sampling
from llm_jax.model import attention, block, ffn, heads, positions, stack, transformer
from llm_jax.serve import reading
from llm_jax.serve.engine import Engine
from llm_jax.serve.requests import Request
from tests.serve.test_engine import DRAWN, prompt, together

VOCAB, LENGTH, PAGES, START = 96, 80, 120, 0  # so many that nobody is sent away
KINDS = ('encoder_decoder', 'prefix')
GREEDY = Sampling(temperature=0.0)


@functools.cache
def make(kind: str):
  """(model, weights with its layers apart), random but large enough that no argmax is a near tie."""
  partial, settings = functools.partial, dict(vocab=VOCAB, embed=64, layers=2, length=LENGTH)
  feed = partial(ffn.Gated, hidden=96)
  if kind == 'prefix':
    mixer = partial(attention.SelfAttention, heads=4, groups=2)
    model = transformer.prefix(block=partial(block.decoder, mixer=mixer, ffn=feed), **settings)
  else:  # as T5, but that cross-attention has fewer heads
    mixer = partial(attention.SelfAttention, heads=4, rotate=None, scale=1.0)
    cross = partial(attention.CrossAttention, heads=2, scale=1.0)
    settings |= dict(bias=partial(positions.Buckets, buckets=16, distance=40))
    model = transformer.encoder_decoder(
      block=partial(block.cross_decoder, mixer=mixer, cross=cross, ffn=feed),
      encoder_layers=2,
      encoder_block=partial(block.decoder, mixer=mixer, ffn=feed),
      head=partial(heads.Tied, scaled=True),
      **settings,
    )
  params, rng = model.init(jax.random.key(0)), np.random.default_rng(1)
  more = lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.08, x.dtype)
  return model, stack.apart(jax.tree.map(more, params))


def ask(kind: str, ids: tuple[int, ...], *more, **told) -> Request:
  """A request for an answer to `ids`."""
  request = Request((START, *ids), *more, **told)
  return request if kind == 'prefix' else request._replace(prompt=(START,), encoded=ids)


def mixed(kind: str) -> list[Request]:
  return [
    ask(kind, prompt(0, 5), 20, GREEDY),
    ask(kind, prompt(1, 68), 8, DRAWN, seed=3),
    ask(kind, prompt(2, 33), 30, Sampling(temperature=1.3, top_k=7, min_p=0.01), seed=4),
    ask(kind, prompt(3, 32), 40, GREEDY),
    ask(kind, prompt(4, 1), 12, Sampling(repetition=1.3, presence=0.5, frequency=0.2), seed=6),
  ]


@pytest.fixture(scope='module', params=KINDS)
def served(request):
  """(kind, engine)."""
  with Engine(*make(request.param), rows=12, pages=PAGES) as engine:
    yield request.param, engine


def test_answers_are_those_of_generate(served):
  kind, engine = served
  asked = mixed(kind)
  for request, tokens in zip(asked, together(engine, asked), strict=True):
    told = dict(max_new=request.max_new, eos=None, start=START, **request.sampling._asdict())
    ids = np.array([request.encoded or request.prompt[1:]])
    out = generate(*make(kind), ids, [ids.size], jax.random.key(request.seed), **told)
    assert [t.id for t in tokens] == np.asarray(out.tokens)[0].tolist()
    np.testing.assert_allclose([t.logp for t in tokens], np.asarray(out.logp)[0], atol=2e-4)


def test_an_answer_depends_on_nobody_else_to_the_bit(served):
  kind, engine = served
  asked = mixed(kind)
  alone = [engine.answer(request) for request in asked]
  crowd = [ask(kind, prompt(100 + i, 3 + 5 * i), 20, DRAWN, seed=i) for i in range(14)]
  for order in (asked + crowd, crowd[:5] + asked[::-1] + crowd[5:]):
    found = dict(zip(order, together(engine, order), strict=True))
    assert [found[request] for request in asked] == alone  # floats too
  stats = engine.stats()
  assert stats['compilations_total'] == 0
  assert stats['blocks_used'] == stats['running'] == 0


def test_samples_of_one_prompt_share_what_was_read(served):
  kind, engine = served
  asked = [ask(kind, prompt(60, 45), 12, DRAWN, seed=i) for i in range(4)]
  with Engine(*make(kind), rows=4, pages=PAGES, prefix_cache=False) as plain:
    expected = together(plain, asked)
    assert plain.stats()['forks_total'] == plain.stats()['blocks_cached'] == 0
  before = engine.stats()
  assert together(engine, asked) == expected
  after = engine.stats()
  assert after['forks_total'] - before['forks_total'] == 3
  read = after['prompt_tokens_total'] - before['prompt_tokens_total']
  assert read == 45 + 1  # and the start token
  assert engine.answer(asked[0]) == expected[0]  # from what was kept of an encoder's input
  again = engine.stats()['prompt_tokens_total'] - after['prompt_tokens_total']
  assert again == (1 if kind == 'encoder_decoder' else 46)


def test_prompts_that_begin_the_same_share_nothing(served):
  """What the model makes of the beginning depends on the end."""
  kind, engine = served
  begin = prompt(50, 64)
  asked = [ask(kind, begin + prompt(51 + i, 3), 6, GREEDY) for i in range(2)]
  before = engine.stats()['prompt_tokens_total']
  for request in asked:
    engine.answer(request)
  assert engine.stats()['prompt_tokens_total'] - before == 2 * (67 + 1)
  assert engine.stats()['prefix_hits_total'] == 0


def test_cancelled_requests_leave_nothing(served):
  kind, engine = served
  heard: queue.Queue = queue.Queue()
  tickets = [engine.submit(ask(kind, prompt(200 + i, 9), 60), heard.put) for i in range(16)]
  heard.get(timeout=60)
  for ticket in tickets:
    ticket.cancel()
  ends = []
  while len(ends) < 16:
    if (token := heard.get(timeout=60)).end is not None:
      ends.append(token.end)
  assert ends == ['cancelled'] * 16
  engine.answer(ask(kind, prompt(99, 3), 1))
  stats = engine.stats()
  assert stats['blocks_used'] == stats['running'] == stats['waiting'] == 0


def test_preempted_requests_go_on_as_if_nothing_had_been(served):
  kind, engine = served
  asked = [ask(kind, prompt(20 + i, 25), 50, DRAWN, seed=i) for i in range(6)]
  expected = together(engine, asked)
  assert engine.stats()['preemptions_total'] == 0
  with Engine(*make(kind), rows=6, pages=18) as narrow:
    assert together(narrow, asked) == expected
    stats = narrow.stats()
    assert stats['preemptions_total'] > 0 and stats['blocks_used'] == 0


def test_inputs_wait_until_there_are_pages_for_them():
  asked = [ask('encoder_decoder', prompt(30 + i, 60), 3, GREEDY) for i in range(6)]
  with Engine(*make('encoder_decoder'), rows=6, pages=10) as narrow:  # for one of them
    found = together(narrow, asked)
    assert narrow.stats()['blocks_cached'] == 8  # the last one's, and the others' have gone
  with Engine(*make('encoder_decoder'), rows=6, pages=PAGES) as roomy:
    assert together(roomy, asked) == found


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (dict(encoded=()), 'reads a prompt with its encoder'),
    (dict(encoded=(1,) * (LENGTH + 1)), f'has 81 tokens, the encoder reads {LENGTH} at most'),
    (dict(prompt=(1,) * LENGTH), f'the context holds {LENGTH}: shorten it'),
    (dict(prompt_logp=True), 'have no log-probabilities'),
  ],
)
def test_what_an_encoder_cannot_read(change, words):
  read = reading.EncoderDecoder(LENGTH)
  request = Request((START,), encoded=(1, 2))
  read.check(request)
  with pytest.raises(UserError, match=words):
    read.check(request._replace(**change))


def test_what_is_read_at_once_has_a_limit():
  read = reading.Prefix(100_000)
  assert read.chunks == (32, 64, 128, 256, 512, 1024, 2048)
  read.check(Request((1,) * 2048))
  with pytest.raises(UserError, match='2049 tokens, 2048 are read at once at most: shorten it'):
    read.check(Request((1,) * 2049))
  with pytest.raises(UserError, match='no log-probabilities'):
    read.check(Request((1, 2), prompt_logp=True))
  with pytest.raises(UserError, match='has no encoder'):
    reading.Causal(100).check(Request((1,), encoded=(2,)))


def test_widths_double_up_to_the_longest():
  assert reading.widths(20) == reading.widths(32) == (32,)
  assert reading.widths(80) == (32, 64, 80) and reading.widths(64) == (32, 64)


def test_embeddings_are_of_decoders(served):
  kind, engine = served
  if kind == 'encoder_decoder':
    with pytest.raises(UserError, match='not for an encoder-decoder'):
      engine.embed([prompt(1, 5)])
    return
  model, params = make(kind)
  ids = np.array([prompt(91, 50)])
  x = model.hidden(params, dict(inputs=ids, prefix=np.ones(ids.shape, bool))).x
  x = np.asarray(x)[0].mean(0)
  np.testing.assert_allclose(engine.embed(ids)[0], x / np.linalg.norm(x), atol=1e-5)
