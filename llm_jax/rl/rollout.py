r"""The source of reinforcement learning: answers to prompts, written by the policy that is being trained.

A round reads `state.params`, writes `group` answers to each of `round / group` prompts, scores them, takes the
learner's own log-probabilities of their tokens, the reference's and the critic's values, and credits every token
(rl/advantage.py). Then it gives `epochs` passes of minibatches over them before it writes again. A round that is one
update needs no log-probabilities of the learner beforehand, as the objective has its own and the policy has not moved:
where nothing else asks for them (a critic, the KL penalty), the sampler's stand in their place.

    inputs targets weights positions segments [prefix]    prompt and answer (data/batch.py); weights 1 on the answer
    old_logp [ref_logp] [values]   [batch, length] f32    of the targets, nats, as of the round's start: the learner's;
                                                          the sampler's, 0 off the answer, in a round of one update
    advantages returns             [batch, length] f32    see rl/advantage.py
    reward [gap]                   [batch] f32            the score; max |sampler's - learner's logp| of a token, nats;
                                                          in a round of one update the objective finds it out
    [reward/NAME]                  [batch] f32            what the score is made of, see `reward.combined`
    index fresh                    [batch]                the prompt's number; 1 in the first minibatch of a round

These are arrays of rl/layout.py, of one of a few lengths, or with `layout.shared` answers behind their prompts.
Prompts, draws and the order of minibatches are fixed by the seed and the number of the round. What the policy of the
round's start wrote cannot be written again once it has moved on, so `state()` holds the round while it is being used.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.data import pipeline, templates
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.decode import steps
from llm_jax.model import scalar, stack
from llm_jax.objectives import sequence
from llm_jax.rl import advantage as advantage_lib
from llm_jax.rl import annotate
from llm_jax.rl import layout as layout_lib
from llm_jax.rl import reward as reward_lib
from llm_jax.train import checkpoint

Arrays = dict[str, np.ndarray]
Record = Mapping[str, Any]


class Form(NamedTuple):
  """A prompt as ids. start: id in front of it, None for none; end: id that ends an answer."""

  ids: list[int]
  start: int | None
  end: int


def plain(model: Any, vocab: Any, record: Record) -> Form:
  """The text record['prompt'] as it stands."""
  return Form(prompts_lib.encode(model, vocab, record['prompt']), vocab.start, vocab.eos)


def chat(model: Any, vocab: Any, record: Record) -> Form:
  """record['prompt'] as a user's turn, or the conversation record['messages'], in the vocabulary's chat template."""
  turns = record.get('messages') or [dict(role='user', content=record['prompt'])]
  prompts_lib.check_vocab(model, vocab)
  return Form(templates.prompt(vocab, turns), None, vocab.turn)


def of_run(model: Any, *, path: str, vocab: Callable | None = None) -> Any:
  """The parameters of the run in `path`, without value head and critic: the usual reference.

  vocab: the policy's vocabulary; a run with another one is refused.
  """
  if vocab is not None:
    annotate.check_vocab(path, vocab())
  with mesh.outside():
    shapes = _policy(jax.eval_shape(model.init, jax.random.key(0)))
  if mesh.current() is not None:
    where = mesh.shardings(_policy(model.axes), shapes)
    shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
  return checkpoint.load_params(path, shapes)


def _policy(params: Any) -> Any:
  """Without value head and critic."""
  return {k: v for k, v in params.items() if k not in (scalar.NAME, scalar.CRITIC)}


# --- which answers are learned from -------------------------------------------------------------------


def every(scores: np.ndarray) -> np.ndarray:
  """All of them. scores: f32 [prompts, group]; returns bool, likewise."""
  return np.ones(scores.shape, bool)


def varied(scores: np.ndarray) -> np.ndarray:
  """DAPO's dynamic sampling: prompts whose answers do not all earn the same, of which there is something to learn
  (arXiv:2503.14476, eq. 11)."""
  return np.broadcast_to((np.ptp(scores, axis=1) > 0)[:, None], scores.shape)


def best(scores: np.ndarray, *, k: int = 1) -> np.ndarray:
  """Best-of-n, with `n = group`: the `k` best answers to each prompt, of equal ones the first. Together with
  `language.next_token` as the objective this is rejection sampling (LLaMA 2, arXiv:2307.09288, section 3.2.3)."""
  order = np.argsort(-scores, axis=1, kind='stable')
  found = np.zeros(scores.shape, bool)
  np.put_along_axis(found, order[:, :k], True, axis=1)
  return found


# --- the source ---------------------------------------------------------------------------------------


class _Settings(NamedTuple):
  reward: Callable
  estimate: Callable
  reference: Callable | None
  value: Callable | None
  control: Callable
  keep: Callable
  penalty: Callable | None
  group: int
  rows: int
  epochs: int
  width: int
  lengths: int
  layout: layout_lib.Layout
  max_new: int
  temperature: float
  tries: int
  seed: int


def make(
  model: Any,
  *,
  prompts: Callable,
  reward: Callable,
  vocab: Callable,
  estimate: Callable = advantage_lib.grpo,
  reference: Callable | None = None,
  value: Callable | None = None,
  beta: float = 0.0,
  control: Callable = advantage_lib.fixed,
  keep: Callable = every,
  penalty: Callable | None = None,
  form: Callable = plain,
  batch: int = 32,
  group: int = 8,
  round: int = 64,
  epochs: int = 1,
  prompt_length: int | None = None,
  lengths: int = 4,
  layout: Callable = layout_lib.whole,
  max_new: int = 32,
  temperature: float = 1.0,
  tries: int = 8,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> 'Rollout':
  """The source of minibatches of `batch` answers out of rounds of `round` answers, `group` to each prompt.

  prompts: () -> list of dicts with `prompt` and whatever the reward is told. reward: (prompts, answers, told) -> f32
  [n]. vocab: () -> the vocabulary; rewards see text, so nobody else has to share it. estimate: of rl/advantage.py.
  reference: (model) -> parameters that log-probabilities are held against, see `of_run`. value: as in `policy.ppo`,
  None for no critic. beta: of the KL penalty per token, moved after each round by control(beta, kl). keep: the answers
  to learn from; prompts are drawn until the round is full, `tries` times at most. penalty: lengths [n] -> added to the
  scores. form: `plain` or `chat`. prompt_length: tokens, default those of the longest. lengths: how many lengths
  prompts are padded to, and as many rows: the shortest that a round fits into. layout: `layout.whole`, or
  `layout.shared` to read a prompt once for all its answers. temperature: of the policy, for drawing and for all
  log-probabilities (objectives have the same argument).

  Raises `UserError` for what does not fit together, a reward model with another tokenizer and a prompt that is too
  long, before anything is compiled; in any round for a reward that is no number, naming the prompt.
  """
  if model.card.kind == 'encoder_decoder':
    raise UserError('rollout.make: an encoder-decoder cannot be the policy; choose a decoder')
  if temperature <= 0:
    raise UserError(f'temperature={temperature}: a policy draws, choose a positive one')
  if group < 1 or round < 1 or round % group or batch < 1 or round % batch:
    raise UserError(f'round={round} must be a multiple of batch={batch} and of group={group}')
  if beta and reference is None:
    raise UserError(f'beta={beta} needs a reference: set reference to rollout.of_run with its path')
  reward_lib.prepare(reward)
  words, records = vocab(), list(prompts())
  if not records:
    raise UserError('there are no prompts: name another file or split')
  forms = [form(model, words, record) for record in records]
  width = prompt_length or max(len(f.ids) for f in forms)
  for i, f in enumerate(forms):
    if len(f.ids) > width or not (f.ids or f.start is not None):
      raise UserError(
        f'{records[i].get("where", f"prompt {i}")} has {len(f.ids)} tokens, prompt_length is {width}: raise it or '
        f'leave the prompt out ({reward_lib.short(records[i].get("prompt", ""))})'
      )
  most = prompts_lib.room(model, forms[0].start)
  if width + max_new > most:
    raise UserError(
      f'prompts of {width} tokens and answers of max_new={max_new} do not fit into the {most} positions of the model: '
      'lower max_new or prompt_length'
    )
  process, arranged = pipeline.processes(process_index, process_count), layout()
  unit = group * mesh.batch_ways() if arranged.grouped else 1
  if batch % process[1]:
    raise UserError(f'a batch of {batch} rows does not divide over {process[1]} processes')
  if batch % unit or batch // process[1] % (group if arranged.grouped else 1):
    raise UserError(f'layout.shared: batch={batch} must be whole groups of {group} on every device')
  settings = _Settings(
    reward, estimate, reference, value, control, keep, penalty, group, round, epochs, width, lengths,
    arranged, max_new, temperature, tries, seed,
  )  # fmt: skip
  return Rollout(model, words, records, forms, batch, beta, settings, process)


class Rollout:
  """Gives minibatches; owns the round they come from.

  batch, length, vocab: as of every source, the longest length. round: the number of the one in use. records: the
  prompts. beta: the KL coefficient of the next round. rows: the round's arrays, None before the first. seconds: what
  the last round took to `draw` answers, `score` them and to `read` them (learner, reference, critic).
  """

  def __init__(self, model, vocab, records, forms, batch, beta, settings, process):
    self.batch, self.vocab, self.records = batch, vocab, records
    start = forms[0].start
    self.length = settings.width + settings.max_new - (start is None)
    self.round, self.beta, self.rows = 0, beta, None
    self._model, self._forms, self._s, self._process = model, forms, settings, process
    self._given, self._cursor, self._memory = 0, 0, {}
    self.seconds: dict[str, float] = {}
    self._reference = None
    read = functools.partial(_read, model, settings.value, settings.temperature)
    self._read = jax.jit(read, static_argnames='critic')
    self._apart = jax.jit(lambda params: stack.apart(_policy(params)))  # draws twice as fast
    self._order = functools.lru_cache(maxsize=2)(
      lambda epoch: np.random.default_rng([settings.seed, epoch]).permutation(len(records))
    )

  @property
  def per_round(self) -> int:
    """Minibatches of a round."""
    return self._s.epochs * self._s.rows // self.batch

  def __call__(self, state: Any) -> Arrays:
    """This process' rows of the next minibatch; writes a new round with `state.params` when the last is used up."""
    if self._given == self.per_round:
      self.round, self._given, self.rows = self.round + 1, 0, None
    if self.rows is None:
      before = self._cursor, self._memory
      try:
        self.rows = self._write(state.params)
      except Exception:
        self._cursor, self._memory = before  # a round that failed can begin again
        raise
    s = self._s
    epoch, k = divmod(self._given, s.rows // self.batch)
    rng = np.random.default_rng([s.seed, self.round, epoch])
    unit = s.group if s.layout.grouped else 1
    order = rng.permutation(s.rows // unit)[:, None] * unit + np.arange(unit)
    rows = order.reshape(-1)[k * self.batch : (k + 1) * self.batch]
    index, count = self._process
    share = self.batch // count
    mine = rows[index * share : (index + 1) * share]
    given = s.layout.cut({name: x[mine] for name, x in self.rows.items()}, self._shape(self.rows))
    given['fresh'] = np.full(share, self._given == 0, np.float32)
    self._given += 1
    return given

  def answers(self) -> tuple[list[str], list[str], list[Record]]:
    """(prompts, answers, told) of the round in use, as the reward was given them."""
    told = [self.records[i] for i in self.rows['index']]
    counts = (self.rows['weights'] > 0) & (self.rows['targets'] != self._forms[0].end)
    pairs = zip(self.rows['targets'], counts, self.rows['index'], strict=True)
    texts = [self._text(i, row[own]) for row, own, i in pairs]
    return [record.get('prompt', '') for record in told], texts, told

  def expected_weights(self) -> np.ndarray:
    """What the weights of the round in use should be, from the prompts and the first end after each: f32, likewise."""
    form, length = self._forms[0], self.rows['inputs'].shape[1]
    place = np.arange(length)
    first = np.array([len(self._forms[i].ids) - (form.start is None) for i in self.rows['index']])
    ended = (self.rows['targets'] == form.end) & (place >= first[:, None])
    cut = np.minimum(first + self._s.max_new, length)
    last = np.where(ended.any(1), np.argmax(ended, 1) + 1, cut)
    return ((place >= first[:, None]) & (place < last[:, None])).astype(np.float32)

  def state(self) -> dict[str, Any]:
    """Where the next minibatch comes from, JSON-able; the round itself as long as some of it is to be given."""
    over = self._given == self.per_round
    kept = None if over or self.rows is None else layout_lib.pack(self.rows)
    place = dict(round=self.round + over, given=0 if over else self._given, cursor=self._cursor)
    return dict(**place, beta=self.beta, memory=dict(self._memory), rows=kept)

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    missing = {'round', 'given', 'cursor', 'beta', 'memory', 'rows'} - set(state)
    if missing:
      raise UserError(
        f'this is not the state of a rollout ({", ".join(sorted(missing))} missing): restore another checkpoint'
      )
    place = (int(state[name]) for name in ('round', 'given', 'cursor'))
    self.round, self._given, self._cursor = place
    self.beta, self._memory = float(state['beta']), dict(state['memory'])
    self.rows = None if state['rows'] is None else layout_lib.unpack(state['rows'])
    if self.rows is not None and len(self.rows['index']) != self._s.rows:
      raise UserError(
        f'the checkpoint is in the middle of a round of {len(self.rows["index"])} answers, not {self._s.rows}: '
        'use the round of the run before'
      )

  def skip(self, batches: int) -> None:
    """Leaves out the next `batches` minibatches, and what is left of the round that they end in."""
    rounds = -(-(self._given + batches) // self.per_round)
    self.restore(dict(self.state(), round=self.round + rounds, given=0, rows=None))
    self._cursor += (rounds - 1) * self._s.rows // self._s.group

  def close(self) -> None:
    """Nothing runs in the background."""

  # --- a round --------------------------------------------------------------------------------------

  def _write(self, params: Any) -> Arrays:
    """Answers until the round is full, as arrays of `round` rows."""
    if self._reference is None and self._s.reference is not None:
      self._reference = self._s.reference(self._model)
    key = jax.random.fold_in(jax.random.key(self._s.seed), self.round)
    found, kls, self.seconds = [], [], {}
    for attempt in range(self._s.tries):
      made, kl, keep = self._attempt(params, jax.random.fold_in(key, attempt))
      found.append({name: x[keep] for name, x in made.items()})
      kls.append(kl)
      if sum(len(part['index']) for part in found) >= self._s.rows:
        break
    else:
      got = sum(len(part['index']) for part in found)
      raise UserError(
        f'round {self.round}: {self._s.tries} draws gave {got} of {self._s.rows} answers to learn from: raise tries or '
        'temperature, use easier prompts, or keep=rollout.every'
      )
    self.beta = self._s.control(self.beta, float(np.mean(kls)))
    length = max(part['inputs'].shape[1] for part in found)
    found = [layout_lib.fit(part, length) for part in found]
    return {
      name: np.concatenate([part[name] for part in found])[: self._s.rows] for name in found[0]
    }

  def _attempt(self, params: Any, key: jax.Array) -> tuple[Arrays, float, np.ndarray]:
    """(arrays of `round` rows, KL to the reference in nats per answer, bool [round]: which to keep)."""
    s, count = self._s, self._s.rows // self._s.group
    index = np.array([self._prompt(self._cursor + i) for i in range(count)])
    self._cursor += count
    made, tokens, ends, said = self._drawn(params, key, index)
    index = np.repeat(index, s.group).astype(np.int32)
    with self._timed('score'):
      earned = self._score(index, tokens, ends)
    weights = made['weights']
    alone = self.per_round == 1 and s.value is None and not self.beta
    found = self._learners(None if alone else params, made | dict(index=index))
    logp = found.setdefault('old_logp', said)
    against = found.get('ref_logp', logp)
    rewards = advantage_lib.penalised(earned['reward'], logp, against, weights, self.beta)
    told = advantage_lib.Told(earned['reward'], rewards, found.get('values'), weights, s.group)
    credit, self._memory = s.estimate(told, self._memory)
    made |= found | credit._asdict() | earned
    if not alone:
      made['gap'] = np.where(weights > 0, np.abs(logp - said), 0).max(1).astype(np.float32)
    made['index'] = index
    keep = s.keep(earned['reward'].reshape(-1, s.group)).reshape(-1)
    return made, float(((logp - against) * weights).sum(1).mean()), keep

  def _drawn(self, params: Any, key: jax.Array, index: np.ndarray) -> tuple:
    """(rows of answers to the prompts `index`, their tokens and lengths, the sampler's log-probabilities as rows)."""
    s, form = self._s, self._forms[index[0]]
    lengths = np.array([len(self._forms[i].ids) for i in index])
    ids = np.zeros((len(index), layout_lib.width(lengths.max(), s.width, s.lengths)), np.int32)
    for row, i in zip(ids, index, strict=True):
      row[: len(self._forms[i].ids)] = self._forms[i].ids
    told = dict(eos=form.end, start=form.start, temperature=s.temperature, logp_at=s.temperature)
    told |= dict(allowed=prompts_lib.drawable(self._model, self.vocab))
    with self._timed('draw'):
      out = generate_lib.generate(
        self._model, self._apart(params), ids, lengths, key, max_new=s.max_new, n=s.group, **told
      )
      tokens, ends, said = (np.asarray(x) for x in out)
    ids, lengths = (np.repeat(x, s.group, 0) for x in (ids, lengths))
    made = layout_lib.lay(self._model, ids, lengths, tokens, ends, form.start)
    length = layout_lib.width(layout_lib.used(made), self.length, s.lengths)
    said = layout_lib.behind(said, lengths - (form.start is None), length)
    return layout_lib.fit(made, length), tokens, ends, said

  def _shape(self, rows: Arrays) -> layout_lib.Shape:
    s = self._s
    return layout_lib.shape(rows, s.group, s.width, s.max_new, s.lengths)

  @contextlib.contextmanager
  def _timed(self, name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

  def _prompt(self, position: int) -> int:
    """The record at a position of the endless order: every epoch is a permutation of its own."""
    epoch, at = divmod(position, len(self.records))
    return int(self._order(epoch)[at])

  def _text(self, index: int, tokens: np.ndarray) -> str:
    form = self._forms[index]
    return ''.join(prompts_lib.pieces(self.vocab, form.ids, [tokens], form.end))

  def _score(self, index: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> Arrays:
    """The reward of each answer, and what it is made of."""
    told = [self.records[i] for i in index]
    prompts = [record.get('prompt', '') for record in told]
    texts = [self._text(i, row[:n]) for i, row, n in zip(index, tokens, ends, strict=True)]
    scores = reward_lib.checked(self._s.reward, prompts, texts, told)
    parts = {f'reward/{name}': np.asarray(x) for name, x in getattr(scores, 'parts', {}).items()}
    penalty = 0 if self._s.penalty is None else self._s.penalty(ends)
    return parts | dict(reward=np.asarray(scores + penalty, np.float32))

  def _learners(self, params: Any, made: Arrays) -> Arrays:
    """What the learner's own forward says of the round's tokens, in parts of the shape that it learns from, and the
    reference's. params: None for the reference alone."""
    if params is None and self._reference is None:
      return {}
    parts, shape, layout = [], self._shape(made), self._s.layout
    with self._timed('read'):
      for first in range(0, len(made['inputs']), self.batch):
        rows = {name: x[first : first + self.batch] for name, x in made.items()}
        some = layout.cut(rows, shape)
        found = {} if params is None else self._read(params, some)
        if self._reference is not None:
          found['ref_logp'] = self._read(self._reference, some, critic=False)['old_logp']
        found = jax.device_get(found)
        parts.append({name: layout.back(x, rows) for name, x in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(model, value, temperature, params, batch, critic=True) -> dict[str, jax.Array]:
  """old_logp, values: of the targets."""
  now = sequence.tokens(model, params, batch, temperature=temperature)
  found = dict(old_logp=now.logp)
  if critic and value is not None:
    found['values'] = value(model, params, batch, now.x)
  return jax.tree.map(steps.whole, found)
