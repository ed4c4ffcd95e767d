r"""What a model costs before there is one: parameters, FLOPs, keys and values, memory per device.

  llm-jax describe
  llm-jax describe --model=palm_540b --mesh=data=8,fsdp=16,tensor=4
  llm-jax describe --config=configs/pretrain/llama.py:7b --config.model.layers=16
  llm-jax describe --workdir=runs/quickstart

Without a model all published ones are listed. Nothing is allocated, and the mesh needs no devices. --axes is one of the
rules of llm_jax/core/mesh.py that say what is split over what.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from absl import flags

from llm_jax.cli.flags import mesh_sizes, parse, read_config
from llm_jax.cli.main import main as command
from llm_jax.core import mesh, tree
from llm_jax.core.config import ConfigDict, build, from_json, use
from llm_jax.core.errors import UserError, nearest
from llm_jax.model import count, presets
from llm_jax.model.card import Attention, Declared, Dense, Kind
from llm_jax.model.published.row import Row
from llm_jax.optim import adafactor, chain, rules, schedules
from llm_jax.train import state

OPTIMIZERS = dict(adamw=rules.adamw, adafactor=adafactor.adafactor, lion=rules.lion, sgd=rules.sgd)
WIDTHS = dict(float32=4, bfloat16=2, float16=2, int8=1)  # bytes
RULES = {
  name: value for name, value in vars(mesh).items()
  if name.isupper() and isinstance(value, dict) and 'activations' in value
}  # fmt: skip


class Subject(NamedTuple):
  """What is described: a name, the model's config, its row if it is published, and what else a run's config says."""

  name: str
  model: ConfigDict
  row: Row | None
  run: Mapping[str, Any]


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = _flags()
  subject = _subject(given, parse(argv, given, __doc__))
  if subject is None:
    if any(given[name].present for name in given):
      raise UserError('name what to describe: --model=NAME, --config=FILE or --workdir=DIR')
    print(_list())
    return 0
  width = WIDTHS.get(given.kv_dtype)
  if width is None:
    raise UserError(f'no kv_dtype {given.kv_dtype!r}; {nearest(given.kv_dtype, WIDTHS)}')
  model = build(subject.model)()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  context, encoder = _lengths(subject, model.card, given)
  parts = [
    _head(subject, model.card),
    _weights(model.axes, shapes),
    _parameters(model.card, subject.row),
    _flops(model.card, context, encoder),
    _context(model.card, context, encoder, given.kv_dtype, width),
    *_training(subject, model.card, encoder),
    _memory(subject, model, shapes, given),
  ]
  print('\n\n'.join(parts))
  return 0


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  at = dict(flag_values=values)
  flags.DEFINE_string('model', None, 'a published model; without any, all are listed', **at)
  flags.DEFINE_string('workdir', None, 'folder of a run, as given to llm-jax train', **at)
  told = 'tokens of context; default what the model is for'
  flags.DEFINE_integer('context', None, told, lower_bound=1, **at)
  told = 'tokens the encoder reads; default as many'
  flags.DEFINE_integer('encoder_context', None, told, lower_bound=1, **at)
  flags.DEFINE_string('kv_dtype', 'bfloat16', f'of keys and values: {", ".join(WIDTHS)}', **at)
  flags.DEFINE_string(
    'mesh', 'data=1', f'sizes such as fsdp=16,tensor=4 of {", ".join(mesh.AXES)}', **at
  )
  flags.DEFINE_string(
    'axes', None, f'what is split: {", ".join(RULES)}; default ZERO3 or the config', **at
  )
  flags.DEFINE_string(
    'optimizer', None, f'{", ".join(OPTIMIZERS)}; default adamw or that of the config', **at
  )
  return values


def _subject(given: flags.FlagValues, arguments: list[str]) -> Subject | None:
  named = [
    n for n, v in (('model', given.model), ('workdir', given.workdir), ('config', arguments)) if v
  ]
  if len(named) > 1:
    raise UserError(f'--{named[0]} and --{named[1]} name two models: leave one out')
  if given.model:
    return Subject(given.model, presets.config(given.model), presets.row(given.model), {})
  if arguments:
    run = read_config(arguments)
    return Subject(_file(arguments), run.model, None, run)
  if given.workdir:
    path = os.path.join(os.path.expanduser(given.workdir), 'config.json')
    if not os.path.isfile(path):
      raise UserError(f'no config.json in {given.workdir}: name the folder of a run')
    with open(path, encoding='utf-8') as f:
      keys = json.load(f)
    run = {
      k: from_json(json.dumps(v)) for k, v in keys.items() if k in ('model', 'optimizer', 'axes')
    }
    return Subject(given.workdir, run['model'], None, run)
  return None


def _file(arguments: list[str]) -> str:
  return next(a.partition('=')[2] for a in arguments if a.lstrip('-').startswith('config='))


def _lengths(subject: Subject, card: Any, given: flags.FlagValues) -> tuple[int, int]:
  """(tokens of the decoder, of the encoder) to count for."""
  source = subject.run.get('source') or {}
  context = given.context or source.get('length') or card.length or 2048
  if not card.encoder_layers:
    return context, 0
  return context, given.encoder_context or source.get('encoder_length') or given.context or context


# --- below: the parts of the page -----------------------------------------------------------------


def table(rows: Iterable[Iterable[str]], align: str) -> str:
  """Rows as aligned columns; align: '<' or '>' for each column."""
  rows = [tuple(map(str, row)) for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  cells = (map(lambda c, w, a: f'{c:{a}{w}}', row, widths, align) for row in rows)
  return '\n'.join('  '.join(line).rstrip() for line in cells)


def si(value: float, unit: str) -> str:
  """A number to three digits with a decimal prefix: `si(1.24e11, 'B')` is '124 GB'."""
  power = 0 if value < 1000 else min(6, int(math.log10(value * 1.0005) // 3))
  scaled = value / 1000**power
  digits = 0 if power == 0 or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
  return f'{scaled:.{digits}f} {("", "k", "M", "G", "T", "P", "E")[power]}{unit}'


def _list() -> str:
  head = ('model', 'parameters', 'active', 'layers', 'embed', 'heads', 'context', 'source')
  lines = [head]
  for name, row in presets.ROWS.items():
    sheet = row.sheet
    encoder, heads = sheet.get('encoder_layers'), sheet.get('heads', '')
    groups = sheet.get('groups')
    lines.append((
      name,
      f'{row.figure:,}',
      f'{row.active_figure:,}' if row.active_figure else '',
      f'{encoder}+{sheet["layers"]}' if encoder else sheet['layers'],
      f'{sheet["embed"]:,}',
      f'{heads}/{groups}' if groups and groups != heads else heads,
      f'{sheet["length"]:,}',
      row.paper,
    ))  # fmt: skip
  note = (
    'layers: encoder+decoder; heads: of queries/of keys. llm-jax describe --model=NAME says more.'
  )
  return table(lines, '<>>>>>><') + '\n\n' + note


def _head(subject: Subject, card: Any) -> str:
  names = dict(
    causal='causal decoder',
    prefix='prefix decoder',
    encoder='encoder',
    encoder_decoder='encoder-decoder',
  )
  context = 'any context' if card.length is None else f'context {card.length:,}'
  lines = [
    f'{subject.name}: {names[card.kind]}, embed {card.embed:,}, vocabulary {card.vocab:,}, {context}, '
    f'positions {card.positions}, norm {card.norm}, {"tied" if card.tied else "untied"} head'
  ]
  if subject.row is not None:
    lines.append(subject.row.paper)
    lines += [f'note: {subject.row.note}'] if subject.row.note else []
  one = 'encoder' if card.kind == 'encoder' else 'decoder'
  for name, kinds in (('encoder', card.encoder), (one, card.decoder)):
    lines += [f'{name}: {kind.repeats} x {_kind(kind)}' for kind in kinds]
  return '\n'.join(lines)


def _kind(kind: Kind) -> str:
  parts = [*kind.mixers, *([] if kind.ffn is None else [kind.ffn])]
  return ', '.join([*map(_sublayer, parts), f'residual {kind.residual}'])


def _sublayer(part: Any) -> str:
  if isinstance(part, Dense):
    return f'{"gated " * part.gated}feed-forward of {part.hidden:,}'
  if isinstance(part, Declared):
    return _module(part.module)
  assert isinstance(part, Attention)
  keys = '' if part.groups == part.heads else f' ({part.groups} of keys)'
  window = '' if part.window is None else f', window {part.window:,}'
  kind = 'cross-attention' if part.cross else 'attention'
  return f'{kind} of {part.heads} heads of {part.head_dim}{keys}{window}'


def _module(module: Any) -> str:
  """A module that is neither attention nor a dense feed-forward, with the sizes among its fields."""
  sizes = [
    f'{name}={value:,}' if isinstance(value, int) else f'{name} {_module(value())}'
    for name, value in vars(module).items()
    if name in ('experts', 'top_k', 'expert', 'shared', 'hidden', 'heads', 'head_dim', 'state')
    and value is not None
  ]
  return ' '.join([type(module).__name__, *sizes])


def _weights(axes: Any, shapes: Any) -> str:
  names, lines = tree.flatten(axes, is_leaf=tree.is_names), [('tensor', 'shape', 'number')]
  for path, leaf in tree.flatten(shapes).items():
    shape = ' '.join(f'{a}={n:,}' for a, n in zip(names[path], leaf.shape, strict=True))
    lines.append((path, shape, f'{tree.count(leaf):,}'))
  return table(lines, '<<>')


def _parameters(card: Any, row: Row | None) -> str:
  whole, met = count.parameters(card), count.active(card)
  total, active = sum(whole.values()), sum(met.values())
  both = total != active
  lines = [('parameters', 'number', *('active',) * both, '')]
  for name, n in whole.items():
    if n:
      lines.append((name, f'{n:,}', *(f'{met[name]:,}',) * both, f'{n / total:.1%}'))
  lines.append(('all', f'{total:,}', *(f'{active:,}',) * both, ''))
  if row is None:
    return table(lines, '<>>>')
  lines.append(('published', row.printed, *(row.active,) * both, ''))
  return table(lines, '<>>>') + _figure(row)


def _figure(row: Row) -> str:
  """How the published number and ours are the same."""
  says = {
    'transformers': 'the model class of transformers has as many',
    'paper': 'the paper prints as many',
    'checkpoint': 'the released checkpoint has as many',
    '': 'the sum of the published sizes',
  }
  counted = f', counted without what matches {row.without}' if row.without else ''
  active = f', active {row.active_figure:,}' if row.active_figure else ''
  lacks = f', {row.lacks:,} of them not built' if row.lacks else ''
  return f'\nto the last digit {row.figure:,}{active}: {says[row.source]}{counted}{lacks}'


def _flops(card: Any, context: int, encoder: int) -> str:
  found = count.forward_flops(card, context, encoder)
  lines = [('FLOPs per token', 'forward', '')]
  total = sum(found.values())
  for name, n in found.items():
    if n:
      lines.append((name, si(n / context, 'FLOP'), f'{n / total:.1%}'))
  training = count.training_flops(card, context, encoder)
  lines += [('all', si(total / context, 'FLOP'), ''), ('training', si(training, 'FLOP'), '')]
  at = f'{context:,} tokens' + f' after {encoder:,} of the encoder' * bool(encoder)
  note = (
    f'of sequences of {at}; scores: the products of queries, keys and values under a causal mask'
  )
  return table(lines, '<>>') + '\n' + note


def _context(card: Any, context: int, encoder: int, dtype: str, width: int) -> str:
  each, whole = (
    count.kv_bytes(card, width=width),
    count.context_bytes(card, context, encoder, width=width),
  )
  grows = f'{each:,} bytes per token of context'
  at = f'{context:,} tokens' + f' and {encoder:,} of the encoder' * bool(encoder)
  windowed = any(getattr(m, 'window', None) for kind in card.decoder for m in kind.mixers)
  if windowed:
    grows += ' until a window is full'
  return f'decoding in {dtype}: {grows}, {si(whole, "B")} for a sequence of {at}'


def _training(subject: Subject, card: Any, encoder: int) -> list[str]:
  """What a config comes to as a run, where it says how many sequences of what length there are in how many steps."""
  source, schedule = (subject.run.get(k) or {} for k in ('source', 'optimizer'))
  schedule = schedule.get('schedule') or {}
  sizes = [subject.run.get('steps'), source.get('batch'), source.get('length')]
  if not all(sizes):
    return []
  steps, rows, length = sizes
  tokens, met = steps * rows * length, sum(count.active(card).values())
  flops = tokens * count.training_flops(card, length, encoder)
  lines = [
    ('training', '', ''),
    ('steps', f'{steps:,}', ''),
    ('batch', f'{rows:,}', f'sequences, {rows * length:,} tokens'),
    ('tokens', f'{tokens:,}', f'{tokens / met:.3g} per parameter'),
    (
      'compute',
      si(flops, 'FLOP'),
      f'6 N D: {si(count.compute(parameters=met, tokens=tokens), "FLOP")}',
    ),
  ]
  if schedule.get('peak'):
    lines.append(('peak learning rate', f'{schedule["peak"]:.3g}', ''))
  return [table(lines, '<><')]


# --- memory on a mesh ------------------------------------------------------------------------------


def _memory(subject: Subject, model: Any, shapes: Any, given: flags.FlagValues) -> str:
  sizes = mesh_sizes(given.mesh)
  on, devices = mesh.abstract(**sizes), math.prod(sizes.values())
  name, table_ = _rules(subject, given)
  table_, why = mesh.divisible(model.axes, shapes, sizes, table_)
  whole = [f'{axis} ({reason})' for axis, reason in why.items()]
  rule, tx = _optimizer(subject, model, given)
  trainable = subject.run.get('trainable')
  with mesh.rules(**table_):
    layout = state.layout(model, tx, trainable, on)
  part = state.trained(shapes, trainable)
  held = dict(
    weights=_each(layout.state.params, shapes),
    gradients=_each(layout.gradients, part),
    optimizer=_each(layout.state.opt_state, jax.eval_shape(tx.init, part)),
  )
  lines = [('memory per device', 'bytes', '')]
  lines += [(n, f'{b:,}', si(b, 'B')) for n, b in held.items()]
  lines.append(('all', f'{sum(held.values()):,}', si(sum(held.values()), 'B')))
  shown = ' x '.join(f'{n}={s}' for n, s in sizes.items())
  of = f'{devices:,} device{"s" * (devices > 1)}'
  notes = [f'{of} ({shown}), rules {name}, {rule}, f32; activations and batch come on top']
  notes += [f'kept whole: {", ".join(whole)}' for _ in whole[:1]]
  return '\n'.join([table(lines, '<>>'), *notes])


def _each(shardings: Any, shapes: Any) -> int:
  """Bytes of one device's part of a tree."""
  parts = jax.tree.map(
    lambda s, x: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), shardings, shapes
  )
  return tree.nbytes(parts)


def _rules(subject: Subject, given: flags.FlagValues) -> tuple[str, Mapping[str, Any]]:
  if given.axes is None and subject.run.get('axes'):
    return 'of the config', {k: dict(v) for k, v in subject.run['axes'].items()}
  name = given.axes or 'ZERO3'
  if name not in RULES:
    raise UserError(f'no axis rules {name!r}; {nearest(name, RULES)}')
  return name, RULES[name]


def _optimizer(subject: Subject, model: Any, given: flags.FlagValues) -> tuple[str, Any]:
  told = subject.run.get('optimizer')
  if given.optimizer is None and told is not None:
    return 'the optimizer of the config', build(told)(model.axes)
  name = given.optimizer or 'adamw'
  if name not in OPTIMIZERS:
    raise UserError(f'no optimizer {name!r}; {nearest(name, OPTIMIZERS)}')
  schedule = use(schedules.constant, peak=1.0)
  return name, build(use(chain.make, rule=use(OPTIMIZERS[name]), schedule=schedule))(model.axes)


if __name__ == '__main__':  # python -m llm_jax.cli.describe
  sys.exit(command(['describe', *sys.argv[1:]]))
