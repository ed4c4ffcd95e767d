"""The tokenizer in the metadata of a GGUF file as a `tokenizer.json`, and the reverse.

`tokenizer.ggml.model` is 'gpt2' (byte-level BPE: pieces and merges, and in `tokenizer.ggml.pre` the name of the rule
that cuts a text into words) or 'llama' (SentencePiece's BPE: pieces and scores; the best neighbours are joined first,
so the scores are an order of merges).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import tokenizer
from llm_jax.data.vocab import SPACE

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
ROLES = dict(
  bos='bos_token_id',
  eos='eos_token_id',
  unk='unknown_token_id',
  pad='padding_token_id',
  turn='eot_token_id',
)
BYTE_LEVEL, SENTENCEPIECE = 'gpt2', 'llama'  # GGUF's names of the two kinds, see above
KEY = 'tokenizer.ggml.'

_LETTERS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
  r'\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _bytes(**kw: Any) -> dict[str, Any]:
  return dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True) | kw


def _words(digits: str) -> dict[str, Any]:
  """Cut by a pattern, then written as bytes."""
  pattern = dict(Regex=_LETTERS.format(digits=digits))
  cut = dict(type='Split', pattern=pattern, behavior='Isolated', invert=False)
  return dict(type='Sequence', pretokenizers=[cut, _bytes(use_regex=False)])


_DIGITS = dict(
  type='Sequence',
  pretokenizers=[dict(type='Digits', individual_digits=True), _bytes(use_regex=True)],
)
# How a text is cut into words, by the name that llama.cpp gives it; the first of those that are equal is written.
WORDS: dict[str, dict[str, Any]] = {
  'gpt-2': _bytes(use_regex=True),
  'smollm': _DIGITS,
  'starcoder': _DIGITS,
  'llama-bpe': _words(r'\p{N}{1,3}'),
  'llama3': _words(r'\p{N}{1,3}'),
  'qwen2': _words(r'\p{N}'),
}
WHOLE_WORDS = ('llama-bpe', 'llama3')  # a word that is a piece is taken whole, whatever the merges


def read(metadata: Mapping[str, Any]) -> tokenizer.Tokenizer:
  """The tokenizer of these metadata. Raises `UserError` when there is none, or none that is known."""
  kind = metadata.get(f'{KEY}model')
  if kind is None or f'{KEY}tokens' not in metadata:
    raise UserError(
      f'it has no tokenizer ({KEY}model or {KEY}tokens is missing): use --vocab=none to convert the weights alone, or '
      '--vocab=DIR for the tokenizer of a Hugging Face folder'
    )
  kinds = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
  if kind not in kinds:
    raise UserError(f'its {KEY}model {kind!r} is not supported: {nearest(kind, kinds)}')
  pieces = metadata[f'{KEY}tokens']
  types = metadata.get(f'{KEY}token_type') or [NORMAL] * len(pieces)
  if len(types) != len(pieces):
    raise UserError(f'it has {len(pieces)} tokens and {len(types)} in {KEY}token_type')
  roles = {role: metadata.get(KEY + key) for role, key in ROLES.items()}
  begins = metadata.get(f'{KEY}add_bos_token', kind == SENTENCEPIECE)
  return tokenizer.Tokenizer(
    kinds[kind](metadata, pieces, types),
    roles=roles | dict(start=roles['bos'] if begins else None),
    template=metadata.get('tokenizer.chat_template'),
  )


def sentencepiece(
  pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, prefix: bool = True
) -> str:
  """SentencePiece's BPE with byte fallback as a `tokenizer.json`. prefix: a space is put in front of every text."""
  ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
  merges = []
  for piece, i in ids.items():
    if types[i] in (NORMAL, USER):
      halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
      known = [(a, b) for a, b in halves if a in ids and b in ids]
      merges += [(-scores[i], i, a, b) for a, b in known]
  merges.sort(key=lambda m: m[:2])
  swap = lambda a, b: dict(type='Replace', pattern=dict(String=a), content=b)
  spaces = [dict(type='Prepend', prepend=SPACE)] * prefix + [swap(' ', SPACE)]
  back = [swap(SPACE, ' '), dict(type='ByteFallback'), dict(type='Fuse')]
  back += [dict(type='Strip', content=' ', start=1, stop=0)] * prefix
  unknown = next((p for p, t in zip(pieces, types, strict=True) if t == UNKNOWN), None)
  return _json(
    pieces,
    types,
    normalizer=dict(type='Sequence', normalizers=spaces),
    pre_tokenizer=None,
    decoder=dict(type='Sequence', decoders=back),
    merges=[[a, b] for _, _, a, b in merges],
    unk_token=unknown,
    fuse_unk=True,
    byte_fallback=True,
  )


