r"""Chinchilla's third approach, fitted anew on the digitised points of its figure 4.

  LLM_JAX_SCALING_DATA=FOLDER .venv/bin/python -m experiments.chinchilla_refit.run

FOLDER holds epoch_chinchilla_svg_extracted.csv, which is data/svg_extracted_data.csv of
github.com/epoch-research/analyzing-chinchilla; it has no licence and so does not come with this repository. Writes
results.json beside this file, half a minute on one core.
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np
from scipy import optimize

from llm_jax.scaling import fits, laws, runs, sums

HERE = os.path.dirname(__file__)
GOPHER = 5.76e23
DELTA = 1e-3
# names, N and D of well-known models whose loss the law says
MODELS = {'Gopher': (280e9, 300e9), 'Chinchilla': (70e9, 1.4e12), 'LLaMA-65B': (65.2e9, 1.4e12)}


def refit(points: runs.Runs, *, trials: int = 4000, steps: int = 21) -> dict[str, Any]:
  """All of results.json: numbers about the fit, none of the points."""
  n, d, y = points.parameters, points.tokens, points.loss
  start = time.perf_counter()
  fit = fits.parametric(n, d, y, delta=DELTA)
  seconds = time.perf_counter() - start
  draws = fits.parametric_draws(fit.law, n, d, y, trials=trials, delta=DELTA)
  residuals = np.log(laws.chinchilla(fit.law, n, d)) - np.log(y)
  return dict(
    runs=len(y),
    fit=fit.law._asdict(),
    objective=fit.objective,
    agreeing=fit.agreeing,
    seconds=round(seconds, 2),
    trials=trials,
    interval=_intervals(draws, laws.Chinchilla._fields),
    objectives_of={
      name: float(_objective(law, n, d, y))
      for name, law in dict(HOFFMANN=laws.HOFFMANN, BESIROGLU=laws.BESIROGLU).items()
    },
    frontier=_frontier(fit.law, draws),
    at_gopher=_optimum(fit.law, draws),
    loss_of={name: float(laws.chinchilla(fit.law, *size)) for name, size in MODELS.items()},
    profile={name: profile(fit.law, name, n, d, y, steps=steps) for name in ('E', 'alpha', 'beta')},
    residuals=_residuals(residuals, points.flops),
  )


def _intervals(draws: np.ndarray, names: tuple) -> dict[str, list[float]]:
  return {
    name: [float(v) for v in ends] for name, ends in zip(names, fits.interval(draws).T, strict=True)
  }


def _objective(law: laws.Chinchilla, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> float:
  error = np.abs(np.log(laws.chinchilla(law, n, d)) - np.log(y))
  bent = np.minimum(error, DELTA)
  return (bent * (error - bent / 2)).sum()


def _frontier(law: laws.Chinchilla, draws: np.ndarray) -> dict[str, Any]:
  found = [laws.frontier(laws.Chinchilla(*draw)).parameters.exponent for draw in draws]
  best = laws.frontier(law)
  return dict(
    parameters=best.parameters._asdict(),
    tokens=best.tokens._asdict(),
    interval=_intervals(np.array(found)[:, None], ('a',))['a'],
  )


def _optimum(law: laws.Chinchilla, draws: np.ndarray) -> dict[str, Any]:
  best = laws.optimum(law, GOPHER)
  drawn = [laws.optimum(laws.Chinchilla(*draw), GOPHER) for draw in draws]
  values = np.array([(a.parameters, a.tokens, a.tokens / a.parameters) for a in drawn])
  names = ('parameters', 'tokens', 'tokens_per_parameter')
  point = best.parameters, best.tokens, best.tokens / best.parameters
  return dict(zip(names, point, strict=True)) | dict(
    flops=GOPHER, interval=_intervals(values, names)
  )


def profile(
  law: laws.Chinchilla, name: str, n: np.ndarray, d: np.ndarray, y: np.ndarray, *, steps: int
) -> list[list[float]]:
  """[value, lowest objective with this constant held there]: flat where the points do not tell it."""
  logs = np.log(n), np.log(d)
  middle = [x.mean() for x in logs]
  zero = np.zeros(len(n))
  one = zero + 1
  columns = np.stack(
    [
      np.stack([one, zero, zero, zero, zero], 1),
      np.stack([zero, one, zero, middle[0] - logs[0], zero], 1),
      np.stack([zero, zero, one, zero, middle[1] - logs[1]], 1),
    ]
  ).reshape(-1, 5)
  best = np.array([
    np.log(law.E), np.log(law.A) - law.alpha * middle[0], np.log(law.B) - law.beta * middle[1],
    law.alpha, law.beta,
  ])  # fmt: skip
  place = law._fields.index(name)
  value, found = getattr(law, name), []
  for side in (np.linspace(1, 0.85, steps // 2 + 1), np.linspace(1, 1.15, steps // 2 + 1)[1:]):
    at = best.copy()
    for factor in side:
      at[place] = np.log(value * factor) if name == 'E' else value * factor
      bounds = [(at[i], at[i]) if i == place else (None, None) for i in range(5)]
      for _ in range(3):  # from where it stopped: the objective has corners
        done = optimize.minimize(
          lambda t: tuple(1e3 * v for v in sums.objective(columns, np.log(y), DELTA, t)),
          at,
          jac=True,
          method='L-BFGS-B',
          bounds=bounds,
          options=dict(maxiter=2000, ftol=1e-15, gtol=1e-12),
        )
        at = done.x
      found.append([float(value * factor), float(done.fun / 1e3)])
  return sorted(found)


def _residuals(residuals: np.ndarray, flops: np.ndarray) -> dict[str, Any]:
  """How log prediction - log loss is distributed, over all runs and by quarter of the compute."""
  order = np.array_split(residuals[np.argsort(flops)], 4)
  quantiles = (1, 5, 25, 50, 75, 95, 99)
  return dict(
    deviation=float(residuals.std()),
    quantiles=dict(
      zip(map(str, quantiles), np.percentile(residuals, quantiles).tolist(), strict=True)
    ),
    mean_by_quarter_of_compute=[float(q.mean()) for q in order],
    deviation_by_quarter_of_compute=[float(q.std()) for q in order],
  )


def main() -> None:
  """Fits and writes."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', default=os.path.join(HERE, 'results.json'), help='the result')
  parser.add_argument('--trials', type=int, default=4000, help='samples of the bootstrap')
  told = parser.parse_args()
  found = refit(runs.chinchilla(), trials=told.trials)
  with open(told.out, 'w', encoding='utf-8') as f:
    json.dump(found, f, indent=1)
    f.write('\n')
  print(
    json.dumps({key: found[key] for key in ('fit', 'objective', 'seconds', 'at_gopher')}, indent=1)
  )


if __name__ == '__main__':
  main()
