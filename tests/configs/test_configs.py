"""Every config file, every size: it reads, survives JSON, and builds its model without allocating it."""

import ast
import functools
import math
import pathlib
import re
import shlex

import jax
import ml_collections
import numpy as np
import pytest

from configs.scaling import architectures
from llm_jax.cli import flags
from llm_jax.core import config as config_lib
from llm_jax.core import mesh, tree
from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.data import batch as batch_lib
from llm_jax.data import branches, pairs
from llm_jax.model import count, scalar, stack
from llm_jax.rl import rollout
from llm_jax.scaling import sweep
from llm_jax.train import state as state_lib
from llm_jax.train import step as step_lib
from tests.variants import variants

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY_FILE = sorted(
  str(p.relative_to(ROOT)) for p in ROOT.glob('configs/**/*.py') if p.name != '__init__.py'
)
SWEEPS = [
  f for f in EVERY_FILE if 'llm-jax sweep' in (ROOT / f).read_text(encoding='utf-8').split('"""')[1]
]
FILES = [f for f in EVERY_FILE if f not in SWEEPS]  # one training each
KEYS = (
  'model source objective optimizer mesh axes steps microbatches trainable init hooks checkpoint log_every seed'
).split()

# all parameters, the vocabulary not padded (survey checklist, part 5)
SIZES = {
  'configs/pretrain/gpt3.py': {
    'small': 125_226_240,
    'medium': 355_871_744,
    'large': 760_300_032,
    'xl': 1_315_723_264,
    '2.7b': 2_651_553_280,
    '6.7b': 6_658_404_352,
    '13b': 12_853_386_240,
    '175b': 174_604_259_328,
  },
  'configs/pretrain/llama.py': {
    '7b': 6_738_415_616,
    '13b': 13_015_864_320,
    '33b': 32_528_943_616,
    '65b': 65_285_660_672,
  },
  'configs/pretrain/t5_small.py': {None: 60_506_624},
}


def docstring(file):
  return ast.get_docstring(ast.parse((ROOT / file).read_text(encoding='utf-8')))


def commands(file):
  """The arguments of the `llm-jax train` lines of a config's docstring."""
  return re.findall(r'^ *(?:\w+=\S+ )?llm-jax train (.*)$', docstring(file), re.M)


def cases():
  """(file, what follows the colon) of every file, every size in it, and every variant that a docstring names."""
  found = {(file, text) for file in FILES for text in SIZES.get(file, {None: 0})}
  found |= {(file, None) for file in FILES}
  for command in (c for file in FILES for c in commands(file)):
    file, _, text = re.search(r'--config=(\S+)', command)[1].partition(':')
    found.add((file, text or None))
  return sorted(found, key=str)


CASES = cases()
EVERY = pytest.mark.parametrize(
  ('file', 'text'), CASES, ids=[f'{f[8:-3]}:{t or ""}' for f, t in CASES]
)


@functools.cache
def read(file, text):
  return config_lib.read(str(ROOT / file), text)


@functools.cache
def model_of(file, text):
  return build(read(file, text).model)()


def groups(cfg):
  """`cfg` and every group of settings below it."""
  yield cfg
  for value in cfg.values():
    for part in value if isinstance(value, tuple) else (value,):
      if isinstance(part, ml_collections.ConfigDict):
        yield from groups(part)


def inner(c):
  """What is read, below the sources that annotate it."""
  found = c.source
  while 'source' in found:
    found = found.source
  return found


@EVERY
def test_reads_checks_and_survives_json(file, text):
  c = read(file, text)
  assert sorted(c.keys()) == sorted(KEYS)
  assert all(group.is_locked for group in groups(c))
  config_lib.check(c)
  again = config_lib.from_json(config_lib.to_json(c))
  assert again == c and config_lib.to_json(again) == config_lib.to_json(c)
  assert config_lib.read(str(ROOT / file), text) is not c  # nothing is shared between two readings
  assert inner(c).batch % c.microbatches == 0


