"""Fits of published runs against what their papers, or others, found in them."""

import hashlib
import json
import os
import pathlib
import re
import unittest

import numpy as np
import pytest
from scipy import optimize

from llm_jax.core.errors import UserError
from llm_jax.data import records
from llm_jax.scaling import fits, laws, nonlinear, runs

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(records.bundled('scaling_laws'))
REFIT = ROOT / 'experiments/chinchilla_refit/results.json'
# the digitised points have no licence and are not bundled: beside the repository, or where the variable says
PLACES = [os.environ.get(runs.PLACE, ''), str(ROOT.parent / 'shared/data/scaling_laws')]
POINTS = [
  path for place in PLACES if os.path.exists(path := f'{place}/epoch_chinchilla_svg_extracted.csv')
]


def test_the_bundled_files_are_those_of_the_list():
  listed = re.findall(
    r'^\| (\S+) \| (\d+) \| (\w{64}) \|', (FOLDER / 'SOURCE.md').read_text(), re.M
  )
  assert {name for name, _, _ in listed} == {p.name for p in FOLDER.glob('*.gz')}
  for name, size, digest in listed:
    data = (FOLDER / name).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size), digest)
  assert sum(int(size) for _, size, _ in listed) < 130_000


def test_chinchilla_refit():
  """The exact minimum: objective 0.001018274, below the 0.00101864 of the refit's authors."""
  if not POINTS:
    raise unittest.SkipTest(f'no digitised points here: name their folder with {runs.PLACE}')
  points = runs.chinchilla(POINTS[0])
  assert len(points.loss) == 240
  fit = fits.parametric(points.parameters, points.tokens, points.loss, delta=1e-3)
  assert fit.objective <= 0.0010183
  assert fit.law == pytest.approx((1.8172, 477.8, 2143, 0.3473, 0.3672), rel=3e-4)
  assert fit.agreeing == 8
  shipped = json.loads(REFIT.read_text())
  assert fit.law._asdict() == pytest.approx(shipped['fit'], rel=1e-5)