def metadata(vocabulary: tokenizer.Tokenizer) -> dict[str, Any]:
  """The metadata of a tokenizer. Raises `UserError` for one that GGUF has no name for."""
  described = json.loads(vocabulary.description)
  kind = BYTE_LEVEL if 'ByteLevel' in json.dumps(described['decoder']) else SENTENCEPIECE
  found = {BYTE_LEVEL: _byte_level_metadata, SENTENCEPIECE: _sentencepiece_metadata}[kind](
    described
  )
  pieces = _pieces(described, vocabulary.base)
  special = {t['id']: CONTROL if t['special'] else USER for t in described['added_tokens']}
  is_byte = lambda p: kind == SENTENCEPIECE and len(p) == 6 and p.startswith('<0x')
  types = [special.get(i, BYTE if is_byte(p) else NORMAL) for i, p in enumerate(pieces)]
  if kind == SENTENCEPIECE and vocabulary.unk is not None:
    types[vocabulary.unk] = UNKNOWN
  found |= dict(model=kind, tokens=pieces, token_type=types)
  found |= dict(add_bos_token=vocabulary.start is not None)
  roles = {key: vocabulary.roles[role] for role, key in ROLES.items()}
  found |= {key: i for key, i in roles.items() if i is not None}
  template = {} if vocabulary.template is None else {'tokenizer.chat_template': vocabulary.template}
  return {KEY + key: value for key, value in found.items()} | template


def _byte_level(told: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]) -> str:
  name = told.get(f'{KEY}pre', 'gpt-2')
  if name not in WORDS:
    raise UserError(f'its {KEY}pre {name!r} is not supported: {nearest(name, WORDS)}')
  if f'{KEY}merges' not in told:
    raise UserError(f'it has no {KEY}merges: convert the model again')
  return _json(
    pieces,
    types,
    normalizer=None,
    pre_tokenizer=WORDS[name],
    decoder=_bytes(use_regex=True, add_prefix_space=True),
    merges=[merge.split(' ') for merge in told[f'{KEY}merges']],
    ignore_merges=name in WHOLE_WORDS,
  )


def _sentencepiece(told: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]) -> str:
  scores = told.get(f'{KEY}scores')
  if scores is None or len(scores) != len(pieces):
    raise UserError(f'it has no {KEY}scores for its {len(pieces)} tokens: convert the model again')
  return sentencepiece(pieces, scores, types, prefix=told.get(f'{KEY}add_space_prefix', True))


def _json(
  pieces: Sequence[str],
  types: Sequence[int],
  *,
  normalizer: Any,
  pre_tokenizer: Any,
  decoder: Any,
  **model: Any,
) -> str:
  added = [
    dict(id=i, content=p, single_word=False, lstrip=False, rstrip=False, normalized=False, special=t != USER)
    for i, (p, t) in enumerate(zip(pieces, types, strict=True))
    if t in (CONTROL, USER, UNKNOWN)
  ]  # fmt: skip
  bpe = dict(
    type='BPE',
    dropout=None,
    unk_token=None,
    continuing_subword_prefix=None,
    end_of_word_suffix=None,
    fuse_unk=False,
    byte_fallback=False,
    ignore_merges=False,
    vocab={p: i for i, p in reversed(list(enumerate(pieces)))},
  )
  parts = dict(
    version='1.0',
    truncation=None,
    padding=None,
    added_tokens=added,
    normalizer=normalizer,
    pre_tokenizer=pre_tokenizer,
    post_processor=None,
    decoder=decoder,
    model=bpe | model,
  )
  return json.dumps(parts, ensure_ascii=False)


def _pieces(described: Mapping[str, Any], size: int) -> list[str]:
  """Spellings by id; numbers without a token get a name nobody writes."""
  named = {i: p for p, i in described['model']['vocab'].items()}
  named |= {t['id']: t['content'] for t in described['added_tokens']}
  return [named.get(i, f'[PAD{i}]') for i in range(size)]


def _byte_level_metadata(described: Mapping[str, Any]) -> dict[str, Any]:
  cut = described['pre_tokenizer']
  name = next((name for name, known in WORDS.items() if _same(known, cut)), None)
  if name is None or described['model'].get('type') != 'BPE':
    raise UserError(
      f'GGUF has no name for the way this tokenizer cuts words; known: {", ".join(WORDS)}: write --format=huggingface'
    )
  merges = [m if isinstance(m, str) else ' '.join(m) for m in described['model']['merges']]
  return dict(pre=name, merges=merges, add_space_prefix=False)


def _same(known: Any, found: Any) -> bool:
  """Whether two descriptions mean the same; keys that one leaves out have their default."""
  if isinstance(known, dict) and isinstance(found, dict):
    return all(_same(known[k], found[k]) for k in known.keys() & found.keys())
  if isinstance(known, list) and isinstance(found, list):
    return len(known) == len(found) and all(map(_same, known, found))
  return known == found


def _sentencepiece_metadata(described: Mapping[str, Any]) -> dict[str, Any]:
  model = described['model']
  if model.get('type') != 'BPE' or not model.get('byte_fallback'):
    raise UserError(
      f'GGUF has no {model.get("type")} tokenizers without byte fallback here: write --format=huggingface'
    )
  pieces = _pieces(described, 1 + max(model['vocab'].values()))
  order: dict[str, int] = {}
  for rank, merge in enumerate(model['merges']):
    a, b = merge.split(' ') if isinstance(merge, str) else merge
    order.setdefault(a + b, rank)
  last = float(len(model['merges']))
  scores = [-float(order.get(piece, last)) for piece in pieces]
  return dict(scores=scores, add_space_prefix='Prepend' in json.dumps(described['normalizer']))