@EVERY
def test_the_model_is_built_without_allocating_it(file, text):
  model = model_of(file, text)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  heads = {name: part for name, part in shapes.items() if name in (scalar.NAME, scalar.CRITIC)}
  assert tree.count(shapes) - tree.count(heads) == count.total(model.card)
  if text in SIZES.get(file, {}):
    assert count.total(model.card._replace(rows=model.card.vocab)) == SIZES[file][text]


@EVERY
def test_state_and_optimizer_divide_over_eight_devices(file, text):
  c, model = read(file, text), model_of(file, text)
  with jax.set_mesh(mesh.make(**c.mesh)), mesh.rules(**c.axes):
    layout = state_lib.layout(model, build(c.optimizer)(model.axes), c.trainable)
    if inner(c).batch >= jax.device_count():  # a command that makes it smaller is for one device
      mesh.check_batch(inner(c).batch, c.microbatches)
    if c.mesh.fsdp == -1:  # what is too large for one device is split over all
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      one = jax.tree.map(
        lambda s, x: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
        layout.state.params,
        shapes,
      )
      assert tree.count(one) < 1.01 * tree.count(shapes) / 8


def example(c, model):
  """A batch with the arrays that the source of a config gives; padding."""
  source, rows, card = inner(c), c.microbatches, model.card
  length = source.get('length') or build(c.source)(model).length
  encoder = source.get('encoder_length') or length
  layout = batch_lib.Layout(card.kind, length, encoder if card.encoder_layers else 0, True)
  text = batch_lib.empty(layout, rows)
  if source.fn == config_lib.path_of(rollout.make):
    names = ('old_logp', 'advantages', 'ref_logp', 'values', 'returns')
    text |= dict.fromkeys(names, text['weights'])
    return text | dict.fromkeys(('reward', 'gap', 'fresh'), text['weights'][:, 0])
  sides = dict(pairs=('chosen', 'rejected'), rankings=('answer0', 'answer1'))
  numbers = {name: np.zeros(rows, np.float32) for name in ('ref_logp', 'kl')}
  told = numbers | dict(desirable=np.zeros(rows, bool), ref_ids=np.zeros((rows, length, 3), int))
  told |= dict(ref_top=np.zeros((rows, length, 3), np.float32), types=text['inputs'])
  told |= dict(label=np.zeros(rows, np.int32), at=np.zeros(rows, np.int32))
  if source.fn == config_lib.path_of(pairs.packed):
    scores = {f'{side}/ref_logp': np.zeros((rows, 3), np.float32) for side in sides['pairs']}
    return branches.empty(layout, rows, 3) | scores
  if names := sides.get(source.fn.rpartition(':')[2]):
    return {f'{side}/{k}': v for side in names for k, v in (text | numbers).items()}
  return text | told


