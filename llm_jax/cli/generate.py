r"""Text from a trained model: one prompt streams to the terminal, several (or --num) come as blocks.

  llm-jax generate --workdir=runs/quickstart --prompt="ROMEO:"
  llm-jax generate --workdir=DIR --prompts_file=prompts.txt --num=3 --temperature=0
  llm-jax generate --workdir=runs/smollm2 --chat

The workdir is all it needs: config, vocabulary and newest checkpoint. Without a prompt it starts a new document.
Mode tokens and sentinels are written as text: --prompt="[S]ROMEO:", --prompt="To be <extra_id_0> not to be".

--chat writes what is said as the model's chat template does: a --prompt is answered once; without one every line of the
input is a turn of a conversation, until it ends (Ctrl-D).
"""

import itertools
import json
import os
import sys
from typing import Any

import jax
from absl import flags

from llm_jax.cli import chat
from llm_jax.cli.flags import parse
from llm_jax.cli.main import main as command
from llm_jax.core.config import build, from_json
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import vocab
from llm_jax.decode import generate
from llm_jax.decode import logits as logits_lib
from llm_jax.model import stack
from llm_jax.train import checkpoint

# The flags of `logits.Sampling`, which says more of each.
SAMPLING = (
  ('temperature', 0.8, 'logits are divided by it; 0 takes the likeliest token'),
  ('top_k', 0, 'draw from this many likeliest tokens; 0 from all'),
  ('top_p', 1.0, 'draw from the fewest tokens with this much probability'),
  ('min_p', 0.0, 'draw from tokens with this part of the largest probability'),
  ('typical', 1.0, 'draw from the fewest tokens of this mass nearest to the entropy'),
  ('epsilon', 0.0, 'draw from tokens of at least this probability'),
  ('eta', 0.0, 'the same, less where the entropy is high'),
  ('repetition', 1.0, 'divides the logits of tokens that are there already; 1 is off'),
  ('presence', 0.0, 'subtracted from the logits of tokens in the answer'),
  ('frequency', 0.0, 'the same, times their number'),
  ('no_repeat_ngram', 0, 'no n-gram of this length twice; 0 is off'),
)


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = _flags()
  if parse(argv, given, __doc__):
    raise UserError(
      'generate reads the config of the run: leave out --config and name the run with --workdir=DIR'
    )
  settings, prompts = _settings(given), _prompts(given)
  try:
    model, params, words = load(given.workdir, given.step)
    params = stack.apart(params, free=True)  # decoding is fastest so
    if given.chat:
      return chat.converse(model, params, words, prompts, given.seed, settings)
    _note_end(model, words, prompts, given.max_new)
    key, shown = jax.random.key(given.seed), model.card.kind != 'encoder_decoder'
    if len(prompts) == 1:
      pieces = generate.stream_text(model, params, words, prompts[0], key, **settings)
      for piece in itertools.chain(prompts if shown else [], pieces):
        print(piece, end='', flush=True)
      print()
    else:
      for i, text in enumerate(generate.text(model, params, words, prompts, key, **settings)):
        print(f'--- {i + 1} of {len(prompts)}: {prompts[i]!r}\n{prompts[i] * shown}{text}\n')
  except KeyboardInterrupt:
    print()
    return 130
  return 0


def load(workdir: str | None, step: int | None = None) -> tuple[Any, Any, Any]:
  """(model, params, vocabulary) of the run in `workdir` at a step that was kept, default the newest."""
  _, model, params = load_model(workdir, step)
  return model, params, vocab.load(os.path.join(os.path.expanduser(workdir), 'vocab'))


