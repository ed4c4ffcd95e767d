"""Checkpoints: what is restored is what was saved, bit for bit, whatever happened to the process or the files."""

import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.core.errors import UserError
from llm_jax.train import checksum
from llm_jax.train.checkpoint import Saver, load_params, warm_start
from llm_jax.train.state import State

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Source:
  """Counts batches."""

  def __init__(self):
    self.position = 0

  def __call__(self, state=None):
    self.position += 1
    return self.position

  def state(self):
    return dict(position=self.position)

  def restore(self, saved):
    self.position = saved['position']


def make(step=0, seed=0, shape=(24, 16), dtype=jnp.float32):
  """Parameters, an optax state with tuples, a mask's holes and an empty array, as optimizers have them."""
  rng = np.random.default_rng(seed)
  w = jnp.asarray(rng.standard_normal(shape), dtype)
  params = dict(
    decoder=dict(layers=dict(w=w, b=jnp.asarray(rng.standard_normal(5), jnp.bfloat16))),
    head=dict(w=w[:4] * 2),
  )
  return State(
    jnp.asarray(step, jnp.int32),
    params,
    (optax.adam(1.0).init(params), None, dict(empty=jnp.zeros((0, 3)))),
  )


def same(a, b):
  a, b = jax.tree.leaves(a), jax.tree.leaves(b)
  bits = lambda x: np.asarray(x).tobytes()
  return len(a) == len(b) and all(
    x.dtype == y.dtype and bits(x) == bits(y) for x, y in zip(a, b, strict=True)
  )


def saved(workdir, steps=(10, 20), **kw):
  """A workdir with a checkpoint of `make(step, seed=step)` at each step."""
  saver, source = Saver(str(workdir), every=10, **kw), Source()
  saver.restore(make(), source)
  for step in steps:
    source.position = 2 * step
    saver.save(step, make(step, seed=step), {})
  saver.wait()
  return saver


def data_files(workdir, step):
  """The files that hold the arrays of a checkpoint, largest first."""
  files = glob.glob(f'{workdir}/checkpoints/{step}/state/**/d/*', recursive=True)
  return sorted(files, key=os.path.getsize, reverse=True)


def test_restores_every_bit_and_the_position_in_the_data(tmp_path):
  saved(tmp_path)
  source = Source()
  state = Saver(str(tmp_path)).restore(make(), source)
  assert same(state, make(20, seed=20)) and source.position == 40
  assert jax.tree.structure(state) == jax.tree.structure(make())
  assert state.params['decoder']['layers']['b'].dtype == jnp.bfloat16


def test_a_fresh_workdir_leaves_the_state_as_it_is(tmp_path):
  state = make()
  assert Saver(str(tmp_path)).restore(state, Source()) is state


def test_the_hook_saves_when_due_and_at_the_last_step(tmp_path):
  saver = Saver(str(tmp_path), every=4, steps=10, keep=9)
  saver.restore(make(), Source())
  for step in range(11):
    saver.hook(step, make(step), dict(loss=jnp.float32(1.0)))
  saver.wait()
  assert saver.steps() == [4, 8, 10]


def test_keeps_the_newest_and_the_best(tmp_path):
  saver = Saver(str(tmp_path), every=1, keep=2, best='bits', keep_best=1)
  saver.restore(make(), Source())
  for step, bits in enumerate([3.0, 1.0, 2.0, 4.0, float('inf'), 5.0], 1):
    saver.hook(step, make(step), dict(bits=jnp.float32(bits)))
  saver.wait()
  assert saver.steps() == [2, 5, 6]
  saver = Saver(
    str(tmp_path), every=1, keep=2, best='bits', keep_best=1
  )  # the values are read back
  saver.restore(make(), Source())
  saver.hook(7, make(7), dict(bits=jnp.float32(7.0)))
  saver.wait()
  assert saver.steps() == [2, 6, 7]


def test_the_best_may_be_the_largest(tmp_path):
  saver = Saver(str(tmp_path), every=1, keep=1, best='accuracy', keep_best=2, best_mode='max')
  saver.restore(make(), Source())
  for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.8, 0.1], 1):
    saver.hook(step, make(step), dict(accuracy=accuracy))
  saver.wait()
  assert saver.steps() == [2, 4, 5]


