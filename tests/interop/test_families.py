"""Hugging Face checkpoints: the numbers of transformers, from random weights; there and back; wrong input.

The oracle lies in `reference/` and was written by `make_reference.py`; LLM_JAX_REFERENCE names another folder of it
(`make parity` writes a fresh one).
"""

import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.core import mesh, tree
from llm_jax.core.config import build, use
from llm_jax.core.errors import UserError
from llm_jax.interop import families, huggingface
from llm_jax.model import classes, count, stack
from llm_jax.objectives import language
from tests.interop.make_reference import EPS, MODELS, RATE, STEPS
from tests.variants import variants

REFERENCE = pathlib.Path(
  os.environ.get('LLM_JAX_REFERENCE') or pathlib.Path(__file__).parent / 'reference'
)
TOLERANCE = 1e-4  # absolute, of logits, gradients and losses of order 1, the same for all families
EVERY = pytest.mark.parametrize('name', MODELS)
FEW = ('gpt2', 'llama', 't5')


@functools.cache
def loaded(name):
  """(model, parameters, what transformers computed, the batch)."""
  model, params = huggingface.load(str(REFERENCE / name))
  expected = load_file(REFERENCE / name / 'expected.safetensors')
  batch = dict(inputs=expected['ids'], targets=expected['targets'])
  if model.card.kind == 'encoder_decoder':
    batch['encoder/inputs'] = expected['encoder']
  batch |= {k: v for k, v in expected.items() if k == 'types'}
  return model, params, expected, {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}


@pytest.fixture
def close(record_property):
  """Holds errors to the tolerance and keeps the largest of a kind for the list at the end (conftest.py)."""
  largest: dict[str, float] = {}

  def check(name, kind, found, wanted, what=''):
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, err_msg=what)
    largest[kind] = max(largest.get(kind, 0.0), float(np.abs(found - wanted).max()))
    record_property('family', name)
    record_property('model_type', huggingface.settings(str(REFERENCE / name))['model_type'])
    record_property(kind, largest[kind])

  return check


@EVERY
def test_logits_are_those_of_transformers(name, close):
  model, params, expected, batch = loaded(name)
  close(name, 'logits', model.logits(params, model.hidden(params, batch).x), expected['logits'])


def test_what_bert_says_of_the_next_sentence_is_what_transformers_says(close):
  model, params, expected, batch = loaded('bert')
  found = classes.read(params, model.hidden(params, batch).x, jnp.zeros(2, jnp.int32))
  close('bert', 'logits', found, expected['classes'])


def test_names_of_older_checkpoints(tmp_path):
  """Those that Google published for TensorFlow: gamma and beta for the scale and bias of a norm."""
  folder, old = copied('bert', tmp_path), dict(weight='gamma', bias='beta')
  rename = lambda n: '.'.join(old.get(p, p) if 'LayerNorm' in n else p for p in n.split('.'))
  tensors = {rename(n): x for n, x in load_file(folder / 'model.safetensors').items()}
  assert 'bert.embeddings.LayerNorm.gamma' in tensors
  save_file(tensors, folder / 'model.safetensors')
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(str(folder))[1], loaded('bert')[1])


@pytest.mark.parametrize('name', variants(MODELS, FEW))  # `make parity` runs them all
def test_three_adamw_steps_are_those_of_transformers(name, close):
  """Gradients tensor by tensor, through the export; losses before each step and after the last."""
  model, params, expected, batch = loaded(name)
  family = families.family(huggingface.settings(str(REFERENCE / name)))

  @jax.jit
  def grad(params):
    def loss(params):
      out = language.next_token(model, params, batch, None)
      return out.sum / out.weight

    return jax.value_and_grad(loss)(params)

  tx = optax.adamw(RATE, eps=EPS, weight_decay=0.0)
  moments, losses = tx.init(params), []
  for step in range(STEPS + 1):
    loss, grads = grad(params)
    losses.append(loss)
    if step == 0:
      first = tree.flatten(jax.tree.map(np.asarray, grads))
      # what import adds to a tensor, its gradient does not have
      rows = tuple(row._replace(add=0.0) for row in family.rows)
      theirs = huggingface.to_theirs(family._replace(rows=rows), first)
      wanted = {k[9:]: v for k, v in expected.items() if k.startswith('gradient/')}
      assert wanted.keys() <= theirs.keys()
      for tensor, value in wanted.items():
        close(name, 'gradients', theirs[tensor], value, tensor)
    updates, moments = tx.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
  close(name, 'losses', np.array(losses), expected['losses'])


@EVERY
def test_there_and_back_is_the_identity(name, tmp_path):
  _, params, _, _ = loaded(name)
  folder = str(tmp_path / 'out')
  told = huggingface.settings(str(REFERENCE / name))
  huggingface.save(folder, params, told)
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[1], params)
  assert huggingface.settings(folder) == told
  theirs, again = (load_file(f / 'model.safetensors') for f in (REFERENCE / name, tmp_path / 'out'))
  for tensor, value in theirs.items():
    if tensor in again and 'embed_positions' not in tensor:  # OPT's first two rows are nobody's
      np.testing.assert_allclose(again[tensor], value, atol=1e-6, err_msg=tensor)


