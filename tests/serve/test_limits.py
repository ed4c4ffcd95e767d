"""Wrong input, limits, clients that go away, and the end of a server."""

import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from llm_jax.cli import main
from llm_jax.serve import api, gate
from tests.serve.conftest import serving, until

ROOT = pathlib.Path(__file__).parents[2]
CHAT, TEXT, EMBED = '/v1/chat/completions', '/v1/completions', '/v1/embeddings'
HI = dict(messages=[dict(role='user', content='hi')])
TOOL = dict(type='function', function=dict(name='f'))


# --- wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'path, body, param, words',
  [
    (TEXT, '{"prompt": ', None, 'not JSON'),
    (TEXT, '[]', None, 'must be a JSON object'),
    (TEXT, '[' * 200_000, None, 'parsing'),
    (TEXT, '{"prompt": "\\ud800"}', None, 'surrogate'),
    (TEXT, '{"prompt": "a", "max_tokens": ' + '9' * 5000 + '}', None, 'parsing'),
    (TEXT, '{"prompt": "a", "temperature": NaN}', 'temperature', 'finite'),
    (TEXT, dict(prompt='a', temperature='1'), 'temperature', 'number'),
    (TEXT, dict(prompt='a', temperature=True), 'temperature', 'number'),
    (TEXT, dict(prompt='a', temperature=-1), 'temperature', 'greater than or equal to 0'),
    (TEXT, dict(prompt='a', temperature=1e-9), 'temperature', 'at least 0.001'),
    (TEXT, dict(prompt='a', temprature=1), 'temprature', "did you mean 'temperature'"),
    (TEXT, dict(prompt='a', top_p=0), 'top_p', 'in (0, 1]'),
    (TEXT, dict(prompt='a', min_p=1), 'min_p', 'in [0, 1)'),
    (TEXT, dict(prompt='a', presence_penalty=1e9), 'presence_penalty', 'less than or equal'),
    (TEXT, dict(prompt='a', top_k=1.5), 'top_k', 'integer'),
    (TEXT, dict(prompt=[]), 'prompt', 'valid string'),
    (TEXT, dict(prompt=[300]), 'prompt', 'not the id of a token'),
    (TEXT, dict(prompt=[[-1]]), 'prompt', 'greater than or equal'),
    (TEXT, dict(prompt=['a'] * 129), 'prompt', 'at most 128 prompts'),
    (TEXT, dict(prompt='a' * 600), None, 'the context holds 512'),
    (TEXT, dict(prompt='a', max_tokens=0), 'max_tokens', 'only with echo'),
    (TEXT, dict(prompt='a', max_tokens=10**6), 'max_tokens', 'at most 512'),
    (TEXT, dict(prompt='a', n=17), 'n', 'at most 16'),
    (TEXT, dict(prompt='a', n=2, best_of=1), 'best_of', 'at least n'),
    (TEXT, dict(prompt='a', best_of=2, stream=True), 'best_of', 'streamed'),
    (TEXT, dict(prompt='a', suffix='b'), 'suffix', 'not supported'),
    (TEXT, dict(prompt='a', stop=['x'] * 17), 'stop', 'at most 16'),
    (TEXT, dict(prompt='a', logprobs=21), 'logprobs', 'less than or equal'),
    (TEXT, dict(prompt='a', logit_bias={'a': 1}), 'logit_bias', 'not the id'),
    (TEXT, dict(prompt='a', logit_bias={'9999': 1}), 'logit_bias', 'not the id'),
    (TEXT, dict(prompt='a', logit_bias={'5': 101}), 'logit_bias', 'less than'),
    (CHAT, dict(messages=[]), 'messages', 'at least 1'),
    (CHAT, dict(messages=[dict(role='king', content='a')]), 'messages', "'system'"),
    (CHAT, dict(messages=[dict(role='user', content=[dict(type='image_url')])]), 'messages', 'text alone'),
    (CHAT, dict(HI, top_logprobs=2), 'top_logprobs', 'needs logprobs'),
    (CHAT, dict(HI, response_format=dict(type='json_schema')), 'response_format', 'json_schema is missing'),
    (CHAT, dict(HI, tool_choice='required'), 'tool_choice', 'needs tools'),
    (CHAT, dict(HI, tools=[TOOL], tool_choice=dict(type='function', function=dict(name='g'))), 'tool_choice', "'g'"),
    (CHAT, dict(HI, tools=[TOOL], response_format=dict(type='json_object')), 'response_format', 'exclude'),
    (CHAT, dict(HI, tools=[dict(type='function', function=dict(name='a b'))]), 'tools', 'pattern'),
    (EMBED, dict(input=''), None, None),
    (EMBED, dict(input=[]), 'input', 'valid string'),
    (EMBED, dict(input='a', dimensions=3), 'dimensions', 'have 8 dimensions'),
    (EMBED, dict(input='a' * 600), None, 'the context holds 512'),
  ],
  ids=lambda x: str(x)[:60],
)  # fmt: skip
def test_wrong_input_is_400_in_openais_shape_with_the_field_to_blame(
  served, path, body, param, words
):
  body = body if isinstance(body, str) else json.dumps(body)
  found = served.http.post(path, content=body, headers={'content-type': 'application/json'})
  if words is None:
    assert found.status_code == 200
    return
  assert found.status_code == 400
  error = found.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert (error['type'], error['param']) == ('invalid_request_error', param)
  assert words in error['message'] and '\n' not in error['message']


