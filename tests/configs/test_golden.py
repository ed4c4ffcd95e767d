"""The losses of the first steps of the main recipes, scaled down, against those stored in golden.json.

They change only with a change of what a recipe computes. If that was meant, `make golden` stores the new ones, and the
commit says why.
"""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from llm_jax.core import config as config_lib
from llm_jax.core import mesh
from llm_jax.core.config import build
from llm_jax.train import loop, state, step
from tests.variants import variants

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORED = pathlib.Path(__file__).with_name('golden.json')
STEPS, SIZES = 20, 'steps=20,batch=4,length=64'
SMALL = {'model.embed': 48, 'model.layers': 2, 'model.block.ffn.hidden': 96}
ENCODER = {'model.encoder_layers': 2, 'model.encoder_block.ffn.hidden': 96}
T5 = {'source.batch': 4, 'source.encoder_length': 64, 'source.length': 32}
RECIPES = {
  'quickstart': (f'configs/quickstart.py:{SIZES}', SMALL),
  'lm': (f'configs/pretrain/lm.py:{SIZES}', SMALL),
  'prefix_lm': (f'configs/pretrain/prefix_lm.py:{SIZES}', SMALL),
  'span_corruption': (f'configs/pretrain/span_corruption.py:{SIZES}', SMALL | ENCODER),
  'ul2': (f'configs/pretrain/ul2.py:{SIZES}', SMALL),
  'ul2_encoder_decoder': (
    f'configs/pretrain/ul2.py:encoder_decoder,{SIZES}',
    SMALL | ENCODER,
  ),
  't5_small': ('configs/pretrain/t5_small.py:shakespeare', SMALL | ENCODER | T5),
}


def losses(path, changes):
  """The loss of each of the first steps on one device, as `cli/train.py` runs them."""
  path, _, text = path.partition(':')
  cfg = config_lib.read(str(ROOT / path), text)
  for key, value in changes.items():
    config_lib.override(cfg, key, value)
  with jax.set_mesh(mesh.make(data=1)), mesh.rules(**cfg.axes):
    model = build(cfg.model)()
    source = build(cfg.source)(model)
    objective = functools.partial(build(cfg.objective), model)
    tx = build(cfg.optimizer)(model.axes)
    layout = state.layout(model, tx)
    update = step.make(objective, tx, layout, microbatches=cfg.microbatches)
    first = state.create(model, tx, cfg.seed, layout=layout)
    found = []
    loop.train(
      first,
      source,
      update,
      steps=STEPS,
      key=jax.random.key(cfg.seed),
      hooks=[lambda step, state, metrics: found.append(metrics['loss']) if step else None],
    )
    source.close()
  return [float(x) for x in found]


@pytest.mark.parametrize('name', variants(RECIPES, set(RECIPES) - {'t5_small'}))
def test_losses_are_those_stored(name):
  found = losses(*RECIPES[name])
  stored = json.loads(STORED.read_text()) if STORED.exists() else {}
  if 'UPDATE' in os.environ:  # make golden
    STORED.write_text(
      json.dumps(stored | {name: [round(x, 5) for x in found]}, indent=1, sort_keys=True) + '\n'
    )
    return
  # the first is one forward pass; after that differences in rounding between processors grow
  np.testing.assert_allclose(found[0], stored[name][0], rtol=1e-5)
  np.testing.assert_allclose(found, stored[name], rtol=2e-4)
