"""The tokenizer of a model that somebody else trained, as a vocabulary: `tokenizers` on its `tokenizer.json`.

The ids are the model's own, so the end of a document is not id 1 and there may be neither padding nor unknown.
Markers, where asked for, come after them, as in `vocab.py`.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.errors import UserError
from llm_jax.data import vocab

FILE, TEMPLATE = 'tokenizer.json', vocab.TEMPLATE
ROLES = ('bos', 'start', 'eos', 'turn', 'unk', 'pad')


class Tokenizer(vocab.Vocabulary):
  """A `tokenizer.json` with the ids that play a role.

  description: the text of the file. roles: ids by name, None for none: `bos` and `eos` as the template may write them,
  `eos` the end of a document, `turn` the end of an answer (default eos), `start` what stands before every prompt,
  `unk`, `pad`. A padding id with another role is none of its own. Raises `UserError` for a description that cannot be
  read.
  """

  file = FILE

  def __init__(
    self,
    description: str,
    *,
    roles: Mapping[str, int | None],
    template: str | None = None,
    extra_ids: int = 0,
    modes: Sequence[str] = (),
  ):
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(description)
    except Exception as e:  # the library raises nothing more particular
      raise UserError(
        f'the tokenizer cannot be read ({" ".join(str(e).split())}): download {FILE} again'
      ) from e
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.description, self.template = description, template or None
    self.roles = {name: roles.get(name) for name in ROLES}
    if self.roles['eos'] is None:
      raise UserError('the tokenizer names no token that ends a text: add eos_token to its config')
    self.start, self.eos, self.unk = (self.roles[name] for name in ('start', 'eos', 'unk'))
    taken = {self.roles[name] for name in ('bos', 'start', 'eos', 'turn', 'unk')}
    self.pad = None if self.roles['pad'] in taken else self.roles['pad']
    super().__init__(1 + max(self._tokenizer.get_vocab().values()), extra_ids, modes)
    wrong = {n: i for n, i in self.roles.items() if i is not None and not 0 <= i < self.base}
    if wrong:
      name, i = wrong.popitem()
      raise UserError(f'the tokenizer has {self.base} ids, but its {name} is number {i}')
    self._silent = [self.eos] if self.pad is None else [self.eos, self.pad]

  @property
  def turn(self) -> int:
    """The id that ends an answer."""
    return self.eos if self.roles['turn'] is None else self.roles['turn']

  @functools.cached_property
  def spelling(self) -> dict[str, str]:
    """The tokens with a role as a chat template knows them: `bos_token`, `eos_token`, `unk_token`, `pad_token`."""
    ids = {name: self.roles[name] for name in ('bos', 'eos', 'unk', 'pad')}
    return {
      f'{name}_token': self._tokenizer.id_to_token(i) for name, i in ids.items() if i is not None
    }

  def with_markers(self, extra_ids: int, modes: Sequence[str]) -> 'Tokenizer':
    """The same ids, followed by these markers."""
    return Tokenizer(
      self.description, roles=self.roles, template=self.template, extra_ids=extra_ids, modes=modes
    )

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def located(self, text: str) -> list[tuple[int, int, int]]:
    """As `Vocabulary.located`, by the library's own account of what each id stands for."""
    if any(start in text for start in self._starts):
      return super().located(text)
    found = self._tokenizer.encode(text, add_special_tokens=False)
    return [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True)]

  def _decode(self, ids: list[int]) -> str:
    shown = [i for i in ids if i not in self._silent]
    return self._tokenizer.decode(shown, skip_special_tokens=False) if shown else ''

  def _base_pieces(self) -> list[bytes]:
    """Of a byte-level tokenizer, whose letters are bytes, and of one that writes spaces as U+2581 exact, but for the
    space that the latter may put before a text; of others what each id says alone."""
    described = json.loads(self.description)
    written = json.dumps(described.get('decoder'))
    added = {t['id']: t['content'].encode() for t in described.get('added_tokens') or ()}
    pieces = [self._tokenizer.id_to_token(i) or '' for i in range(self.base)]
    if 'ByteLevel' in written:
      letters = {letter: bytes([byte]) for byte, letter in enumerate(_letters())}
      said = [b''.join(letters.get(c, c.encode()) for c in piece) for piece in pieces]
    elif 'ByteFallback' in written or 'Metaspace' in written:
      said = [vocab.unescaped(piece) for piece in pieces]
    else:
      said = [self._tokenizer.decode([i]).encode() for i in range(self.base)]
    return [added.get(i, piece) for i, piece in enumerate(said)]

  def _base_controls(self) -> list[int]:
    added = json.loads(self.description).get('added_tokens') or ()
    special = (t['id'] for t in added if t.get('special', True))
    return sorted({*special, *(i for i in self.roles.values() if i is not None)})

  def _settings(self) -> dict:
    return super()._settings() | dict(roles=self.roles)

  def _content(self) -> bytes:
    return self.description.encode()