def test_a_metric_that_nobody_wrote_is_named(tmp_path, capsys):
  saver = Saver(str(tmp_path), every=1, best='heldout/bits')
  saver.restore(make(), Source())
  saver.hook(1, make(1), {'heldout/bit': 1.0, 'loss': 2.0})
  assert "did you mean 'heldout/bit'?" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['loss', 'grad_norm', 'param_norm'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_bad_state_is_not_saved(tmp_path, capsys, name, value):
  saver = Saver(str(tmp_path), every=1)
  saver.restore(make(), Source())
  saver.hook(1, make(1), {name: jnp.float32(value)})
  saver.wait()
  assert saver.steps() == [] and f'step 1 is not saved: {name} is' in capsys.readouterr().err


def test_the_step_being_written_does_not_count_yet(tmp_path):
  saver = saved(tmp_path, steps=[10])
  saver.save(20, make(20), {})
  assert saver.steps() in ([10], [10, 20])
  saver.wait()
  assert saver.steps() == [10, 20]


def test_donating_the_buffers_after_a_save_changes_nothing(tmp_path):
  saver = Saver(str(tmp_path))
  state = make(1, seed=3, shape=(512, 512))
  saver.restore(make(shape=(512, 512)), Source())
  saver.save(1, state, {})
  double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
  for _ in range(3):
    state = double(state)
  saver.wait()
  again = Saver(str(tmp_path)).restore(make(shape=(512, 512)), Source())
  assert same(again, make(1, seed=3, shape=(512, 512)))


# --- other meshes -----------------------------------------------------------------------------------


def on_mesh(state, sizes, spec, kind):
  mesh = jax.make_mesh(
    sizes, ('a', 'b'), axis_types=(kind,) * 2, devices=jax.devices()[: sizes[0] * sizes[1]]
  )

  def put(x):
    parts = spec if x.ndim == 2 and x.size and not any(n % 4 for n in x.shape) else PartitionSpec()
    return NamedSharding(mesh, parts)

  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put(x)), state)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_restores_onto_another_mesh(tmp_path, kind):
  state = make(10, seed=1)
  wide = on_mesh(state, (4, 2), PartitionSpec('a', 'b'), kind)
  saver = Saver(str(tmp_path))
  saver.restore(state, Source())
  saver.save(10, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, wide), {})
  saver.wait()
  for target in (
    on_mesh(state, (2, 4), PartitionSpec('b', 'a'), kind),
    on_mesh(state, (2, 1), PartitionSpec('a'), kind),
    state,
  ):
    restored = Saver(str(tmp_path)).restore(target, Source())
    assert same(restored, state)
    assert jax.tree.all(
      jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), restored, target)
    )


# --- checksums --------------------------------------------------------------------------------------


def reference(x):
  """The two sums of the docstring in Python integers."""
  raw = np.asarray(x)
  narrow = {1: np.uint8, 2: np.uint16}
  words = raw.reshape(-1).view(narrow.get(raw.dtype.itemsize, np.uint32)).tolist()
  first = sum(w * (2 * i + 1) for i, w in enumerate(words)) % 2**32
  mixed = lambda i: (h := i * 0x9E3779B9 % 2**32) ^ (h >> 15)
  return first, sum(w * (2 * mixed(i) + 1) for i, w in enumerate(words)) % 2**32


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool', 'int8', 'float8_e4m3fn']
)
@pytest.mark.parametrize('shape', [(), (7,), (3, 5, 2)])
def test_checksum_is_the_formula(dtype, shape):
  x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
  assert checksum.of(dict(x=x)) == dict(x=reference(x))


