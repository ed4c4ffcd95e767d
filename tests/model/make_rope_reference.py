"""The frequencies of rescaled rotary positions as transformers computes them, stored in `rope.json`.

python -m tests.model.make_rope_reference      # needs the extra `parity`
"""

import json
import pathlib

STORED = pathlib.Path(__file__).with_name('rope.json')
YARN = dict(rope_type='yarn', factor=16.0, original_max_position_embeddings=4096)
LLAMA3 = dict(
  rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=8192, rope_theta=5e5,
)  # fmt: skip
LONG = dict(
  rope_type='longrope', factor=32.0, original_max_position_embeddings=4096,
  short_factor=[1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5], long_factor=[1.0, 1.5, 4.0, 9.0, 20.0, 31.0, 32.0, 32.0],
)  # fmt: skip
# name: (rope_parameters, head_dim, length asked about, max_position_embeddings)
CASES = {
  'linear': (dict(rope_type='linear', factor=4.0), 64, 4096, 4096),
  'linear_partial': (
    dict(rope_type='linear', factor=2.5, partial_rotary_factor=0.5),
    64,
    4096,
    4096,
  ),
  'dynamic_within': (dict(rope_type='dynamic', factor=2.0), 64, 1000, 2048),
  'dynamic_beyond': (dict(rope_type='dynamic', factor=2.0), 64, 5000, 2048),
  'yarn': (YARN, 128, 65536, 65536),
  'yarn_small_head': (dict(YARN, original_max_position_embeddings=32, factor=4.0), 8, 128, 128),
  'yarn_base': (dict(YARN, rope_theta=1e6, beta_fast=16.0, beta_slow=2.0), 128, 65536, 65536),
  'yarn_attention': (dict(YARN, attention_factor=0.5), 128, 65536, 65536),
  'llama3': (LLAMA3, 128, 131072, 131072),
  'llama3_2': (dict(LLAMA3, factor=32.0), 64, 131072, 131072),
  'longrope_short': (LONG, 16, 4096, 131072),
  'longrope_long': (LONG, 16, 4097, 131072),
}


def main() -> None:
  """All cases."""
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  found = {}
  for name, (told, head_dim, length, longest) in CASES.items():
    told = dict(rope_theta=10000.0) | told
    sizes = dict(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=longest)
    config = LlamaConfig(**sizes, rope_parameters=dict(told))
    values, factor = ROPE_INIT_FUNCTIONS[told['rope_type']](config, 'cpu', seq_len=length)
    found[name] = dict(inv_freq=values.double().tolist(), attention_scaling=float(factor))
  STORED.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
