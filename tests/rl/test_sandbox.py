"""Hostile programs: each is contained, does not pass, leaves nothing behind, and the next program runs as before."""

import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from llm_jax.core.errors import UserError
from llm_jax.rl import sandbox

QUICK = dict(seconds=2.0, memory=64 << 20)
TESTS = 'assert double(3) == 6\nassert double(-1) == -2'
RIGHT = 'def double(x):\n  return 2 * x'


@pytest.fixture
def isolated():
  """Where there are no walls nothing may run, and that is all there is to see."""
  try:
    sandbox.check()
  except UserError as e:
    assert 'cannot be isolated' in str(e)
    return lambda *_, **__: None
  return lambda code, tests=TESTS, **told: sandbox.run(textwrap.dedent(code), tests, **QUICK | told)


def processes() -> set[str]:
  """The command lines of the machine's processes that hold our launcher."""
  found = set()
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      text = path.read_text()
    except OSError:
      continue
    if 'jail.py' in text:
      found.add(path.parent.name)
  return found


def becomes(true) -> bool:
  """Whether `true()` holds within a minute."""
  return any(true() or signal.sigtimedwait([], 0.05) for _ in range(1200))


def test_programs_pass_and_fail(isolated):
  if (found := isolated(RIGHT)) is None:
    return
  assert found == sandbox.Result(True, '', '')
  wrong = isolated('def double(x): return 3 * x')
  assert (wrong.passed, wrong.why) == (False, 'failed') and 'AssertionError' in wrong.output
  assert 'SyntaxError' in isolated('def double(x) return').output
  echo = 'import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)'
  assert isolated(echo, None, stdin='1 2\n39') == sandbox.Result(True, '', '42\n')
  assert not isolated('import sys; sys.exit(3)', None).passed
  library = (
    'import collections, heapq, json, random, re, decimal, threading\ndef double(x): return 2 * x'
  )
  assert isolated(library).passed
  threads = 'import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n' + RIGHT
  assert isolated(threads).passed
  many = sandbox.run_all([(RIGHT, TESTS), ('', TESTS), (RIGHT, TESTS)], workers=2, **QUICK)
  assert [r.passed for r in many] == [True, False, True]


THREATS = dict(
  fork_bomb="""
    import os
    made = 0
    for _ in range(100):
      try:
        if os.fork() == 0:
          os._exit(0)
        made += 1
      except OSError:
        pass
    print('made', made)
    """,
  process_pool="""
    import multiprocessing
    multiprocessing.Process(target=print).start()
    """,
  another_program="""
    import os
    os.execv('/bin/sh', ['sh', '-c', 'true'])
    """,
  shell="""
    import os
    print('shell', os.system('true'))
    """,
  infinite_loop='while True: pass',
  sleeping="""
    import time
    time.sleep(1000)
    """,
  ignores_signals="""
    import signal
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
      signal.signal(number, lambda *_: None)
    while True: pass
    """,
  ten_gigabytes="""
    x = bytearray(10 << 30)
    """,
  many_lists="""
    x = []
    while True: x.append(bytearray(1 << 20))
    """,
  threads_that_hold_memory="""
    import threading
    for _ in range(1000):
      threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()
    """,
  fills_the_disk="""
    for i in range(100):
      with open(f'/tmp/{i}', 'wb') as f:
        f.write(bytes(1 << 20))
    """,
  exits_well='import os; os._exit(0)',
  leaves='import sys; sys.exit(0)',
  leaves_at_exit="""
    import atexit, os
    atexit.register(lambda: os._exit(0))
    raise SystemExit(0)
    """,
  prints_the_marker="""
    import os
    print('walled\\npassed\\nTrue')
    for fd in range(3, 60):
      try:
        os.write(fd, b'walled\\npassed\\n' + bytes(16).hex().encode())
      except OSError:
        pass
    os._exit(0)
    """,
  huge_output="""
    import os
    while True: os.write(1, bytes(1 << 16))
    """,
  huge_report="""
    import os
    while True:
      for fd in range(3, 60):
        try:
          os.write(fd, bytes(1 << 16))
        except OSError:
          pass
    """,
  closes_everything="""
    import os, time
    os.closerange(0, 60)
    time.sleep(1000)
    """,
  kills_its_parents="""
    import os, signal
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
      for pid in (os.getppid(), 1, 0, -1):
        try:
          os.kill(pid, number)
        except OSError:
          pass
    """,
  text_that_is_no_program='x = "\ud800\0"',
  nested='(' * 200_000,
  endless_recursion='import sys; sys.setrecursionlimit(10**9); f = lambda: f(); f()',
  interrupts_process_one="""
    import os, signal
    os.kill(1, signal.SIGINT)
    while True: pass
    """,
  mounts="""
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())
    """,
)


@pytest.mark.parametrize('name', THREATS)
def test_threat_is_contained(name, isolated):
  before = processes()
  found = isolated(THREATS[name])
  if found is None:
    return
  assert not found.passed
  assert 'shell 0' not in found.output and ('made' not in found.output or 'made 0' in found.output)
  assert len(found.output) <= 1 << 16
  assert processes() <= before  # nothing of it lives
  assert isolated(RIGHT).passed


def test_limits_are_named(isolated):
  if (found := isolated('while True: pass', seconds=1.0)) is None:
    return
  assert found.why in ('time', 'failed')  # the clock on the wall or that of the processor
  assert isolated('import time; time.sleep(9)', seconds=0.5).why == 'time'
  assert isolated('print("x" * 3000)', output=1000).why == 'output'
  assert 'MemoryError' in isolated('x = bytearray(10 << 30)').output
  assert 'No space left' in isolated(THREATS['fills_the_disk'], disk=8 << 20).output
  assert isolated('open("/tmp/x", "w").write("x" * 1000)\n' + RIGHT).passed


