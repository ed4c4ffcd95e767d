r"""InstructGPT's three steps on a toy whose gold reward is known, and what each method pays for it in divergence.

  .venv/bin/python experiments/instruct_gpt/run.py                  # about four minutes of one core
  .venv/bin/python experiments/instruct_gpt/run.py --seeds=1 --quick --out=runs/instruct_gpt

(1) A policy is tuned on demonstrations; (2) a reward model, which begins as that policy, learns from pairs of its
answers whose labels are the gold reward's, a quarter of them wrong; (3) PPO, GRPO, RAFT and best-of-n follow the reward
model, DPO the pairs. All that learns goes through train/loop.py and train/step.py. The 30,941 answers of up to four
letters are listed, so rewards and divergences are exact, on prompts that nothing was learned on. Writes result.json and
frontier.png.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from llm_jax.core import mesh
from llm_jax.objectives import language, policy, preference
from llm_jax.objectives import reward as reward_objective
from llm_jax.optim import chain, rules, schedules
from llm_jax.rl import advantage, annotate, feedback, layout, rollout, toy
from llm_jax.rl import reward as reward_lib
from llm_jax.train import loop
from llm_jax.train import state as state_lib
from llm_jax.train import step as step_lib

MOST = 4  # letters of an answer


class Size(NamedTuple):
  """demonstrations, pairs: how many. noise: the share of labels that are turned round. sft, rm, rl, dpo: steps. marks:
  the steps of step three that are looked at. ns: of best-of-n. betas: of DPO. listed: prompts that are looked at."""

  demonstrations: int = 512
  pairs: int = 512
  noise: float = 0.25
  sft: int = 150
  rm: int = 300
  rl: int = 120
  dpo: int = 120
  marks: tuple = (2, 5, 10, 20, 40, 80, 120)
  ns: tuple = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
  betas: tuple = (1.0, 0.3, 0.1, 0.03)
  listed: int = 2


QUICK = Size(
  sft=100, rm=40, rl=30, dpo=40, marks=(5, 15, 30), ns=(1, 4, 16), betas=(0.3,), listed=1
)

# name: (objective, the rollout's settings, learning rate); {} where the batches are not rollouts
METHODS: dict[str, tuple[Callable, dict[str, Any], float]] = {
  'SFT': (language.next_token, {}, 3e-3),
  'RM': (functools.partial(reward_objective.bradley_terry, centre=0.01), {}, 1e-3),
  'PPO': (
    policy.ppo,
    dict(estimate=advantage.gae, value=policy.value_head, epochs=2, beta=0.02),
    1e-3,
  ),
  'GRPO': (
    functools.partial(policy.grpo, beta=0.02),
    dict(estimate=advantage.grpo, epochs=2),
    1e-3,
  ),
  'RAFT': (
    language.next_token,
    dict(estimate=advantage.score, keep=rollout.best, tries=9, epochs=2),
    1e-3,
  ),
}
RL = ('PPO', 'GRPO', 'RAFT')


class Rows:
  """A source of minibatches of arrays, in an order that the seed fixes."""

  def __init__(self, arrays: Mapping[str, np.ndarray], batch: int, seed: int):
    first = next(iter(arrays.values()))
    self.batch, self.length, self.vocab = min(batch, len(first)), first.shape[1], toy.Letters()
    self._arrays, self._count, self._seed, self._at = dict(arrays), len(first), seed, 0

  def __call__(self, state: Any = None) -> dict[str, np.ndarray]:
    """The next minibatch."""
    epoch, k = divmod(self._at, self._count // self.batch)
    order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
    self._at += 1
    rows = order[k * self.batch : (k + 1) * self.batch]
    return {name: value[rows] for name, value in self._arrays.items()}


class Point(NamedTuple):
  """gold, proxy: expected rewards, the second in standard deviations of the tuned policy's. kl: to it, nats."""

  gold: float
  proxy: float
  kl: float


@functools.cache
def model() -> Any:
  """Policy, reward model and critic: one architecture with a scalar head."""
  return toy.model()


@functools.cache
def updates(name: str, **settings: Any) -> tuple[Callable, Any]:
  """(update, optimizer) of a method, compiled once for all seeds. settings: of the objective."""
  objective, _, rate = METHODS[name] if name in METHODS else (preference.dpo, {}, 1e-3)
  schedule = functools.partial(schedules.constant, peak=rate)
  tx = chain.make(model().axes, rule=rules.adamw, schedule=schedule)
  return step_lib.make(functools.partial(objective, model(), **settings), tx), tx