def load(folder: str, settings: Mapping[str, Any]) -> Tokenizer:
  """What `Tokenizer.save(folder)` wrote; settings: its vocab.json."""
  path = os.path.join(folder, FILE)
  if not os.path.isfile(path):
    raise UserError(f'no tokenizer in {folder} ({FILE} is missing): convert the model again')
  return Tokenizer(
    _read(path),
    roles=settings['roles'],
    template=vocab.template_of(folder),
    extra_ids=settings['extra_ids'],
    modes=tuple(settings['modes']),
  )


def from_huggingface(folder: str) -> Tokenizer:
  """The tokenizer of a Hugging Face folder: `tokenizer.json`, the roles in the JSON files beside it, its template.

  Raises `UserError` when there is no `tokenizer.json`.
  """
  path = os.path.join(folder, FILE)
  if not os.path.isfile(path):
    raise UserError(
      f'{folder} has no tokenizer ({FILE} is missing): add the file, or use --vocab=none to convert the weights alone'
    )
  description = _read(path)
  told = _json(folder, 'tokenizer_config.json')
  model, generation = _json(folder, 'config.json'), _json(folder, 'generation_config.json')
  ids = _ids(description)
  named = _json(folder, 'special_tokens_map.json') | {k: v for k, v in told.items() if v}
  roles: dict[str, int | None] = {}
  for role in ('bos', 'eos', 'unk', 'pad'):
    name = named.get(f'{role}_token')
    name = name.get('content') if isinstance(name, dict) else name
    given = generation.get(f'{role}_token_id', model.get(f'{role}_token_id'))
    given = given[0] if isinstance(given, list) and given else given
    roles[role] = ids.get(name, given) if isinstance(name, str) else given
  if roles['eos'] is None:
    raise UserError(f'{folder} names no eos_token: add it to tokenizer_config.json')
  starts = model.get('decoder_start_token_id')
  if starts is None and _begins(description, told, roles['bos']):
    starts = roles['bos']
  template = vocab.template_of(folder) or told.get('chat_template')
  if isinstance(template, list):  # several, by name
    template = {t['name']: t['template'] for t in template}.get('default')
  return Tokenizer(description, roles=roles | dict(start=starts), template=template)


def write_huggingface(vocabulary: Tokenizer, folder: str) -> None:
  """Writes what `from_huggingface(folder)` and transformers read."""
  named = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  named |= vocabulary.spelling | dict(add_bos_token=vocabulary.start is not None)
  description = vocabulary.description
  if vocabulary.start is not None:
    description = _with_start(description, vocabulary.start)
  with open(os.path.join(folder, FILE), 'w', encoding='utf-8') as f:
    f.write(description)
  if vocabulary.template is not None:
    named['chat_template'] = vocabulary.template
    with open(os.path.join(folder, TEMPLATE), 'w', encoding='utf-8') as f:
      f.write(vocabulary.template)
  with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
    json.dump(named, f, indent=1, ensure_ascii=False)


def _with_start(description: str, start: int) -> str:
  """A tokenizer.json that itself puts the start token in front of a text, where it does not yet."""
  described = json.loads(description)
  if described.get('post_processor') is None:
    token = next(t['content'] for t in described['added_tokens'] if t['id'] == start)
    text = lambda name, of: {'Sequence': dict(id=name, type_id=of)}
    first = {'SpecialToken': dict(id=token, type_id=0)}
    described['post_processor'] = dict(
      type='TemplateProcessing',
      single=[first, text('A', 0)],
      pair=[first, text('A', 0), text('B', 1)],
      special_tokens={token: dict(id=token, ids=[start], tokens=[token])},
    )
  return json.dumps(described, ensure_ascii=False)


def _begins(description: str, told: Mapping[str, Any], bos: int | None) -> bool:
  """Whether encoding a text puts the beginning-of-text token in front of it."""
  if bos is None:
    return False
  if 'add_bos_token' in told:
    return bool(told['add_bos_token'])
  import tokenizers

  return tokenizers.Tokenizer.from_str(description).encode('a').ids[:1] == [bos]


def _letters() -> str:
  """The letter that stands for each byte in byte-level BPE: itself where it prints, else the next from U+0100 on, as in
  GPT-2."""
  prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  rest = iter(range(0x100, 0x200))
  return ''.join(chr(byte if byte in prints else next(rest)) for byte in range(256))


def _ids(description: str) -> dict[str, int]:
  """The added tokens of a tokenizer.json, or all of its tokens where it has none."""
  try:
    described = json.loads(description)
    ids = {t['content']: t['id'] for t in described.get('added_tokens') or ()}
    pieces = described['model'].get('vocab')
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{FILE} is not a tokenizer ({e}): download it again') from e
  return (pieces if isinstance(pieces, dict) else {}) | ids


def _json(folder: str, name: str) -> dict[str, Any]:
  path = os.path.join(folder, name)
  if not os.path.isfile(path):
    return {}
  try:
    return json.loads(_read(path))
  except ValueError as e:
    raise UserError(f'{path} is not JSON ({e}): download it again') from e


def _read(path: str) -> str:
  try:
    with open(path, encoding='utf-8') as f:
      return f.read()
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8 text (byte {e.start}): download it again') from e
