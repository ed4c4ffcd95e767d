"""What came out: intervals over seeds, differences seed by seed, RegMix's fits, tables and a figure."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.scaling import mixture

LAWS = dict(
  linear=lambda x, y: mixture.regress(x, y, features=mixture.linear),
  quadratic=lambda x, y: mixture.regress(x, y, features=mixture.quadratic),
  logarithmic=lambda x, y: mixture.regress(x, y, features=mixture.logarithmic),
  exponential=mixture.exponential,
)


def fitted(mixtures: np.ndarray, loss: np.ndarray, law: Callable) -> list[Callable]:
  """A law for each domain's loss [n, domains]."""
  return [law(mixtures, y) for y in loss.T]


def worst(laws: Sequence[Callable]) -> Callable:
  """Mixtures -> the highest of the domains' predicted losses."""
  return lambda mixtures: np.max([law(mixtures) for law in laws], axis=0)


def interval(values: Sequence[float]) -> dict[str, Any]:
  """The mean and half the width of its 95 % interval by Student's t."""
  from scipy import stats

  x = np.asarray(values, float)
  half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
  return dict(values=x.tolist(), mean=float(x.mean()), half=float(half))


def summarise(
  cells: Mapping[str, Mapping[str, Any]],
  domains: Sequence[str],
  arms: Sequence[str],
  seeds: int,
  held: int,
) -> dict[str, Any]:
  """JSON of everything. cells: of `small.Cells`. held: mixtures that RegMix is tested on."""
  alone = np.array([cells[f'large only {name} 0']['loss'][i] for i, name in enumerate(domains)])
  rows, scores = {}, {}
  for arm in arms:
    runs = [cells[f'large {arm} {seed}'] for seed in range(seeds)]
    loss = np.array([one['loss'] for one in runs])
    scores[arm] = dict(worst=loss.max(1), excess=(loss - alone).max(1), mean=loss.mean(1))
    rows[arm] = {name: interval(loss[:, i]) for i, name in enumerate(domains)}
    rows[arm] |= {name: interval(x) for name, x in scores[arm].items()}
    rows[arm]['rates'] = np.mean([one['rates'] for one in runs], axis=0).tolist()
  differences = {
    arm: {name: interval(x - scores[arms[0]][name]) for name, x in scores[arm].items()}
    for arm in arms[1:]
  }
  return dict(
    domains=list(domains),
    alone=alone.tolist(),
    rows=rows,
    differences=differences,
    doremi=[_thinned(one) for name, one in cells.items() if name.startswith('doremi')],
    regmix=regressions([x for name, x in cells.items() if name.startswith('tiny')], domains, held),
    cpu_minutes=round(sum(one['cpu'] for one in cells.values()) / 60, 1),
  )


