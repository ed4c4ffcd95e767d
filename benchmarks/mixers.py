r"""Forward and backward pass of four layers of each mixer, beside its reference implementation in PyTorch on the CPU.

  python -m benchmarks.mixers                        # about three minutes; needs the extra `parity`
  python -m benchmarks.mixers --only=mamba,rwkv --rounds=3

Peers: transformers' LLaMA, Mistral (a window of 64), Mamba, Mamba-2 and RWKV (without their CUDA kernels, as they run
on a CPU), eager; for the others, which transformers does not have, recurrences.py. Both sides
have the same weights and must agree on the output; ours runs its layers unrolled, as PyTorch does. Calls are taken in
turn, so that what else the machine does hits both. Medians; `ratio` is the peer's time over ours.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = dict(hidden_size=256, num_hidden_layers=4, vocab_size=64)
PEERS = {
  'llama': (
    'LlamaConfig', dict(SIZES, intermediate_size=688, num_attention_heads=4, tie_word_embeddings=True),
  ),
  'mistral': (
    'MistralConfig',
    dict(
      SIZES, intermediate_size=688, num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    ),
  ),
  'mamba': ('MambaConfig', dict(SIZES)),
  'mamba2': (
    'Mamba2Config', dict(SIZES, num_heads=8, head_dim=64, n_groups=1, state_size=64, chunk_size=64),
  ),
  'rwkv': ('RwkvConfig', dict(SIZES, use_cache=False, rescale_every=0)),
}  # fmt: skip


WRITTEN = ('retention', 's4', 's4d', 'h3', 'gss', 'hyena')


def published(name: str) -> tuple[Any, Any, Any]:
  """(our model, its parameters, the peer without its head), of one random checkpoint."""
  import torch
  import transformers

  from llm_jax.core.config import build
  from llm_jax.interop import huggingface
  from llm_jax.model import stack

  config, arguments = PEERS[name]
  torch.manual_seed(0)
  told = getattr(transformers, config)(**arguments)
  peer = transformers.AutoModelForCausalLM.from_config(told).float().train()
  with tempfile.TemporaryDirectory() as folder:
    peer.save_pretrained(folder)
    params = huggingface.load(folder)[1]
    model = build(huggingface.config(folder))(runner=stack.loop)

  def run(ids: Any) -> Any:
    peer.zero_grad(set_to_none=True)
    return peer.base_model(input_ids=ids).last_hidden_state

  return model, params, run


def written(name: str) -> tuple[Any, Any, Any]:
  """The same of a mixer whose peer is in recurrences.py, in a decoder with a gated feed-forward."""
  import jax

  from benchmarks import recurrences
  from llm_jax.core import tree
  from llm_jax.model import block, ffn, norms, stack, transformer
  from llm_jax.model.recurrent import gss, h3, hyena, retnet, s4

  partial = functools.partial
  ours = dict(
    retention=partial(retnet.Retention, heads=4),
    s4=s4.S4,
    s4d=s4.S4D,
    h3=h3.H3,
    gss=gss.GatedStateSpace,
    hyena=partial(hyena.Hyena, length=256),
  )
  feed = partial(ffn.Gated, hidden=512)
  layer = partial(block.decoder, mixer=ours[name], ffn=feed, norm=norms.RMSNorm)
  model = transformer.causal(vocab=64, embed=256, layers=4, block=layer, runner=stack.loop)
  params = model.init(jax.random.key(0))
  return (
    model,
    params,
    partial(_decoder, getattr(recurrences, name), _tensors(tree.flatten(params))),
  )


def _tensors(flat: dict[str, Any]) -> dict[str, Any]:
  import torch

  return {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in flat.items()}


def _decoder(mixer: Callable, p: dict[str, Any], ids: Any) -> Any:
  """Pre-norm layers around a mixer."""
  import torch

  for w in p.values():
    w.grad = None

  def norm(x: Any, scale: Any) -> Any:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], scale, 1e-6)

  x, layer = p['embedding/table'][ids], 'decoder/layers/block_0/'
  for i in range(4):
    w = {name.removeprefix(layer): v[i] for name, v in p.items() if name.startswith(layer)}
    of = {name.removeprefix('mixer/'): v for name, v in w.items() if name.startswith('mixer/')}
    x = x + mixer(of, norm(x, w['mixer_norm/scale']))
    y = norm(x, w['ffn_norm/scale'])
    x = x + (torch.nn.functional.silu(y @ w['ffn/gate']) * (y @ w['ffn/up'])) @ w['ffn/down']
  return norm(x, p['decoder/norm/scale'])


def compare(name: str, batch: int, length: int, rounds: int) -> tuple[float, float]:
  """Median seconds of a forward and backward pass: (ours, the peer's)."""
  import jax
  import torch

  model, params, peer = published(name) if name in PEERS else written(name)
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 64, (batch, length))
  weight = rng.standard_normal((batch, length, 256)).astype(np.float32)

  def loss(params: Any) -> Any:
    x = model.hidden(params, dict(inputs=jax.numpy.asarray(ids))).x
    return (x * weight).sum(), x

  grad = jax.jit(jax.grad(loss, has_aux=True))
  ids_there, weight_there = torch.tensor(ids), torch.tensor(weight)

  def ours() -> np.ndarray:
    return np.asarray(jax.block_until_ready(grad(params))[1])

  def theirs() -> np.ndarray:
    x = peer(ids_there)
    (x * weight_there).sum().backward()
    return x.detach().numpy()

  apart = np.abs(ours() - theirs()).max()
  if apart > 1e-2:
    raise SystemExit(f'{name}: the two sides are {apart:.2g} apart')
  seconds = [[], []]
  for _ in range(rounds):
    for run, found in zip((ours, theirs), seconds, strict=True):
      start = time.perf_counter()
      run()
      found.append(time.perf_counter() - start)
  return tuple(map(statistics.median, seconds))


def main() -> None:
  """Prints a line for each mixer."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--only', default=','.join((*PEERS, *WRITTEN)))
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--length', type=int, default=256)
  parser.add_argument('--rounds', type=int, default=9)
  told = parser.parse_args()
  print(f'{"mixer":10} {"llm_jax ms":>12} {"torch ms":>12} {"ratio":>8}')
  for name in told.only.split(','):
    # transformers' Mamba steps through the tokens: seconds a call
    batch, rounds = (2, 3) if name == 'mamba' else (told.batch, told.rounds)
    ours, theirs = compare(name, batch, told.length, rounds)
    print(f'{name:10} {1e3 * ours:12.0f} {1e3 * theirs:12.0f} {theirs / ours:8.2f}', flush=True)


if __name__ == '__main__':
  main()