def test_checksum_finds_every_single_wrong_bit_and_swaps():
  x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
  good = checksum.of(dict(x=jnp.asarray(x)))
  for bit in range(16 * 32):
    wrong = x.view(np.uint32).copy()
    wrong[bit // 32] ^= np.uint32(1 << bit % 32)
    assert checksum.of(dict(x=jnp.asarray(wrong.view(np.float32)))) != good
  for i in range(15):
    order = np.arange(16)
    order[[i, i + 1]] = i + 1, i
    assert checksum.of(dict(x=jnp.asarray(x[order]))) != good


# --- damage -----------------------------------------------------------------------------------------


def restore(workdir, capsys, shape=(24, 16)):
  """(state, what was said)."""
  state = Saver(str(workdir)).restore(make(shape=shape), Source())
  return state, capsys.readouterr().err


@pytest.mark.parametrize('where', [0.02, 0.2, 0.5, 0.8, 0.98])
def test_a_flipped_byte_is_found_and_the_previous_checkpoint_used(tmp_path, capsys, where):
  saver = Saver(str(tmp_path))
  saver.restore(make(shape=(256, 128)), Source())
  for step in (10, 20):
    saver.save(step, make(step, seed=step, shape=(256, 128)), {})
  saver.wait()
  file = data_files(tmp_path, 20)[0]
  data = bytearray(pathlib.Path(file).read_bytes())
  data[int(where * len(data))] ^= 0x55
  pathlib.Path(file).write_bytes(data)
  state, said = restore(tmp_path, capsys, shape=(256, 128))
  assert same(state, make(10, seed=10, shape=(256, 128)))
  assert said.count('\n') == 1 and 'checkpoint 20 is damaged' in said


def test_a_silently_changed_array_is_named(tmp_path, capsys, monkeypatch):
  """Whatever the file format lets through: here the reader itself lies about one value."""
  import orbax.checkpoint as ocp

  saved(tmp_path)
  true = ocp.PyTreeCheckpointHandler.restore

  def lie(self, directory, *a, **k):
    tree = true(self, directory, *a, **k)
    if directory.parent.name == '20':
      tree['params']['head']['w'] = tree['params']['head']['w'].at[1, 2].add(1e-6)
    return tree

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'restore', lie)
  state, said = restore(tmp_path, capsys)
  assert same(state, make(10, seed=10)) and "'params/head/w'" in said


def truncate(workdir):
  os.truncate(data_files(workdir, 20)[0], os.path.getsize(data_files(workdir, 20)[0]) // 2)


def delete(workdir):
  os.remove(data_files(workdir, 20)[0])


def empty_folder(workdir):
  shutil.rmtree(f'{workdir}/checkpoints/20')
  os.makedirs(f'{workdir}/checkpoints/20')


def no_arrays(workdir):
  shutil.rmtree(f'{workdir}/checkpoints/20/state')


def change_description(workdir):
  file = pathlib.Path(f'{workdir}/checkpoints/20/meta/metadata')
  file.write_text(file.read_text().replace('position\\": 40', 'position\\": 41'))


def cut_description(workdir):
  file = pathlib.Path(f'{workdir}/checkpoints/20/meta/metadata')
  file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize(
  'harm', [truncate, delete, empty_folder, no_arrays, change_description, cut_description]
)
def test_what_cannot_be_read_is_set_aside(tmp_path, capsys, harm):
  saved(tmp_path)
  harm(tmp_path)
  state, said = restore(tmp_path, capsys)
  assert same(state, make(10, seed=10))
  assert said.count('\n') == 1 and '20 is damaged' in said
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['10', '20.damaged']
  saver = Saver(str(tmp_path))
  saver.restore(make(), Source())
  saver.save(20, make(20, seed=5), {})  # the step can be reached again
  saver.wait()
  assert same(restore(tmp_path, capsys)[0], make(20, seed=5))


def test_when_none_is_good_it_says_where_and_what_to_do(tmp_path, capsys):
  saved(tmp_path)
  for step in (10, 20):
    shutil.rmtree(tmp_path / f'checkpoints/{step}/state')
  with pytest.raises(
    UserError, match=rf'none of the checkpoints in {tmp_path}.*another --workdir'
  ) as e:
    restore(tmp_path, capsys)
  assert '\n' not in str(e.value)


def test_other_folders_are_left_alone(tmp_path, capsys):
  saved(tmp_path)
  os.makedirs(tmp_path / 'checkpoints/notes')
  os.makedirs(tmp_path / 'checkpoints/30.orbax-checkpoint-tmp/state')
  state, said = restore(tmp_path, capsys)
  assert same(state, make(20, seed=20)) and said == ''


@pytest.mark.parametrize(
  'other, message',
  [
    (
      lambda: make(shape=(24, 8)),
      r"'params/decoder/layers/w' has shape \(24, 16\) there, \(24, 8\) here",
    ),
    (lambda: make(dtype=jnp.float16), r"'params/decoder/layers/w' is float32 there, float16 here"),
    (
      lambda: make().replace(params=dict(make().params, new=jnp.ones(3))),
      r"it has no 'params/new' \(3,\)",
    ),
    (lambda: make().replace(opt_state=()), r"'opt_state/0/0/count' \(\) is not in this one"),
  ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, capfd, other, message):
  saved(tmp_path)
  with pytest.raises(UserError, match=message) as e:
    Saver(str(tmp_path)).restore(other(), Source())
  assert '--workdir' in str(e.value) and '\n' not in str(e.value)
  assert capfd.readouterr() == ('', '')
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['10', '20']


# --- processes that die, disks that are full ------------------------------------------------------------

PRELUDE = """
import os, signal, sys, threading, time
sys.path[:0] = [{root!r}, {here!r}]
import numpy as np
import jax
import jax.numpy as jnp
from test_checkpoint import Saver, Source, make, same
from llm_jax.core.errors import UserError
big = lambda step: make(step, seed=step, shape=(1500, 1000))
"""


def python(code, *, check=True, **kw):
  """Runs `code` after the prelude in a process of its own."""
  prelude = PRELUDE.format(root=str(ROOT), here=str(ROOT / 'tests/train'))
  environ = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='')
  command = [sys.executable, '-c', prelude + textwrap.dedent(code)]
  done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, **kw)
  assert not check or done.returncode == 0, done.stderr
  return done