def _thinned(one: Mapping[str, Any], points: int = 20) -> dict[str, Any]:
  """A round of DoReMi; of its weights the means of `points` stretches."""
  trace = np.array(one['trace'])
  every = max(1, len(trace) // points)
  means = trace[: len(trace) // every * every].reshape(-1, every, trace.shape[1]).mean(1)
  kept = {k: one[k] for k in ('cell', 'rates', 'reference', 'loss')}
  return dict(kept, steps=len(trace), every=every, trace=means.round(4).tolist())


def regressions(runs: Sequence[Mapping[str, Any]], domains: Sequence[str], held: int) -> dict:
  """How well each law predicts the last `held` runs, which it was not fitted to: Spearman's rank correlation, and the
  mean error in nats."""
  from scipy import stats

  x, y = (np.array([one[k] for one in runs]) for k in ('rates', 'loss'))
  told = {}
  for name, law in LAWS.items():
    laws = fitted(x[:-held], y[:-held], law)
    pairs = [(one(x[-held:]), y[-held:, i]) for i, one in enumerate(laws)]
    pairs.append((worst(laws)(x[-held:]), y[-held:].max(1)))
    told[name] = {
      target: dict(rank=float(stats.spearmanr(p, t)[0]), error=float(np.abs(p - t).mean()))
      for target, (p, t) in zip((*domains, 'worst'), pairs, strict=True)
    }
  return dict(fitted=len(x) - held, held=held, laws=told, rates=x.tolist(), loss=y.tolist())


def write(summary: Mapping[str, Any], folder: str) -> None:
  """results.json, results.md and results.png."""
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as f:
    json.dump(summary, f, indent=1)
  with open(os.path.join(folder, 'results.md'), 'w', encoding='utf-8') as f:
    f.write(table(summary))
  draw(summary, os.path.join(folder, 'results.png'))


def table(summary: Mapping[str, Any]) -> str:
  """Markdown: the mixtures, the differences from the uniform one, RegMix's laws."""
  names = summary['domains']
  told = lambda one, sign='': f'{one["mean"]:{sign}.4f} ± {one["half"]:.4f}'
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  shown = (*names, 'worst', 'excess', 'mean')
  lines = [
    line(['mixture', ' : '.join(names), *names, 'worst domain', 'worst excess', 'mean']),
    '| --- | --- |' + ' --: |' * len(shown),
  ]
  for arm, row in summary['rows'].items():
    rates = ' : '.join(f'{100 * r:.0f} %' for r in row['rates'])
    lines.append(line([arm, rates, *(told(row[key]) for key in shown)]))
  alone = [f'{x:.4f}' for x in summary['alone']]
  lines.append(line(['one domain alone', '', *alone, f'{max(summary["alone"]):.4f}', '0', '']))
  lines += [
    '',
    line(['minus uniform, nats per byte', 'worst domain', 'worst excess', 'mean']),
    '| --- | --: | --: | --: |',
  ]
  for arm, row in summary['differences'].items():
    lines.append(line([arm, *(told(row[key], '+') for key in ('worst', 'excess', 'mean'))]))
  targets = (*names, 'worst')
  lines += [
    '',
    line(['law', *(f'{t}: rank correlation, error' for t in targets)]),
    '| --- |' + ' --: |' * len(targets),
  ]
  for law, row in summary['regmix']['laws'].items():
    lines.append(line([law, *(f'{row[t]["rank"]:.2f}, {row[t]["error"]:.3f}' for t in targets)]))
  return '\n'.join(lines) + '\n'


def draw(summary: Mapping[str, Any], path: str) -> None:
  """DoReMi's weights over its steps; what each mixture reaches on each domain; RegMix's predictions."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11.5, 3.8), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  weights, losses, predictions = figure.subplots(1, 3)
  _weights(weights, summary)
  _losses(losses, summary)
  _predictions(predictions, summary['regmix'])
  for panel in (weights, losses, predictions):
    panel.grid(color='0.9', linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    for side in ('top', 'right'):
      panel.spines[side].set_visible(False)
  figure.savefig(path, format='png')


STYLES = (('-', 'o'), ('--', 's'), (':', '^'))


def _weights(panel: Any, summary: Mapping[str, Any]) -> None:
  steps = summary['doremi'][0]['steps']
  for i, (name, (line, mark)) in enumerate(zip(summary['domains'], STYLES, strict=True)):
    panel.plot([], [], line, marker=mark, color='black', linewidth=1, label=name)
    for k, one in enumerate(summary['doremi']):
      x = k * steps + one['every'] * (np.arange(len(one['trace'])) + 0.5)
      panel.plot(x, np.array(one['trace'])[:, i], line, color='0.45', linewidth=1)
      panel.plot([(k + 1) * steps], one['rates'][i], mark, color='black', markersize=5)
  panel.set_title("DoReMi's domain weights", fontsize=10)
  panel.set_xlabel(
    'step of the proxy, one round after the other\n(points: the average, the answer of a round)',
    fontsize=9,
  )
  panel.set_ylabel('weight (share of the loss)', fontsize=9)
  panel.set_ylim(0, None)
  panel.legend(fontsize=8, frameon=False)


def _losses(panel: Any, summary: Mapping[str, Any]) -> None:
  columns = (*summary['domains'], 'worst')
  for k, ((arm, row), (_, mark)) in enumerate(zip(summary['rows'].items(), STYLES, strict=True)):
    at = np.arange(len(columns)) + 0.2 * (k - 1)
    mean, half = (np.array([row[c][key] for c in columns]) for key in ('mean', 'half'))
    told = dict(color='black', markersize=5, capsize=3, linewidth=1)
    face = 'white' if k == 0 else 'black' if k == 1 else '0.6'
    panel.errorbar(at, mean, yerr=half, fmt=mark, markerfacecolor=face, label=arm, **told)
  alone = [*summary['alone'], max(summary['alone'])]
  panel.plot(
    np.arange(len(columns)), alone, '_', color='black', markersize=26, label='one domain alone'
  )
  panel.set_xticks(np.arange(len(columns)), columns)
  panel.set_title('The larger model on each mixture', fontsize=10)
  panel.set_ylabel('held-out loss, nats per byte', fontsize=9)
  n = len(next(iter(summary['rows'].values()))['worst']['values'])
  panel.set_xlabel(f'domain\n(bars: 95 % intervals of {n} seeds)', fontsize=9)
  panel.legend(fontsize=8, frameon=False)


def _predictions(panel: Any, told: Mapping[str, Any]) -> None:
  x, y = np.array(told['rates']), np.array(told['loss']).max(1)
  cut = told['fitted']
  laws = fitted(x[:cut], np.array(told['loss'])[:cut], LAWS['exponential'])
  predicted = worst(laws)(x)
  panel.plot(predicted[:cut], y[:cut], 'o', color='0.6', markersize=4, label='fitted')
  panel.plot(predicted[cut:], y[cut:], 's', color='black', markersize=5, label='held out')
  ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
  panel.plot(ends, ends, '-', color='black', linewidth=0.8)
  panel.set_title('RegMix: worst domain of a mixture', fontsize=10)
  panel.set_xlabel('predicted by the mixing law, nats per byte', fontsize=9)
  panel.set_ylabel('measured with a tiny model, nats per byte', fontsize=9)
  panel.legend(fontsize=8, frameon=False)
