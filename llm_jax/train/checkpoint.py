"""Checkpoints: asynchronous, checked, and never the reason that a run is lost. The only file that imports Orbax.

A checkpoint is a folder `checkpoints/STEP` with two items: `state`, the arrays as nested dicts by path, and `meta`,
JSON with the shape, dtype and checksum of every array, the position in the data, the averages of the metrics so far,
and the config. It does not depend on the mesh, the optimizer's classes or how the model was executed.

Orbax restores flipped bytes without a word, so the checksums are compared after restoring (`checksum.py`); a
checkpoint that cannot be read or differs is put aside and the one before it is used. Shapes are compared before
anything is read.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from llm_jax.core import tree
from llm_jax.core.errors import UserError, nearest
from llm_jax.train import checksum, damage, folders, partners, processes

FORMAT = 1
GUARDED = ('loss', 'grad_norm', 'param_norm')  # finite, or the state is not worth keeping

# Orbax logs, with traces, what its exceptions say; they reach the user as one line from here.
logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)


class Saver:
  """Saves and restores the state of a run. Owns the background thread that writes: use it in a `with`.

  every: steps between checkpoints; the last step, where `steps` is given, is saved as well. keep: how many of the
  newest stay. best: name of a metric, of the step or written by a hook at that step; the `keep_best` checkpoints with
  the smallest value (`best_mode='max'`: largest) stay too. config_json: stored with each checkpoint.
  """

  def __init__(
    self,
    workdir: str,
    *,
    every: int = 250,
    keep: int = 3,
    best: str | None = None,
    keep_best: int = 1,
    best_mode: str = 'min',
    asynchronous: bool = True,
    steps: int | None = None,
    config_json: str = '',
  ):
    if every < 1 or keep < 1 or keep_best < 1:
      raise UserError(
        f'checkpoint: every={every}, keep={keep}, keep_best={keep_best} must be at least 1'
      )
    if best_mode not in ('min', 'max'):
      raise UserError(f"checkpoint.best_mode={best_mode!r}: choose 'min' or 'max'")
    self.folder = os.path.join(os.path.abspath(workdir), folders.NAME)
    self._every, self._steps, self._best, self._config = every, steps, best, config_json
    self._parts: dict[str, Any] = {}
    self._restored: dict[str, Any] = {}  # the parts of the checkpoint that was restored
    self._saving: int | None = None
    self._manager = _manager(self.folder, keep, best, keep_best, best_mode, asynchronous)

  def __enter__(self) -> 'Saver':
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    """Waits for the checkpoint that is being written, which would be lost with the process. Not after Ctrl-C."""
    if kind is None:
      self.wait()
    elif not issubclass(kind, KeyboardInterrupt):
      with contextlib.suppress(UserError):  # the error on its way is the one to show
        self.wait()

  def track(self, name: str, part: Any) -> None:
    """Stores `part.state()` (JSON) with every checkpoint; hands to `part.restore` what was restored, if it is there."""
    self._parts[name] = part
    if name in self._restored:
      part.restore(self._restored[name])

  def steps(self) -> list[int]:
    """Steps with a finished checkpoint, in order. One that is still being written is not among them."""
    return folders.steps(self.folder)

  def hook(self, step: int, state: Any, metrics: Any) -> None:
    """Saves every `every` steps and at the last. Raises `UserError` when an earlier save failed in the background."""
    self._check()
    if step > 0 and (step % self._every == 0 or step == self._steps):
      self.save(step, state, metrics)

  def save(self, step: int, state: Any, metrics: Any) -> bool:
    """Starts saving; returns once the arrays are copied. False if the step is saved already or its loss is not finite.

    Raises `UserError` when there is no room, or an earlier save failed; what was saved before stays.
    """
    self._check()
    bad = [
      f'{name} is {float(metrics[name])}'
      for name in GUARDED
      if name in metrics and not np.isfinite(metrics[name])
    ]
    if bad:
      self._say(f'step {step} is not saved: {bad[0]}')
    if bad or step in self._manager.all_steps():
      return False
    arrays = {path: x for path, x in tree.flatten(state).items() if x.size}
    meta = json.dumps(self._meta(step, arrays))
    self._room(arrays)
    with self._errors(step):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree.unflatten(arrays)),
          meta=ocp.args.JsonSave(dict(text=meta, crc=zlib.crc32(meta.encode()))),
        ),
        metrics=self._value(step, metrics),
        force=True,
      )
    self._saving = step
    return True

  def wait(self) -> None:
    """Returns when the last checkpoint is on disk. Raises `UserError` when it could not be written."""
    with self._errors(self._saving):
      self._manager.wait_until_finished()
    self._saving = None

  def restore(
    self,
    state: Any,
    source: Any,
    writer: Any = None,
    *,
    init_from: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    only: str | None = None,
    grow: Callable | None = None,
  ) -> Any:
    """The newest good checkpoint of this workdir; without one, `state` with parameters from `init_from`, or as it is.

    state: arrays or `ShapeDtypeStruct`s with the shardings wanted. source, writer: tracked, see `track`; the writer
    drops what it wrote after the step. init_from, rename, only, grow: see `warm_start`. Raises `UserError` when the
    checkpoint is of another model, or when there are checkpoints but none is good.
    """
    self._restored = {}
    self.track('source', source)
    if writer is not None:
      self.track('writer', writer)
    steps = processes.from_first(self.steps())
    if steps:
      return self._newest(state, steps)
    if writer is not None:
      writer.restore(None)
    if init_from is None:
      return state
    return warm_start(state, init_from, rename=rename, only=only, grow=grow)

  def rewind(self, state: Any, step: int) -> Any:
    """The newest good checkpoint of at most `step`, or None; data and metrics as of then, later ones are deleted."""
    self.wait()
    steps = processes.from_first([s for s in self.steps() if s <= step])
    if not steps:
      return None
    restored = self._newest(state, steps)
    for later in processes.from_first(self.steps()):
      if later > int(restored.step):
        self._manager.delete(later)
    return restored

  def _newest(self, state: Any, steps: Sequence[int]) -> Any:
    for step in reversed(steps):
      folder = os.path.join(self.folder, str(step))
      try:
        meta = _read_meta(folder)
        damage.compare(folder, meta['leaves'], tree.flatten(state))
        arrays = _read(folder, meta['leaves'], tree.flatten(state))
      except damage.Damaged as e:
        self._set_aside(step, e)
        continue
      self._restored = meta['parts']
      for name, part in self._parts.items():
        if name in self._restored:
          part.restore(self._restored[name])
      empty = lambda x: jnp.zeros(x.shape, x.dtype, device=_sharding(x))
      return tree.map_paths(lambda path, x: arrays[path] if x.size else empty(x), state)  # noqa: B023
    raise UserError(
      f'none of the checkpoints in {self.folder} can be restored, see above; they are kept as STEP.damaged: '
      'repair one and rename it back, or start anew with another --workdir'
    )

  def _set_aside(self, step: int, error: damage.Damaged) -> None:
    """Renames a broken checkpoint: its step will be saved again, and it must not count among the newest."""
    target = os.path.join(self.folder, f'{step}.damaged')
    if jax.process_index() == 0:
      shutil.rmtree(target, ignore_errors=True)
      os.rename(os.path.join(self.folder, str(step)), target)
    processes.barrier(f'damaged {step}')
    self._manager.reload()
    self._say(f'warning: checkpoint {step} is damaged ({error}); set aside as {target}')

  def _meta(self, step: int, arrays: dict[str, Any]) -> dict[str, Any]:
    sums = checksum.of(arrays)
    leaves = {path: [list(x.shape), x.dtype.name, *sums[path]] for path, x in arrays.items()}
    parts = {name: part.state() for name, part in self._parts.items()}
    return dict(format=FORMAT, step=step, parts=parts, config=self._config, leaves=leaves)

  def _value(self, step: int, metrics: Any) -> dict[str, float] | None:
    """The metric that ranks checkpoints, if it is known for this step."""
    if self._best is None:
      return None
    written = self._parts['writer'].latest if 'writer' in self._parts else {}
    value = metrics.get(self._best)
    if value is None and written.get(self._best, (None,))[0] == step:
      value = written[self._best][1]
    if value is None:
      near = nearest(self._best, {*metrics, *written} - {self._best})
      self._say(f'checkpoint {step} has no {self._best!r} to be ranked by; {near}')
    return None if value is None or not np.isfinite(value) else dict(value=float(value))

  def _room(self, arrays: dict[str, Any]) -> None:
    need = sum(
      s.data.nbytes for x in arrays.values() for s in x.addressable_shards if s.replica_id == 0
    )
    free = shutil.disk_usage(self.folder).free
    if free < need:
      raise UserError(
        f'no room for a checkpoint in {self.folder}: it needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; '
        f'make room or lower checkpoint.keep, then run the same command again{self._safe()}'
      )

  def _check(self) -> None:
    """Brings up what went wrong in the background, as soon as it has ended."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  @contextlib.contextmanager
  def _errors(self, step: int | None) -> Iterator[None]:
    """What Orbax raises while writing, as one line."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:
      raise UserError(
        f'checkpoint {step} could not be written to {self.folder} ({damage.reason(e)}): make room or make the folder '
        f'writable, then run the same command again{self._safe()}'
      ) from e

  def _safe(self) -> str:
    steps = self.steps()
    return f' (it goes on from step {steps[-1]})' if steps else ''

  def _say(self, text: str) -> None:
    writer = self._parts.get('writer')
    if writer is not None:
      writer.say(text)
    elif jax.process_index() == 0:
      print(text, file=sys.stderr, flush=True)


def warm_start(
  state: Any,
  path: str,
  *,
  rename: Sequence[tuple[str, str]] = (),
  only: str | None = None,
  grow: Callable | None = None,
) -> Any:
  """`state` with parameters from another run; step and optimizer start afresh, a moving average starts from them.

  path: a workdir (its newest good checkpoint) or the folder of one step. rename: (regex, replacement) pairs applied
  to the stored names (`decoder/norm/scale`). only: a regex on the names here; the parameters it finds are loaded, the
  others stay. Without it every parameter here and there must have its partner. grow(path, stored, fresh) -> what to use
  of a stored parameter of another shape than the fresh one here, see `train.grow`. Values are cast to the dtype here.
  """
  wanted = partners.wanted(tree.flatten(state.params), only)
  choose = lambda stored: partners.renamed(path, stored, wanted, rename, only)
  new = _load(path, wanted, choose, grow)
  params = tree.map_paths(lambda p, x: new.get(p, x), state.params)
  return state.replace(params=params, opt_state=partners.refresh(state.opt_state, new))


def load_params(path: str, params: Any) -> Any:
  """The parameters of a run for use: their moving average where the run kept one.

  path: as in `warm_start`. params: tree of arrays or `ShapeDtypeStruct`s (with shardings, if on a mesh).
  """
  wanted = tree.flatten(params)
  new = _load(path, wanted, lambda stored: partners.averaged(path, stored, wanted))
  return tree.map_paths(lambda p, _: new[p], params)


def _load(
  path: str, wanted: dict[str, Any], choose: Callable, grow: Callable | None = None
) -> dict[str, Any]:
  """Arrays for the targets `wanted`. choose: stored paths -> {target: stored path}. Damaged ones are passed over."""
  for folder in folders.newest_first(path):
    try:
      meta = _read_meta(folder)
      chosen = choose(meta['leaves'])
      targets = {}
      for p, stored in chosen.items():
        shape, dtype, *_ = meta['leaves'][stored]
        there, here = tuple(shape), tuple(wanted[p].shape)
        where = _sharding(wanted[p])
        if there != here:
          if grow is None:
            raise UserError(
              f'{p!r} has shape {there} in {folder} and {here} here: use a matching config or only=REGEX'
            )
          where = where if where.num_devices == 1 else _everywhere(where)  # it may not divide
        targets[stored] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
      arrays = _read(folder, meta['leaves'], targets)
      fit = lambda p, x: x if x.shape == wanted[p].shape else grow(p, x, wanted[p])
      new = {p: fit(p, arrays[stored]) for p, stored in chosen.items()}
      return {p: x.astype(wanted[p].dtype) for p, x in new.items()}
    except damage.Damaged as e:
      print(f'warning: {folder} is damaged ({e})', file=sys.stderr, flush=True)
  raise UserError(f'no checkpoint in {path} can be read, see above: name another run')


def _manager(
  folder: str, keep: int, best: str | None, keep_best: int, mode: str, asynchronous: bool
) -> ocp.CheckpointManager:
  policies: list = [checkpoint_managers.LatestN(keep)]
  value = lambda metrics: metrics['value']
  if best is not None:
    policies.append(
      checkpoint_managers.BestN(
        get_metric_fn=value,
        reverse=mode == 'min',
        n=keep_best,
        keep_checkpoints_without_metrics=False,
      )
    )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    best_fn=None if best is None else value,
    best_mode=mode,
    cleanup_tmp_directories=True,
    enable_async_checkpointing=asynchronous,
    save_root_metadata=False,
  )
  damage.hush()
  try:
    os.makedirs(folder, exist_ok=True)
    return ocp.CheckpointManager(
      folder,
      options=options,
      item_handlers=dict(state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler()),
    )
  except OSError as e:
    raise UserError(
      f'cannot use {folder} for checkpoints ({damage.reason(e)}): choose another --workdir'
    ) from e


def _read_meta(folder: str) -> dict[str, Any]:
  """The `meta` item."""

  def read() -> str:
    args = ocp.args.JsonRestore()
    item = ocp.JsonCheckpointHandler().restore(epath.Path(folder) / 'meta', args=args)
    if zlib.crc32(item['text'].encode()) != item['crc']:
      raise damage.Damaged('its description is not as it was written')
    return item['text']

  meta = json.loads(_together(read))
  if meta['format'] != FORMAT:
    raise UserError(
      f'{folder} has format {meta["format"]}, not {FORMAT}: use the llm_jax that wrote it'
    )
  return meta


def _read(folder: str, leaves: dict[str, list], targets: dict[str, Any]) -> dict[str, jax.Array]:
  """The arrays of `targets` by path, each where its target is, compared with their checksums."""
  item = tree.unflatten({
    p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)) for p, x in targets.items() if x.size
  })  # fmt: skip
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  sizes = [math.prod(x.shape) * x.dtype.itemsize for x in targets.values()]
  flight = (1 << 20) + max(sum(sizes) // 5, *sizes)  # bytes on their way: bounds the peak memory
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=flight / 1e9)
  place = epath.Path(folder) / 'state'
  arrays = tree.flatten(_together(lambda: handler.restore(place, args=args)))
  for path, sums in checksum.of(arrays).items():
    if list(sums) != leaves[path][2:]:
      raise damage.Damaged(f'the values of {path!r} are not those that were saved')
  return arrays


def _together(read: Callable[[], Any]) -> Any:
  """What `read()` gives; raises `Damaged` on all processes when one of them cannot read."""
  result = error = None
  try:
    with damage.guard():
      result = read()
  except damage.Damaged as e:
    error = e
  processes.agree(error, damage.Damaged('another process cannot read its part'))
  return result


def _everywhere(sharding: Any) -> jax.sharding.Sharding:
  """Whole on each device of the mesh."""
  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _sharding(x: Any) -> jax.sharding.Sharding:
  return getattr(x, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
