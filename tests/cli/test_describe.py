"""`llm-jax describe` as a user runs it: a published model, a config, a run; wrong input in one line."""

import functools
import os
import re
import subprocess
import sys

import jax
import pytest

from llm_jax.cli import describe, main
from llm_jax.core import mesh, tree
from llm_jax.core.config import build, config, to_json
from llm_jax.model import presets
from llm_jax.optim import chain, rules, schedules
from llm_jax.train import state

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(capsys, *arguments):
  """(exit code, what went to stdout, to stderr)."""
  code = main.main(['describe', *arguments])
  done = capsys.readouterr()
  return code, done.out, done.err


def line(text, start):
  """The words of the first line that starts so."""
  found = [x for x in text.splitlines() if x.startswith(start)]
  assert found, f'no line {start!r} in:\n{text}'
  return found[0].removeprefix(start).split()


def test_palm_on_512_devices_that_are_not_there(capsys):
  code, out, _ = run(capsys, '--model=palm_540b', '--mesh=data=8,fsdp=16,tensor=4')
  assert code == 0
  assert line(out, 'all ') == ['540,356,474,880'] and line(out, 'published ') == ['540.35B']
  assert line(out, 'decoder/layers/block_0/mixer/query ') == (
    'layers=118 embed=18,432 heads=48 head_dim=256 26,726,105,088'.split()
  )
  assert '120,832 bytes per token of context, 247 MB for a sequence of 2,048 tokens' in out
  # 64 shards of all but the two matrices of the one head of keys (16 shards) and the norms (1)
  one_head, norms = 2 * 118 * 18432 * 256, 119 * 18432
  rest = 540_356_474_880 - one_head - norms
  held = 4 * (rest // 64 + one_head // 16 + norms)
  assert line(out, 'weights ')[0] == line(out, 'gradients ')[0] == f'{held:,}'
  assert line(out, 'optimizer ')[0] == f'{2 * held + 12:,}'  # two moments, two counters and a rate
  assert 'kept whole: groups (1 does not divide by tensor=4)' in out


def test_the_readme_shows_what_it_prints(capsys):
  _, out, _ = run(capsys, '--model=palm_540b', '--mesh=data=8,fsdp=16,tensor=4')
  with open(f'{ROOT}/README.md', encoding='utf-8') as f:
    shown = re.search(r'^```text\n(parameters .*?)^```$', f.read(), re.M | re.S)
  assert out.endswith(shown[1])


def test_experts_are_total_and_active_and_split_over_their_axis(capsys):
  _, out, _ = run(capsys, '--model=mixtral_8x7b', '--mesh=expert=8')
  assert line(out, 'all ') == ['46,702,792,704', '12,879,925,248']
  assert line(out, 'published ') == ['46.7B', '12.9B']
  assert '32 x attention of 32 heads of 128 (8 of keys), MoE experts=8 expert Gated' in out
  split = 32 * 8 * (3 * 4096 * 14336 + 4096)  # experts, and the router's column for each
  held = 4 * (46_702_792_704 - split + split // 8)
  assert line(out, 'weights ')[0] == f'{held:,}'


def test_columns_are_aligned(capsys):
  _, out, _ = run(capsys, '--model=gpt2')
  block = next(b for b in out.split('\n\n') if b.startswith('parameters'))
  ends = {re.match(r'\S+ +[\d,]+', x).end() for x in block.splitlines()[1:-2]}
  assert len(ends) == 1


@pytest.mark.parametrize(
  ('optimizer', 'each'), [('adamw', 8), ('lion', 4), ('sgd', 4), ('adafactor', 0.1)]
)
def test_optimizer_state(capsys, optimizer, each):
  _, out, _ = run(capsys, '--model=gpt2', f'--optimizer={optimizer}')
  got = int(line(out, 'optimizer ')[0].replace(',', ''))
  assert got <= each * 124_439_808 + 16 and (each < 1 or got > each * 124_439_808)


@pytest.mark.parametrize('zero', ['DATA', 'ZERO1', 'ZERO2', 'ZERO3'])
def test_memory_is_what_devices_would_hold(capsys, zero):
  sizes = dict(fsdp=4, tensor=2)
  model = build(presets.config('gpt2'))()
  tx = chain.make(
    model.axes, rule=rules.adamw, schedule=functools.partial(schedules.constant, peak=1.0)
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  whole = dict(params=params, opt_state=jax.eval_shape(tx.init, params))
  table = dict(describe.RULES[zero])
  table = {kind: dict(names, vocab=()) for kind, names in table.items()}  # 50,257 is odd
  with jax.set_mesh(mesh.make(**sizes)), mesh.rules(**table):
    real = state.layout(model, tx)
  _, out, _ = run(capsys, '--model=gpt2', '--mesh=fsdp=4,tensor=2', f'--axes={zero}')
  for name, shardings, shapes in (
    ('weights ', real.state.params, whole['params']),
    ('gradients ', real.gradients, whole['params']),
    ('optimizer ', real.state.opt_state, whole['opt_state']),
  ):
    part = jax.tree.map(
      lambda s, x: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), shardings, shapes
    )
    assert line(out, name)[0] == f'{tree.nbytes(part):,}'


def test_a_config_and_a_run(capsys, tmp_path):
  code, out, _ = run(
    capsys, f'--config={ROOT}/configs/pretrain/t5_small.py', '--config.model.layers=3'
  )
  assert code == 0 and 'decoder: 3 x attention' in out and 'encoder: 6 x attention' in out
  assert 'of sequences of 114 tokens after 512 of the encoder' in out
  assert 'rules of the config, the optimizer of the config' in out
  (tmp_path / 'config.json').write_text(to_json(config(model=presets.config('gpt2'), steps=1)))
  code, out, _ = run(capsys, f'--workdir={tmp_path}', '--context=64', '--kv_dtype=float32')
  assert code == 0 and 'adamw' in out
  assert f'{2 * 12 * 768 * 4:,} bytes per token of context, 4.72 MB' in out


def test_all_are_listed(capsys):
  code, out, _ = run(capsys)
  assert code == 0
  assert [x.split()[0] for x in out.splitlines()[1:] if 'arXiv' in x][:2] == [
    'gpt3_small',
    'gpt3_medium',
  ]
  for name, row in presets.ROWS.items():
    assert line(out, f'{name} ')[0] == f'{row.figure:,}'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--model=palm540b'], "no published model 'palm540b'; did you mean 'palm_540b'?"),
    (['--model=gpt2', '--mesh=tensr=4'], "no mesh axis 'tensr'; did you mean 'tensor'?"),
    (['--model=gpt2', '--mesh=tensor'], '--mesh=tensor: write sizes as in --mesh=data=8,fsdp=16'),
    (['--model=gpt2', '--mesh=fsdp=0'], 'mesh fsdp=0: without devices every size is a positive'),
    (['--model=gpt2', '--axes=ZERO4'], "no axis rules 'ZERO4'; did you mean 'ZERO3'?"),
    (['--model=gpt2', '--kv_dtype=bf16'], "no kv_dtype 'bf16'; did you mean 'bfloat16'?"),
    (['--model=gpt2', '--optimizer=adam'], "no optimizer 'adam'; did you mean 'adamw'?"),
    (['--model=gpt2', '--workdir=x'], '--model and --workdir name two models: leave one out'),
    (['--workdir=nowhere'], 'no config.json in nowhere: name the folder of a run'),
    (['--mesh=fsdp=2'], 'name what to describe: --model=NAME, --config=FILE or --workdir=DIR'),
    (['--model=gpt2', '--context=0'], 'context=0'),
  ],
)  # fmt: skip
def test_wrong_input(capsys, arguments, message):
  code, out, err = run(capsys, *arguments)
  assert code == 2 and out == '' and err.count('\n') == 1
  assert message in err


def test_units():
  values = (999, 1000, 9994, 9996, 99_960, 999_600, 1.24e11, 1.1e18)
  assert [describe.si(v, 'B') for v in values] == [
    '999 B', '1.00 kB', '9.99 kB', '10.0 kB', '100 kB', '1.00 MB', '124 GB', '1.10 EB'
  ]  # fmt: skip


def test_it_imports_no_tensorflow():
  code = (
    'import sys; from llm_jax.cli import main; main.main(["describe", "--model=gpt2"]); '
    'print(*[m for m in ("tensorflow", "seqio", "orbax") if m in sys.modules], sep="loaded ")'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert 'loaded' not in done.stdout.splitlines()[-1] and done.stdout.endswith('\n\n')
