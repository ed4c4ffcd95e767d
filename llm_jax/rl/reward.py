"""Rewards: the one signature, and what is built from it.

    reward(prompts, answers, told) -> f32 [n]

prompts, answers: n texts. told: n records, the other fields of each prompt (the right answer, a tag). More is better.
Rules and verifiers (rl/verify.py), a learned reward model, a model that is asked (rl/judge.py) and any combination of
these have this signature; settings are keyword arguments, so that a config can name them:

    reward = use(reward.weighted, parts=dict(right=use(verify.math), short=use(verify.length)), weights=dict(short=0.1))
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import batch as batch_lib
from llm_jax.data import templates
from llm_jax.decode import prompts as prompts_lib
from llm_jax.model import scalar
from llm_jax.objectives import reward as objective
from llm_jax.train import checkpoint

Told = Sequence[Mapping[str, Any]]
Reward = Callable[[Sequence[str], Sequence[str], Told], np.ndarray]


# --- combinations -------------------------------------------------------------------------------------


class Combined(np.ndarray):
  """Rewards f32 [n] that know what they are made of. parts: name -> f32 [n]; empty for what is computed from them."""

  parts: Mapping[str, np.ndarray] = types.MappingProxyType({})


def combined(total: np.ndarray, parts: Mapping[str, np.ndarray]) -> Combined:
  """`total` with its `parts`, which `rollout.make` puts into the batch as `reward/NAME`."""
  made = np.asarray(total, np.float32).view(Combined)
  made.parts = dict(parts)
  return made


def scores(
  parts: Mapping[str, Reward], prompts: Sequence[str], answers: Sequence[str], told: Told
) -> dict[str, np.ndarray]:
  """What each of `parts` gives, f32 [n]. Raises `UserError` for what is no number, with the part and the prompt."""
  return {name: checked(part, prompts, answers, told, name) for name, part in parts.items()}


def checked(
  reward: Reward, prompts: Sequence[str], answers: Sequence[str], told: Told, name: str = 'reward'
) -> np.ndarray:
  """The rewards, f32 [n], all of them finite; still `combined` where they are."""
  found = np.asanyarray(reward(prompts, answers, told), np.float32)
  if found.shape != (len(answers),):
    raise UserError(
      f'{name} must give a number for each of {len(answers)} answers, got {found.shape}'
    )
  if not np.isfinite(found).all():
    i = int(np.flatnonzero(~np.isfinite(found))[0])
    place = f' of {told[i]["where"]}' if 'where' in told[i] else ''
    raise UserError(
      f'{name} gives {found[i]} for the prompt{place} {short(prompts[i])} and the answer {short(answers[i])}: make it '
      'a finite number for every answer'
    )
  return found


def short(text: str) -> str:
  """How errors quote a text."""
  return repr(text if len(text) <= 60 else f'{text[:57]}...')


def mean(
  prompts: Sequence[str], answers: Sequence[str], told: Told, *, parts: Mapping
) -> np.ndarray:
  """The mean of several rewards."""
  found = scores(parts, prompts, answers, told)
  return combined(np.mean(list(found.values()), axis=0), found)


def weighted(
  prompts: Sequence[str], answers: Sequence[str], told: Told, *, parts: Mapping, weights: Mapping
) -> np.ndarray:
  """The sum of several rewards, each times its weight, 1 where none is named."""
  for name in weights:
    if name not in parts:
      raise UserError(f'weights names no part {name!r}; {nearest(name, parts)}')
  found = scores(parts, prompts, answers, told)
  return combined(np.sum([weights.get(name, 1.0) * x for name, x in found.items()], axis=0), found)


def minimum(
  prompts: Sequence[str], answers: Sequence[str], told: Told, *, parts: Mapping
) -> np.ndarray:
  """The least of several rewards: an answer is as good as its worst side (Coste et al. 2023, arXiv:2310.02743)."""
  found = scores(parts, prompts, answers, told)
  return combined(np.min(list(found.values()), axis=0), found)


def safety_first(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  safety: Callable,
  helpfulness: Callable,
  threshold: float = 0.15,
  tag: str = 'safety',
) -> np.ndarray:
  """LLaMA 2's reward (arXiv:2307.09288, section 3.2.3): whiten(logit(R)), R = safety where it is below `threshold` or
  the prompt's record has a true `tag`, else helpfulness. Both parts are probabilities, such as `probability`."""
  found = scores(dict(safety=safety, helpfulness=helpfulness), prompts, answers, told)
  tagged = np.array([bool(record.get(tag)) for record in told], bool)
  used = np.where(tagged | (found['safety'] < threshold), found['safety'], found['helpfulness'])
  if used.min(initial=0) < 0 or used.max(initial=1) > 1:
    raise UserError('safety and helpfulness must be probabilities: wrap them in reward.probability')
  return combined(whiten(np.log(used.clip(1e-6)) - np.log1p(-used.clip(max=1 - 1e-6))), found)


