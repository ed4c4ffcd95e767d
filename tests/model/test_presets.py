"""Published models: every row builds, and has the published number of parameters to the last digit.

The figures that say `transformers` are those of its model classes with the published configs, made without memory:

    with torch.device('meta'):
      model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(num_hidden_layers=44, ...))
    sum(p.numel() for p in model.parameters())
"""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.interop import huggingface
from llm_jax.model import count, presets

REFERENCE = pathlib.Path(__file__).resolve().parents[1] / 'interop/reference'
# The survey's table 5 (arXiv:2303.18223): layers, heads, d_model, maximum context (0: none printed)
TABLE_5 = dict(
  gpt3_175b=(96, 96, 12288, 2048),
  pangu_alpha_200b=(64, 128, 16384, 1024),
  opt_175b=(96, 96, 12288, 2048),
  palm_540b=(118, 48, 18432, 2048),
  bloom_176b=(70, 112, 14336, 2048),
  mt_nlg_530b=(105, 128, 20480, 2048),
  gopher_280b=(80, 128, 16384, 2048),
  chinchilla_70b=(80, 64, 8192, 0),
  galactica_120b=(96, 80, 10240, 2048),
  lamda_137b=(64, 128, 8192, 0),
  jurassic1_178b=(76, 96, 13824, 2048),
  llama_65b=(80, 64, 8192, 2048),
  glm_130b=(70, 96, 12288, 2048),
  t5_11b=(24, 128, 1024, 512),
)


@functools.cache
def made(name):
  """(the model, its parameters by path), nothing allocated."""
  model = build(presets.config(name))()
  return model, tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))


def left_out(name, flat):
  """Parameters that the published figure does not count."""
  pattern = presets.row(name).without
  return tree.count([x for path, x in flat.items() if pattern and re.search(pattern, path)])


def unit(text):
  """(number, what one unit of its last digit is): 350M -> (350e6, 1e7), 13.0B -> (13e9, 1e8)."""
  digits, power = re.fullmatch(r'([\d.,]+)([MBT]?)', text).groups()
  digits, power = digits.replace(',', ''), dict(M=1e6, B=1e9, T=1e12).get(power, 1)
  whole, _, rest = digits.partition('.')
  last = 10.0 ** -len(rest) if rest else 10.0 ** (len(whole) - len(whole.rstrip('0')))
  return float(digits) * power, last * power


@pytest.mark.parametrize('name', presets.ROWS)
def test_parameters_are_the_published_ones_to_the_last_digit(name):
  row, (model, flat) = presets.row(name), made(name)
  assert count.total(model.card) == tree.count(flat)
  assert tree.count(flat) - left_out(name, flat) + row.lacks == row.figure
  active = sum(count.active(model.card).values())
  if row.active_figure is None:
    assert active == count.total(model.card)
  else:  # what is left out of the figure is met by every token
    assert active - left_out(name, flat) == row.active_figure


@pytest.mark.parametrize('name', presets.ROWS)
def test_figures_agree_with_what_the_papers_print(name):
  row = presets.row(name)
  for printed, figure in ((row.printed, row.figure), (row.active, row.active_figure)):
    if printed:
      want, last = unit(printed)
      assert (abs(figure - want) < max(last, 1)) == row.closes
  assert row.closes or row.note
  assert not (row.without or row.lacks) or row.note


def test_units():
  assert unit('540.35B') == (540.35e9, pytest.approx(1e7))
  assert unit('350M') == (350e6, 1e7) and unit('13.0B') == (13e9, 1e8)
  assert unit('50,558,868,480') == (50_558_868_480, 10)


@pytest.mark.parametrize('name', TABLE_5)
def test_table_5_of_the_survey(name):
  sheet = presets.row(name).sheet
  layers, heads, embed, length = TABLE_5[name]
  assert (sheet['layers'], sheet['heads'], sheet['embed']) == (layers, heads, embed)
  assert length in (0, sheet['length'])
  card = made(name)[0].card
  assert (card.layers, card.heads, card.embed) == (layers, heads, embed)


# the folder of a tiny model whose logits are those of transformers (tests/interop/test_families.py)
PAIRS = {
  'gpt2': 'gpt2', 'opt_125m': 'opt', 'bloom_560m': 'bloom', 'pythia_70m': 'gpt_neox', 'gptj_6b': 'gptj',
  'codegen_16b': 'codegen', 'starcoder': 'gpt_bigcode', 'falcon_7b': 'falcon', 'llama_7b': 'llama',
  'gpt1': 'gpt1', 'bert_base': 'bert', 't5_small': 't5', 't5_v1.1_small': 't5_gated', 'mt5_small': 'mt5',
}  # fmt: skip
SIZES = 'vocab embed layers encoder_layers heads groups head_dim hidden length'.split()


def flattened(call, at=()):
  """{path of keys: value} of a config, without the sizes and the kernels, which compute the same."""
  if at and at[-1] == 'kernel':
    return {}
  if not isinstance(call, dict):
    return {} if at[-1] in SIZES else {at: call}
  return {path: x for key, v in call.items() for path, x in flattened(v, (*at, key)).items()}


@pytest.mark.parametrize('name', PAIRS)
def test_but_for_sizes_it_is_what_is_read_from_hugging_face(name):
  read = huggingface.config(str(REFERENCE / PAIRS[name]))
  ours, theirs = (
    flattened(json.loads(config_lib.to_json(c))) for c in (presets.config(name), read)
  )
  turned = [path for path in ours if path[-1] == 'fraction' and ours[path] != theirs.get(path)]
  for path in turned:  # how much of a head rotates depends on its size
    del ours[path], theirs[path]
  assert ours == theirs


TINY = dict(vocab=32, embed=32, layers=2, heads=4, head_dim=8, hidden=48, length=8)
FAMILIES = (
  'gpt1 gpt2 opt_125m bloom_560m pythia_70m gptj_6b falcon_7b falcon_40b galactica_120b bert_base '
  't5_small t5_v1.1_small ul2_20b palm_8b lamda_137b mistral_7b glm_130b glam_64b_64e gopher_44m '
  'mixtral_8x7b alphacode_41b alexatm_20b'
).split()


@pytest.mark.parametrize('name', FAMILIES)
def test_small_ones_run(name):
  sheet = presets.row(name).sheet
  more = dict(groups=2) if sheet.get('groups') else {}
  more |= dict(experts=4) if sheet.get('experts') else {}
  more |= dict(encoder_layers=2) if sheet.get('encoder_layers') else {}
  model = build(presets.config(name, **TINY, **more))()
  params = model.init(jax.random.key(0))
  batch = dict(inputs=jnp.arange(8)[None])
  if model.card.encoder_layers:
    batch['encoder/inputs'] = batch['inputs']
  logits = model.logits(params, model.hidden(params, batch).x)
  assert logits.shape == (1, 8, 32)
  uniform = -jax.nn.log_softmax(logits).mean()
  assert np.isfinite(uniform) and abs(uniform - math.log(32)) < 5


def test_names_and_changes():
  with pytest.raises(UserError, match=r"no published model 'palm540b'; did you mean 'palm_540b'\?"):
    presets.config('palm540b')
  with pytest.raises(UserError, match=r"takes no argument 'dtyp'; did you mean 'dtype'\?"):
    presets.config('gpt2', dtyp='bfloat16')
  assert presets.config('gpt2', vocab_multiple=64, layers=3).layers == 3
  survives = presets.config('t5_small')
  assert config_lib.from_json(config_lib.to_json(survives)) == survives
