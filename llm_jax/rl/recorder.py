r"""The flight recorder of reinforcement learning: a fixed panel for every round, and a name for what goes wrong.

Rewards rise in many ways of which one is wanted. The panel holds what tells them apart; `diagnose` reads the panels of
the last rounds and names the failure, with the number that gave it away. The thresholds are arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core.errors import UserError
from llm_jax.objectives import policy, sequence
from llm_jax.train.hooks import Hook, Run

Panel = dict[str, float]

# The names, and what to do about each.
REMEDIES = dict(
  gap='sampler and learner disagree: check temperature, dtype and positions',
  mask_bug='weights are not 1 on exactly the tokens of the answers: check what lays out the batch',
  stale_policy='the answers were written by another policy: fewer epochs, or sample with the newest weights',
  reward_sign='answers that earn more are made less likely: check the sign of reward and advantages',
  constant_reward='all answers earn the same: there is nothing to learn; check the reward, use keep=rollout.varied',
  entropy_collapse='the policy always says the same: lower the learning rate, add an entropy bonus or KL penalty',
  length_exploit='the reward is earned by length: control for it in the reward, or use policy.dr_grpo or dapo',
  reward_hacking='the reward rises and what it stands for falls: stop here, mend the reward or raise beta',
  kl_runaway='the policy has left its reference: raise beta, use advantage.adaptive, lower the learning rate',
  value_collapse='the critic knows less than a constant would: check returns, raise value_weight or its learning rate',
)


def record(
  run: Run,
  *,
  gold: Callable | None = None,
  every: int = 1,
  window: int = 5,
  temperature: float = 1.0,
  judge: Callable | None = None,
) -> Hook:
  """Writes the panel of every `every`th round as `rl/...` and says when something has a name, once per failure.

  gold: a reward that the policy does not see. window: rounds that trends are read from. temperature: that of the
  rollout. judge: `diagnose`, or that with other thresholds. The panel is of the round's answers under the policy after
  the round's first update.
  """
  if every < 1 or window < 2:
    raise UserError(f'recorder: every={every} must be at least 1 and window={window} 2')
  history = _History(window)
  run.saver.track('recorder', history)
  read = jax.jit(
    lambda params, batch: sequence.tokens(run.model, params, batch, temperature=temperature)[:2]
  )

  def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
    source = run.source
    if source.rows is None or source.round in history.seen or source.round % every:
      return
    with run.writer.aside():
      shape = lambda x: x[: source.batch]
      batch = {name: shape(x) for name, x in source.rows.items()}
      if 'gap' not in batch and 'gap_squared' in metrics:
        batch['gap'] = np.sqrt(np.float32(metrics['gap_squared']))
      logp, entropy = (np.asarray(x) for x in read(state.params, batch))
      found = panel(batch, logp, entropy)
      found['mask'] = float((batch['weights'] != shape(source.expected_weights())).any(1).mean())
      if gold is not None:
        found['reward/gold'] = float(np.mean(gold(*source.answers())))
      history.add(source.round, found)
      run.writer.write(step, {f'rl/{name}': value for name, value in found.items()})
      for name, why in (judge or diagnose)(history.panels).items():
        if name not in history.named:
          history.named[name] = source.round
          run.writer.write(step, {f'rl/diagnosis/{name}': 1.0})
          run.writer.say(f'step {step}: {name.replace("_", " ")}: {why}. {REMEDIES[name]}')

  return hook


def panel(batch: Mapping[str, np.ndarray], logp: np.ndarray, entropy: np.ndarray) -> Panel:
  """The fixed panel of a round. batch: of `rollout.make`; logp, entropy: f32 [batch, length], of the policy now.

  kl, k3: nats per answer, of the policy that wrote from its reference. ratio/: quantiles over tokens of the policy now
  to the one that wrote. old_kl: k3 between the two, per token. clipped: tokens whose ratio is off by more than 0.2.
  gap: the largest of an answer; of a round of one update the root of the mean square that the objective found, absent
  where that is none of rl. explained_variance: of the returns by the critic, absent without. sign: correlation of
  advantage and reward over answers. reward/NAME: means of what the reward is made of.
  """
  w, n = batch['weights'], batch['weights'].sum(1)
  own, total = w > 0, max(w.sum(), 1)
  log_ratio = (logp - batch['old_logp'])[own].astype(np.float64)
  ratio = np.exp(log_ratio)
  found = {f'ratio/p{q:02}': float(np.quantile(ratio, q / 100)) for q in (1, 50, 99)}
  found |= dict(
    old_kl=float((ratio - 1 - log_ratio).mean()),
    clipped=float((np.abs(ratio - 1) > 0.2).mean()),
    entropy=float((entropy * w).sum() / total),
    length=float(n.mean()),
    reward=float(batch['reward'].mean()),
    reward_std=float(batch['reward'].std()),
    sign=_correlation((batch['advantages'] * w).sum(1) / np.maximum(n, 1), batch['reward']),
    by_length=_correlation(n, batch['reward']),
  )
  found |= {name: float(x.mean()) for name, x in batch.items() if name.startswith('reward/')}
  if 'gap' in batch:
    found['gap'] = float(batch['gap'].max())
  if 'ref_logp' in batch:
    pair = batch['old_logp'], batch['ref_logp']
    for name, k in (('kl', policy.k1), ('k3', policy.k3)):
      found[name] = float((np.asarray(k(*pair)) * w).sum(1).mean())
  if 'values' in batch:
    returns, error = batch['returns'][own], (batch['returns'] - batch['values'])[own]
    found['explained_variance'] = float(1 - error.var() / max(returns.var(), 1e-12))
  return found


def diagnose(
  panels: Sequence[Panel],
  *,
  gap: float = 1e-3,
  stale: float = 0.05,
  sign: float = -0.1,
  entropy: float = 0.1,
  growth: float = 1.1,
  by_length: float = 0.7,
  fall: float = 0.05,
  kl: float = 25.0,
  explained: float = -0.5,
) -> dict[str, str]:
  """What the panels of the last rounds show, oldest first: name -> the number that gave it away.

  gap: nats. stale: old_kl, nats per token. sign: correlation. entropy: part of the first panel's. growth: of the length
  since the first panel, when its correlation with the reward was by_length. fall: of the gold reward, in its absolute
  value, while the reward rises by as much. kl: nats per answer. explained: variance, of a critic that does not get
  better. The first panel is that of the first round; trends are read from three panels on.
  """
  first, last, found = panels[0], panels[-1], {}
  if last.get('gap', 0) > gap:
    found['gap'] = f'log-probabilities differ by {last["gap"]:.2g} nats'
  if last.get('mask', 0) > 0:
    found['mask_bug'] = f'{100 * last["mask"]:.0f} % of the rows'
  if last['old_kl'] > stale:
    found['stale_policy'] = f'KL to the policy that wrote is {last["old_kl"]:.2g} nats per token'
  if last['reward_std'] > 0 and last['sign'] < sign:
    found['reward_sign'] = f'advantage and reward correlate with {last["sign"]:.2f}'
  if len(panels) > 1 and all(p['reward_std'] == 0 for p in panels[1:]):
    found['constant_reward'] = f'{last["reward"]:.3g} for every answer'
  if last['entropy'] < entropy * first['entropy']:
    found['entropy_collapse'] = (
      f'{last["entropy"]:.3f} nats per token, {first["entropy"]:.3f} at first'
    )
  if last.get('kl', 0) > kl:
    found['kl_runaway'] = f'{last["kl"]:.1f} nats per answer'
  if len(panels) < 3:
    return found
  rise = last['reward'] - first['reward']
  longer = last['length'] > growth * first['length']
  if longer and rise > 0 and max(p['by_length'] for p in panels) > by_length:
    found['length_exploit'] = f'{last["length"]:.1f} tokens, {first["length"]:.1f} at first'
  if 'reward/gold' in last and rise > fall and last['reward/gold'] < first['reward/gold'] - fall:
    found['reward_hacking'] = (
      f'reward +{rise:.2f}, gold {last["reward/gold"] - first["reward/gold"]:+.2f}'
    )
  if 'explained_variance' in last:
    told = [p['explained_variance'] for p in panels]
    learns = told[-1] > told[0] + 0.1 * abs(told[0])  # a fresh critic begins far below 0 and rises
    if max(told[1:]) < explained and not learns:
      found['value_collapse'] = f'explained variance {told[-1]:.2f}'
  return found


class _History:
  """The first panel and the last ones; part of checkpoints."""

  def __init__(self, window: int):
    self.window, self.panels = window, []
    self.seen, self.named = set(), {}

  def add(self, number: int, found: Panel) -> None:
    self.seen = {number}
    self.panels = [*self.panels, found]
    if len(self.panels) > self.window + 1:
      del self.panels[1]

  def state(self) -> dict[str, Any]:
    return dict(panels=self.panels, seen=sorted(self.seen), named=self.named)

  def restore(self, saved: Mapping[str, Any]) -> None:
    self.panels = [dict(p) for p in saved['panels']]
    self.seen, self.named = set(saved['seen']), dict(saved['named'])


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
  """0 where one of them does not vary."""
  x, y = x - x.mean(), y - y.mean()
  scale = np.sqrt((x**2).sum() * (y**2).sum())
  return float((x * y).sum() / scale) if scale > 1e-12 else 0.0