@pytest.mark.parametrize('delay', [0.0, 0.02, 0.1])
def test_kill_9_during_a_save_leaves_the_one_before(tmp_path, capsys, delay):
  done = python(
    f"""
    saver, source = Saver({str(tmp_path)!r}), Source()
    saver.restore(big(0), source)
    for step in (10, 20):
      saver.save(step, big(step), {{}})
      saver.wait()
    saver.save(30, big(30), {{}})
    time.sleep({delay})
    os.kill(os.getpid(), signal.SIGKILL)
    """,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  big = lambda step: make(step, seed=step, shape=(1500, 1000))
  saver = Saver(str(tmp_path))
  state = saver.restore(big(0), Source())
  step = int(state.step)
  assert step in (20, 30) and same(state, big(step)) and capsys.readouterr().err == ''
  saver.save(40, big(40), {})
  saver.wait()
  assert saver.steps()[-1] == 40
  assert [
    n for n in os.listdir(saver.folder) if not n.isdigit()
  ] == []  # the half-written one is gone


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path):
  """A limit on the size of files fails the writing thread in the middle, as a full disk does."""
  done = python(
    f"""
    import resource
    saver = Saver({str(tmp_path)!r}, every=10)
    saver.restore(big(0), Source())
    saver.save(10, big(10), {{}})
    saver.wait()
    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, unlimited))
    saver.save(20, big(20), {{}})
    try:
      for _ in range(600):
        saver.hook(21, big(21), {{}})
        time.sleep(0.1)
    except UserError as e:
      print(e)
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    print(saver.steps(), same(Saver({str(tmp_path)!r}).restore(big(0), Source()), big(10)))
    """
  )
  said, steps = done.stdout.splitlines()
  assert re.match(
    r'checkpoint 20 could not be written to .* \(file too large\): make room .* from step 10\)$',
    said,
  )
  assert steps == '[10] True'
  assert 'Traceback' not in done.stderr, done.stderr


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
  saver = saved(tmp_path, steps=[10])
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 100))
  with pytest.raises(UserError, match=r'no room for a checkpoint in .*it goes on from step 10\)'):
    saver.save(20, make(20), {})
  assert saver.steps() == [10]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file is in the way')
  with pytest.raises(UserError, match=r'cannot use .*checkpoints.*choose another --workdir'):
    Saver(str(tmp_path))


def test_a_damaged_checkpoint_makes_no_noise_afterwards(tmp_path):
  done = python(
    f"""
    import glob
    many = lambda: make().replace(params={{f'l{{i}}': jnp.asarray(np.random.randn(300, 1000)) for i in range(12)}})
    saver = Saver({str(tmp_path)!r})
    saver.restore(many(), Source())
    for step in (10, 20):
      saver.save(step, many(), {{}})
    saver.wait()
    for file in glob.glob({str(tmp_path)!r} + '/checkpoints/20/state/**/d/*', recursive=True):
      os.truncate(file, os.path.getsize(file) // 2)
    Saver({str(tmp_path)!r}).restore(many(), Source())
    time.sleep(1)
    """
  )
  assert done.stderr.count('\n') == 1 and '20 is damaged' in done.stderr, done.stderr


