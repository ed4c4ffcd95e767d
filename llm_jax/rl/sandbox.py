"""Somebody else's program, run with nothing to break: what a model wrote, and the tests that it should pass.

    found = sandbox.run('def double(x): return 2 * x', 'assert double(3) == 6')
    found.passed, found.why, found.output

Each program has a process of its own with limits on time, memory, output and files, without network, other processes
or files to see (how: rl/jail.py). Linux 5.14 or newer; where one of the walls cannot be had, nothing runs and
`UserError` says what is missing. What it does not promise: a program shares its interpreter with its tests, so
one that goes looking for them can deceive them (an object equal to everything, say). Where that matters, compare what
the program prints with what it should (`tests=None`), outside.
"""

import concurrent.futures
import functools
import json
import math
import os
import pathlib
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from llm_jax.core.errors import UserError

JAIL = pathlib.Path(__file__).with_name('jail.py')
START = 60.0  # seconds for the interpreter to start on a busy machine
REMEDY = (
  'allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0 and user.max_user_namespaces above 0) '
  'or start the container with --cap-add=SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined'
)


class Result(NamedTuple):
  """passed: the program and its tests ran to their end. why: '' then; otherwise 'time', 'output' (too much of it),
  'failed' (an exception, or it ended before its end). output: what it wrote, standard error included."""

  passed: bool
  why: str
  output: str


def run(
  code: str,
  tests: str | None = '',
  *,
  stdin: str = '',
  seconds: float = 5.0,
  memory: int = 256 << 20,
  disk: int = 16 << 20,
  output: int = 1 << 16,
) -> Result:
  """Runs Python `code`, then `tests` in the same names; passed when neither raises.

  tests: Python, such as asserts; None for a program, which may also end by `sys.exit(0)`. seconds: of wall and of
  processor time. memory, disk: bytes beyond the interpreter's own, in /tmp. output: bytes; a program that writes more
  is ended. The program finds Python's standard library and nothing else. Raises `UserError` if it cannot be isolated.
  """
  if not sys.platform.startswith('linux'):
    raise UserError(f'untrusted code is isolated by Linux, this is {sys.platform}: run it there')
  token = secrets.token_hex(16)
  told = dict(code=code, tests=tests, stdin=stdin, token=token, memory=memory, disk=disk)
  told['cpu'] = math.ceil(seconds)
  read, write = os.pipe()
  process = subprocess.Popen(
    [sys.executable, '-I', '-S', '-X', 'utf8', str(JAIL), str(write)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    pass_fds=(write,),
    start_new_session=True,
    env={},
    cwd='/',
  )
  os.close(write)
  try:
    report, said, why = _follow(process, read, json.dumps(told), seconds, output)
  finally:
    _end(process, read)
  walls, _, rest = report.partition(b'\n')
  text = said[:output].decode(errors='replace')
  if walls != b'walled':
    late = f'it did not start within {START:.0f} s' if why == 'time' else 'it did not start'
    reason = walls.decode(errors='replace') or text.strip().rpartition('\n')[2] or late
    raise UserError(f'untrusted code cannot be isolated here ({reason}): {REMEDY}')
  passed = not why and rest == token.encode()
  return Result(passed, '' if passed else why or 'failed', text)


def run_all(programs: Sequence[tuple], *, workers: int = 4, **settings: float) -> list[Result]:
  """`run` for each (code, tests) or (code, tests, stdin), `workers` at a time, in their order."""
  one = lambda told: run(*told[:2], stdin=''.join(told[2:]), **settings)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(one, programs))


@functools.cache
def check() -> None:
  """Raises `UserError` unless programs can be isolated here."""
  run('pass')


def _follow(
  process: subprocess.Popen, read: int, told: str, seconds: float, output: int
) -> tuple[bytes, bytes, str]:
  """Reads the report and what is written until both end, or one of the limits is reached."""
  try:
    process.stdin.write(told.encode())
    process.stdin.close()
  except BrokenPipeError:
    pass  # it ended before it read this; the report says why
  held = {read: b'', process.stdout.fileno(): b''}
  until = time.monotonic() + START
  with selectors.DefaultSelector() as waiting:
    for fd in held:
      waiting.register(fd, selectors.EVENT_READ)
    while waiting.get_map():
      left = until - time.monotonic()
      if left <= 0:
        return *held.values(), 'time'
      for key, _ in waiting.select(left):
        piece = os.read(key.fd, 1 << 16)
        if not piece:
          waiting.unregister(key.fd)
        if key.fd == read and not held[read] and piece:
          until = time.monotonic() + seconds  # the clock of the program starts
        held[key.fd] += piece
        if len(held[key.fd]) > output:
          return *held.values(), 'output'
  return *held.values(), ''


def _end(process: subprocess.Popen, read: int) -> None:
  """Ends process 1 of the namespace and with it all in it, and waits until they are gone: the launcher ends last."""
  process.terminate()
  try:
    process.wait(START)
  except subprocess.TimeoutExpired:  # the kernel then ends process 1 with its parent
    process.kill()
    process.wait()
  process.stdout.close()
  os.close(read)