def learn(
  name: str,
  params: Any,
  source: Callable,
  steps: int,
  look: Callable | None = None,
  **settings: Any,
) -> Any:
  """`params` after `steps` updates. look(step, params) is called after each."""
  update, tx = updates(name, **settings)
  params = jax.tree.map(jnp.copy, params)
  begin = state_lib.State(jnp.zeros((), jnp.int32), params, tx.init(params))
  hooks = [] if look is None else [lambda step, state, metrics: look(step, state.params)]
  return loop.train(begin, source, update, steps=steps, key=jax.random.key(0), hooks=hooks).params


# --- data -----------------------------------------------------------------------------------------------


def lay(prompts: Sequence[str], answers: Sequence[str], *, cut: bool) -> dict[str, np.ndarray]:
  """Texts as arrays. cut: no end after `MOST` letters, where sampling stops too; a reward model reads it."""
  words, width = toy.Letters(), MOST + (not cut)
  asked = np.array([words.encode(p) for p in prompts], np.int32)
  said = [[*words.encode(a), words.eos][:width] for a in answers]
  tokens = np.array([ids + [0] * (width - len(ids)) for ids in said], np.int32)
  lengths, ends = np.full(len(asked), asked.shape[1]), np.array([len(ids) for ids in said])
  return layout.lay(model(), asked, lengths, tokens, ends, words.start)


def demonstrate(prompts: Sequence[str], rng: np.random.Generator) -> list[str]:
  """What a person writes who is right more often than not: a to f with 60 %, one to four letters."""
  good, bad = list(toy.LETTERS[:6]), list(toy.LETTERS[6:])
  sizes = rng.choice([1, 2, 3, 4], len(prompts), p=[0.1, 0.2, 0.3, 0.4])
  letter = lambda: rng.choice(good if rng.random() < 0.6 else bad)
  return [''.join(letter() for _ in range(size)) for size in sizes]


def compare(params: Any, prompts: Sequence[str], size: Size, seed: int) -> dict[str, list[str]]:
  """Two different answers of the policy to each of `size.pairs` prompts; the better one is `chosen`, but for noise."""
  write = feedback.of_model(model(), params, toy.Letters(), max_new=MOST, batch=512)
  asked = [prompts[i % len(prompts)] for i in range(size.pairs)]
  key, rng = jax.random.key(seed), np.random.default_rng([seed, 2])
  found: dict[str, list[str]] = dict(prompt=[], chosen=[], rejected=[])
  for one in feedback.sample(write, toy.gold, asked, [{}] * len(asked), key, n=2):
    (a, b), apart = one.answers, float(one.scores[0] - one.scores[1])
    better = apart > 0 if apart else rng.random() < 0.5
    if a != b:
      right = better != (rng.random() < size.noise)
      for side, text in zip(found, (one.prompt, *((a, b) if right else (b, a))), strict=True):
        found[side].append(text)
  return found


def sides(pairs: Mapping[str, Sequence[str]], *, cut: bool) -> dict[str, np.ndarray]:
  """Pairs as a batch: chosen/... and rejected/..."""
  laid = {side: lay(pairs['prompt'], pairs[side], cut=cut) for side in ('chosen', 'rejected')}
  return {f'{side}/{name}': x for side, arrays in laid.items() for name, x in arrays.items()}


# --- what is measured -----------------------------------------------------------------------------------


class Exact:
  """Expected rewards and divergences by listing all answers to a few prompts.

  logp: of the tuned policy; gold, proxy: of all answers; [prompts, answers]. reward: the proxy as a reward function.
  """

  def __init__(self, tuned: Any, judge: Any, prompts: Sequence[str]):
    self._prompts, self.texts = prompts, toy.texts(MOST)
    self.logp = _listed()(tuned, prompts)
    raw = toy.rewards(model(), most=MOST)(judge, prompts)
    told = [{}] * len(self.texts)
    self.gold = np.tile(toy.gold(self.texts, self.texts, told), (len(prompts), 1))
    p = np.exp(self.logp) / len(prompts)
    mean = (p * raw).sum()
    spread = float(np.sqrt((p * (raw - mean) ** 2).sum()))
    self.proxy = (raw - mean) / spread
    own = reward_lib.of_model(model(), judge, toy.Letters(), batch=64)
    self.reward = lambda prompts, answers, told: (own(prompts, answers, told) - mean) / spread

  def point(self, logp: np.ndarray) -> Point:
    """Of the log-probabilities [prompts, answers]."""
    p = np.exp(logp)
    kl = [toy.divergence(a, b) for a, b in zip(logp, self.logp, strict=True)]
    return Point(
      *(float((p * r).sum(1).mean()) for r in (self.gold, self.proxy)), float(np.mean(kl))
    )

  def of_policy(self, params: Any) -> Point:
    """Of a model."""
    return self.point(_listed()(params, self._prompts))

  def changed(self, change: Callable, rewards: np.ndarray, strength: float) -> Point:
    """Of `toy.best_of_n` or `toy.tilted` of the tuned policy."""
    rows = zip(self.logp, rewards, strict=True)
    return self.point(np.stack([change(logp, r, strength) for logp, r in rows]))