def load_model(
  workdir: str | None, step: int | None = None, flag: str = 'workdir'
) -> tuple[Any, Any, Any]:
  """(the model's part of the config, model, params) of a run. flag: the one that names it."""
  if not workdir:
    raise UserError(f'name the run: --{flag}=DIR')
  workdir = os.path.expanduser(workdir)
  path, folder = os.path.join(workdir, 'config.json'), os.path.join(workdir, 'checkpoints')
  kept = sorted(int(n) for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []
  if not kept or not os.path.isfile(path):
    config = path if os.path.isfile(path) else 'configs/quickstart.py'
    raise UserError(
      f'no trained model in {workdir} ({"no checkpoint yet" if not kept else "config.json is missing"}): '
      f'train one with llm-jax train --config={config} --workdir={workdir}'
    )
  if step is not None and step not in kept:
    raise UserError(
      f'{workdir} has no checkpoint of step {step}; kept: {", ".join(map(str, kept))}'
    )
  with open(path, encoding='utf-8') as f:
    described = from_json(json.dumps(json.load(f)['model']))  # the rest is not needed nor imported
  model = build(described)()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  source = workdir if step is None else os.path.join(folder, str(step))
  return described, model, checkpoint.load_params(source, shapes)


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  at = dict(flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder of the run, as given to llm-jax train', **at)
  flags.DEFINE_multi_string('prompt', [], 'text to go on from; may be repeated', **at)
  flags.DEFINE_string('prompts_file', None, 'a file with one prompt per line', **at)
  flags.DEFINE_integer('max_new', 200, 'tokens to generate at most', lower_bound=1, **at)
  for name, default, words in SAMPLING:
    define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
    define(name, default, words, **at)
  flags.DEFINE_multi_string('stop', [], 'end the text in front of this; may be repeated', **at)
  flags.DEFINE_string('preset', None, f'settings of a paper: {", ".join(logits_lib.PRESETS)}', **at)
  flags.DEFINE_integer('seed', 0, 'the same seed gives the same text', **at)
  flags.DEFINE_integer('num', 1, 'samples per prompt', lower_bound=1, **at)
  flags.DEFINE_bool('chat', False, 'answer as the chat template of the model says', **at)
  flags.DEFINE_integer('step', None, 'step of the checkpoint; default the newest', **at)
  return values


def _settings(given: flags.FlagValues) -> dict[str, Any]:
  """The sampler's settings: a preset's, where one is named, with what the command line sets itself on top."""
  names = logits_lib.Sampling._fields
  settings = {name: given[name].value for name in names}
  if given.preset is not None:
    if given.preset not in logits_lib.PRESETS:
      raise UserError(f'no preset {given.preset!r}; {nearest(given.preset, logits_lib.PRESETS)}')
    own = {name: given[name].value for name in names if given[name].present}
    settings = logits_lib.PRESETS[given.preset] | own
  logits_lib.check(**settings)
  return dict(settings, max_new=given.max_new, stop=tuple(given.stop))


def _prompts(given: flags.FlagValues) -> list[str]:
  prompts = list(given.prompt)
  if given.prompts_file is not None:
    try:
      with open(given.prompts_file, encoding='utf-8') as f:
        prompts += f.read().splitlines()
    except OSError as e:
      raise UserError(
        f'cannot read --prompts_file={given.prompts_file}: {e.strerror.lower()}'
      ) from e
    except UnicodeDecodeError as e:
      raise UserError(
        f'{given.prompts_file} is not UTF-8 text (byte {e.start}): convert it with iconv'
      ) from e
    if not prompts:
      raise UserError(f'{given.prompts_file} holds no prompt: write one per line')
  return [prompt for prompt in prompts or [''] for _ in range(given.num)]


def _note_end(model: Any, words: Any, prompts: list[str], max_new: int) -> None:
  """Says beforehand when a table of learned positions will end the text early."""
  limit = generate.limit(model)
  longest = (
    0 if model.card.kind == 'encoder_decoder' else max(len(words.encode(p)) for p in prompts)
  )
  if longest < limit < longest + max_new:
    note = f'the model has {limit} positions: the text ends after {limit - longest} tokens'
    print(f'llm-jax: note: {note}', file=sys.stderr)


if __name__ == '__main__':  # python -m llm_jax.cli.generate
  sys.exit(command(['generate', *sys.argv[1:]]))