def whiten(x: np.ndarray) -> np.ndarray:
  """Mean 0 and standard deviation 1; all 0 where all are equal."""
  x = np.asarray(x, np.float32)
  return ((x - x.mean()) / (x.std() + 1e-8)).astype(np.float32)


def probability(
  prompts: Sequence[str], answers: Sequence[str], told: Told, *, reward: Callable
) -> np.ndarray:
  """sigmoid(reward): of a model of comparisons, the chance that the answer beats one of reward 0."""
  return (1 / (1 + np.exp(-checked(reward, prompts, answers, told)))).astype(np.float32)


def ruled(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  preference: Callable,
  rules: Mapping,
  cost: float = 1.0,
) -> np.ndarray:
  """preference - cost x the sum of the probabilities that the answer breaks each of `rules` (after Sparrow, Glaese et
  al. 2022, arXiv:2209.14375). rules: reward functions that give these probabilities, such as `judge.judged`."""
  broken = scores(rules, prompts, answers, told)
  liked = checked(preference, prompts, answers, told, 'preference')
  total = liked - cost * np.sum(list(broken.values()), axis=0)
  return combined(total, broken | dict(preference=liked))


# --- a learned reward ---------------------------------------------------------------------------------


class Text(NamedTuple):
  """A prompt and its answer as ids. start: id in front, None for none. answer: with the id that ends it."""

  start: int | None
  prompt: list[int]
  answer: list[int]


def plain(vocab: Any, prompt: str, answer: str) -> Text:
  """The two texts as they stand, one after the other."""
  return Text(vocab.start, list(vocab.encode(prompt)), [*vocab.encode(answer), vocab.eos])


def chat(vocab: Any, prompt: str, answer: str) -> Text:
  """The prompt as a user's turn in the vocabulary's chat template, the answer as the assistant's."""
  before = templates.prompt(vocab, [dict(role='user', content=prompt)])
  return Text(None, before, [*vocab.encode(answer), vocab.turn])


def of_model(
  model: Any, params: Any, vocab: Any, *, batch: int = 16, form: Callable = plain
) -> Reward:
  """The reward of a model with a scalar head (model/scalar.py), read at the last token of the answer.

  batch: texts per forward, padded to a power of two of tokens, so that a handful of shapes is compiled. form: (vocab,
  prompt, answer) -> `Text`, as in the training of the model.
  """
  if scalar.NAME not in params:
    raise UserError('this model gives no number: set model to use(scalar.make, model=...)')
  read = functools.partial(_read, _Static(model.hidden, mesh.context()))

  def reward(prompts: Sequence[str], answers: Sequence[str], told: Told) -> np.ndarray:
    del told
    texts = [form(vocab, p, a) for p, a in zip(prompts, answers, strict=True)]
    sizes = [len(t.prompt) + len(t.answer) for t in texts]
    for prompt, size in zip(prompts, sizes, strict=True):
      if size > (model.card.length or size):
        raise UserError(
          f'prompt and answer have {size} tokens, the reward model reads {model.card.length}: {short(prompt)}'
        )
    found = np.zeros(len(texts), np.float32)
    order = np.argsort(sizes, kind='stable')  # texts of like length share a batch
    for first in range(0, len(texts), batch):
      own = order[first : first + batch]
      laid = _lay(model.card, [texts[i] for i in own], batch)
      found[own] = np.asarray(read(params, laid))[: len(own)]
    return found

  return reward


