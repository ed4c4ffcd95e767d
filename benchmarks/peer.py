"""The peer: a GPT-2 style decoder in PyTorch, as nanoGPT trains it, written from its published description.

Learned positions, pre-LayerNorm, GELU (erf), no biases, tied head (Radford et al. 2019; github.com/karpathy/nanoGPT).
`F.scaled_dot_product_attention` and `F.cross_entropy`, fused AdamW: what is fastest in PyTorch on a CPU.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)). x: [batch, length, embed]."""

  def __init__(self, embed: int, heads: int):
    super().__init__()
    self.heads = heads
    self.mixer_norm = nn.LayerNorm(embed, bias=False)
    self.ffn_norm = nn.LayerNorm(embed, bias=False)
    self.qkv = nn.Linear(embed, 3 * embed, bias=False)
    self.out = nn.Linear(embed, embed, bias=False)
    self.up = nn.Linear(embed, 4 * embed, bias=False)
    self.down = nn.Linear(4 * embed, embed, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    b, t, d = x.shape
    qkv = self.qkv(self.mixer_norm(x)).split(d, dim=2)
    q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in qkv)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
    return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Decoder(nn.Module):
  """ids [batch, length] and targets -> mean cross entropy in nats."""

  def __init__(self, *, vocab: int, embed: int, layers: int, heads: int, length: int):
    super().__init__()
    self.table = nn.Embedding(vocab, embed)
    self.positions = nn.Embedding(length, embed)
    self.blocks = nn.ModuleList(Block(embed, heads) for _ in range(layers))
    self.norm = nn.LayerNorm(embed, bias=False)
    for name, p in self.named_parameters():
      if p.ndim > 1:  # GPT-2: 0.02, and less on the way back to the residual stream
        narrow = (2 * layers) ** -0.5 if name.endswith(('out.weight', 'down.weight')) else 1.0
        nn.init.normal_(p, std=0.02 * narrow)

  def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    x = self.table(ids) + self.positions.weight[: ids.shape[1]]
    for block in self.blocks:
      x = block(x)
    logits = F.linear(self.norm(x), self.table.weight)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def adamw(model: nn.Module, *, rate: float, betas: tuple, decay: float) -> torch.optim.AdamW:
  """Fused AdamW; matrices decay, vectors do not."""
  parameters = list(model.parameters())
  groups = [
    dict(params=[p for p in parameters if p.ndim > 1], weight_decay=decay),
    dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
  ]
  return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def load(model: Decoder, weights: Mapping[str, np.ndarray]) -> None:
  """Copies llm_jax's parameters, by path, into the model."""

  def put(p: torch.Tensor, value: np.ndarray) -> None:
    p.data.copy_(torch.from_numpy(np.ascontiguousarray(value).reshape(p.shape)))

  put(model.table.weight, weights['embedding/table'])
  put(model.positions.weight, weights['positions/table'])
  put(model.norm.weight, weights['decoder/norm/scale'])
  for i, block in enumerate(model.blocks):
    w = {
      p.removeprefix('decoder/layers/block_0/'): x[i]
      for p, x in weights.items()
      if p.startswith('decoder/layers/')
    }
    d = block.out.weight.shape[0]
    qkv = [w[f'mixer/{name}'].reshape(d, d).T for name in ('query', 'key', 'value')]
    put(block.qkv.weight, np.concatenate(qkv))
    put(block.out.weight, w['mixer/out'].reshape(d, d).T)
    put(block.up.weight, w['ffn/up'].T)
    put(block.down.weight, w['ffn/down'].T)
    put(block.mixer_norm.weight, w['mixer_norm/scale'])
    put(block.ffn_norm.weight, w['ffn_norm/scale'])