def test_what_the_engine_refuses_is_400(served, monkeypatch):
  monkeypatch.setattr(served.engine, 'length', 10_000)  # the fake compares with its own
  monkeypatch.setattr(
    type(served.engine), 'submit', lambda *a: (_ for _ in ()).throw(api.UserError('no'))
  )
  found = served.http.post(TEXT, json=dict(prompt='a'))
  assert (found.status_code, found.json()['error']['message']) == (400, 'no')


def test_other_mistakes(served):
  post, get = served.http.post, served.http.get
  assert post(TEXT, json=dict(prompt='a', model='b')).status_code == 404
  assert get('/v2').status_code == 404 and get(TEXT).status_code == 405
  assert (
    post(TEXT, content='{"prompt": "a"}', headers={'content-type': 'text/plain'}).status_code == 400
  )
  assert post(TEXT).status_code == 400
  for found in (get('/v2'), get(TEXT), post(TEXT)):
    assert found.json()['error']['message']
  elsewhere = get(
    '/v1/models', headers=dict(host='elsewhere.example:80')
  )  # a page that rebound its name
  assert elsewhere.status_code == 403
  assert get('/v1/models', headers=dict(host='[::1]:80')).status_code == 200


def test_a_key():
  with serving(api_key='sesame') as served:
    good = openai.OpenAI(base_url=served.url + '/v1', api_key='sesame', max_retries=0)
    assert good.completions.create(model='fake', prompt='say:x').choices[0].text == 'x'
    with pytest.raises(openai.AuthenticationError, match='Authorization: Bearer'):
      served.ai.models.list()
    for headers in (
      {},
      dict(authorization='sesame'),
      dict(authorization='Basic sesame'),
      dict(authorization='Bearer'),
    ):
      for path in ('/v1/models', '/metrics', '/openapi.json'):
        found = served.http.get(path, headers=headers)
        assert (found.status_code, found.headers['www-authenticate']) == (401, 'Bearer')
        assert found.json()['error']['code'] == 'invalid_api_key'
    for path in ('/', '/health', '/ready'):
      assert served.http.get(path).status_code == 200
    elsewhere = dict(host='elsewhere.example', authorization='Bearer sesame')
    assert served.http.get('/v1/models', headers=elsewhere).status_code == 200


def test_a_body_that_is_too_large():
  with serving(limits=api.Limits(body=1000)) as served:
    large = json.dumps(dict(prompt='a' * 1000)).encode()
    parts = (
      large[i : i + 100] for i in range(0, len(large), 100)
    )  # sent in chunks, of no known length
    for content in (large, parts, b' ' * 100_000):
      found = served.http.post(TEXT, content=content, headers={'content-type': 'application/json'})
      assert found.status_code == 413 and found.json()['error']['code'] == 'body_too_large'
    fits = json.dumps(dict(prompt='say:x', user='a' * 900)).encode()
    assert served.http.post(
      TEXT, content=fits, headers={'content-type': 'application/json'}
    ).is_success


