"""What experiments/norm_positions calls stable, on losses of our own; its README is of its results."""

import gzip
import json
import pathlib

import numpy as np

from experiments.norm_positions import report
from llm_jax.data import records

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')
FALLS = np.linspace(5, 3, 40)


def test_a_spike_is_a_rise_of_the_mean_of_five_above_the_lowest_before():
  assert report.spike(FALLS) == 0
  once = FALLS.copy()
  once[20:25] += (
    1  # the window on it and the window before it: 1 higher, and a fall of five steps lower
  )
  assert abs(report.spike(once) - (1 - 5 * (FALLS[0] - FALLS[1]))) < 1e-9
  noise = FALLS + np.where(np.arange(40) == 20, 1.0, 0.0)  # of one batch
  assert report.spike(noise) < 0.2
  assert report.spike(np.append(FALLS, np.nan)) == np.inf


def test_stable_is_finite_below_the_start_and_without_a_spike():
  assert report.stable(FALLS)
  assert not report.stable(FALLS[::-1]) and not report.stable(np.append(FALLS, np.inf))
  assert not report.stable(np.full(40, 5.0))
  recovered = np.concatenate([FALLS, FALLS])
  assert recovered[-1] < recovered[0] and not report.stable(recovered)


def test_the_largest_stable_rate_has_only_stable_ones_below_it():
  good, bad = FALLS.tolist(), FALLS[::-1].tolist()
  one = dict(rates=[-9, -8, -7, -6], losses=[[good, good, bad, good]])
  assert report.largest(one) == -8
  assert report.largest(dict(one, losses=[[good] * 4, [good, bad, good, good]])) == -9
  assert report.largest(dict(one, losses=[[bad, good, good, good]])) is None
  assert report.largest(dict(one, losses=[[good] * 3 + [[5.0, None] * 20]])) == -7


def test_a_rate_at_which_nothing_but_frequencies_is_learnt_does_not_count():
  learnt, stuck = np.linspace(5, 3, 40).tolist(), np.linspace(5, 3.4, 40).tolist()
  one = dict(rates=[-9, -8, -7], losses=[[learnt, learnt, stuck]])
  assert report.largest(one) == -7 and report.learning(one) == -8
  assert report.learning(dict(one, losses=[[stuck] * 3])) is None
  with gzip.open(records.bundled('tinyshakespeare/input.txt.gz')) as f:
    share = np.bincount(np.frombuffer(f.read(), np.uint8)) / 1_115_394
  entropy = -(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum()
  assert abs(entropy - report.FREQUENCIES) < 1e-3


def test_the_shipped_table_is_of_its_results():
  runs = json.loads(SHIPPED.read_text())
  assert {one['name'] for one in runs} == set(report.NAMES)
  assert all(report.largest(one) == one['largest'] for one in runs)
  assert report.table(runs) in SHIPPED.with_name('README.md').read_text()
