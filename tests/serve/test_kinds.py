"""Models that read a prompt at once, by an encoder or in both directions, served as causal ones are: to the bit."""

import contextlib
import functools
import queue
import types

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import llm_jax.serve
from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.data import vocab
from llm_jax.decode.generate import generate
from llm_jax.decode.logits import Sampling
from llm_jax.model import attention, block, ffn, positions, stack, transformer
from llm_jax.serve import reading
from llm_jax.serve.engine import Engine
from llm_jax.serve.requests import Request
from tests.cli.test_serve import serving, write_run
from tests.serve.test_engine import DRAWN, prompt, together
from tests.variants import variants

VOCAB, LENGTH, START = 262, 64, 0
ROWS, PAGES = 12, 96  # as many as the rows can fill
KINDS = ('encoder_decoder', 'prefix')
GREEDY = Sampling(temperature=0.0)
SIZES = dict(vocab=VOCAB, embed=32, layers=1, length=LENGTH)
FEED = use(ffn.Gated, hidden=48)
MIXER = use(attention.SelfAttention, heads=4, rotate=None, scale=1.0)
CROSS = use(attention.CrossAttention, heads=2, scale=1.0)
ROTATED = use(attention.SelfAttention, heads=4, groups=2)
MODELS = dict(
  prefix=use(transformer.prefix, block=use(block.decoder, mixer=ROTATED, ffn=FEED), **SIZES),
  encoder_decoder=use(  # as T5, but that cross-attention has fewer heads
    transformer.encoder_decoder,
    block=use(block.cross_decoder, mixer=MIXER, cross=CROSS, ffn=FEED),
    encoder_layers=1,
    encoder_block=use(block.decoder, mixer=MIXER, ffn=FEED),
    bias=use(positions.Buckets, buckets=16, distance=40),
    **SIZES,
  ),
)


def drawn(model):
  """Weights, random but large enough that no argmax is a near tie."""
  shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.25, x.dtype), shapes)


@functools.cache
def make(kind: str):
  """(model, weights with its layers apart)."""
  model = build(MODELS[kind])()
  return model, stack.apart(drawn(model))


def ask(kind: str, ids: tuple[int, ...], *more, **told) -> Request:
  """A request for an answer to `ids`."""
  request = Request((START, *ids), *more, **told)
  return request if kind == 'prefix' else request._replace(prompt=(START,), encoded=ids)


def mixed(kind: str) -> list[Request]:
  lengths, settings = (5, 40, 33, 32, 1), (GREEDY, DRAWN, DRAWN, GREEDY, DRAWN)
  told = zip(lengths, settings, strict=True)
  return [ask(kind, prompt(i, n), 20, how, seed=i) for i, (n, how) in enumerate(told)]


@pytest.fixture(scope='module', params=variants(KINDS, ['encoder_decoder']))
def served(request):
  """(kind, engine)."""
  with Engine(*make(request.param), rows=ROWS, pages=PAGES) as engine:
    yield request.param, engine


def test_answers_are_those_of_generate(served):
  kind, engine = served
  asked = mixed(kind)
  for request, tokens in zip(asked, together(engine, asked), strict=True):
    told = dict(max_new=20, eos=None, start=START, **request.sampling._asdict())
    own = request.encoded or request.prompt[1:]
    ids = np.zeros((1, 40), np.int32)
    ids[0, : len(own)] = own
    out = generate(*make(kind), ids, [len(own)], jax.random.key(request.seed), **told)
    assert [t.id for t in tokens] == np.asarray(out.tokens)[0].tolist()
    np.testing.assert_allclose([t.logp for t in tokens], np.asarray(out.logp)[0], atol=2e-4)


def test_an_answer_depends_on_nobody_else_to_the_bit(served):
  kind, engine = served
  asked = mixed(kind)
  alone = [engine.answer(request) for request in asked]
  crowd = [ask(kind, prompt(100 + i, 1 + 3 * i), 20, DRAWN, seed=i) for i in range(14)]
  for order in (asked + crowd, crowd[:5] + asked[::-1] + crowd[5:]):
    found = dict(zip(order, together(engine, order), strict=True))
    assert [found[request] for request in asked] == alone  # floats too
  stats = engine.stats()
  assert stats['compilations_total'] == 0
  assert stats['blocks_used'] == stats['running'] == 0