def test_the_shipped_refit():
  """What our fit of the digitised points says agrees with its authors, and not with the rounded constants."""
  found = json.loads(REFIT.read_text())
  law = laws.Chinchilla(**found['fit'])
  assert found['runs'] == 240
  assert found['objective'] <= 0.0010183 < found['objectives_of']['BESIROGLU'] < 0.00103
  assert found['objectives_of']['HOFFMANN'] > 4 * found['objective']
  # Besiroglu et al.: standard errors 0.03, 124.58, 1293.23, 0.02, 0.02; 80 % interval of a: (0.49, 0.54) or so
  errors = dict(E=0.03, A=124.58, B=1293.23, alpha=0.02, beta=0.02)
  for name, (low, high) in found['interval'].items():
    assert low < getattr(laws.BESIROGLU, name) < high
    assert (high - low) / (2 * 1.96) == pytest.approx(errors[name], rel=0.4), name
  low, high = found['frontier']['interval']
  assert low < 0.5 < high
  assert not low < 0.4516 < high or low > 0.44
  best = laws.optimum(law, 5.76e23)
  assert found['at_gopher']['parameters'] == pytest.approx(best.parameters)
  assert 15 < found['at_gopher']['tokens_per_parameter'] < 21
  low, high = found['at_gopher']['interval']['tokens_per_parameter']
  assert low < 20 < high < 93  # what the rounded constants would have
  for name, points in found['profile'].items():
    values = np.array(points)
    assert values[:, 1].min() == pytest.approx(found['objective'], rel=1e-9)
    assert values[np.argmin(values[:, 1]), 0] == pytest.approx(found['fit'][name])
    assert np.all(np.diff(values[: len(values) // 2 + 1, 1]) < 0)


def test_points_that_are_not_there_say_where_to_get_them(tmp_path):
  with pytest.raises(UserError, match='epoch-research/analyzing-chinchilla'):
    runs.chinchilla(str(tmp_path / 'none.csv'))


# Relative errors in percent on C4 by (parameters, tokens per parameter): figure 5 of Gadre et al.
FIGURE_5 = {
  'c4': {
    0.011: [1.1, 0.0, 0.2, 0.7, 0.9, 0.0, 0.6],
    0.079: [2.6, 0.3, 0.2, 0.4, 0.1, 0.7, 0.8],
    0.154: [1.5, 0.5, 1.1, 1.1, 3.3, 2.8, 0.6],
    0.411: [0.5, 0.2, 0.0, 2.8, 0.2, 2.0],
    1.4: {20: 0.8, 80: 1.5},
    6.9: {20: 4.3},
  },
  'redpajama': {
    0.011: [0.3, 0.0, 0.3, 1.7, 1.1, 0.0, 1.0],
    0.079: [2.2, 0.3, 0.2, 0.7, 1.4, 2.1, 2.3],
    0.154: [0.8, 0.5, 0.6, 0.0, 0.4, 0.4, 0.3],
    0.411: [0.4, 0.2, 0.1, 0.3, 0.3, 1.4, 1.1],
    1.4: {20: 0.1, 640: 0.7},
    6.9: {20: 0.7},
  },
  'refinedweb': {
    0.011: [0.9, 0.0, 0.9, 1.9, 1.0, 0.0, 1.1],
    0.079: [2.4, 0.1, 0.0, 0.5, 1.2, 2.0, 0.9],
    0.154: [0.9, 0.2, 0.6, 2.8, 2.2, 0.8, 0.9],
    0.411: [0.2, 0.1, 0.5, 0.8, 0.9, 0.9, 0.3],
    1.4: {20: 0.6, 320: 0.0},
    6.9: {20: 1.6},
  },
}
MULTIPLES = (10, 20, 40, 80, 160, 320, 640)


def small(data):
  """The five runs of the paper's table 1: four sizes at 20 tokens per parameter, the smallest at 320 too."""
  ratio = np.round(data.tokens / data.parameters)
  return ((ratio == 20) & (data.parameters < 1e9)) | ((ratio == 320) & (data.parameters < 2e7))


@pytest.mark.parametrize('corpus', FIGURE_5)
def test_overtraining_is_predicted_as_in_the_paper(corpus):
  """Five runs of 11M to 411M parameters predict the loss of 1.4B on 900B tokens; every error of figure 5 to 0.6 %."""
  data = runs.overtraining(corpus)
  known = small(data)
  assert known.sum() == 5
  law = fits.tied(*(x[known] for x in (data.parameters, data.tokens, data.loss))).law
  errors = 100 * np.abs(laws.chinchilla(law, data.parameters, data.tokens) / data.loss - 1)
  seen = 0
  for size, row in FIGURE_5[corpus].items():
    row = row if isinstance(row, dict) else dict(zip(MULTIPLES, row))
    for multiple, published in row.items():
      near = np.abs(data.parameters / 1e9 / size - 1) < 0.06
      at = near & (np.round(data.tokens / data.parameters) == multiple)
      assert at.sum() == 1
      assert errors[at][0] == pytest.approx(published, abs=0.6), (size, multiple)
      seen += 1
  assert seen == sum(len(row) for row in FIGURE_5[corpus].values()) >= 30


def test_the_papers_own_fit_of_overtraining():
  """curve_fit of the loss itself, as the paper does, on its five runs: 1.4B parameters and 900B tokens to 0.7 %."""
  data = runs.overtraining('redpajama')
  known = small(data)

  def law(x, e, a, b, eta):
    n, d = x
    m, c = d / n, 6 * n * d
    return e + (a * m**eta + b * m**-eta) * c**-eta

  x = np.stack([data.parameters, data.tokens])
  want, _ = optimize.curve_fit(
    law, x[:, known], data.loss[known], p0=(1.8, 200, 400, 0.13), maxfev=20000
  )
  ours = fits.tied(*(v[known] for v in (*x, data.loss)), delta=np.inf).law
  both = law(x, *want), laws.chinchilla(ours, *x)
  assert np.allclose(*both, rtol=0.006, atol=0)  # ours weighs relative errors, theirs absolute ones
  large = np.argmax(data.parameters * data.tokens)
  assert (data.parameters[large] / 1e9, data.tokens[large] / 1e9) == pytest.approx(
    (1.4, 900), rel=0.03
  )
  assert abs(both[0][large] / data.loss[large] - 1) == pytest.approx(0.007, abs=0.002)


@pytest.mark.parametrize('corpus', FIGURE_5)
def test_the_exponent_does_not_depend_on_overtraining(corpus):
  """Lines of the reducible loss against compute, one per number of tokens per parameter, are parallel (figure 2)."""
  data = runs.overtraining(corpus)
  ratio = np.round(data.tokens / data.parameters)
  fit = (ratio >= 10) & (data.parameters < 1e9)
  law = fits.tied(*(x[fit] for x in (data.parameters, data.tokens, data.loss))).law
  slopes = []
  for multiple in (20, 40, 80, 160):
    at = fit & (ratio == multiple)
    slopes.append(fits.power(data.flops[at], data.loss[at] - law.E).law.exponent)
  assert np.mean(slopes) == pytest.approx(-law.alpha / 2, abs=0.01)
  assert np.ptp(slopes) < 0.03
  assert 0.10 < law.alpha / 2 < 0.15


def test_the_assignment_of_cs336():
  """The lowest run of each budget, fitted as the assignment asks: the published solution, 70,054,233,905 parameters at
  1e23 FLOP. The losses come from a law, which approach 3 recovers: parabolas are 1 % from its optimum, and taking the
  lowest run as the optimum is 24 % off, because it can only be one of the eight sizes that were trained."""
  data = runs.isoflops()
  budgets = np.unique(data.flops)
  at = [np.flatnonzero(data.flops == c)[np.argmin(data.loss[data.flops == c])] for c in budgets]
  lowest = fits.power(budgets, data.parameters[at]).law
  assert lowest == pytest.approx((1.163, 0.468683), rel=1e-3)
  assert round(float(laws.power(lowest, 1e23))) == 70_054_233_905
  assert round(float(laws.power(lowest, 1e24))) == 206_118_539_185
  tokens = fits.power(budgets, data.tokens[at]).law
  assert laws.power(tokens, 1e23) == pytest.approx(237_910_911_842)

  truth = fits.parametric(data.parameters, data.tokens, data.loss)
  assert truth.objective < 1e-15
  assert truth.law == pytest.approx((2.69, 1606.4, 3210.7, 0.34, 0.36), rel=1e-6)
  _, frontier = fits.isoflop(data.flops, data.parameters, data.tokens, data.loss)
  for c in (1e23, 1e24):
    best = laws.optimum(truth.law, c)
    assert laws.power(frontier.parameters, c) == pytest.approx(best.parameters, rel=0.02)
    assert laws.power(frontier.tokens, c) == pytest.approx(best.tokens, rel=0.02)
    assert laws.power(lowest, c) < 0.8 * best.parameters


def test_the_runs_of_kyo_takano():
  """234 real runs: a and b are halves, as Chinchilla says, and the largest 23 are 1 % from what the others predict."""
  data = runs.kyo_takano()
  assert len(data.loss) == 234
  assert np.allclose(data.flops, 6 * data.parameters * data.tokens, rtol=0.02)
  fit = fits.parametric(data.parameters, data.tokens, data.loss)
  residuals = np.log(laws.chinchilla(fit.law, data.parameters, data.tokens) / data.loss)
  assert residuals.std() < 0.006
  draws = fits.parametric_draws(fit.law, data.parameters, data.tokens, data.loss, trials=100)
  exponents = [laws.frontier(laws.Chinchilla(*draw)).parameters.exponent for draw in draws]
  low, high = fits.interval(exponents)
  assert low < 0.5 < high < low + 0.1
  known = data.flops < 1e21
  errors = fits.extrapolation(
    lambda n, d, y: fits.parametric(n, d, y).law,
    laws.chinchilla,
    (data.parameters, data.tokens),
    data.loss,
    known,
  )
  assert len(errors) == 23
  assert np.abs(errors).mean() < 0.012


def ladder(task):
  """(predicted, measured accuracy) of the ladder's largest run, 3B-10xC, from the sizes up to 1B."""
  data = runs.olmo_ladder(task)
  known = data.parameters < 3e9
  largest = np.argmax(data.flops)
  assert data.names[largest] == '3B-10xC'
  law = nonlinear.two_step(
    *(
      x[known] for x in (data.parameters, data.tokens, data.scores['bits'], data.scores['accuracy'])
    )
  )
  guess = nonlinear.predict_task(law, data.parameters[largest], data.tokens[largest])
  return float(guess), data.scores['accuracy'][largest]


def test_two_steps_predict_the_top_of_the_olmo_ladder():
  """With 6 times the compute of any run fitted. The paper: within 2 points on these four tasks, for 7B and 13B."""
  errors = {
    task: 100 * np.subtract(*ladder(task)) for task in ('mmlu', 'hellaswag', 'piqa', 'socialiqa')
  }
  assert np.mean(np.abs(list(errors.values()))) < 2, errors
  assert max(np.abs(list(errors.values()))) < 3, errors
  guess, truth = ladder(
    'arc_challenge'
  )  # the paper finds it hard too: 6.9 points on its four other tasks
  assert abs(guess - truth) < 0.09


def test_the_olmo_ladder_is_as_its_paper_says():
  data = runs.olmo_ladder()
  assert len(data.names) == 30
  multiple = np.array([float(name.split('-')[1].removesuffix('xC')) for name in data.names])
  assert np.allclose(data.tokens, 20 * data.parameters * multiple, rtol=3e-3)
  per_token = {n: c / d for n, c, d in zip(data.parameters, data.flops, data.tokens)}
  assert per_token[190_354_176] == pytest.approx(1_903_391_232)  # the repository's table
  assert per_token[3_169_537_280] == pytest.approx(22_970_355_200)
  known = data.parameters < 3e9
  errors = fits.extrapolation(
    lambda n, d, y: fits.parametric(n, d, y).law,
    laws.chinchilla,
    (data.parameters, data.tokens),
    data.scores['c4'],
    known,
  )
  assert np.abs(errors).mean() < 0.012


@pytest.mark.parametrize('deduplicated', [True, False])
def test_pythia_on_lambada(deduplicated):
  data = runs.pythia(deduplicated=deduplicated)
  last = data.tokens == data.tokens.max()
  order = np.argsort(data.parameters[last])
  n, loss, accuracy = (
    x[last][order] for x in (data.parameters, data.scores['loss'], data.scores['accuracy'])
  )
  assert data.tokens.max() == pytest.approx(300e9, rel=1e-3)
  assert np.all(np.diff(accuracy) > 0)
  # the loss of the 12B model from those up to 6.9B: to 5 % with an irreducible part, 15 % off without
  assert laws.offset(fits.offset(n[:-1], loss[:-1]).law, n[-1]) == pytest.approx(loss[-1], rel=0.05)
  assert laws.power(fits.power(n[:-1], loss[:-1]).law, n[-1]) < 0.85 * loss[-1]
  # one curve from loss to accuracy for all sizes and checkpoints after the first 2B tokens
  late = data.tokens > 2e9
  curve = nonlinear.sigmoid(data.scores['loss'][late], data.scores['accuracy'][late], low=0.0)
  rest = laws.accuracy(curve, data.scores['loss'][late]) - data.scores['accuracy'][late]
  assert rest.std() < 0.02
  assert np.abs(rest).max() < 0.05


def test_pythias_published_scores():
  """Pythia's own table of the models trained on the Pile: LAMBADA by size; and a task that size does not help."""
  data = runs.pythia(deduplicated=False)
  last = data.tokens == data.tokens.max()
  found = dict(zip(data.names[last], data.scores['accuracy'][last].round(3)))
  assert found == {
    '70m': 0.185, '160m': 0.328, '410m': 0.516, '1.4b': 0.616, '2.8b': 0.647, '6.9b': 0.673, '12b': 0.705,
  }  # fmt: skip
  assert np.all(data.scores['accuracy'][data.tokens == 0] == 0)
  winograd = runs.pythia('wsc', deduplicated=False)
  late = winograd.tokens == winograd.tokens.max()
  assert winograd.scores['accuracy'][late].max() < 0.58
  with pytest.raises(UserError, match="did you mean 'arc_easy'"):
    runs.pythia('arc_eazy')


def test_a_capability_is_a_sigmoid_of_compute():
  """123 base models of many families: log compute alone explains 73 % of MMLU, and what is left is families."""
  data = runs.observations()
  assert len(data.names) == 123
  score = data.scores['MMLU']
  curve = nonlinear.sigmoid(-np.log10(data.flops), score, low=0.25)
  rest = score - laws.accuracy(curve, -np.log10(data.flops))
  assert 1 - rest.var() / score.var() == pytest.approx(0.726, abs=0.005)
  assert 22.5 < -curve.middle < 23.8
  families = [rest[data.names == name] for name in set(data.names)]
  within = np.concatenate([f - f.mean() for f in families if len(f) > 1])
  assert within.var() < 0.7 * rest.var()


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: runs.overtraining('redpyjama'), "did you mean 'redpajama'"),
    (lambda: runs.overtraining('c4', 'wikipedia'), 'known: c4_val'),
    (lambda: runs.olmo_ladder('helaswag'), "did you mean 'hellaswag'"),
  ],
)
def test_unknown_names(call, message):
  with pytest.raises(UserError, match=message):
    call()
