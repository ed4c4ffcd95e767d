"""GGUF, the file format of llama.cpp, read and written through the `gguf` package: another table of names.

    model, params, words = gguf.load('model.gguf')
    gguf.save('model.gguf', params, told, words, type_='q8_0')

Its metadata are read as a Hugging Face `config.json` would say them, so one function builds the model of both. Queries
and keys are stored for RoPE on neighbouring pairs (2i, 2i + 1); the patterns `(h k r) -> h (r k)` put the first of all
pairs before the second, as Hugging Face and `positions.rope` have them, so both imports give the same parameters.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigDict, build
from llm_jax.core.errors import UserError, nearest
from llm_jax.interop import gguf_tokenizer, huggingface, partial
from llm_jax.interop.architectures import llama
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import LAYER, OUT, UP, Family, Row, linear, norm
from llm_jax.model.transformer import Model

# Types that the package writes, and how a file of them is numbered in `general.file_type` (ggml's llama_ftype).
TYPES = dict(f32=('F32', 0), f16=('F16', 1), q8_0=('Q8_0', 7))
PAIRS, PAIRS_BIAS = '(h k r) d -> d h (r k)', '(h k r) -> h (r k)'
AT = 'blk.*.attn_'

LLAMA = Family(
  llama.llama,
  (
    Row('embedding/table', 'token_embd.weight', 'v d -> v d'),
    *norm('decoder/norm', 'output_norm'),
    Row('head/w', 'output.weight', 'v d -> d v'),
    *norm(f'{LAYER}mixer_norm', 'blk.*.attn_norm'),
    *norm(f'{LAYER}ffn_norm', 'blk.*.ffn_norm'),
    *linear('mixer/query', f'{AT}q', PAIRS, PAIRS_BIAS),
    *linear('mixer/key', f'{AT}k', PAIRS, PAIRS_BIAS),
    *linear('mixer/value', f'{AT}v', '(h k) d -> d h k', '(h k) -> h k'),
    *linear('mixer/out', f'{AT}output', OUT),
    *linear('ffn/gate', 'blk.*.ffn_gate', UP),
    *linear('ffn/up', 'blk.*.ffn_up', UP),
    *linear('ffn/down', 'blk.*.ffn_down', 'd f -> f d'),
  ),
  '',
  (),
  dict(r=2),
)
ARCHITECTURES = dict(llama=LLAMA)

# Their key below `llama.` and the name in a config.json.
KEYS = dict(
  embedding_length='hidden_size',
  feed_forward_length='intermediate_size',
  block_count='num_hidden_layers',
  context_length='max_position_embeddings',
)
KEYS |= {
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'rope.freq_base': 'rope_theta',
}
OPTIONAL = {'attention.head_count_kv', 'attention.key_length', 'rope.freq_base'}


def load(path: str) -> tuple[Model, Any, Any]:
  """(model, parameters as f32 numpy arrays, vocabulary) of a file.

  Raises `UserError` naming the key or tensor: no GGUF file, one that is cut off, an architecture, a type of tensor or a
  tokenizer that is not read, a tensor that is missing, left over or of another shape.
  """
  file = File(path)
  return (build(file.model())(), file.parameters(), file.vocabulary())


class File:
  """An open file. metadata: by key. told: the same as a config.json would say it."""

  def __init__(self, path: str):
    self.path = path
    reader = _open(path)
    self.metadata = {key: field.contents() for key, field in reader.fields.items()}
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self.family = self._family()
    self.told = self._told()

  def model(self) -> ConfigDict:
    """The model as the `model` of a config."""
    return self.family.model(self.told)

  def parameters(self) -> Any:
    """The parameters as f32 numpy arrays."""
    wanted = huggingface.shapes(build(self.model())())
    return huggingface.to_ours(
      self.family, self._tensors, self.read, wanted, told=f'the metadata of {self.path}'
    )

  def vocabulary(self) -> Any:
    """Its tokenizer. Raises `UserError` when there is none."""
    try:
      return gguf_tokenizer.read(self.metadata)
    except UserError as e:
      raise UserError(f'{self.path}: {e}') from e

  def read(self, name: str) -> np.ndarray:
    """One tensor, dequantized."""
    import gguf

    tensor = self._tensors[name]
    try:
      x = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as e:
      raise UserError(
        f'the tensor {name!r} of {self.path} has the type {tensor.tensor_type.name}, which is not read: convert it '
        'with llama-quantize to F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K'
      ) from e
    return np.asarray(x, np.float32).reshape(tuple(reversed(tensor.shape.tolist())))

  def _family(self) -> Family:
    name = self.metadata.get('general.architecture')
    if name is None:
      raise UserError(f'{self.path} has no key general.architecture: it is no model')
    if name not in ARCHITECTURES:
      raise UserError(
        f'the architecture {name!r} of {self.path} is not supported: {nearest(name, ARCHITECTURES)}'
      )
    return ARCHITECTURES[name]

  def _get(self, key: str, default: Any = UserError) -> Any:
    key = f'{self.metadata["general.architecture"]}.{key}'
    if key in self.metadata:
      return self.metadata[key]
    if default is UserError:
      raise UserError(f'{self.path} has no key {key!r}: convert the model again')
    return default

  def _told(self) -> dict[str, Any]:
    told = {
      ours: value
      for theirs, ours in KEYS.items()
      if (value := self._get(theirs, None if theirs in OPTIONAL else UserError)) is not None
    }
    for key in ('rms_norm_eps', 'rope_theta'):  # stored in 32 bits: 1e-5 is 9.999999747378752e-06
      if key in told:
        told[key] = float(str(np.float32(told[key])))
    size = told.get('head_dim', told['hidden_size'] // told['num_attention_heads'])
    scaling = self._get('rope.scaling.type', 'none')
    wrong = {
      'expert_count': (self._get('expert_count', 0), 0),
      'rope.dimension_count': (self._get('rope.dimension_count', size), size),
      'attention.value_length': (self._get('attention.value_length', size), size),
      'rope.scaling.type': (scaling, 'none'),
    }
    for key, (value, only) in wrong.items():
      if value != only:
        raise UserError(
          f'{self.path} has {key}={value!r}, which is not supported: only {only!r} is'
        )
    if 'token_embd.weight' not in self._tensors:
      raise UserError(f"{self.path} has no tensor 'token_embd.weight': it is no whole model")
    return dict(
      told,
      architectures=['LlamaForCausalLM'],
      model_type='llama',
      hidden_act='silu',
      vocab_size=int(self._tensors['token_embd.weight'].shape[-1]),
      tie_word_embeddings='output.weight' not in self._tensors,
      attention_bias='blk.0.attn_q.bias' in self._tensors,
    )


def save(
  path: str,
  params: Any,
  told: Settings,
  vocabulary: Any = None,
  *,
  type_: str = 'f16',
  name: str = 'llm_jax',
) -> None:
  """Writes parameters of the model that `told`, a config.json of a LLaMA, describes. The file appears once it is whole.

  type_: of matrices, 'f32', 'f16' or 'q8_0'; vectors are f32; f16 where q8_0's blocks of 32 do not divide a row.
  vocabulary: a `data.tokenizer.Tokenizer`, stored with its chat template; None leaves it out.
  """
  import gguf

  if type_ not in TYPES:
    raise UserError(f'cannot write GGUF of type {type_!r}; {nearest(type_, TYPES)}')
  family = _to_write(told)
  flat = huggingface.checked(family, params, told)
  with partial.new(path) as temporary:
    writer = gguf.GGUFWriter(temporary, 'llama')
    writer.add_name(name)
    writer.add_file_type(TYPES[type_][1])
    _add_settings(writer, told)
    for key, value in (gguf_tokenizer.metadata(vocabulary) if vocabulary else {}).items():
      _add(writer, key, value)
    for tensor, x in huggingface.to_theirs(family, flat).items():
      _add_tensor(writer, tensor, x, TYPES[type_][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_write(told: Settings) -> Family:
  """The family of a config.json among those that GGUF has here."""
  known = {family.model: family for family in ARCHITECTURES.values()}
  asked = llama.FAMILIES.get(told.get('model_type'))
  found = known.get(asked.model) if asked else None
  if found is None:
    raise UserError(
      f'the architecture {told.get("model_type")!r} is not written as GGUF: {nearest("", ARCHITECTURES)}'
    )
  return found


def _add_settings(writer: Any, told: Settings) -> None:
  """The metadata of a config.json."""
  sizes = dict(told, num_key_value_heads=told.get('num_key_value_heads') or told['num_attention_heads'])  # fmt: skip
  sizes['rope_theta'] = (told.get('rope_parameters') or told).get('rope_theta', 10_000.0)
  head = told.get('head_dim') or told['hidden_size'] // told['num_attention_heads']
  sizes['head_dim'] = None if head * told['num_attention_heads'] == told['hidden_size'] else head
  for theirs, ours in KEYS.items():
    if sizes.get(ours) is not None:
      _add(writer, f'llama.{theirs}', sizes[ours])
  writer.add_rope_dimension_count(head)
  writer.add_vocab_size(told['vocab_size'])


def _add(writer: Any, key: str, value: Any) -> None:
  kinds: dict[type, Callable] = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  kinds[type(value)](key, value)


def _add_tensor(writer: Any, name: str, x: np.ndarray, type_: str) -> None:
  import gguf

  kinds = gguf.GGMLQuantizationType
  if x.ndim == 1:
    type_ = 'F32'
  elif type_ == 'Q8_0' and x.shape[-1] % 32:
    type_ = 'F16'
  writer.add_tensor(name, gguf.quantize(x, kinds[type_]), raw_dtype=kinds[type_])


def _open(path: str) -> Any:
  """A `GGUFReader` whose tensors are all inside the file."""
  import gguf

  class Reader(gguf.GGUFReader):
    """Reads an array at once, where the package makes several objects for each element (a vocabulary has 100,000), and
    names the tensor that a file is too short for, where the package fails on its shape."""

    def _get_field_parts(self, start: int, raw_type: int) -> tuple:
      if raw_type != gguf.GGUFValueType.ARRAY:
        return super()._get_field_parts(start, raw_type)
      kind, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
      of, n, at = gguf.GGUFValueType(int(kind[0])), int(count[0]), start + 12
      if of in self.gguf_scalar_to_np:
        values = self._get(at, self.gguf_scalar_to_np[of], n)
        if len(values) < n:
          raise IndexError('an array ends too early')
        return 12 + values.nbytes, [kind, count, values], [2], [gguf.GGUFValueType.ARRAY, of]
      if of != gguf.GGUFValueType.STRING:
        return super()._get_field_parts(start, raw_type)
      texts, raw, order = [], memoryview(self.data), '<' if self.byte_order == 'I' else '>'
      for _ in range(n):
        (size,) = struct.unpack_from(f'{order}Q', raw, at)
        texts.append(raw[at + 8 : at + 8 + size])
        at += 8 + size
      indices = list(range(2, 2 + n))
      return at - start, [kind, count, *texts], indices, [gguf.GGUFValueType.ARRAY, of]

    def _build_tensors(self, start: int, fields: list) -> None:
      for field in fields:
        _, name, _, dims, kind, offset = field.parts
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
        end = int(start + offset[0]) + int(np.prod(dims)) * size // block
        if end > len(self.data):
          raise UserError(
            f'{path} is cut off: the tensor {bytes(name).decode()!r} ends at byte {end:,}, the file has '
            f'{len(self.data):,}: download it again'
          )
      super()._build_tensors(start, fields)

  try:
    with open(path, 'rb') as f:
      magic = f.read(4)
  except OSError as e:
    raise UserError(
      f'{path} cannot be read ({(e.strerror or str(e)).lower()}): name a GGUF file'
    ) from e
  if magic != b'GGUF':
    raise UserError(f'{path} is no GGUF file: it begins with {magic!r}, not with GGUF')
  try:
    return Reader(path)
  except UserError:
    raise
  except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as e:
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise UserError(
      f'{path} is damaged or cut off within its metadata ({reason}): download it again'
    ) from e
