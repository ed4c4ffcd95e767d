"""What a policy earns on prompts it does not learn from."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.decode import generate as generate_lib
from llm_jax.decode import prompts as prompts_lib
from llm_jax.rl import reward as reward_lib
from llm_jax.rl import rollout
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