@pytest.mark.parametrize('bad', [dict(every=0), dict(keep=0), dict(best_mode='low')])
def test_settings_that_make_no_sense(tmp_path, bad):
  with pytest.raises(UserError, match='|'.join(bad)):
    Saver(str(tmp_path), **bad)


# --- parts that are tracked, going back ---------------------------------------------------------------


def test_rewind_goes_back_and_forgets_what_came_after(tmp_path):
  saver, source = saved(tmp_path, steps=[10, 20, 30]), Source()
  saver.track('source', source)
  assert saver.rewind(make(), 5) is None
  assert same(saver.rewind(make(), 25), make(20, seed=20)) and source.position == 40
  assert saver.steps() == [10, 20]
  saver.save(30, make(30, seed=7), {})
  saver.wait()
  assert same(Saver(str(tmp_path)).restore(make(), Source()), make(30, seed=7))


def test_what_is_tracked_later_still_gets_its_state(tmp_path):
  saver = Saver(str(tmp_path))
  saver.restore(make(), Source())
  counter = Source()
  saver.track('counter', counter)
  counter.position = 7
  saver.save(1, make(1), {})
  saver.wait()
  saver = Saver(str(tmp_path))
  saver.restore(make(), Source())
  late = Source()
  saver.track('counter', late)
  assert late.position == 7


def test_the_config_is_in_the_checkpoint(tmp_path):
  saved(tmp_path, config_json='{"a": 1}')
  item = json.loads((tmp_path / 'checkpoints/20/meta/metadata').read_text())
  assert json.loads(item['text'])['config'] == '{"a": 1}'


# --- parameters from another run ------------------------------------------------------------------------


def test_init_from_loads_parameters_and_nothing_else(tmp_path):
  saved(tmp_path / 'old')
  source = Source()
  fresh = make(seed=5)
  state = Saver(str(tmp_path / 'new')).restore(fresh, source, init_from=str(tmp_path / 'old'))
  assert same(state.params, make(seed=20).params) and same(state.opt_state, fresh.opt_state)
  assert int(state.step) == 0 and source.position == 0


def test_a_checkpoint_of_the_run_itself_comes_before_init_from(tmp_path):
  saved(tmp_path / 'old')
  saved(tmp_path / 'new', steps=[3])
  state = Saver(str(tmp_path / 'new')).restore(make(), Source(), init_from=str(tmp_path / 'old'))
  assert same(state, make(3, seed=3))


def test_one_step_may_be_named(tmp_path):
  saved(tmp_path)
  state = warm_start(make(), str(tmp_path / 'checkpoints/10'))
  assert same(state.params, make(seed=10).params)


def test_rename_and_only_choose_parameters(tmp_path):
  saved(tmp_path)
  old, fresh = make(seed=20).params, make(seed=5)
  params = dict(body=dict(layers=fresh.params['decoder']['layers']), head=dict(w=jnp.ones((2, 2))))
  state = warm_start(
    fresh.replace(params=params),
    str(tmp_path),
    rename=[('^decoder/', 'body/'), ('/b$', '/bias')],
    only='^body/.*w',
  )
  assert same(state.params['body']['layers']['w'], old['decoder']['layers']['w'])
  assert same(state.params['body']['layers']['b'], params['body']['layers']['b'])
  assert same(state.params['head'], params['head'])


def test_parameters_are_cast_and_the_average_starts_from_them(tmp_path):
  saved(tmp_path)
  fresh = make(seed=5, dtype=jnp.float16)
  state = warm_start(fresh.replace(opt_state=dict(ema=fresh.params)), str(tmp_path))
  old = make(seed=20).params
  assert same(state.params['head']['w'], old['head']['w'].astype(jnp.float16))
  assert same(state.opt_state['ema'], state.params)
  pointers = lambda t: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)]
  assert not set(pointers(state.params)) & set(
    pointers(state.opt_state)
  )  # both are donated to the step


