"""muP's experiment: the coordinate checks in width and depth, small, and what is shipped says what the README says."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mup import models, report
from llm_jax.core import mesh

SHIPPED = pathlib.Path(report.__file__).with_name('results.json')
VOCAB, STEPS = 32, 5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """One device, and initial values from numpy, whose generator compiles nothing."""
  draw = lambda key, shape: jnp.asarray(
    np.random.default_rng(len(shape) + shape[-1]).normal(size=shape), jnp.float32
  )
  monkeypatch.setattr(jax.random, 'normal', draw)
  with jax.set_mesh(mesh.make(data=1)):
    yield


def batches():
  """Sequences in which every id is followed by one and the same other id, four times out of five."""
  rng = np.random.default_rng(0)
  ids, follows = [rng.integers(VOCAB, size=(STEPS, 4))], rng.permutation(VOCAB)
  for _ in range(16):
    other = rng.integers(VOCAB, size=(STEPS, 4))
    ids.append(np.where(rng.random((STEPS, 4)) < 0.2, other, follows[ids[-1]]))
  x = jnp.asarray(np.stack(ids, -1), jnp.int32)
  return dict(inputs=x[..., :-1], targets=x[..., 1:])


def exponents(make, sizes, of, rate=2.0**-6):
  """The exponents of the movement in the size; of: size -> (width, layers)."""
  rows = []
  for width, layers in map(of, sizes):
    made = models.build(make(layers), width, layers, VOCAB, STEPS)
    params = made.model.init(jax.random.key(0))
    found = models.moved(made, rate, params, batches(), layers)
    rows.append(dict(last=found[f'layer {layers}'], logits=found['logits']))
  return models.slopes(sizes, rows)


@pytest.mark.slow
def test_coordinates_move_alike_at_four_widths():
  sizes, base = (32, 64, 128, 256), models.Base()
  found = {
    name: exponents(lambda n, make=make: make(base, n), sizes, lambda w: (w, 2))
    for name, make in models.PARAMETRISATIONS.items()
  }
  check(found['muP'], found['standard'])


def check(transferred, standard):
  """Exponents in the width: of muP near 0; logits may fall, because those it begins with fade as 1/sqrt(width)."""
  assert abs(transferred['last']) < 0.2 and standard['last'] > 0.5, (transferred, standard)
  assert -0.45 < transferred['logits'] < 0.1, transferred


@pytest.mark.slow
def test_coordinates_move_alike_at_four_depths():
  """One rate for all depths; without the multiplier what a block adds is added ever more often."""
  sizes, base = (2, 4, 8, 16), models.Base(width=32)
  of = lambda n: (32, n)
  plain = exponents(lambda n: models.standard(base, n), sizes, of)
  for alpha in (0.5, 1.0):
    scaled = base._replace(alpha=alpha)
    found = exponents(lambda n, b=scaled: models.transferred(b, n), sizes, of)
    assert abs(found['last']) < 0.2 < plain['last'] - 0.1, (alpha, found, plain)


def test_the_shipped_optima_are_those_of_its_runs_and_hold():
  """muP's best rate moves by one step of the grid at most from 64 to 512 wide, the standard one's by two or more."""
  told = json.loads(SHIPPED.read_text())
  assert report.optima(told) == told['optima']
  moves = {name: found['moves']['rate'] for name, found in told['optima'].items()}
  assert told['settings']['widths'][::3] == [64, 512]
  assert abs(moves['muP']) <= 1 and moves['standard'] <= -2
  wide, standard = (told['coordinates'][f'width, {name}']['slopes'] for name in ('muP', 'standard'))
  check(*(dict(last=s['layer 2'], logits=s['logits']) for s in (wide, standard)))
  readme = SHIPPED.with_name('README.md').read_text()
  assert report.tables(told) in readme


def test_an_optimum_between_rates_is_a_parabola_s():
  rates = np.arange(-8.0, -2)
  assert report.optimum(rates, (rates + 4.8) ** 2) == pytest.approx((-5, -4.8))
  assert report.optimum(rates, rates) == (-8, -8)
