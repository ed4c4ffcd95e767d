"""What needs no gradient is data: functions that wrap a source and add what a frozen model says of its texts.

    source = use(annotate.with_reference, source=use(pairs.pairs, ...), ref='runs/sft')

ref: the folder of a run with the model's own architecture, or None for the parameters that a run with `seed` begins
with. The arrays are computed anew for each batch, in the batch's own shape, so a resumed run has the same ones to the
last bit.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import vocab as vocab_lib
from llm_jax.model import scalar
from llm_jax.objectives import sequence
from llm_jax.train import checkpoint, folders

Batch = dict[str, np.ndarray]


class Annotated:
  """A source with `add(batch, state)` done to each batch. state: of the training, None in `once()`."""

  def __init__(self, source: Any, add: Callable[[Batch, Any], Batch], longer: int = 0):
    self._source, self._add = source, add
    self.batch, self.length, self.vocab = source.batch, source.length + longer, source.vocab
    self.texts = getattr(source, 'texts', 1)

  def __call__(self, state: Any = None) -> Batch:
    """The next batch of this process."""
    return self._add(self._source(state), state)

  def once(self) -> Iterator[Batch]:
    """One pass, as the source's own."""
    return (self._add(batch, None) for batch in self._source.once())

  def state(self) -> dict[str, Any]:
    """Where the source stands."""
    return self._source.state()

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a `state()`."""
    self._source.restore(state)

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` batches; nothing is computed for them."""
    self._source.skip(batches)

  def close(self) -> None:
    """Stops what the source runs."""
    self._source.close()


class Frozen:
  """A reference model: the parameters, loaded or made when they are first needed."""

  def __init__(self, model: Any, vocab: Any, ref: str | None, seed: int):
    self.model, self._ref, self._seed, self._params = model, ref, seed, None
    if ref is not None:
      check_vocab(ref, vocab)

  def params(self, state: Any = None) -> Any:
    """The parameters, without a scalar head. Raises `UserError` where ref=None and the run began with others."""
    if self._params is not None:
      return self._params
    self._params = _initial(self.model, self._seed) if self._ref is None else self._load()
    if self._ref is None and state is not None and int(state.step) == 0:
      begun = {k: v for k, v in state.params.items() if k != scalar.NAME}
      same = jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), begun, self._params)
      if not all(jax.tree.leaves(same)):
        raise UserError(
          'ref=None stands for the parameters of a fresh run with this seed, but this run began with others: '
          'set source.ref to the run it began with (init.init_from)'
        )
    return self._params

  def _load(self) -> Any:
    shapes = jax.eval_shape(self.model.init, jax.random.key(0))
    places = _places(self.model, shapes)
    if places is not None:
      put = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
      shapes = jax.tree.map(put, shapes, places)
    return checkpoint.load_params(self._ref, {k: v for k, v in shapes.items() if k != scalar.NAME})


def _places(model: Any, shapes: Any) -> Any:
  return None if mesh.current() is None else mesh.shardings(model.axes, shapes)


def _initial(model: Any, seed: int) -> Any:
  places = _places(model, jax.eval_shape(model.init, jax.random.key(seed)))
  with mesh.outside():
    params = jax.jit(model.init, out_shardings=places)(jax.random.key(seed))
  return {k: v for k, v in params.items() if k != scalar.NAME}


def check_vocab(run: str, vocab: Any) -> None:
  """Raises `UserError` unless the run in the folder `run` was trained with the vocabulary `vocab`."""
  workdir = os.path.dirname(os.path.dirname(folders.newest_first(run)[0]))
  there = vocab_lib.load(os.path.join(workdir, 'vocab'))
  if there.fingerprint != vocab.fingerprint:
    raise UserError(
      f'{run} has another tokenizer ({there.size} ids) than this data ({vocab.size} ids): policy, reference and '
      f'reward model must share one, set vocab=use(vocab.of_run, path={run!r})'
    )


def _local(x: jax.Array) -> np.ndarray:
  """This process' rows of a global array."""
  if x.is_fully_addressable:
    return np.asarray(x)
  found = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([np.asarray(found[start]) for start in sorted(found)])


def with_reference(
  model: Any,
  *,
  source: Callable,
  ref: str | None = None,
  seed: int = 0,
  sides: tuple = ('chosen', 'rejected'),
  chunk: int | None = 32,
) -> Annotated:
  """Adds `SIDE/ref_logp` f32 [batch]: the reference's log-probability of the targets that count, in nats.

  source: model -> source. ref, seed: see above. sides: of the batch; '' is a text without a name and gets `ref_logp`.
  Of rows that branch (data/branches.py), [batch, comparisons].
  """
  inner = source(model)
  return _referenced(model, inner, Frozen(model, inner.vocab, ref, seed), sides, chunk)


def _referenced(
  model: Any, inner: Any, frozen: Frozen, sides: tuple, chunk: int | None
) -> Annotated:
  @functools.partial(jax.jit, static_argnums=2)
  def score(params: Any, text: Mapping[str, jax.Array], count: int) -> list[jax.Array]:
    found = sequence.totals(sequence.tokens(model, params, text, chunk=chunk).logp, text, count)
    return [mesh.shard(y, 'batch', *(None,) * (y.ndim - 1)) for y in found]

  def add(batch: Batch, state: Any) -> Batch:
    params = frozen.params(state)
    if 'branches' in batch:
      found = score(params, mesh.place(sequence.together(batch, sides)), len(sides))
    else:  # one side at a time: half the logits exist at once
      found = [score(params, mesh.place(_text(batch, side)), 1)[0] for side in sides]
    names = (f'{side}/ref_logp' if side else 'ref_logp' for side in sides)
    return batch | dict(zip(names, map(_local, found), strict=True))

  return Annotated(inner, add)


