"""Writes mup.json: what the package of the authors of muP makes of a small transformer that is 4 times as wide.

  pip install mup==1.0.0 torch && python tests/optim/make_mup_reference.py

For every weight: the ratio of its initial standard deviation to the base model's, the factors of its learning rate and
of rate * weight_decay under MuAdamW and MuSGD, and the multiplier of its layer. The feed-forward is 2 times as wide, so
that fan-in and fan-out differ.
"""

import json
import pathlib

import torch
from mup import MuAdamW, MuReadout, MuSGD, set_base_shapes

VOCAB, LENGTH = 512, 128


class Decoder(torch.nn.Module):
  """The weights of one block and its two ends; nothing is run."""

  def __init__(self, embed: int, ffn: int):
    super().__init__()
    linear = torch.nn.Linear
    self.embedding = torch.nn.Embedding(VOCAB, embed)
    self.positions = torch.nn.Embedding(LENGTH, embed)
    self.norm = torch.nn.LayerNorm(embed)
    self.query, self.key, self.value = (linear(embed, embed) for _ in range(3))
    self.attention_out = linear(embed, embed)
    self.ffn_in, self.ffn_out = linear(embed, ffn), linear(ffn, embed)
    self.head = MuReadout(embed, VOCAB, bias=False)


def main() -> None:
  torch.manual_seed(0)
  base, delta, wide = Decoder(128, 256), Decoder(256, 512), Decoder(512, 512)
  before = {name: float(p.std()) for name, p in base.named_parameters()}
  set_base_shapes(wide, base, delta=delta)
  told = {
    name: dict(std=round(float(p.std()) / before[name], 4), multiplier=1.0)
    for name, p in wide.named_parameters()
    if not name.endswith('bias') and 'norm' not in name
  }
  told['head.weight']['multiplier'] = 1 / wide.head.width_mult()
  names = {id(p): name for name, p in wide.named_parameters()}
  for rule, make in (('adam', MuAdamW), ('sgd', MuSGD)):
    for group in make(wide.parameters(), lr=1.0, weight_decay=1.0).param_groups:
      for p in group['params']:
        entry = told.setdefault(names[id(p)], {})
        entry[rule] = group['lr']
        entry[f'{rule} decay'] = group['lr'] * group['weight_decay']
  path = pathlib.Path(__file__).with_name('mup.json')
  path.write_text(json.dumps(told, indent=1, sort_keys=True) + '\n')


if __name__ == '__main__':
  main()