class _Static(NamedTuple):
  """What the compiled code depends on besides shapes: of a model what `score` reads."""

  hidden: Callable
  context: Any


def _lay(card: Any, texts: list[Text], rows: int) -> dict[str, np.ndarray]:
  width = lambda sizes: 1 << max(4, (max(sizes) - 1).bit_length())
  both = card.kind == 'encoder_decoder'
  given, answered = [len(t.prompt) for t in texts], [len(t.answer) for t in texts]
  total = answered if both else [a + b for a, b in zip(given, answered, strict=True)]
  first = texts[0].start if texts[0].start is not None else texts[0].answer[-1]
  layout = batch_lib.Layout(card.kind, width(total), width([*given, 1]), True, first)
  laid = batch_lib.empty(layout, rows)
  for row, text in enumerate(texts):
    ids = np.array(text.prompt, np.int32), np.array(text.answer, np.int32)
    batch_lib.put(laid, layout, row, 1, 0, 0, ids)
  return {name: prompts_lib.fill(x) for name, x in laid.items()}


_read = jax.jit(objective.score, static_argnums=0)


def learned(
  prompts: Sequence[str],
  answers: Sequence[str],
  told: Told,
  *,
  model: Callable,
  path: str,
  vocab: Callable,
  policy_vocab: Callable | None = None,
  batch: int = 16,
  form: Callable = plain,
) -> np.ndarray:
  """The reward model of the run in `path`, as `of_model`; its weights are read once.

  model: use(scalar.make, model=...) as it was trained; vocab: its vocabulary. policy_vocab: that of the policy, for a
  reward model that must read the very tokens the policy wrote: another one is refused.
  """
  return _opened(model, path, vocab, policy_vocab, batch, form)(prompts, answers, told)


def prepare(reward: Callable) -> None:
  """Opens the reward models that a reward is made of, so that a missing run or another tokenizer is refused now."""
  if not isinstance(reward, functools.partial):
    return
  told = reward.keywords
  if reward.func is learned:
    settings = dict(policy_vocab=None, batch=16, form=plain) | told
    _opened(*(settings[k] for k in ('model', 'path', 'vocab', 'policy_vocab', 'batch', 'form')))
  for value in told.values():
    for part in value.values() if isinstance(value, Mapping) else (value,):
      prepare(part)


@functools.lru_cache(maxsize=8)
def _opened(model, path, vocab, policy_vocab, batch, form) -> Reward:
  if policy_vocab is not None:
    alike(policy_vocab(), vocab(), path)
  made, params, words = opened(model, path, vocab)
  return of_model(made, params, words, batch=batch, form=form)


@functools.lru_cache(maxsize=4)
def opened(model: Callable, path: str, vocab: Callable) -> tuple[Any, Any, Any]:
  """(model, params, vocabulary) of the run in `path`, read once."""
  made = model()
  with mesh.outside():
    shapes = jax.eval_shape(made.init, jax.random.key(0))
  return made, checkpoint.load_params(path, shapes), vocab()


def alike(policy: Any, reward: Any, name: str) -> None:
  """Raises `UserError` unless both vocabularies give every id the same meaning."""
  if policy.fingerprint != reward.fingerprint:
    raise UserError(
      f'the policy writes {policy.size} ids of {type(policy).__name__} {policy.fingerprint}, the reward model {name} '
      f"reads {reward.size} of {type(reward).__name__} {reward.fingerprint}: train it on the policy's vocabulary"
    )