def with_kl(
  model: Any,
  *,
  source: Callable,
  ref: str | None = None,
  seed: int = 0,
  chunk: int | None = 32,
) -> Annotated:
  """Adds what KTO needs: `ref_logp`, and `kl` f32 [batch], z = max(0, mean log p(y'|x) - log ref(y'|x)).

  y' is the response of the row before (the first row takes the last one's), the mean over all rows of the batch, so z
  is one number (arXiv:2402.01306, section 4.1). It is that of the policy as it stands, which `once()` does not know:
  there it is 0.
  """
  inner = source(model)
  frozen = Frozen(model, inner.vocab, ref, seed)

  @jax.jit
  def divergence(params: Any, ref_params: Any, text: Mapping[str, jax.Array]) -> jax.Array:
    own, other = (
      sequence.total(sequence.tokens(model, p, text, chunk=chunk).logp, text['weights'])
      for p in (params, ref_params)
    )
    there = text['weights'].sum(-1) > 0
    return jnp.maximum(jnp.where(there, own - other, 0).sum() / jnp.maximum(there.sum(), 1), 0)

  def add(batch: Batch, state: Any) -> Batch:
    kl = 0.0
    if state is not None:
      text = mesh.place(mismatched(_text(batch, '')))
      kl = float(divergence(state.params, frozen.params(), text))
    return batch | dict(kl=np.full(len(batch['inputs']), kl, np.float32))

  return Annotated(_referenced(model, inner, frozen, ('',), chunk), add)


def mismatched(text: Batch) -> Batch:
  """Each prompt with the response of the row before it, cut at the end of the row. Rows without targets stay."""
  made = {name: np.array(value) for name, value in text.items()}
  rows = np.flatnonzero(text['weights'].sum(1) > 0)
  length = text['inputs'].shape[1]
  for row, other in zip(rows, np.roll(rows, 1), strict=True):
    start = np.flatnonzero(text['weights'][row])[0]
    said = np.flatnonzero(text['weights'][other])
    take = slice(said[0], min(said[-1] + 1, said[0] + length - start))
    end = start + take.stop - take.start
    for name in ('targets', 'weights'):
      made[name][row, start:] = 0
      made[name][row, start:end] = text[name][other, take]
    made['inputs'][row, start + 1 :] = 0
    made['inputs'][row, start + 1 : end] = made['targets'][row, start : end - 1]
    if 'segments' in text:
      made['segments'][row] = np.arange(length) < end
      made['positions'][row] = np.arange(length) * made['segments'][row]
  return made


def with_top(
  model: Any,
  *,
  source: Callable,
  tokens: tuple,
  ref: str | None = None,
  seed: int = 0,
  top: int = 16,
) -> Annotated:
  """What Quark needs: the token of its quantile in front of each text, and the reference's likeliest tokens without it.

  tokens: one text per quantile, the worst first, each a single token of the vocabulary; the batch says which with
  `quantile` int32 [batch], or with `desirable` for two. Rows are one slot longer. Adds `ref_ids` and `ref_top`
  [batch, length + 1, top]: ids and log-probabilities (`objectives/feedback.quark`).
  """
  inner = source(model)
  frozen, ids = Frozen(model, inner.vocab, ref, seed), np.array(_single(inner.vocab, tokens))
  if model.card.kind == 'encoder_decoder':
    raise UserError('with_top marks the text that a decoder reads: choose a causal or prefix model')

  @jax.jit
  def likeliest(params: Any, text: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    head = model.head(params)

    def at(x: jax.Array) -> tuple[jax.Array, jax.Array]:
      logits = model.logits(head, x[:, None])[:, 0, : model.card.vocab].astype(jnp.float32)
      return jax.lax.top_k(jax.nn.log_softmax(logits), top)

    x = jnp.swapaxes(model.hidden(params, text).x, 0, 1)
    values, found = jax.lax.map(at, x, batch_size=32)  # logits of the whole length would be large
    return tuple(
      mesh.shard(jnp.swapaxes(a, 0, 1), 'batch', 'length', None) for a in (found, values)
    )

  def add(batch: Batch, state: Any) -> Batch:
    text = _text(batch, '')
    found, values = map(_local, likeliest(frozen.params(state), mesh.place(text)))
    kind = batch['quantile'] if 'quantile' in batch else batch['desirable'].astype(np.int32)
    later = lambda a: np.pad(a, ((0, 0), (1, 0), *((0, 0),) * (a.ndim - 2)))
    marked = {name: later(value) for name, value in text.items()}
    marked['inputs'][:, 0], marked['inputs'][:, 1] = text['inputs'][:, 0], ids[kind]
    marked['targets'][:, 0] = ids[kind]
    if 'segments' in text:
      marked['segments'][:, 0] = text['segments'][:, 0]
      marked['positions'][:, 1:] += text['segments'] > 0
    if 'prefix' in text:
      marked['prefix'][:, 0] = text['prefix'][:, 0]
    return marked | dict(ref_ids=later(found), ref_top=later(values))

  return Annotated(inner, add, longer=1)


def _single(vocab: Any, tokens: tuple) -> list[int]:
  found = [vocab.encode(token) for token in tokens]
  wrong = [token for token, ids in zip(tokens, found, strict=True) if len(ids) != 1]
  if wrong or len(tokens) < 2:
    raise UserError(
      f'tokens={tokens}: name two or more texts that are one token each'
      + (f', {wrong[0]!r} is {len(vocab.encode(wrong[0]))}' if wrong else '')
    )
  return [ids[0] for ids in found]


def _text(batch: Batch, side: str) -> Batch:
  """The arrays of one text of a batch."""
  if side:
    return sequence.side(batch, side)
  return {k: v for k, v in batch.items() if k in sequence.READ or k.startswith('encoder/')}
