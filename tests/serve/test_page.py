"""The chat page as people use it, in the Chromium of the system: type, stream, stop, clear, settings, hover, keys."""

import re
import shutil
import unittest

import pytest
from playwright.sync_api import expect, sync_playwright

from llm_jax.serve.server import PAGE
from tests.serve import fake
from tests.serve.conftest import serving, until

FLAGS = (
  '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
  '--disable-component-update --disable-sync'
).split()
LINE = 'To be, or not to be — that is the question. '
SPEECH = (LINE * 4).strip()


@pytest.fixture(scope='module')
def browser():
  found = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
  )
  if found is None:
    raise unittest.SkipTest('no Chromium here: apt install chromium')
  with sync_playwright() as play:
    started = play.chromium.launch(executable_path=found, args=FLAGS)
    yield started
    started.close()


@pytest.fixture(scope='module')
def slow():
  with serving(delay=0.004, length=2048) as found:
    yield found


@pytest.fixture
def visit(browser, slow):
  """Opens the page of a server, at a width; the page may not complain nor ask anybody else for anything."""
  contexts, said = [], []

  def open_(served=slow, width=1200, **more):
    context = browser.new_context(viewport=dict(width=width, height=800), **more)
    contexts.append(context)
    page = context.new_page()
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on(
      'request', lambda r: None if r.url.startswith((served.url, 'data:')) else said.append(r.url)
    )
    page.goto(served.url)
    return page

  yield open_
  for context in contexts:
    context.close()
  assert not said


def answers(page):
  return page.locator('article:not(.you)')


def ask(page, text):
  page.get_by_label('Your message').fill(text)
  page.keyboard.press('Enter')


def finished(page, n=1):
  expect(page.locator('.facts')).to_have_count(n)


def test_type_stream_and_go_on(visit, slow):
  page = visit()
  expect(page).to_have_title('fake')
  expect(page.get_by_role('button', name='Send')).to_be_disabled()
  ask(page, 'say:' + SPEECH)
  text = answers(page).locator('.text')
  expect(text).to_contain_text('To be')
  assert len(text.inner_text()) < len(SPEECH)  # there is more to come
  finished(page)
  expect(text).to_have_text(SPEECH)
  expect(page.locator('.you .text')).to_have_text('say:' + SPEECH)
  expect(page.locator('.facts')).to_contain_text('finished')
  expect(page.locator('#said')).to_contain_text('finished: To be')  # for screen readers, once
  expect(page.get_by_label('Your message')).to_be_focused()
  page.get_by_label('Your message').press_sequentially('one')
  page.keyboard.press('Shift+Enter')
  page.get_by_label('Your message').press_sequentially('say:<b>two</b>')
  page.get_by_role('button', name='Send').click()
  finished(page, 2)
  expect(text.nth(1)).to_have_text('<b>two</b>')  # text, not a part of the page
  prompt = slow.engine.words.decode(slow.engine.requests[-1].prompt)
  assert (
    f'assistant\n{SPEECH}<|im_end|>' in prompt and 'user\none\nsay:<b>two</b><|im_end|>' in prompt
  )


@pytest.mark.parametrize('how', ['button', 'Escape'])
def test_stop(visit, slow, how):
  page = visit()
  before = slow.engine.cancelled
  ask(page, 'on and on')
  expect(answers(page).locator('.t').nth(5)).to_be_attached()
  if how == 'button':
    page.get_by_role('button', name='Stop').click()
  else:
    page.keyboard.press('Escape')
  finished(page)
  expect(page.locator('.facts')).to_contain_text('stopped')
  until(lambda: slow.engine.cancelled == before + 1 and not slow.engine.stats()['running'])
  ask(page, 'say:next')
  finished(page, 2)
  expect(answers(page).last.locator('.text')).to_have_text('next')


def test_clear_begins_anew(visit, slow):
  page = visit()
  ask(page, 'say:a')
  finished(page)
  ask(page, 'on and on')
  expect(answers(page).nth(1).locator('.t').first).to_be_attached()
  page.get_by_role('button', name='Clear').click()
  expect(page.locator('article')).to_have_count(0)
  ask(page, 'say:b')
  finished(page)
  assert slow.engine.words.decode(slow.engine.requests[-1].prompt).count('<|im_start|>') == 2
  until(lambda: not slow.engine.stats()['running'])


def test_settings_are_sent_and_kept(visit, slow):
  page = visit()
  page.get_by_role('button', name='Settings').click()
  page.get_by_label('System prompt').fill('Be brief.')
  page.get_by_label('Temperature').fill('1.5')
  page.get_by_label('Top-p').fill('0.75')
  page.get_by_label('Top-k').fill('12')
  page.get_by_label('Tokens at most').fill('9')
  page.get_by_label('Seed').fill('41')
  page.get_by_label('Stop in front of').fill('three\nfour')
  ask(page, 'hm')
  finished(page)
  expect(page.locator('.facts')).to_contain_text('9 tokens')
  asked = slow.engine.requests[-1]
  s = asked.sampling
  assert (s.temperature, s.top_p, s.top_k, asked.max_new, asked.seed) == (1.5, 0.75, 12, 9, 41)
  assert slow.engine.words.decode(asked.prompt).startswith(
    '<|im_start|>system\nBe brief.<|im_end|>'
  )
  ask(page, 'say:one three')
  finished(page, 2)
  expect(answers(page).last.locator('.text')).to_have_text('one ')
  page.reload()
  page.get_by_role('button', name='Settings').click()
  expect(page.get_by_label('Top-k')).to_have_value('12')
  page.get_by_role('button', name='Reset').click()
  expect(page.get_by_label('Top-k')).to_have_value('0')
  page.get_by_role('button', name='Close').click()
  expect(page.get_by_label('Top-k')).to_be_hidden()
  expect(page.get_by_role('button', name='Settings')).to_be_focused()