def test_a_body_that_does_not_arrive(monkeypatch, capfd):
  monkeypatch.setattr(gate, 'READ_SECONDS', 0.2)
  with serving() as served:
    host, _, port = served.url.removeprefix('http://').partition(':')
    head = f'POST {TEXT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n'
    with socket.create_connection((host, int(port))) as waits:
      waits.sendall(head.encode() + b'{')
      assert waits.recv(99).startswith(b'HTTP/1.1 408')
    with socket.create_connection((host, int(port))) as leaves:
      leaves.sendall(head.encode() + b'{')
    until(lambda: 'status="499"' in served.http.get('/metrics').text)
    assert served.http.get('/ready').is_success
  assert 'Traceback' not in capfd.readouterr().err


# --- more than there is room for ----------------------------------------------------------------------


def endless(served, **more):
  """A stream that goes on until it is closed; its first piece has come."""
  asked = dict(model='fake', prompt='hm', max_tokens=500, **more)
  stream = served.ai.completions.create(stream=True, **asked)
  next(stream)
  return stream


def quiet(served):
  stats = served.engine.stats()
  return not stats['running'] and not stats['waiting'] and not stats['blocks_used']


def test_a_full_queue_is_429_and_says_when_to_come_back():
  with serving(rows=1, queue=2, delay=0.01) as served:
    streams = [endless(served)]
    waiting = [threading.Thread(target=lambda: streams.append(endless(served))) for _ in range(2)]
    for thread in waiting:
      thread.start()
    until(lambda: served.engine.stats()['waiting'] == 2)
    for more in ({}, dict(stream=True), dict(n=4)):
      found = served.http.post(TEXT, json=dict(prompt='a', **more))
      assert (
        found.status_code == 429 and found.headers['retry-after'] == '3'
      )  # 2.5, in whole seconds
      assert found.json()['error']['type'] == 'rate_limit_error'
    with pytest.raises(openai.RateLimitError):
      served.ai.completions.create(model='fake', prompt='a')
    streams.pop(0).close()
    until(lambda: served.engine.stats()['waiting'] < 2)
    for _ in waiting:
      until(lambda: streams)
      streams.pop(0).close()
    for thread in waiting:
      thread.join()
    until(lambda: quiet(served))


def test_of_several_answers_that_do_not_all_fit_none_stays():
  with serving(rows=1, queue=3, delay=0.01) as served:
    stream = endless(served)
    assert served.http.post(TEXT, json=dict(prompt='a', n=8, max_tokens=400)).status_code == 429
    stream.close()
    until(lambda: quiet(served))


def test_a_request_that_takes_too_long_is_504():
  with serving(limits=api.Limits(timeout=0.3), delay=0.02) as served:
    found = served.http.post(TEXT, json=dict(prompt='hm', max_tokens=500))
    assert found.status_code == 504 and found.json()['error']['code'] == 'timeout'
    with pytest.raises(openai.APIError, match='not done after'):
      list(served.ai.completions.create(model='fake', prompt='hm', max_tokens=500, stream=True))
    until(lambda: quiet(served))


def test_an_engine_that_breaks_is_500_or_the_last_event():
  with serving(delay=0.01) as served:
    stream = endless(served)
    served.engine.broken = True
    with pytest.raises(openai.APIError, match='could not go on'):
      list(stream)
    found = served.http.post(TEXT, json=dict(prompt='hm'))
    assert found.status_code == 500 and found.json()['error']['type'] == 'server_error'
    stats = served.engine.stats
    served.engine.stats = lambda: dict(stats(), failed=True)
    assert [served.http.get(p).status_code for p in ('/health', '/ready')] == [503, 503]


# --- clients that go away -----------------------------------------------------------------------------