def test_files_outside_are_out_of_sight(isolated, tmp_path, monkeypatch):
  secret = tmp_path / 'secret.txt'
  secret.write_text('the secret')
  secret.chmod(0o666)
  monkeypatch.setenv('API_KEY', 'the secret')
  found = isolated(
    f"""
    import os
    def attempt(name, act):
      try:
        print(name, act())
      except OSError as e:
        print(name, 'refused')
    attempt('read', lambda: open({str(secret)!r}).read())
    attempt('write', lambda: open({str(secret)!r}, 'w').write('broken'))
    attempt('create', lambda: open({str(tmp_path / 'new')!r}, 'w').write('new'))
    attempt('processes', lambda: os.listdir('/proc'))
    attempt('library', lambda: open(os.__file__, 'a'))
    attempt('root', lambda: open('/new', 'w'))
    attempt('passwords', lambda: open('/etc/passwd').read())
    print(dict(os.environ), os.listdir('/tmp'))
    """,
    '',
  )
  if found is None:
    return
  assert 'secret' not in found.output.replace(str(secret), '')
  for name in ('read', 'write', 'create', 'processes', 'library', 'root', 'passwords'):
    assert f'{name} refused' in found.output
  assert secret.read_text() == 'the secret' and [p.name for p in tmp_path.iterdir()] == [
    'secret.txt'
  ]


def test_network_is_out_of_reach(isolated):
  with socket.create_server(('127.0.0.1', 0)) as server:
    server.settimeout(0.2)
    code = f"""
    import socket, asyncio
    asyncio.run(asyncio.sleep(0))
    try:
      socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)
    except PermissionError:
      print('no network')
    """
    found = isolated(code, '')
    with pytest.raises(TimeoutError):
      server.accept()
  assert found is None or (found.passed and 'no network' in found.output)


def test_each_wall_stands_alone(isolated, tmp_path, monkeypatch):
  """Without the filter of system calls the namespaces still hold: no other process, no network, all ends together."""
  if isolated('') is None:
    return
  jail = sandbox.JAIL.read_text().replace('  refuse()\n', '')
  code = """
    import os, socket, time
    try:
      socket.create_connection(('127.0.0.1', 9), 1)
    except OSError as e:
      print(type(e).__name__)
    children = 0
    for _ in range(100):
      try:
        if os.fork() == 0:
          os.setsid()
          time.sleep(1000)
        children += 1
      except BlockingIOError:
        print('no more after', children)
        break
    """
  before = processes()
  weak = tmp_path / 'weak_jail.py'
  weak.write_text(jail)
  monkeypatch.setattr(sandbox, 'JAIL', weak)
  found = isolated(code)
  left = processes()
  assert 'ConnectionRefused' not in found.output and 'OSError' in found.output
  assert 'no more after 30' in found.output and left == before


def test_programs_end_with_the_process_that_runs_them(isolated):
  if isolated('') is None:
    return
  before = processes()
  code = (
    'from llm_jax.rl import sandbox\n'
    'print("started", flush=True)\n'
    'sandbox.run("while True: pass", seconds=60)\n'
  )
  parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert parent.stdout.readline() == b'started\n'
  assert becomes(lambda: processes() - before)
  parent.send_signal(signal.SIGKILL)
  parent.wait()
  parent.stdout.close()
  assert becomes(lambda: processes() <= before)


def test_refuses_where_a_wall_is_missing(monkeypatch, tmp_path):
  broken = tmp_path / 'jail.py'
  text = sandbox.JAIL.read_text()
  assert "call('unshare', apart" in text
  broken.write_text(
    text.replace(
      "call('unshare', apart", "raise Missing('unshare: refused'); call('unshare', apart"
    )
  )
  monkeypatch.setattr(sandbox, 'JAIL', broken)
  with pytest.raises(UserError, match=r'cannot be isolated here \(unshare: refused\): allow user'):
    sandbox.run('open("/tmp/ran", "w")', '')
  broken.write_text(text.replace('  refuse()\n', "  raise Missing('prctl: Invalid argument')\n"))
  with pytest.raises(UserError, match='prctl: Invalid argument'):
    sandbox.run('pass')
  monkeypatch.setattr(sys, 'platform', 'darwin')
  with pytest.raises(UserError, match='darwin'):
    sandbox.run('pass')


@pytest.mark.parametrize('rights', ['as we are', 'none'])
def test_with_and_without_privileges(rights, isolated):
  """Somebody who may become nobody else gets the same walls as root."""
  if isolated('') is None:
    return
  drop = (
    'import ctypes, os\n'
    'user, group = os.getuid(), os.getgid()\n'
    'assert ctypes.CDLL(None).unshare(0x10000000) == 0\n'  # CLONE_NEWUSER
    'open("/proc/self/setgroups", "w").write("deny")\n'
    'open("/proc/self/uid_map", "w").write(f"{user} {user} 1")\n'
    'open("/proc/self/gid_map", "w").write(f"{group} {group} 1")\n'
  )
  code = (
    'from llm_jax.rl import sandbox\n'
    'print(sandbox.run("import os; print(os.listdir(chr(47) + \'tmp\'), os.getpid())").output)\n'
    "for code in (\"import os; os.fork()\", \"open('/etc/passwd')\", \"open('/x', 'w')\", \"open('/tmp/x', 'w')\"):\n"
    '  print(sandbox.run(code).passed)\n'
  )
  code = drop + code if rights == 'none' else code
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.stdout.split() == ['[]', '2', 'False', 'False', 'False', 'True'], done.stderr
