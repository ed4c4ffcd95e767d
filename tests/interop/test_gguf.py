"""GGUF files: what the `gguf` package says of every type, what a Hugging Face import says, and wrong input."""

import json
import pathlib

import gguf as package
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.core.errors import UserError
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.interop import gguf, huggingface

REFERENCE = pathlib.Path(__file__).parent / 'reference'
KINDS = package.GGMLQuantizationType
NAMES = {
  'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output',
  'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
  'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down', 'model.layers': 'blk',
}  # fmt: skip
SIZES = dict(
  vocab_size=9,
  hidden_size=256,
  intermediate_size=256,
  num_hidden_layers=1,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=16,
  rms_norm_eps=1e-5,
)


def theirs(name, x, c):
  """Name and values as llama.cpp's converter writes them: halves of each head interleaved (`permute`)."""
  for ours, other in NAMES.items():
    name = name.replace(ours, other)
  heads = {'attn_q': c['num_attention_heads'], 'attn_k': c['num_key_value_heads']}
  for part, n in heads.items():
    if f'.{part}.' in name:
      x = x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
  return name, np.ascontiguousarray(x)


def write(path, tensors, c, *, more=(), leave=(), architecture='llama'):
  """A GGUF file by the package alone. tensors: name -> (array, type)."""
  w = package.GGUFWriter(path, architecture)
  keys = dict(
    embedding_length=c['hidden_size'],
    feed_forward_length=c['intermediate_size'],
    block_count=c['num_hidden_layers'],
    context_length=c['max_position_embeddings'],
  )
  keys |= {
    'attention.head_count': c['num_attention_heads'],
    'attention.head_count_kv': c['num_key_value_heads'],
  }
  for key in set(keys) - set(leave):
    w.add_uint32(f'llama.{key}', keys[key])
  w.add_float32('llama.attention.layer_norm_rms_epsilon', c['rms_norm_eps'])
  if c.get('head_dim'):
    w.add_uint32('llama.attention.key_length', c['head_dim'])
  w.add_float32('llama.rope.freq_base', (c.get('rope_parameters') or {}).get('rope_theta', 1e4))
  for key, value in dict(more).items():
    gguf._add(w, key, value)
  for name, (x, kind) in tensors.items():
    if name not in leave:
      w.add_tensor(name, x, raw_dtype=kind)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return str(path)