@pytest.mark.parametrize('stream', [True, False])
@pytest.mark.parametrize('rows', [1, 8])  # while it waits in the queue, or while it is answered
def test_a_connection_that_is_cut_gives_everything_back(stream, rows):
  with serving(rows=rows, delay=0.01) as served:
    first = endless(served) if rows == 1 else None
    host, _, port = served.url.removeprefix('http://').partition(':')
    connection = http.client.HTTPConnection(host, int(port))
    body = json.dumps(dict(prompt='ha', max_tokens=500, stream=stream, n=2))
    connection.request('POST', TEXT, body, {'content-type': 'application/json'})
    there = (lambda s: s['waiting'] == 2) if first else (lambda s: s['running'] == 2)
    until(lambda: there(served.engine.stats()))
    connection.sock.close()
    until(lambda: served.engine.cancelled == 2)
    if first:
      until(lambda: served.engine.stats()['waiting'] == 0)
      next(first)  # who stays goes on
      first.close()
    until(lambda: quiet(served))
    assert not served.service.replies


# --- the end ------------------------------------------------------------------------------------------


def process(*flags):
  """A server in a process of its own: (process, url)."""
  command = [sys.executable, '-m', 'tests.serve.fake', *flags]
  started = subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=dict(os.environ),
  )
  return started, started.stdout.readline().split()[-1]


def stream_lines(url, tokens):
  body = dict(prompt='hm', max_tokens=tokens, stream=True, seed=1)
  with httpx.stream('POST', url + TEXT, json=body, timeout=60) as found:
    yield from (line.removeprefix('data: ') for line in found.iter_lines() if line)


def test_sigterm_lets_answers_finish_and_exits_with_0():
  server, url = process('--delay=0.02')
  expected = httpx.post(url + TEXT, json=dict(prompt='hm', max_tokens=60, seed=1)).json()
  lines = stream_lines(url, 60)
  got = [next(lines)]
  server.send_signal(signal.SIGTERM)
  got += list(lines)
  assert got.pop() == '[DONE]'
  assert ''.join(json.loads(x)['choices'][0]['text'] for x in got) == expected['choices'][0]['text']
  with pytest.raises(httpx.ConnectError):
    httpx.get(url + '/health')
  _, err = server.communicate(timeout=60)
  assert server.returncode == 0 and 'Traceback' not in err


def test_answers_that_do_not_finish_in_time_are_cut_and_told():
  server, url = process('--delay=0.05', '--drain=0.2')
  lines = stream_lines(url, 500)
  next(lines)
  server.send_signal(signal.SIGTERM)
  assert 'shutting down' in list(lines)[-1]
  _, err = server.communicate(timeout=60)
  assert server.returncode == 0 and 'Traceback' not in err


def test_a_second_signal_does_not_wait():
  with serving(delay=0.01, drain=60) as served:
    stream = endless(served)
    for _ in range(2):
      served.made.state.server.handle_exit(signal.SIGINT, None)
    with pytest.raises(openai.APIError, match='shutting down'):
      list(stream)
    served.thread.join(30)
    assert not served.thread.is_alive()


def test_while_draining_new_work_is_503(served, monkeypatch):
  monkeypatch.setattr(served.service, 'draining', True)
  assert served.http.get('/health').status_code == 200
  for found in (served.http.get('/ready'), served.http.post(TEXT, json=dict(prompt='a'))):
    assert found.status_code == 503 and int(found.headers['retry-after']) > 0


# --- the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--host=0.0.0.0'], 'name a key with --api_key'),
    ([], 'name the run: --workdir=DIR'),
    (['--workdir=nowhere'], 'no trained model in nowhere'),
    (['--port=99999'], 'port'),
    (['--config=x.py'], 'leave out --config'),
  ],
)
def test_the_command_refuses_in_one_line(flags, words, capsys, monkeypatch):
  monkeypatch.delenv('LLM_JAX_API_KEY', raising=False)
  port = [] if any('port' in f for f in flags) else ['--port=0']
  assert main.main(['serve', *port, *flags]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count('\n') == 1 and 'Traceback' not in error


def test_a_port_that_is_taken(served, capsys):
  port = served.url.rpartition(':')[2]
  assert main.main(['serve', f'--port={port}']) == 2
  assert 'try another --port' in capsys.readouterr().err