@pytest.mark.parametrize('file', FILES)
def test_one_update_traces(file):
  text = next(iter(SIZES.get(file, {None: 0})))
  c, model = read(file, text), model_of(file, text)
  tx = build(c.optimizer)(model.axes)
  batch = example(c, model)
  objective = functools.partial(build(c.objective), model)
  update = step_lib.make(objective, tx, microbatches=c.microbatches, trainable=c.trainable)
  state = jax.eval_shape(lambda: state_lib.create(model, tx, c.seed, trainable=c.trainable))
  after, metrics = jax.eval_shape(update, state, batch, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert {'loss', 'weight', 'grad_norm', 'param_norm', 'learning_rate'} <= set(metrics)


@pytest.mark.parametrize('file', FILES)
def test_the_docstring_says_how_to_run_it(file):
  found = commands(file)
  assert found, f'{file}: its docstring has no line `llm-jax train --config={file} --workdir=...`'
  assert any(f'--config={file}' in command for command in found)
  for command in found:
    assert '--workdir=' in command
    ours = [a for a in shlex.split(command) if a.startswith('--config')]
    flags.read_config([a.replace('--config=', f'--config={ROOT}/') for a in ours])
  if file != 'configs/pretrain/lm.py':
    assert re.search(r'[Dd]iffers from', docstring(file)), f'{file}: say what it differs from'


def test_sizes_that_do_not_exist():
  with pytest.raises(UserError, match=r"no size '175' in this ladder; did you mean '175b'\?"):
    config_lib.read(str(ROOT / 'configs/pretrain/gpt3.py'), '175')
  with pytest.raises(UserError, match=r"no kind 'swich' of mixture; did you mean 'switch'\?"):
    config_lib.read(str(ROOT / 'configs/pretrain/moe.py'), 'swich')
  with pytest.raises(UserError, match=r"takes no argument 'sise'; did you mean 'size'\?"):
    config_lib.read(str(ROOT / 'configs/pretrain/llama.py'), 'sise=7b')


def test_gpt3_alternates_dense_and_banded_layers():
  c = read('configs/pretrain/gpt3.py', 'small,band=256')
  card = build(c.model)().card
  assert [(kind.repeats, kind.mixers[0].window) for kind in card.decoder] == [(6, None), (6, 256)]
  dense = build(read('configs/pretrain/gpt3.py', 'small').model)().card
  assert count.total(card) == count.total(dense)
  assert sum(count.forward_flops(card, 2048).values()) < sum(
    count.forward_flops(dense, 2048).values()
  )


@pytest.mark.parametrize(('size', 'tokens'), [('small', 4), ('175b', 12)])
def test_gpt3_counts_tokens_while_the_batch_grows(size, tokens):
  """The warm-up ends with 375M tokens, the cosine with 260B, the run with 300B, the growth after 4 to 12B."""
  c = read('configs/pretrain/gpt3.py', size)
  ramp, schedule = build(c.source.ramp), c.optimizer.schedule
  rows = lambda k: ramp(k).size
  seen, at, batch = 0, {}, c.source.batch
  for k in range(40_000):
    at[k] = seen
    seen += rows(k) * c.source.length
  assert rows(0) * 16 == rows(39_999) == batch  # 32K tokens where the full batch has 0.5M
  assert len({rows(k) for k in at}) == 16
  full = next(k for k in at if rows(k) == batch)
  assert abs(at[full] / (tokens * 1e9) - 1) < 0.01
  assert 0 <= at[schedule.warmup] - 375e6 <= rows(schedule.warmup) * c.source.length
  for k, want in ((schedule.steps, 260e9), (c.steps, 300e9)):
    got = at[full] + (k - full) * batch * c.source.length
    assert 0 <= got - want < batch * c.source.length


def test_llama_counts_tokens():
  for size, tokens in (('7b', 1.0e12), ('65b', 1.4e12)):
    c = read('configs/pretrain/llama.py', size)
    assert abs(c.steps * c.source.batch * c.source.length / tokens - 1) < 1e-5
    assert c.optimizer.schedule.steps == c.steps and c.optimizer.schedule.warmup == 2000


def test_the_long_stage_takes_the_weights_of_the_short_one():
  file = 'configs/pretrain/length_extension.py'
  short, shapes = read(file, 'short'), {}
  for method in ('none', 'interpolation', 'base', 'ntk', 'yarn'):
    c = read(file, f'long,method={method}')
    assert c.init.init_from == 'runs/short' and c.source.length == 4 * short.source.length
    told = c.model.block.mixer.rotate
    assert (told.scaling is None, told.base) == (
      method in ('none', 'base'),
      5e5 if method == 'base' else 1e4,
    )
    shapes[method] = jax.eval_shape(model_of(file, f'long,method={method}').init, jax.random.key(0))
  first = jax.eval_shape(model_of(file, 'short').init, jax.random.key(0))
  assert all(one == first for one in shapes.values())
  for wrong, message in (
    ('middle', "no stage 'middle'"),
    ('long,method=yarm', "did you mean 'yarn'"),
  ):
    with pytest.raises(UserError, match=message):
      read(file, wrong)


@pytest.mark.parametrize('file', SWEEPS)
def test_a_sweep_is_configs_of_trainings(file):
  found = re.findall(r'^ *llm-jax sweep (.*)$', docstring(file), re.M)
  assert any(f'--config={file}' in command for command in found)
  for command in found:
    words = shlex.split(command)
    assert any(w.startswith('--workdir=') for w in words)
    ours = [w.replace('--config=', f'--config={ROOT}/') for w in words if w.startswith('--config')]
    cells = flags.read_sweep(ours).cells
    assert len({cell.name for cell in cells}) == len(cells) > 2
    if command == found[0] and file == 'configs/scaling/isoflop.py':
      assert len(cells) == 25  # which the files of launch/ say
  for cell in (cells[0], cells[-1]):
    c = cell.recipe
    assert sorted(c.keys()) == sorted(KEYS)
    assert config_lib.from_json(config_lib.to_json(c)) == c
    assert c.optimizer.schedule.steps == c.steps  # the rate is at its end where the loss is taken
  if file != 'configs/scaling/isoflop.py':
    assert re.search(r'[Dd]iffers from', docstring(file)), f'{file}: say what it differs from'


def test_the_cells_of_a_budget_spend_it():
  """Within half a step; and the config of an optimum has the size and the tokens it is asked for."""
  found = flags.read_sweep([f'--config={ROOT}/configs/scaling/isoflop.py:budgets=1,sizes=3'])
  for cell in found.cells:
    c = cell.recipe
    n = count.total(build(c.model)().card)
    step = 6 * n * c.source.batch * c.source.length
    assert abs(step * c.steps - cell.arguments['budget']) <= step / 2
  c = found.optimal(parameters=1e6, tokens=2e7, devices=3)
  assert abs(count.total(build(c.model)().card) / 1e6 - 1) < 0.1
  assert c.source.batch % 3 == 0 and c.mesh.data == 3
  assert abs(c.steps * c.source.batch * c.source.length / 2e7 - 1) < 1e-3


@pytest.mark.parametrize(
  'kind', variants(('causal', 'prefix', 'encoder_decoder'), ('encoder_decoder',))
)
def test_a_cell_of_each_architecture_spends_its_budget_and_trains(kind):
  file = f'{ROOT}/configs/scaling/architectures.py:kinds={kind},budget=2e9,budgets=1,sizes=2'
  cells = flags.read_sweep([f'--config={file}']).cells
  for cell in cells:
    model, c = build(cell.recipe.model)(), cell.recipe
    assert model.card.kind == kind
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.count(shapes) == count.total(model.card)
    each = sweep.flops(cell) / c.steps
    assert abs(sweep.flops(cell) - 2e9) <= each / 2
  told = cells[0].recipe
  with jax.set_mesh(mesh.make(data=1)), mesh.rules(**told.axes):
    model = build(told.model)()
    source = build(told.source)(model)
    update = step_lib.make(
      functools.partial(build(told.objective), model), build(told.optimizer)(model.axes)
    )
    state = state_lib.create(model, build(told.optimizer)(model.axes), 0)
    losses = []
    for _ in range(3):
      state, metrics = update(state, source(), jax.random.key(0))
      losses.append(float(metrics['loss']))
    source.close()
  assert all(abs(loss - math.log(264)) < 3 for loss in losses) and 0 < metrics['weight'] < 8 * 128


@pytest.mark.parametrize('kind', architectures.KINDS)
def test_flops_of_an_architecture_are_what_xla_counts(kind):
  told = architectures.model(kind, 256, 2)
  told.runner = config_lib.use(stack.loop)
  model, length = build(told)(), 64
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  batch = {'inputs': jax.ShapeDtypeStruct((1, length), np.int32)}
  if kind == 'encoder_decoder':
    batch['encoder/inputs'] = batch['inputs']
  forward = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch).x))
  xla = forward.lower(shapes, batch).cost_analysis()['flops']
  encoder = length if kind == 'encoder_decoder' else 0
  ours = sum(count.forward_flops(model.card, length, encoder, seen=1.0).values())
  assert ours <= xla <= 1.05 * ours