def random(kind, seed=0):
  """Name -> (stored array, type) of a one-layer model; K types, which the package cannot write, are random blocks."""
  rng = np.random.default_rng(seed)
  d, kv = 256, 128
  shapes = {'token_embd': (9, d), 'output_norm': (d,)} | {
    f'blk.0.{n}': s
    for n, s in dict(
      attn_norm=(d,), ffn_norm=(d,), attn_q=(d, d), attn_k=(kv, d), attn_v=(kv, d),
      attn_output=(d, d), ffn_gate=(d, d), ffn_up=(d, d), ffn_down=(d, d),
    ).items()
  }  # fmt: skip
  found = {}
  for name, shape in shapes.items():
    x = rng.normal(size=shape).astype(np.float32)
    used = KINDS.F32 if x.ndim == 1 else kind
    if used in (KINDS.Q4_K, KINDS.Q6_K):
      block, size = package.GGML_QUANT_SIZES[used]
      stored = rng.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
      at = slice(0, 4) if used == KINDS.Q4_K else slice(size - 2, size)
      scale = rng.uniform(0.01, 1, (*stored.shape[:2], (at.stop - at.start) // 2))
      stored[..., at] = scale.astype(np.float16).view(np.uint8)
      stored = stored.reshape(shape[0], -1)
    else:
      stored = package.quantize(x, used)
    found[f'{name}.weight'] = (stored, used)
  return found


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K'])
def test_every_type_is_what_the_package_dequantizes(kind, tmp_path):
  tensors = random(KINDS[kind])
  file = gguf.File(write(tmp_path / 'm.gguf', tensors, SIZES))
  params = file.parameters()
  values = {name: package.dequantize(x, t).astype(np.float32) for name, (x, t) in tensors.items()}
  block = params['decoder']['layers']['block_0']
  np.testing.assert_array_equal(params['embedding']['table'], values['token_embd.weight'])
  np.testing.assert_array_equal(block['ffn']['down'][0], values['blk.0.ffn_down.weight'].T)
  q = values['blk.0.attn_q.weight'].reshape(4, 32, 2, 256)  # head, pair, member of the pair
  np.testing.assert_array_equal(
    block['mixer']['query'][0][:, :, :32], q[:, :, 0].transpose(2, 0, 1)
  )
  np.testing.assert_array_equal(
    block['mixer']['query'][0][:, :, 32:], q[:, :, 1].transpose(2, 0, 1)
  )
  assert np.isfinite(values['blk.0.attn_q.weight']).all()


@pytest.mark.parametrize('name', ['llama', 'llama_tied'])
def test_a_file_of_llama_cpps_converter_is_the_hugging_face_import(name, tmp_path):
  told = huggingface.settings(str(REFERENCE / name))
  stored = load_file(REFERENCE / name / 'model.safetensors')
  tensors = {k: (x, KINDS.F32) for k, x in (theirs(n, x, told) for n, x in stored.items())}
  path = write(tmp_path / 'm.gguf', tensors, told)
  _, params = huggingface.load(str(REFERENCE / name))
  jax.tree.map(np.testing.assert_array_equal, gguf.File(path).parameters(), params)
  assert gguf.File(path).model() == huggingface.config(str(REFERENCE / name))
  # and what is written is what the converter writes
  gguf.save(str(tmp_path / 'again.gguf'), params, told, type_='f32')
  again = {t.name: t.data for t in package.GGUFReader(tmp_path / 'again.gguf').tensors}
  assert again.keys() == tensors.keys()
  for key, (x, _) in tensors.items():
    np.testing.assert_array_equal(again[key], x)


@pytest.mark.parametrize('type_', ['f32', 'f16', 'q8_0'])
def test_there_and_back_is_the_packages_quantization(type_, tmp_path):
  tensors = random(KINDS.F32, seed=1)
  file = gguf.File(write(tmp_path / 'a.gguf', tensors, SIZES))
  gguf.save(str(tmp_path / 'b.gguf'), file.parameters(), file.told, type_=type_)
  found = {t.name: t for t in package.GGUFReader(tmp_path / 'b.gguf').tensors}
  for name, (x, _) in tensors.items():
    kind = KINDS.F32 if x.ndim == 1 else KINDS[type_.upper()]
    assert found[name].tensor_type == kind
    np.testing.assert_array_equal(found[name].data, package.quantize(x, kind))
  again = gguf.File(str(tmp_path / 'b.gguf'))
  assert again.told == file.told
  largest = jax.tree.map(lambda a, b: np.abs(a - b).max(), again.parameters(), file.parameters())
  assert max(jax.tree.leaves(largest)) <= dict(f32=0, f16=2e-3, q8_0=2e-2)[type_]


def test_rows_that_do_not_divide_by_32_are_f16(tmp_path):
  _, params = huggingface.load(str(REFERENCE / 'llama'))
  told = huggingface.settings(str(REFERENCE / 'llama'))
  gguf.save(str(tmp_path / 'm.gguf'), params, told, type_='q8_0')
  assert {t.tensor_type.name for t in package.GGUFReader(tmp_path / 'm.gguf').tensors} == {
    'F32',
    'F16',
  }


def no(_):
  """Leaves the file as it is."""


def cut(n):
  return lambda path: path.write_bytes(path.read_bytes()[:n])


EXTRA = (np.ones(4, np.float32), KINDS.F32)
WRONG = {
  'cut within the tensors': ({}, cut(-100), r"cut off: the tensor 'blk\.0\.ffn_\w+\.weight' ends at byte"),
  'cut within the metadata': ({}, cut(200), 'damaged or cut off within its metadata'),
  'another magic': ({}, lambda p: p.write_bytes(b'GGML' + p.read_bytes()[4:]), "begins with b'GGML', not with GGUF"),
  'an empty file': ({}, cut(0), "begins with b'', not with GGUF"),
  'no file': ({}, lambda p: p.unlink(), 'cannot be read \\(no such file'),
  'another version': ({}, lambda p: p.write_bytes(p.read_bytes()[:4] + b'\x09' + p.read_bytes()[5:]), 'version 9'),
  'an architecture that is not read': (dict(architecture='lama'), no, "'lama' of .* did you mean 'llama'"),
  'a missing tensor': (dict(leave=('blk.0.attn_k.weight',)), no, "no tensor 'blk.0.attn_k.weight', which the metadata"),
  'a missing table': (dict(leave=('token_embd.weight',)), no, "no tensor 'token_embd.weight'"),
  'a missing key': (dict(leave=('block_count',)), no, "no key 'llama.block_count'"),
  'one tensor too many': (dict(extra={'blk.0.attn_rot.weight': EXTRA}), no, "the tensor 'blk.0.attn_rot.weight'"),
  'another shape': (dict(extra={'blk.0.attn_q.weight': EXTRA}), no, r"'blk.0.attn_q.weight' has shape \(4,\)"),
  'another type': (
    dict(extra={'blk.0.ffn_up.weight': (np.ones((256, 256), np.int32), KINDS.I32)}), no,
    "'blk.0.ffn_up.weight' of .* type I32, which is not read",
  ),
  'scaled positions': (dict(more={'llama.rope.scaling.type': 'yarn'}), no, "rope.scaling.type='yarn'"),
  'experts': (dict(more={'llama.expert_count': 8}), no, 'expert_count=8'),
  'no tokenizer': ({}, no, r'no tokenizer \(tokenizer.ggml.model'),
  'an unknown tokenizer': (
    dict(more={'tokenizer.ggml.model': 'bert', 'tokenizer.ggml.tokens': ['a']}), no, "'bert' is not supported"
  ),
  'an unknown way to cut words': (
    dict(more={'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['a'], 'tokenizer.ggml.pre': 'smolm'}), no,
    "'smolm' is not supported: did you mean 'smollm'",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_gets_one_line(case, tmp_path):
  kw, spoil, message = WRONG[case]
  kw = dict(kw)
  tensors = random(KINDS.F32) | kw.pop('extra', {})
  write(tmp_path / 'm.gguf', tensors, SIZES, **kw)
  spoil(tmp_path / 'm.gguf')
  with pytest.raises(UserError, match=message) as e:
    gguf.load(str(tmp_path / 'm.gguf'))
  assert '\n' not in str(e.value)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
  _, params = huggingface.load(str(REFERENCE / 'llama'))
  told = huggingface.settings(str(REFERENCE / 'llama'))
  target = str(tmp_path / 'm.gguf')
  with pytest.raises(UserError, match="type 'q4_0'; did you mean 'q8_0'"):
    gguf.save(target, params, told, type_='q4_0')
  with pytest.raises(UserError, match="'gpt2' is not written as GGUF"):
    gguf.save(target, params, huggingface.settings(str(REFERENCE / 'gpt2')))
  with pytest.raises(UserError, match='in the parameters'):
    gguf.save(target, params, told | dict(vocab_size=25))
  byte_level = dict(
    model=dict(type='BPE', vocab={'a': 0}, merges=[]), added_tokens=[], decoder=None
  )
  words = Tokenizer(json.dumps(byte_level), roles=dict(eos=0))
  with pytest.raises(UserError, match='no BPE tokenizers without byte fallback'):
    gguf.save(target, params, told, words)
  assert not list(tmp_path.iterdir())
