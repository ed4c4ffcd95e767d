"""What is held out of alignment: prompts for what a policy earns, pairs for what a reward model makes of them."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import mesh
from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.objectives import reward as model_lib
from llm_jax.objectives import sequence
from llm_jax.rl import preferences, rollout
from llm_jax.rl import reward as reward_lib
from llm_jax.train.hooks import Hook, Run


def reward(
  run: Run,
  *,
  prompts: Callable,
  reward: Callable,
  form: Callable = rollout.plain,
  every: int = 50,
  max_new: int = 32,
  temperature: float = 0.0,
  batch: int = 512,
  seed: int = 0,
  name: str = 'heldout',
) -> Hook:
  """Writes NAME/reward, the mean over the answers to all prompts, before the first step, every `every` and at the last.

  prompts, reward, form: as in `rollout.make`. temperature: 0 is greedy. The vocabulary is that of the source; the
  moving average of the parameters is used where there is one.
  """
  records = list(prompts())
  if not records or every < 1:
    raise UserError(
      f'heldout.reward: {len(records)} prompts, every={every}: both must be at least 1'
    )
  vocab, model = run.source.vocab, run.model
  forms = [form(model, vocab, record) for record in records]
  width = max(len(f.ids) for f in forms)
  ids = np.zeros((len(forms), width), np.int32)
  for row, f in zip(ids, forms, strict=True):
    row[: len(f.ids)] = f.ids
  lengths = np.array([len(f.ids) for f in forms])
  told = dict(eos=forms[0].end, start=forms[0].start, temperature=temperature, max_new=max_new)
  told['allowed'] = prompts_lib.drawable(model, vocab)

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if step % every and step != run.steps:
      return
    with run.writer.aside():
      texts, key = [], jax.random.fold_in(jax.random.key(seed), step)
      for first in range(0, len(forms), batch):
        some = slice(first, first + batch)
        rows = np.arange(len(forms))[some]
        out = generate_lib.generate(
          model, state.averaged, ids[some], lengths[some], key, rows=rows, **told
        )
        pairs = zip(forms[some], np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
        for f, row, n in pairs:
          texts.append(''.join(prompts_lib.pieces(vocab, f.ids, [row[:n]], f.end)))
      asked = [r.get('prompt', '') for r in records]
      scores = reward_lib.checked(reward, asked, texts, records, name)
      run.writer.write(step, {f'{name}/reward': float(scores.mean())})
      run.writer.say(f'step {step}: {name} reward {scores.mean():.4f} of {len(texts)} answers')

  return hook


def calibration(
  run: Run, *, source: Callable, every: int = 500, bins: int = 10, name: str = 'heldout'
) -> Hook:
  """How often a reward model prefers what people prefer, and whether it is as sure as it is right; draws it.

  Every `every` steps and at the last, one pass over the pairs of `source(run.model).once()`. Writes NAME/accuracy,
  the share of pairs in the right order, and NAME/calibration_error; draws NAME_calibration.png.
  """
  if every < 1 or bins < 1:
    raise UserError(f'heldout.calibration: every={every} and bins={bins} must be at least 1')
  held, sides = source(run.model), ('chosen', 'rejected')

  @jax.jit
  def read(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    told = sequence.together(batch, sides)
    chosen, rejected = model_lib.of_texts(params, run.model.hidden(params, told).x, told, 2)
    return chosen - rejected, sequence.totals(jnp.ones_like(told['weights']), told, 2)[0] > 0

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    if not step or (step % every and step != run.steps):
      return
    with run.writer.aside():
      found = [jax.device_get(read(state.averaged, mesh.place(batch))) for batch in held.once()]
      margins = np.concatenate([margin[there] for margin, there in found])
      right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
      low, high = preferences.wilson(right, len(margins))
      error = preferences.calibration_error(margins, bins=bins)
      values = dict(accuracy=right / len(margins), calibration_error=error)
      run.writer.write(step, {f'{name}/{key}': value for key, value in values.items()})
      if jax.process_index() == 0:
        path = os.path.join(run.workdir, f'{name}_calibration.png')
        preferences.plot(path, {'reward model': margins}, bins=bins)
      run.writer.say(
        f'step {step}: {name} {right / len(margins):.3f} of {len(margins)} pairs in the right order (95 % interval '
        f'{low:.3f} to {high:.3f}), calibration error {error:.3f}'
      )

  return hook