@pytest.mark.parametrize(
  'kw, change, message',
  [
    (dict(only='^heat/'), {}, r"only='\^heat/' matches no parameter"),
    ({}, dict(heads=jnp.ones(3)), r"has no parameter 'heads'; .*init_from, rename and only"),
    ({}, dict(head={}), r"has a parameter 'head/w' that this model lacks.*only=REGEX"),
    (
      dict(only='^head/'),
      dict(head=dict(w=jnp.ones((3, 3)))),
      r"'head/w' has shape \(4, 16\) in .* and \(3, 3\) here",
    ),
  ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, kw, change, message):
  saved(tmp_path)
  with pytest.raises(UserError, match=message):
    warm_start(make().replace(params=make().params | change), str(tmp_path), **kw)


def test_init_from_a_place_without_checkpoints(tmp_path):
  saved(tmp_path / 'run_a')
  with pytest.raises(UserError, match=r"there is no checkpoint in .*run_b.*did you mean '.*run_a'"):
    warm_start(make(), str(tmp_path / 'run_b'))


def test_load_params_takes_the_average_where_there_is_one(tmp_path):
  saved(tmp_path / 'plain')
  shapes = jax.eval_shape(lambda: make().params)
  assert same(load_params(str(tmp_path / 'plain'), shapes), make(seed=20).params)
  saver = Saver(str(tmp_path / 'averaged'))
  average = jax.tree.map(lambda x: x / 2, make(seed=1).params)
  state = make(seed=1).replace(opt_state=(dict(ema=dict(average, head={})),))  # the head is frozen
  saver.restore(state, Source())
  saver.save(1, state, {})
  saver.wait()
  loaded = load_params(str(tmp_path / 'averaged'), shapes)
  assert same(loaded['decoder'], average['decoder']) and same(loaded['head'], state.params['head'])


def test_load_params_passes_over_a_damaged_checkpoint_and_leaves_it(tmp_path, capsys):
  saved(tmp_path)
  delete(tmp_path)
  shapes = jax.eval_shape(lambda: make().params)
  assert same(load_params(str(tmp_path), shapes), make(seed=10).params)
  assert '20 is damaged' in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['10', '20']


# --- several processes ----------------------------------------------------------------------------------

JOIN = """
import sys
import jax
from jax.experimental.multihost_utils import sync_global_devices
index, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize('127.0.0.1:' + port, 2, index)
"""
WORKER = """
import glob
from jax.sharding import AxisType, NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ('a',), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, PartitionSpec('a'))

def put(x):
  sharding = spread if x.ndim == 2 and x.size else NamedSharding(mesh, PartitionSpec())
  return jax.make_array_from_callback(x.shape, sharding, lambda i: np.asarray(x)[i])

def local(tree):
  return [np.asarray(s.data).tobytes() for x in jax.tree.leaves(tree) for s in x.addressable_shards]

state = lambda step: jax.tree.map(put, make(step, seed=step, shape=(2000, 300)))
saver = Saver(workdir, every=10)
saver.restore(state(0), Source())
for step in (10, 20):
  saver.hook(step, state(step), dict(loss=1.0))
saver.wait()
assert local(Saver(workdir).restore(state(0), Source())) == local(state(20))
sync_global_devices('read')
if index == 0:  # only the part that process 1 reads
  files = glob.glob(workdir + '/checkpoints/20/state/ocdbt.process_1/d/*')
  file = max(files, key=os.path.getsize)
  os.truncate(file, os.path.getsize(file) // 2)
sync_global_devices('harm')
assert local(Saver(workdir).restore(state(0), Source())) == local(state(10))
print('fine', index)
"""


def test_two_processes_agree_on_what_is_good(tmp_path):
  import socket

  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  environ = dict(
    os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=2'
  )
  prelude = PRELUDE.format(root=str(ROOT), here=str(ROOT / 'tests/train'))
  command = [sys.executable, '-c', JOIN + prelude + WORKER]
  start = lambda i: subprocess.Popen(
    [*command, str(i), str(port), str(tmp_path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environ,
  )
  workers = [start(0), start(1)]
  try:
    said = [w.communicate(timeout=120)[0] for w in workers]
  finally:
    for w in workers:
      w.kill()
  assert 'fine 0' in said[0] and 'fine 1' in said[1], said[0][-3000:] + said[1][-3000:]
  one = Saver(str(tmp_path)).restore(
    make(shape=(2000, 300)), Source()
  )  # one process reads what two wrote
  assert same(one, make(10, seed=10, shape=(2000, 300)))
