"""The files of karpathy/llama2.c: `model.bin` in its first format, and the `tok512.bin` beside it.

A header of seven int32 (embed, ffn, layers, heads, groups, vocabulary, length; a negative vocabulary says that the head
is not tied), then f32 matrices, each kind for all layers. They are those of LLaMA in the order of GGUF, whose table
of names serves.
"""

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.config import ConfigDict, build
from llm_jax.core.errors import UserError
from llm_jax.data import tokenizer
from llm_jax.data.vocab import SPACE
from llm_jax.interop import gguf, gguf_tokenizer, huggingface

NAMES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
NAMES += ('num_key_value_heads', 'vocab_size', 'max_position_embeddings')
UNK, BOS, EOS, BYTES = 0, 1, 2, 3  # ids of its tokenizers; a byte b is id 3 + b


class Checkpoint(NamedTuple):
  """told: as a Hugging Face config.json would say it. tensors: by their names in GGUF."""

  told: dict[str, Any]
  tensors: Mapping[str, np.ndarray]

  def model(self) -> ConfigDict:
    """The model as the `model` of a config."""
    return gguf.LLAMA.model(self.told)

  def parameters(self) -> Any:
    """The parameters as f32 numpy arrays."""
    wanted = huggingface.shapes(build(self.model())())
    return huggingface.to_ours(
      gguf.LLAMA, self.tensors, self.tensors.__getitem__, wanted, told='the header'
    )


def read(path: str) -> Checkpoint:
  """A `model.bin`. Raises `UserError` when the file is not as long as its header says."""
  try:
    with open(path, 'rb') as f:
      header, body = f.read(28), f.read()
  except OSError as e:
    raise UserError(
      f'{path} cannot be read ({(e.strerror or str(e)).lower()}): name a .bin of llama2.c'
    ) from e
  sizes = dict(zip(NAMES, struct.unpack('<7i', header), strict=True)) if len(header) == 28 else {}
  tied = sizes.get('vocab_size', 0) > 0
  sizes['vocab_size'] = abs(sizes.get('vocab_size', 0))
  if not sizes or not all(0 < n < 1 << 24 for n in sizes.values()):
    raise UserError(f'{path} is no model of llama2.c: its header has impossible sizes {sizes}')
  layout = _layout(sizes, tied)
  need = 4 * sum(math.prod(shape) for _, shape in layout)
  if len(body) != need:
    raise UserError(
      f'{path} is damaged or in a newer format of llama2.c: its header asks for {28 + need:,} bytes, it has '
      f'{28 + len(body):,}'
    )
  values, tensors, at = np.frombuffer(body, '<f4'), {}, 0
  for name, shape in layout:
    x = values[at : at + math.prod(shape)].reshape(shape)
    at += math.prod(shape)
    if '*' in name:
      tensors |= {name.replace('*', str(i)): part for i, part in enumerate(x)}
    elif name:
      tensors[name] = x
  told = dict(sizes, model_type='llama', architectures=['LlamaForCausalLM'], hidden_act='silu')
  told |= dict(rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=tied)
  return Checkpoint(told, tensors)


def vocabulary(path: str, size: int) -> tokenizer.Tokenizer:
  """A `tokenizer.bin` of `size` ids: the longest length, then (score f32, length i32, bytes) of every piece.

  In the text that its models read every story begins with the start token and none has another end, so that token is
  both start and end here.
  """
  if not os.path.isfile(path):
    raise UserError(f'no tokenizer {path}: name it with --vocab=FILE, or --vocab=none for none')
  with open(path, 'rb') as f:
    raw = f.read()
  pieces, scores, at = [], [], 4
  try:
    for _ in range(size):
      score, length = struct.unpack_from('<fi', raw, at)
      pieces.append(raw[at + 8 : at + 8 + length].decode())
      scores.append(score)
      at += 8 + length
  except (struct.error, UnicodeDecodeError) as e:
    raise UserError(f'{path} is no tokenizer of {size} ids of llama2.c ({e})') from e
  if at != len(raw):
    raise UserError(f'{path} has more than {size} ids: it is of another model')
  pieces[UNK], pieces[BOS], pieces[EOS] = '<unk>', '<s>', '</s>'
  pieces[BYTES : BYTES + 256] = [f'<0x{b:02X}>' for b in range(256)]
  types = [gguf_tokenizer.UNKNOWN, *[gguf_tokenizer.CONTROL] * 2, *[gguf_tokenizer.BYTE] * 256]
  types += [gguf_tokenizer.NORMAL] * (size - len(types))
  described = gguf_tokenizer.sentencepiece([p.replace(' ', SPACE) for p in pieces], scores, types)
  return tokenizer.Tokenizer(described, roles=dict(bos=BOS, start=BOS, eos=BOS, unk=UNK))


def _layout(c: Mapping[str, int], tied: bool) -> list[tuple[str, tuple[int, ...]]]:
  """The parts of the file in order; '' for the tables of angles, which are computed anew."""
  d, f, n, v = (c[k] for k in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'vocab_size'))  # fmt: skip
  size = d // c['num_attention_heads']
  kv = size * c['num_key_value_heads']
  angles = ('', (2, c['max_position_embeddings'], size // 2))
  return [
    ('token_embd.weight', (v, d)),
    ('blk.*.attn_norm.weight', (n, d)),
    ('blk.*.attn_q.weight', (n, d, d)),
    ('blk.*.attn_k.weight', (n, kv, d)),
    ('blk.*.attn_v.weight', (n, kv, d)),
    ('blk.*.attn_output.weight', (n, d, d)),
    ('blk.*.ffn_norm.weight', (n, d)),
    ('blk.*.ffn_gate.weight', (n, f, d)),
    ('blk.*.ffn_down.weight', (n, d, f)),
    ('blk.*.ffn_up.weight', (n, f, d)),
    ('output_norm.weight', (d,)),
    angles,
    *([] if tied else [('output.weight', (v, d))]),
  ]