@functools.cache
def _listed() -> Callable:
  return toy.distribution(model(), most=MOST)


def best_of_n(exact: Exact, n: int) -> tuple[Point, dict[str, float]]:
  """(the point, the formula of its divergence and how far below it may lie)."""
  slack = [toy.best_of_n_slack(a, r, n) for a, r in zip(exact.logp, exact.proxy, strict=True)]
  told = dict(formula=toy.best_of_n_kl(n), slack=float(np.mean(slack)))
  return exact.changed(toy.best_of_n, exact.proxy, n), told


# --- the three steps ------------------------------------------------------------------------------------


def first_two(
  size: Size, seed: int
) -> tuple[Any, Any, dict[str, list[str]], list[dict], list[str]]:
  """(tuned policy, reward model, pairs, prompts to learn on, prompts to look at)."""
  records = toy.prompts(count=64 + size.listed, seed=seed)
  train, held = records[size.listed :], [r['prompt'] for r in records[: size.listed]]
  texts = [r['prompt'] for r in train]
  asked = [texts[i % len(texts)] for i in range(size.demonstrations)]
  shown = demonstrate(asked, np.random.default_rng([seed, 1]))
  begin = jax.jit(model().init)(jax.random.key(seed))
  tuned = learn('SFT', begin, Rows(lay(asked, shown, cut=True), 64, seed), size.sft)
  pairs = compare(tuned, texts, size, seed)
  judge = learn('RM', tuned, Rows(sides(pairs, cut=False), 64, seed), size.rm)
  return tuned, judge, pairs, train, held


def third(
  name: str, tuned: Any, exact: Exact, records: Sequence[dict], size: Size, seed: int
) -> dict[str, Point]:
  """Points along the training of a method that writes its own answers."""
  source = rollout.make(
    model(), prompts=lambda: list(records), reward=exact.reward, vocab=toy.Letters, max_new=MOST,
    reference=lambda model: tuned, batch=64, round=64, group=8, seed=seed, **METHODS[name][1],
  )  # fmt: skip
  found: dict[str, Point] = {}

  def look(step: int, params: Any) -> None:
    if step in size.marks:
      found[f'step {step}'] = exact.of_policy(params)

  learn(name, tuned, source, size.rl, look)
  return found


def directly(tuned: Any, exact: Exact, pairs: Mapping, size: Size, seed: int) -> dict[str, Point]:
  """DPO with several strengths; each run begins with the tuned policy, so that is the reference."""
  found = {}
  begun = model()._replace(init=lambda key: tuned)
  for beta in size.betas:
    rows = lambda _: Rows(sides(pairs, cut=True), 64, seed)
    source = annotate.with_reference(begun, source=rows)
    found[f'beta {beta}'] = exact.of_policy(learn('DPO', tuned, source, size.dpo, beta=beta))
  return found


def run(size: Size, seed: int) -> tuple[dict[str, dict[str, Point]], dict[str, Any]]:
  """(method -> strength -> point, what else was seen)."""
  tuned, judge, pairs, train, held = first_two(size, seed)
  exact = Exact(tuned, judge, held)
  best = {f'n = {n}': best_of_n(exact, n) for n in size.ns}
  found = {'SFT': {'': exact.point(exact.logp)}}
  found['best-of-n'] = {name: point for name, (point, _) in best.items()}
  for name in RL:
    found[name] = third(name, tuned, exact, train, size, seed)
  found['DPO'] = directly(tuned, exact, pairs, size, seed)
  for name, rewards in (('optimum for gold', exact.gold), ('optimum for proxy', exact.proxy)):
    strengths = (2.0**-k for k in range(-3, 7))
    found[name] = {f'beta {b}': exact.changed(toy.tilted, rewards, b) for b in strengths}
  told = dict(
    pairs=len(pairs['prompt']), best_of_n={name: more for name, (_, more) in best.items()}
  )
  return found, told