def test_samples_of_one_prompt_share_what_was_read(served):
  kind, engine = served
  asked = [ask(kind, prompt(60, 45), 12, DRAWN, seed=i) for i in range(4)]
  with Engine(*make(kind), rows=ROWS, pages=PAGES, prefix_cache=False) as plain:
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
  begin = prompt(50, 40)
  asked = [ask(kind, begin + prompt(51 + i, 3), 6, GREEDY) for i in range(2)]
  before = engine.stats()['prompt_tokens_total']
  for request in asked:
    engine.answer(request)
  assert engine.stats()['prompt_tokens_total'] - before == 2 * (43 + 1)
  assert engine.stats()['prefix_hits_total'] == 0


def test_cancelled_requests_leave_nothing(served):
  kind, engine = served
  heard: queue.Queue = queue.Queue()
  tickets = [engine.submit(ask(kind, prompt(200 + i, 9), 50), heard.put) for i in range(16)]
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


@contextlib.contextmanager
def fewer(pages, count: int):
  """Leaves `count` pages to those who come."""
  taken = [pages.take() for _ in range(pages.total - count)]
  yield
  pages.drop(taken)


def test_preempted_requests_go_on_as_if_nothing_had_been(served):
  kind, engine = served
  asked = [ask(kind, prompt(20 + i, 25), 35, DRAWN, seed=i) for i in range(6)]
  expected, before = together(engine, asked), engine.stats()
  with fewer(engine._pages, 12):
    assert together(engine, asked) == expected
  after = engine.stats()
  assert before['preemptions_total'] == 0 < after['preemptions_total']
  assert after['blocks_used'] == 0


def test_inputs_wait_until_there_are_pages_for_them(served):
  kind, engine = served
  if kind != 'encoder_decoder':
    return
  asked = [ask(kind, prompt(30 + i, 60), 3, GREEDY) for i in range(4)]
  expected, pages = together(engine, asked), engine._inputs.pages
  with fewer(pages, 10):  # for one of them, and what was kept has gone
    assert together(engine, asked) == expected
    assert pages.free == 2 and pages.cached == 8


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (dict(encoded=()), 'reads a prompt with its encoder'),
    (dict(encoded=(1,) * (LENGTH + 1)), f'has 65 tokens, the encoder reads {LENGTH} at most'),
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


class Kept:
  """An engine that somebody else closes."""

  def __init__(self, engine):
    self._engine = engine

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def close(self, drain=None):
    pass


@pytest.mark.parametrize('own', variants([False, True], [False]))
def test_a_run_is_served(served, own, tmp_path, monkeypatch):
  """`llm-jax serve`: the answers of the engine as text, which with an encoder do not go on with the prompt. own: with
  an engine of its own."""
  kind, engine = served
  folder = write_run(tmp_path / 'run', MODELS[kind], drawn(make(kind)[0]))
  words, loaded = vocab.bytes_(extra_ids=0), []
  if not own:
    made = lambda model, params, **sizes: loaded.append(params) or Kept(engine)
    monkeypatch.setattr(llm_jax.serve, 'engine', types.SimpleNamespace(Engine=made))
  texts = ['To be, or', 'not']
  asked = [ask(kind, tuple(words.encode(x)), 10, GREEDY, ends=(words.eos,)) for x in texts]
  with serving(folder, monkeypatch, f'--rows={ROWS}', f'--pages={PAGES}') as url:
    client = openai.OpenAI(base_url=url + '/v1', api_key='none', max_retries=3)
    create = functools.partial(client.completions.create, model='run', temperature=0, max_tokens=10)
    answer = create(prompt=texts, n=2)
    found = [c.text for c in answer.choices]
    assert found[::2] == found[1::2]
    for text, own_text, request in zip(found[::2], texts, asked, strict=True):
      ids = [t.id for t in engine.answer(request)]
      before = own_text if kind == 'prefix' else ''
      assert before + text == words.decode([*words.encode(before), *ids])
    starts = 2 * (kind == 'prefix')
    assert answer.usage.prompt_tokens == sum(map(len, texts)) + starts
    pieces = create(prompt=texts[1], echo=True, stream=True)
    assert ''.join(c.choices[0].text for c in pieces) == texts[1] + found[2]
    for wrong, more in {
      f'the prompt has {LENGTH + 2 + (kind == "prefix")} tokens, the': dict(
        prompt='a' * (LENGTH + 2)
      ),
      'have no log-probabilities': dict(prompt='a', echo=True, logprobs=1),
    }.items():
      with pytest.raises(openai.BadRequestError, match=wrong):
        create(**more)
    if kind == 'encoder_decoder':
      with pytest.raises(openai.BadRequestError, match='not for an encoder-decoder'):
        client.embeddings.create(model='run', input='a')
    assert 'llm_jax_engine_blocks_used 0.0' in httpx.get(url + '/metrics').text
  for params in loaded:
    jax.tree.map(np.testing.assert_array_equal, params, make(kind)[1])