def test_hover_shows_what_else_it_could_have_been(visit):
  page = visit()
  ask(page, 'say:héy')
  finished(page)
  tokens, tip = answers(page).locator('.t'), page.get_by_role('tooltip')
  expect(tokens).to_have_text(['h', 'é', 'y'])  # é is two tokens here, and one thing to point at
  expect(tip).to_be_hidden()
  tokens.nth(0).hover()
  rows = tip.locator('tr')
  expect(rows).to_have_count(5)
  expect(rows.nth(0)).to_have_text(re.compile(r'h\s*90\.5 %'))  # exp(-0.1): what the fake says
  expect(rows.nth(1)).to_have_text(re.compile(r'i\s*33\.3 %'))
  tokens.nth(1).hover()
  expect(tip.locator('table')).to_have_count(2)
  shades = [float(tokens.nth(i).evaluate('e => e.style.getPropertyValue("--s")')) for i in (0, 2)]
  ids = fake.words().encode('hy')
  bits = [(0.1 + i % 10 / 10) / 0.6931 for i in ids]
  assert shades == pytest.approx([b / 8 for b in bits], abs=2e-3)
  page.get_by_role('button', name='Probabilities').click()
  tokens.nth(0).hover()
  expect(tip).to_be_hidden()
  shade = tokens.nth(0).evaluate('e => getComputedStyle(e).backgroundColor')
  assert shade == 'rgba(0, 0, 0, 0)'


def test_the_keyboard_goes_through_the_tokens(visit):
  page = visit()
  ask(page, 'say:abc')
  finished(page)
  page.locator('article:not(.you) .text').focus()
  page.keyboard.press('ArrowRight')
  page.keyboard.press('ArrowRight')
  expect(page.locator('.t.on')).to_have_text('b')
  expect(page.locator('#said')).to_contain_text('likeliest: b 90.5 %')
  page.keyboard.press('ArrowLeft')
  expect(page.locator('.t.on')).to_have_text('a')
  page.keyboard.press('Escape')
  expect(page.get_by_role('tooltip')).to_be_hidden()


def test_a_key_is_asked_for(browser, visit):
  with serving(api_key='sesame') as served:
    page = visit(served)
    page.get_by_label('API key').fill('wrong')
    page.keyboard.press('Enter')
    expect(page.get_by_role('heading', name='The key was wrong')).to_be_visible()
    page.get_by_label('API key').fill('sesame')
    page.keyboard.press('Enter')
    expect(page).to_have_title('fake')
    ask(page, 'say:open')
    finished(page)
    page.reload()
    expect(page).to_have_title('fake')  # not asked again
    page.context.close()


def test_a_model_without_a_template_goes_on_with_a_text(visit):
  with serving(words=fake.words(None)) as served:
    page = visit(served)
    expect(page.get_by_placeholder('Write the beginning of a text')).to_be_visible()
    ask(page, 'say:ROMEO')
    finished(page)
    expect(answers(page).locator('.text')).to_have_text('say:ROMEOROMEO')
    answers(page).locator('.t').first.hover()
    expect(page.get_by_role('tooltip').locator('tr')).to_have_count(5)
    page.context.close()


def test_errors_are_said_and_what_was_typed_stays(visit):
  with serving() as served:
    page = visit(served)
    expect(page).to_have_title('fake')
    ask(page, 'x' * 600)
    expect(page.get_by_role('alert')).to_contain_text('the context holds 512')
    expect(page.get_by_label('Your message')).to_have_value('x' * 600)
    expect(page.locator('article')).to_have_count(0)
    ask(page, 'say:well')
    finished(page)
    page.context.close()


@pytest.mark.parametrize('scheme, other', [('light', 'dark'), ('dark', 'light')])
def test_dark_and_light(visit, scheme, other):
  page = visit(color_scheme=scheme)
  shown = lambda: page.evaluate('document.documentElement.dataset.theme')
  assert shown() == scheme
  page.get_by_role('button', name='Dark or light').click()
  assert shown() == other
  page.reload()
  assert shown() == other


def test_it_fits_a_phone(visit):
  page = visit(width=390)
  ask(page, 'say:' + 'a' * 90 + ' ' + LINE)
  finished(page)
  wide = 'document.documentElement.scrollWidth'
  assert page.evaluate(wide) <= 390
  page.get_by_role('button', name='Settings').click()
  assert page.evaluate(wide) <= 390
  page.get_by_role('button', name='Close').click()
  answers(page).locator('.t').nth(60).hover()
  box = page.get_by_role('tooltip').bounding_box()
  assert box['x'] >= 0 and box['x'] + box['width'] <= 390


def test_it_needs_nothing_from_elsewhere():
  text = PAGE.read_text(encoding='utf-8')
  addresses = set(re.findall(r'(?:https?:)?//[\w.-]+\.\w+', text))
  assert addresses == {'http://www.w3.org'}  # a name, not an address: the icon is an SVG
  assert not re.search(r'innerHTML|insertAdjacentHTML|document\.write|eval\(', text)
