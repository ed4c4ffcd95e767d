"""The dial: formulas by hand, monotone in the depth, the parameters of the model it describes, a run that learns."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.cli import main
from llm_jax.core import config as config_lib
from llm_jax.core import mesh
from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.scaling import dial
from llm_jax.train import loop, state, step

FILE = str(pathlib.Path(__file__).resolve().parents[2] / 'configs/scaling/dial.py')


def test_every_number_by_hand():
  """Depth 12 is GPT-3's small shape: 768 wide, 12 heads; the rest on paper."""
  d = dial.turn(12, vocab=32_128, length=1024)
  assert (d.embed, d.heads, d.hidden) == (768, 12, 2048)  # 8/3 of 768 is 2048
  layers = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768)
  assert d.parameters == layers + 768 + 32_128 * 768 and d.tokens == 20 * d.parameters
  assert d.flops == 6 * (layers + 768) * d.tokens
  tokens = 0.2920 * d.flops**0.3271
  assert d.batch % 8 == 0 and abs(d.batch * 1024 - tokens) <= 4 * 1024
  assert 0 <= d.steps * d.batch * 1024 - d.tokens < d.batch * 1024
  np.testing.assert_allclose(d.peak, 0.3118 * d.flops**-0.125)
  assert d.warmup == d.steps // 200


def test_deepseek_s_own_budget():
  """Its 7B model read 2T tokens in batches of 2304 sequences of 4,096 at 4.2e-4 (arXiv:2401.02954, table 2)."""
  flops = 6 * 6.4e9 * 2e12  # without the embeddings
  assert abs(np.log2(dial.batch(flops, length=4096, multiple=8) / 2304)) < 0.5
  assert abs(np.log2(dial.peak(flops) / 4.2e-4)) < 0.5


def test_monotone_in_the_depth():
  turned = [dial.turn(n, vocab=1024, length=256) for n in range(1, 41)]
  for name in (
    'embed',
    'heads',
    'hidden',
    'parameters',
    'tokens',
    'flops',
    'batch',
    'steps',
    'warmup',
  ):
    values = [getattr(d, name) for d in turned]
    assert values == sorted(values), name
  peaks = [d.peak for d in turned]
  assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize('depth', [1, 4, 8])
def test_the_card_has_these_parameters(depth):
  d = dial.turn(depth, vocab=1024, length=256)
  c = config_lib.read(FILE, f'depth={depth}')
  card = build(c.model)().card
  assert count.total(card) == d.parameters
  assert (card.embed, card.layers, card.heads, card.ffn) == (d.embed, depth, d.heads, d.hidden)
  assert (c.source.batch, c.steps, c.optimizer.schedule.peak) == (d.batch, d.steps, d.peak)


def test_other_ratios():
  one, two = (dial.turn(4, vocab=1024, length=256, ratio=r) for r in (20.0, 200.0))
  assert two.tokens == 10 * one.tokens and two.batch > one.batch
  assert dial.width(3, aspect=50, head_dim=64) == 192
  with pytest.raises(UserError, match='depth=0 of the dial must be positive'):
    dial.turn(0, vocab=1024, length=256)


@pytest.mark.slow
def test_depth_4_trains(monkeypatch):
  """The config as the command line builds it, the sequences few and short; initial values from numpy."""
  draw = np.random.default_rng(0).standard_normal
  monkeypatch.setattr(jax.random, 'normal', lambda key, shape: jnp.asarray(draw(shape, np.float32)))
  c = config_lib.read(FILE, 'depth=4')
  with jax.set_mesh(mesh.make(data=1)), mesh.rules(**c.axes):
    model = build(c.model)()
    objective = functools.partial(build(c.objective), model)
    tx = build(c.optimizer)(model.axes)
    update = step.make(objective, tx)
    rng, found = np.random.default_rng(0), []
    ids = rng.integers(1024, size=(2, 17)).astype(np.int32)
    params = model.init(jax.random.key(0))
    loop.train(
      state.State(jnp.zeros((), jnp.int32), params, tx.init(params)),
      lambda _: dict(inputs=ids[:, :-1], targets=ids[:, 1:]),
      update,
      steps=4,
      key=jax.random.key(0),
      hooks=[lambda n, s, metrics: found.append(float(metrics['loss'])) if n else None],
    )
  assert abs(found[0] - np.log(1024)) < 0.5 and found[-1] < found[0] - 0.5


def test_describe_prints_it(capsys):
  assert main.main(['describe', f'--config={FILE}:depth=8']) == 0
  out, d = capsys.readouterr().out, dial.turn(8, vocab=1024, length=256)
  told = out.partition('\ntraining ')[2]
  for text in (
    f'{d.steps:,}', f'{d.batch:,}  sequences, {d.batch * 256:,} tokens', '20 per parameter', f'{d.peak:.3g}',
  ):  # fmt: skip
    assert text in told, (text, out)
  assert f'{d.parameters:,}' in out and 'attention of 8 heads of 64' in out
