r"""Text from a trained model: one prompt streams to the terminal, several (or --num) come as blocks.

  llm-jax generate --workdir=runs/quickstart --prompt="ROMEO:"
  llm-jax generate --workdir=DIR --prompts_file=prompts.txt --num=3 --temperature=0
  llm-jax generate --workdir=runs/smollm2 --chat

The workdir is all it needs: config, vocabulary and newest checkpoint. Without a prompt it starts a new document.
Mode tokens and sentinels are written as text: --prompt="[S]ROMEO:", --prompt="To be <extra_id_0> not to be".

--beams=4 searches for the likeliest text instead of drawing one (--num then are the best of them), and --preset=t5_beam
as T5 did; with --temperature, --top_p and the like beside it, as in --preset=survey, the beams are drawn. --explain
prints for every token the candidates and what each setting did to them. --regex='(yes|no)' and --schema=FILE draw only
what matches.

--chat writes what is said as the model's chat template does, its own or the one it was tuned with here: a --prompt is
answered once; without one every line of the input is a turn of a conversation, until it ends (Ctrl-D).
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from llm_jax.cli import chat, explain
from llm_jax.cli.flags import parse
from llm_jax.cli.main import main as command
from llm_jax.core.config import build, from_json
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import vocab
from llm_jax.decode import beam, constrain, generate
from llm_jax.decode import logits as logits_lib
from llm_jax.decode import prompts as prompts_lib
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
# Those of `beam.search`, and what it heeds of the others: all of them make it `beam.sample`.
BEAM = ('beams', 'length_penalty', 'early_stopping', 'groups', 'diversity')
SEARCHED = ('repetition', 'presence', 'frequency', 'no_repeat_ngram')
GREEDY = 'temperature', 0
PRESETS = logits_lib.PRESETS | beam.PRESETS


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
    if given.chat and given.explain:
      raise UserError('--explain shows a --prompt and no conversation: leave out --chat')
    guides = _guides(given, words, prompts)
    if given.chat:
      return chat.converse(model, params, words, prompts, given.seed, settings)
    _note_end(model, words, prompts, settings['max_new'])
    key, shown = jax.random.key(given.seed), model.card.kind != 'encoder_decoder'
    if given.explain:
      explain.show(model, params, words, prompts, key, **settings)
    elif 'beams' in settings:
      asked = prompts[:: given.num]
      told = (key,) if 'temperature' in settings else ()
      texts = beam.text(model, params, words, asked, *told, n=given.num, **settings)
      _blocks(prompts, texts, shown)
    elif len(prompts) == 1:
      settings['guides'] = guides
      pieces = generate.stream_text(model, params, words, prompts[0], key, **settings)
      for piece in itertools.chain(prompts if shown else [], pieces):
        print(piece, end='', flush=True)
      print()
    else:
      _blocks(prompts, generate.text(model, params, words, prompts, key, **settings), shown)
  except KeyboardInterrupt:
    print()
    return 130
  return 0


def _blocks(prompts: list[str], texts: list[str], shown: bool) -> None:
  """Prints each text behind its prompt, with a line above it where there are several."""
  for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    head = f'--- {i + 1} of {len(prompts)}: {prompt!r}\n' if len(prompts) > 1 else ''
    print(f'{head}{prompt * shown}{text}' + '\n' * (len(prompts) > 1))


def load(
  workdir: str | None, step: int | None = None, lay: Callable | None = None
) -> tuple[Any, Any, Any]:
  """(model, params, vocabulary) of the run in `workdir` at a step that was kept, default the newest."""
  _, model, params = load_model(workdir, step, lay=lay)
  return model, params, vocab.load(os.path.join(os.path.expanduser(workdir), 'vocab'))


def load_model(
  workdir: str | None,
  step: int | None = None,
  flag: str = 'workdir',
  lay: Callable | None = None,
) -> tuple[Any, Any, Any]:
  """(the model's part of the config, model, params) of a run. flag: the one that names it. lay: from the model and the
  shapes of its parameters to those with shardings; None for one device."""
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
  shapes = shapes if lay is None else lay(model, shapes)
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
  flags.DEFINE_integer('beams', 1, 'beams of a beam search; 1 draws', lower_bound=1, **at)
  penalty = 'scores are divided by it: gnmt:ALPHA, power:ALPHA or none'
  flags.DEFINE_string('length_penalty', 'power:1', penalty, **at)
  early = 'when a beam search ends (see llm_jax.decode.beam.search)'
  flags.DEFINE_enum('early_stopping', 'false', ['true', 'false', 'never'], early, **at)
  flags.DEFINE_integer('groups', 1, 'groups of beams that differ', lower_bound=1, **at)
  flags.DEFINE_float('diversity', 0.0, 'what a token of a group before costs', **at)
  flags.DEFINE_multi_string('stop', [], 'end the text in front of this; may be repeated', **at)
  flags.DEFINE_string('regex', None, 'the text matches this regular expression', **at)
  flags.DEFINE_string('schema', None, 'file of a JSON schema: the text is JSON of it', **at)
  flags.DEFINE_string('preset', None, f'settings of a paper: {", ".join(PRESETS)}', **at)
  flags.DEFINE_integer('seed', 0, 'the same seed gives the same text', **at)
  flags.DEFINE_integer('num', 1, 'samples per prompt', lower_bound=1, **at)
  flags.DEFINE_bool('explain', False, 'print how each token came about', **at)
  flags.DEFINE_bool('chat', False, 'answer as the chat template of the model says', **at)
  flags.DEFINE_integer('step', None, 'step of the checkpoint; default the newest', **at)
  return values


def _settings(given: flags.FlagValues) -> dict[str, Any]:
  """The settings of `generate.text` or, where there are beams, of `beam.text`: a preset's, where one is named, with
  what the command line sets itself on top."""
  names = (*logits_lib.Sampling._fields, *BEAM, 'max_new')
  settings = {name: given[name].value for name in names}
  settings['length_penalty'] = _penalty(given.length_penalty)
  settings['early_stopping'] = dict(true=True, false=False).get(
    given.early_stopping, given.early_stopping
  )
  if given.preset is not None:
    if given.preset not in PRESETS:
      raise UserError(f'no preset {given.preset!r}; {nearest(given.preset, PRESETS)}')
    kept = {name: value for name, value in settings.items() if given[name].present}
    neutral = {name: settings[name] for name in (*BEAM, 'max_new')}
    settings = neutral | PRESETS[given.preset] | kept
  sampling = {n: settings[n] for n in logits_lib.Sampling._fields if n in settings}
  logits_lib.check(**sampling)
  stop, max_new = tuple(given.stop), settings['max_new']
  if settings['beams'] == 1:
    return dict(sampling, max_new=max_new, stop=stop)
  wrong = [name for name in ('chat', 'explain') if given[name].value]
  if wrong:
    raise UserError(f'beams are for a --prompt alone: leave out {wrong[0]} or --beams')
  drawn = [n for n in sampling if n not in SEARCHED and (n, sampling[n]) != GREEDY]
  told = [n for n in drawn if given[n].present]
  if settings.get('temperature') == 0 and told:
    raise UserError(f'beams at temperature 0 are not drawn: leave out {told[0]}')
  told += [n for n in drawn if n in PRESETS.get(given.preset, ())]
  if told and settings.get('temperature') != 0:
    sampling = dict(temperature=given.temperature) | sampling
  else:
    sampling = {n: sampling[n] for n in SEARCHED if n in sampling}
  return {n: settings[n] for n in BEAM} | sampling | dict(max_new=max_new, stop=stop)


def _penalty(text: str) -> Any:
  """The function of `--length_penalty=NAME:ALPHA`."""
  name, _, alpha = text.partition(':')
  if name not in beam.PENALTIES:
    raise UserError(f'no length penalty {name!r}; {nearest(name, beam.PENALTIES)}')
  try:
    told = dict(alpha=float(alpha)) if alpha else {}
  except ValueError:
    raise UserError(f'--length_penalty={text}: {alpha!r} is no number') from None
  if name == 'none' and told:
    raise UserError(f'--length_penalty={text}: none takes no number')
  return functools.partial(beam.PENALTIES[name], **told)


def _guides(given: flags.FlagValues, words: Any, prompts: list[str]) -> list[constrain.Guide]:
  """The constraint of the one text, where there is one."""
  if given.regex is None and given.schema is None:
    return []
  if given.regex is not None and given.schema is not None:
    raise UserError('--regex and --schema exclude each other: leave one of them out')
  if given.chat or given.explain or given.beams > 1 or len(prompts) > 1:
    raise UserError('--regex and --schema are for one text that is drawn: name one --prompt alone')
  if given.regex is not None:
    return [constrain.regex(words, given.regex)]
  try:
    with open(given.schema, encoding='utf-8') as f:
      return [constrain.json_schema(words, f.read())]
  except OSError as e:
    raise UserError(f'cannot read --schema={given.schema}: {e.strerror.lower()}') from e


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
  limit = prompts_lib.limit(model)
  longest = (
    0 if model.card.kind == 'encoder_decoder' else max(len(words.encode(p)) for p in prompts)
  )
  if longest < limit < longest + max_new:
    note = f'the model has {limit} positions: the text ends after {limit - longest} tokens'
    print(f'llm-jax: note: {note}', file=sys.stderr)


if __name__ == '__main__':  # python -m llm_jax.cli.generate
  sys.exit(command(['generate', *sys.argv[1:]]))
