r"""What a token costs as the sequence grows: seconds and bytes of attention, local attention and recurrent mixers.

  python -m benchmarks.length                      # about three minutes; writes benchmarks/length.png
  python -m benchmarks.length --lengths=512,2048 --only=attention,mamba

One mixer of 64 channels, one sequence, forward and backward pass, compiled. Seconds are the least of several calls, the
mixers in turn at each length; bytes are what XLA sets aside for temporary arrays (its memory analysis), which needs no
run. Attention grows with the length per token, the others stay where they are.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.model import attention, kernels, param
from llm_jax.model.attention import Context
from llm_jax.model.masks import Mask
from llm_jax.model.recurrent import hyena, mamba, mamba2, retnet, rwkv, s4

EMBED, REPEATS = 64, 3
partial = functools.partial
# S4 and Hyena are convolutions: log t per token
MIXERS = {
  'attention': partial(attention.SelfAttention, heads=1, kernel=kernels.blocked),
  'window 256': partial(attention.SelfAttention, heads=1, window=256, kernel=kernels.banded),
  '+ 4 sinks': partial(
    attention.SelfAttention, heads=1, window=256, sinks=4, kernel=kernels.banded
  ),
  'mamba': mamba.Mamba,
  'mamba2': partial(mamba2.Mamba2, head_dim=32, state=32),
  'rwkv': rwkv.TimeMix,
  'retention': partial(retnet.Retention, heads=2),
  's4d': partial(s4.S4D, pairs=8),
  'hyena': partial(hyena.Hyena, length=16_384),
}


def compiled(make: Callable, length: int) -> tuple[Callable[[], Any], float]:
  """(forward and backward pass over one sequence, temporary bytes)."""
  mixer, ctx = make(), Context(Mask(True), jnp.arange(length)[None])
  x = jax.random.normal(jax.random.key(0), (1, length, EMBED))
  declared = param.declare(mixer, x[:, :1], ctx._replace(positions=ctx.positions[:, :1]))
  shapes = param.unbox(declared)[0]
  params = jax.tree.map(lambda s: 0.1 * jax.random.normal(jax.random.key(1), s.shape), shapes)
  loss = lambda p, x: jnp.square(mixer.apply(dict(params=p), x, ctx)[0]).sum()
  run = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
  memory = run.memory_analysis().temp_size_in_bytes
  return lambda: jax.block_until_ready(run(params, x)), memory


def measure(names: list[str], lengths: list[int]) -> dict[str, list[tuple[float, float]]]:
  """(microseconds, bytes) per token of each mixer at each length."""
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
  print(f'{"length":>8}' + ''.join(f'{name:>22}' for name in names))
  for length in lengths:
    made = {name: compiled(MIXERS[name], length) for name in names}
    best = dict.fromkeys(names, float('inf'))
    for _ in range(REPEATS):
      for name, (run, _) in made.items():
        start = time.perf_counter()
        run()
        best[name] = min(best[name], time.perf_counter() - start)
    for name, (_, memory) in made.items():
      found[name].append((1e6 * best[name] / length, memory / length))
    row = (f'{found[n][-1][0]:9.1f} us {found[n][-1][1]:8.0f} B' for n in names)
    print(f'{length:8}' + ''.join(f'{cell:>22}' for cell in row), flush=True)
  return found


def plot(found: dict[str, list[tuple[float, float]]], lengths: list[int], path: str) -> None:
  """Two panels, both axes logarithmic."""
  import matplotlib as mpl

  mpl.use('Agg')
  from matplotlib import pyplot as plt

  figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  for i, (panel, title) in enumerate(
    zip(panels, ('microseconds per token', 'temporary bytes per token'), strict=True)
  ):
    for mark, (name, values) in zip('osv^<>DPX', found.items(), strict=False):
      panel.plot(lengths, [v[i] for v in values], marker=mark, markersize=4, label=name)
    panel.set(xscale='log', yscale='log', xlabel='tokens', title=title)
    panel.set_xticks(lengths, [str(n) for n in lengths], minor=False)
    panel.grid(alpha=0.3)
  panels[0].legend(fontsize=8)
  figure.savefig(path, dpi=110)


def main() -> None:
  """Prints the table and draws it."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--only', default=','.join(MIXERS))
  parser.add_argument('--lengths', default='1024,2048,4096,8192,16384')
  parser.add_argument('--out', default=os.path.join(os.path.dirname(__file__), 'length.png'))
  told = parser.parse_args()
  lengths = [int(n) for n in told.lengths.split(',')]
  plot(measure(told.only.split(','), lengths), lengths, told.out)


if __name__ == '__main__':
  main()