# --- what is shown --------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float:
  """Half of the 95 % interval of a mean (Student's t); 0 for one value."""
  if len(values) < 2:
    return 0.0
  spread = np.std(values, ddof=1) / len(values) ** 0.5
  return float(stats.t.ppf(0.975, len(values) - 1) * spread)


def table(runs: Sequence[Mapping[str, Mapping[str, Point]]]) -> list[dict[str, Any]]:
  """One row for each method and strength: means over the seeds, half intervals, and the gold reward of each seed."""
  rows = []
  for method, strengths in runs[0].items():
    for strength in strengths:
      points = [r[method][strength] for r in runs]
      row: dict[str, Any] = dict(method=method, strength=strength)
      for name, values in zip(Point._fields, zip(*points, strict=True), strict=True):
        row[name] = round(float(np.mean(values)), 4) + 0.0  # no -0.0
        row[f'{name}_interval'] = round(interval(values), 4)
      rows.append(row | dict(gold_of_seeds=[round(p.gold, 4) for p in points]))
  return rows


LOOKS = {  # line, marker, filled
  'best-of-n': ('-', 'o', 'white'),
  'RAFT': ('--', 's', 'white'),
  'PPO': ('-', '^', 'black'),
  'GRPO': ('--', 'D', 'black'),
  'DPO': (':', 'v', '0.6'),
}


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Gold reward against divergence."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.6, 4.4), layout='constrained')
  FigureCanvasAgg(figure)
  panel = figure.subplots()
  of = lambda method, name: np.array([r[name] for r in rows if r['method'] == method])
  widest = max(of(m, 'kl').max() for m in LOOKS)
  for method, look in (('optimum for gold', '-'), ('optimum for proxy', '-.')):
    panel.plot(of(method, 'kl'), of(method, 'gold'), look, color='0.65', lw=1.5, label=method)
  for method, (line, marker, fill) in LOOKS.items():
    order = np.argsort(of(method, 'kl'))
    column = lambda name, method=method, order=order: of(method, name)[order]
    panel.errorbar(
      column('kl'), column('gold'), yerr=column('gold_interval'), xerr=column('kl_interval'),
      linestyle='none', ecolor='0.75', elinewidth=0.8, capsize=2, zorder=1,
    )  # fmt: skip
    panel.plot(
      column('kl'), column('gold'), line, marker=marker, mfc=fill, color='black', ms=6, lw=1.3,
      label=method, zorder=2,
    )  # fmt: skip
  panel.axhline(of('SFT', 'gold')[0], color='0.8', lw=1, zorder=0)
  panel.text(1.04 * widest, of('SFT', 'gold')[0], 'SFT', va='bottom', ha='right', color='0.4')
  panel.set(xlabel='KL to the SFT policy, nats', ylabel='gold reward', xlim=(-0.05, 1.05 * widest))
  panel.set_ylim(top=1.02)
  panel.spines[['top', 'right']].set_visible(False)
  panel.legend(
    frameon=False, fontsize=9, loc='center left', bbox_to_anchor=(1, 0.5), handlelength=3
  )
  figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seeds', type=int, default=6)
  parser.add_argument('--quick', action='store_true', help='few steps and one listed prompt')
  parser.add_argument('--out', default=os.path.dirname(os.path.abspath(__file__)))
  given = parser.parse_args(argv)
  size, start = QUICK if given.quick else Size(), time.perf_counter()
  with jax.set_mesh(mesh.make(data=1)):
    runs = []
    for seed in range(given.seeds):
      runs.append(run(size, seed))
      print(f'seed {seed}: {time.perf_counter() - start:.0f} s', flush=True)
  rows = table([found for found, _ in runs])
  for row in rows:
    print(
      f'{row["method"]:18} {row["strength"]:12} gold {row["gold"]:6.3f} +- {row["gold_interval"]:.3f}  '
      f'proxy {row["proxy"]:6.2f}  KL {row["kl"]:6.3f} +- {row["kl_interval"]:.3f} nats'
    )
  os.makedirs(given.out, exist_ok=True)
  told = dict(
    seeds=given.seeds, settings=size._asdict(), rows=rows, told=[more for _, more in runs]
  )
  with open(os.path.join(given.out, 'result.json'), 'w', encoding='utf-8') as f:
    f.write(json.dumps(told, indent=1) + '\n')
  draw(rows, os.path.join(given.out, 'frontier.png'))


if __name__ == '__main__':
  main()
