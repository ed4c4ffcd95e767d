"""Runs inside the process that `sandbox.run` starts: walls itself in, then executes the program that it was given.

Not imported by anything: `python -I -S jail.py REPORT`, with a JSON description on standard input. The walls, from the
outside in:

- namespaces: no network, no other processes in sight, and a file system of its own that holds Python's library
  (read-only) and an empty /tmp in memory;
- no privileges: another user id when started as root, no capabilities, no way to gain any (prctl(2), no_new_privs);
- system calls: a filter (seccomp(2)) refuses new processes, sockets, mounts, tracing and shared memory, so that
  one process is all there is and its limits are those of the whole program;
- limits: processor time, address space, size and number of files, threads.

The parent of the program is process 1 of its namespace: with it the kernel ends whatever the program has started.
Written to the pipe REPORT: one line 'walled', or what could not be had; then the token, once the program and its
tests have run to their end.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig

NEW_MOUNTS, NEW_IPC, NEW_NAMES, NEW_USERS, NEW_PIDS, NEW_NETWORK = (
  0x00020000,
  0x08000000,
  0x04000000,
  0x10000000,
  0x20000000,
  0x40000000,
)
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = (
  1,
  2,
  4,
  32,
  4096,
  16384,
  1 << 18,
)
DETACH = 2
ROOT = '/sys'  # an empty file system is mounted over it, and becomes the root
THREADS, FILES = 32, 64

# Refused system calls: their numbers on x86-64 and on arm64, None where there is none.
REFUSED = dict(
  fork=(57, None),
  vfork=(58, None),
  execve=(59, 221),
  execveat=(322, 281),
  socket=(41, 198),
  connect=(42, 203),
  bind=(49, 200),
  ptrace=(101, 117),
  process_vm_readv=(310, 270),
  process_vm_writev=(311, 271),
  unshare=(272, 97),
  setns=(308, 268),
  mount=(165, 40),
  umount2=(166, 39),
  pivot_root=(155, 41),
  chroot=(161, 51),
  shmget=(29, 194),
  msgget=(68, 186),
  semget=(64, 190),
  mq_open=(240, 180),
  add_key=(248, 217),
  request_key=(249, 218),
  keyctl=(250, 219),
  perf_event_open=(298, 241),
  memfd_create=(319, 279),
  bpf=(321, 280),
  userfaultfd=(323, 282),
  io_uring_setup=(425, 425),
  io_uring_enter=(426, 426),
  io_uring_register=(427, 427),
  open_tree=(428, 428),
  move_mount=(429, 429),
  fsopen=(430, 430),
  pidfd_open=(434, 434),
  pidfd_getfd=(438, 438),
  mount_setattr=(442, 442),
  memfd_secret=(447, 447),
)
CLONE, CLONE3, THREAD = (56, 220), 435, 0x00010000
MACHINES = dict(x86_64=(0, 0xC000003E), aarch64=(1, 0xC00000B7))  # column above, AUDIT_ARCH
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
  """A wall that cannot be had."""


def call(name: str, *arguments) -> None:
  """A function of the C library that returns 0."""
  made = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_ulong(a) for a in arguments]
  if getattr(libc, name)(*made) != 0:
    raise Missing(f'{name}: {os.strerror(ctypes.get_errno())}')


def spaces() -> int | None:
  """Leaves the namespaces of the machine. Returns the user id to become, None to stay: as root one of those that
  nobody has, so that the limit on threads counts (it does not bind root)."""
  apart = NEW_MOUNTS | NEW_IPC | NEW_NAMES | NEW_PIDS | NEW_NETWORK
  with open('/proc/self/uid_map') as f:
    first, _, count = (int(x) for x in f.read().splitlines()[-1].split())
  if os.geteuid() == 0 and count > 1:
    call('unshare', apart)
    return first + count // 2 + os.getpid() % (count // 2)
  user, group = os.geteuid(), os.getegid()
  call('unshare', apart | NEW_USERS)
  for name, text in (
    ('setgroups', 'deny'),
    ('uid_map', f'{user} {user} 1'),
    ('gid_map', f'{group} {group} 1'),
  ):
    with open(f'/proc/self/{name}', 'w') as f:
      f.write(text)
  return None


def root(size: int) -> None:
  """The file system: Python's library and the system's, read-only, and /tmp of `size` bytes."""
  call('mount', b'none', b'/', b'none', RECURSIVE | PRIVATE, 0)
  call('mount', b'tmpfs', ROOT.encode(), b'tmpfs', NO_SUID, b'size=1m,nr_inodes=4k,mode=755')
  shown: list[str] = []
  library = [sysconfig.get_path(name) for name in ('stdlib', 'platstdlib')]
  system = ['/lib', '/lib64', '/usr/lib', '/usr/lib64', '/etc/ld.so.cache', '/dev/null']
  for path in [*system, f'{sys.base_prefix}/lib', *library]:
    if not os.path.exists(path) or any(path == p or path.startswith(f'{p}/') for p in shown):
      continue
    target = ROOT + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
      os.symlink(os.readlink(path), target)
      continue
    shown.append(path)
    if os.path.isdir(path):
      os.makedirs(target, exist_ok=True)
    else:
      os.close(os.open(target, os.O_CREAT))
    call('mount', path.encode(), target.encode(), b'none', BIND | RECURSIVE, 0)
    read_only = struct.pack('QQQQ', 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY, of it and all that lies below
    call('syscall', 442, 0, target.encode(), 0x8000, read_only, len(read_only))
  os.makedirs(f'{ROOT}/tmp')
  options = f'size={size},nr_inodes=1k,mode=1777'.encode()
  call('mount', b'tmpfs', f'{ROOT}/tmp'.encode(), b'tmpfs', NO_SUID | NO_DEVICES, options)
  call('mount', b'none', ROOT.encode(), b'none', REMOUNT | BIND | READ_ONLY | NO_SUID, 0)
  os.chdir(ROOT)
  call('syscall', REFUSED['pivot_root'][MACHINES[platform.machine()][0]], b'.', b'.')
  call('umount2', b'.', DETACH)
  os.chdir('/tmp')


def powerless(user: int | None) -> None:
  """Gives up privileges for good."""
  if user is not None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  call('capset', struct.pack('Ii', 0x20080522, 0), bytes(24))
  call('prctl', 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
  call('prctl', 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody attaches to it


def limits(told: dict) -> None:
  """memory: bytes beyond what the interpreter has. cpu: seconds."""
  bound = lambda name, value: resource.setrlimit(getattr(resource, name), (value, value))
  bound('RLIMIT_AS', told['held'] + told['memory'])
  bound('RLIMIT_CPU', told['cpu'])
  bound('RLIMIT_FSIZE', told['disk'])
  bound('RLIMIT_NOFILE', FILES)
  bound('RLIMIT_NPROC', THREADS)
  bound('RLIMIT_CORE', 0)
  bound('RLIMIT_MEMLOCK', 0)


def refuse() -> None:
  """The filter of system calls."""
  column, machine = MACHINES[platform.machine()]
  load, equal, least, either, end = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
  allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
  code = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, kill), (load, 0, 0, 0)]
  if column == 0:  # the numbers of x32, which mean the same calls
    code += [(least, 0, 1, 0x40000000), (end, 0, 0, kill)]
  for number in (row[column] for row in REFUSED.values() if row[column] is not None):
    code += [(equal, 0, 1, number), (end, 0, 0, error | EPERM)]
  code += [(equal, 0, 1, CLONE3), (end, 0, 0, error | ENOSYS)]  # the library then uses clone
  code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (either, 1, 0, THREAD)]
  code += [(end, 0, 0, error | EPERM), (end, 0, 0, allow)]
  text = b''.join(struct.pack('HBBI', *x) for x in code)
  held = ctypes.create_string_buffer(text, len(text))
  call('prctl', 22, 2, struct.pack('HxxxxxxQ', len(code), ctypes.addressof(held)), 0, 0)


def execute(told: dict, report: int) -> None:
  """The program, then its tests in the same names."""
  import builtins
  import traceback

  names: dict = {'__name__': '__main__'}
  own = dict(vars(builtins))
  try:
    try:
      exec(compile(told['code'], '<answer>', 'exec'), names)
    except SystemExit as e:
      if told['tests'] is not None or e.code not in (None, 0):
        raise
    if told['tests'] is not None:
      names['__builtins__'] = own
      exec(compile(told['tests'], '<tests>', 'exec'), names)
    sys.stdout.flush()
  except BaseException:
    sys.stdout.flush()
    traceback.print_exc(limit=-3)
    sys.stderr.flush()
    os._exit(1)
  os.write(report, told['token'].encode())
  os._exit(0)


def program(told: dict, report: int) -> None:
  """The child of process 1."""
  os.setsid()
  given = os.memfd_create('stdin')
  os.write(given, told['stdin'].encode(errors='replace'))
  os.lseek(given, 0, os.SEEK_SET)
  os.dup2(given, 0)
  os.close(given)
  limits(told)
  refuse()
  os.write(report, b'walled\n')
  execute(told, report)


def die() -> None:
  """From now on the kernel ends this process with its parent (PR_SET_PDEATHSIG)."""
  call('prctl', 1, signal.SIGKILL, 0, 0, 0)


def first(told: dict, report: int) -> None:
  """Process 1: ends with the program, or when the one that started it is gone."""
  powerless(told.pop('user'))
  die()  # the change of user has undone it
  child = os.fork()
  if not child:
    try:
      program(told, report)
    except BaseException as e:
      os.write(report, f'{e}\n'.encode())
    os._exit(1)
  while os.wait()[0] != child:
    pass
  os._exit(0)


def main() -> None:
  """Says what stands in the way in the first line of the report."""
  report = int(sys.argv[1])
  die()
  try:
    with open(0, 'rb', closefd=False) as f:
      told = json.load(f)
    if platform.machine() not in MACHINES:
      raise Missing(f'no list of system calls for {platform.machine()}')
    with open('/proc/self/statm') as f:
      told['held'] = int(f.read().split()[0]) * resource.getpagesize()
    told['user'] = spaces()
    child = 0
    signal.signal(
      signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL) if child else os._exit(1)
    )
    child = os.fork()
    if not child:
      die()
      root(told['disk'])
      first(told, report)
    os.close(report)
    os.waitpid(child, 0)  # process 1 can be waited for once all others of its namespace are gone
  except (Missing, OSError) as e:
    os.write(report, f'{e}\n'.encode())
    os._exit(1)


if __name__ == '__main__':
  main()
