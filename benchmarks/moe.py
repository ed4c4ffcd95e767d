r"""Forward and backward of one mixture of experts: ways to dispatch, and transformers' Mixtral block in PyTorch.

  python -m benchmarks.moe                        # about a minute; needs the extra `parity`
  python -m benchmarks.moe --experts=16 --rounds=3

All start from the same weights, see the same tokens, must agree on the gradient of the router (all but `limited`, which
drops tokens), and take turns (A B C A B C ...), so that what else the machine does hits all alike. Medians, f32.
`dense` is one feed-forward as wide as the experts that a token meets: what perfect dispatch would cost.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable

import numpy as np


def data(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Weights by name and tokens [rows, length, embed]."""
  rng = np.random.default_rng(0)
  e, d, f = args.experts, args.embed, args.hidden
  shapes = dict(router=(d, e), gate=(e, d, f), up=(e, d, f), down=(e, f, d))
  w = {n: rng.standard_normal(s, np.float32) * s[-2] ** -0.5 for n, s in shapes.items()}
  return w, rng.standard_normal((args.rows, args.length, d), np.float32)


def ours(args: argparse.Namespace, w: dict, x: np.ndarray) -> dict[str, Callable]:
  """Name -> a function that returns the gradient of the router."""
  import jax
  import jax.numpy as jnp

  from llm_jax.model import dispatch, ffn, grouped
  from llm_jax.model.attention import Context
  from llm_jax.model.masks import Mask
  from llm_jax.model.moe import MoE

  partial = functools.partial
  ctx = Context(Mask(True), jnp.arange(args.length)[None])
  w, x = jax.tree.map(jnp.asarray, (w, x))

  def runner(module, w) -> Callable:
    def loss(w, x):
      return (module.apply({'params': w}, x, ctx)[0] ** 2).sum()

    run = jax.jit(jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(run(w, x))[0].get('router')

  unit = partial(ffn.Gated, hidden=args.hidden)
  ways = {
    'dropless': dispatch.dropless,
    'dropless, ragged_dot': partial(dispatch.dropless, product=grouped.ragged),
    'limited 1.25': partial(dispatch.limited, factor=1.25),
    'every expert': partial(dispatch.limited, factor=args.experts / args.top_k),
  }
  found = {n: runner(MoE(args.experts, unit, args.top_k, dispatch=d), w) for n, d in ways.items()}
  k, wide = args.top_k, ffn.Gated(hidden=args.top_k * args.hidden)
  plain = {n: jnp.concatenate(w[n][:k], -1) for n in ('gate', 'up')}
  found['dense'] = runner(wide, dict(plain, down=jnp.concatenate(w['down'][:k])))
  return found


def theirs(args: argparse.Namespace, w: dict, x: np.ndarray) -> dict[str, Callable]:
  """The same of transformers' block, with each of its ways to run the experts that a CPU has."""
  import torch
  import transformers
  from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

  found = {}
  for way in ('eager', 'grouped_mm'):
    told = transformers.MixtralConfig(
      hidden_size=args.embed,
      intermediate_size=args.hidden,
      num_local_experts=args.experts,
      num_experts_per_tok=args.top_k,
      experts_implementation=way,
    )
    block = MixtralSparseMoeBlock(told)
    put = lambda p, a: p.data.copy_(torch.from_numpy(np.ascontiguousarray(a)))
    put(block.gate.weight, w['router'].T)
    both = np.concatenate([w['gate'], w['up']], -1)
    put(block.experts.gate_up_proj, both.swapaxes(1, 2))
    put(block.experts.down_proj, w['down'].swapaxes(1, 2))

    def run(block=block) -> np.ndarray:
      tokens = torch.from_numpy(x).requires_grad_()
      block.zero_grad(set_to_none=True)
      (block(tokens) ** 2).sum().backward()
      return block.gate.weight.grad.numpy().T

    found[f'transformers, {way}'] = run
  return found


def agree(first: dict[str, np.ndarray]) -> None:
  """Stops unless all that drop nothing computed the same."""
  wanted = np.asarray(first['transformers, eager'])
  for name, grad in first.items():
    if grad is not None and 'limited' not in name:
      off = np.abs(np.asarray(grad) - wanted).max() / np.abs(wanted).max()
      if off > 1e-3:
        raise SystemExit(f'not the same block: {name} is {off:.1e} off')


def main() -> None:
  """Parses the command line and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  sizes = dict(experts=8, top_k=2, embed=256, hidden=512, rows=8, length=256, rounds=5)
  for name, value in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  w, x = data(args)
  engines = ours(args, w, x) | theirs(args, w, x)
  agree({name: run() for name, run in engines.items()})
  times = {name: [] for name in engines}
  for _ in range(args.rounds):
    for name, run in engines.items():
      wall, cpu = time.perf_counter(), time.process_time()
      run()
      times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  middle = {name: np.median(np.asarray(t), axis=0) for name, t in times.items()}
  peer = np.min([t for name, t in middle.items() if name.startswith('transformers')], axis=0)
  print(f'{"":24}{"ms":>8}{"CPU-ms":>8}  faster peer / this')
  for name, (wall, cpu) in middle.items():
    print(f'{name:24}{1e3 * wall:8.1f}{1e3 * cpu:8.1f}{peer[0] / wall:12.2f}')
  print(f'load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')


if __name__ == '__main__':
  main()