@EVERY
def test_parameters_are_counted(name):
  model, params, _, _ = loaded(name)
  assert count.total(model.card) == tree.count(params)


@pytest.mark.parametrize('name', variants(MODELS, FEW))
def test_unrolled_and_on_a_mesh(name):
  """The other runner, and the parameters split over tensor=2 x fsdp=2."""
  _, params, expected, batch = loaded(name)
  told = inner = huggingface.config(str(REFERENCE / name))
  while 'model' in inner:  # below the heads of an encoder
    inner = inner.model
  inner.runner = use(stack.loop)
  model = build(told)()
  rules = mesh.ZERO3
  if any(
    path.endswith('mixer/key') and x.shape[-2] == 1 for path, x in tree.flatten(params).items()
  ):
    rules = {kind: axes | dict(groups=()) for kind, axes in rules.items()}  # one group stays whole
  with jax.set_mesh(mesh.make(data=1, fsdp=2, tensor=2)), mesh.rules(**rules):
    placed = jax.device_put(params, mesh.shardings(model.axes, params))
    found = jax.jit(lambda p: model.logits(p, model.hidden(p, batch).x))(placed)
  np.testing.assert_allclose(found, expected['logits'], atol=1e-4)


def copied(name, tmp_path):
  folder = tmp_path / name
  shutil.copytree(REFERENCE / name, folder)
  return folder


def change(folder, **settings):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit(folder, change):
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def cut(path):
  path.write_bytes(path.read_bytes()[:-100])


Q = 'model.layers.1.self_attn.q_proj.weight'
WRONG = {
  'unknown architecture': (lambda f: change(f, model_type='lama'), "'lama'.*'llama'"),
  'unsupported setting': (
    lambda f: change(f, rope_parameters=dict(rope_type='yarm', factor=2.0)),
    "RoPE of type 'yarm'.*not supported.*'yarn'",
  ),
  'a window': (lambda f: change(f, sliding_window=8), 'sliding_window=8'),
  'a key is missing': (lambda f: change(f, vocab_size=None), "no 'vocab_size'"),
  'not JSON': (lambda f: (f / 'config.json').write_text('{'), 'config.json is not JSON'),
  'no config': (lambda f: (f / 'config.json').unlink(), 'no Hugging Face folder'),
  'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'neither model.safetensors nor'),
  'a broken index': (
    lambda f: (f / 'model.safetensors.index.json').write_text('{}'),
    'is no index of tensors',
  ),
  'cut off': (lambda f: cut(f / 'model.safetensors'), 'cannot be read'),
  'a tensor is missing': (lambda f: edit(f, lambda t: t.pop(Q)), Q.removeprefix('model.')),
  'a tensor too many': (
    lambda f: edit(f, lambda t: t.update({'model.extra': t[Q]})),
    "'model.extra'.*no place",
  ),
  'another shape': (
    lambda f: edit(f, lambda t: t.update({Q: t[Q][:8]})),
    rf"'{Q}' has shape \(8, 16\).*\(16, 16\)",
  ),
  'a head of its own': (
    lambda f: change(f, tie_word_embeddings=True),
    "ties the head to the embedding, but 'lm_head.weight' has other values",
  ),
  'tied or not': (
    lambda f: edit(f, lambda t: t.pop('lm_head.weight')),
    "no tensor 'lm_head.weight'",
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_gets_one_line(case, tmp_path):
  spoil, message = WRONG[case]
  folder = copied('llama', tmp_path)
  spoil(folder)
  with pytest.raises(UserError, match=message) as e:
    huggingface.load(str(folder))
  assert '\n' not in str(e.value)


def test_several_files_half_precision_and_the_bare_model(tmp_path):
  """A sharded checkpoint in bfloat16 without the prefix, as GPT-2's own is."""
  _, params, _, _ = loaded('gpt2')
  folder = copied('gpt2', tmp_path)
  half = {
    k.removeprefix('transformer.'): np.asarray(jnp.asarray(v, jnp.bfloat16))
    for k, v in load_file(folder / 'model.safetensors').items()
  }
  (folder / 'model.safetensors').unlink()
  names = sorted(half)
  files = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, inside in files.items():
    save_file({k: half[k] for k in inside}, folder / file)
  where = {k: file for file, inside in files.items() for k in inside}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
  found = huggingface.load(str(folder))[1]
  rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), params)
  jax.tree.map(np.testing.assert_array_equal, found, rounded)


def test_a_copy_of_the_tied_table_is_no_head(tmp_path):
  _, params, _, _ = loaded('gpt2')
  folder = copied('gpt2', tmp_path)
  edit(folder, lambda t: t.update({'lm_head.weight': t['transformer.wte.weight'].copy()}))
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(str(folder))[1], params)


def test_parameters_of_another_model_are_not_written(tmp_path):
  _, params, _, _ = loaded('llama')
  told = huggingface.settings(str(REFERENCE / 'gpt2'))
  with pytest.raises(UserError, match="'decoder/layers.*use the one they are of"):
    huggingface.save(str(tmp_path / 'out'), params, told)
  told = huggingface.settings(str(REFERENCE / 'llama'))
  with pytest.raises(UserError, match='exists: name a new folder'):
    huggingface.save(str(tmp_path), params, told)
  assert not list(tmp_path.iterdir())
