"""How many FLOP/s the devices could do: the denominator of MFU, model FLOPs utilisation (arXiv:2204.02311, app. B).

TPU: cloud.google.com/tpu/docs/system-architecture, per chip. NVIDIA: the data sheets of V100, A100, H100, H200, B200,
L4, L40S, T4 (dense, without sparsity, SXM where there are several). `f32` is what `jax.numpy` products of f32 arrays
use unless told otherwise: one bf16 pass on TPUs, TF32 on tensor cores since A100, plain f32 before.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

T = 1e12


class Chip(NamedTuple):
  """Peak FLOP/s of a chip with bf16 (before A100: f16) and f32 operands, and how many jax devices it counts as."""

  bf16: float
  f32: float
  devices: int = 1


# Searched in order in `device_kind`, lower case.
CHIPS = {
  'tpu v2': Chip(46 * T, 46 * T, 2),
  'tpu v3': Chip(123 * T, 123 * T, 2),
  'tpu v4 lite': Chip(138 * T, 138 * T),
  'tpu v4': Chip(275 * T, 275 * T),
  'tpu v5 lite': Chip(197 * T, 197 * T),
  'tpu v5e': Chip(197 * T, 197 * T),
  'tpu v5': Chip(459 * T, 459 * T),
  'tpu v6': Chip(918 * T, 918 * T),
  'tpu7x': Chip(2307 * T, 2307 * T, 2),
  'tpu v7': Chip(2307 * T, 2307 * T, 2),
  'gb200': Chip(2500 * T, 1250 * T),
  'b200': Chip(2250 * T, 1100 * T),
  'gh200': Chip(989.4 * T, 494.7 * T),
  'h200': Chip(989.4 * T, 494.7 * T),
  'h100 pcie': Chip(756 * T, 378 * T),
  'h100': Chip(989.4 * T, 494.7 * T),
  'a100': Chip(312 * T, 156 * T),
  'l40s': Chip(362 * T, 183 * T),
  'l4': Chip(121 * T, 60 * T),
  'v100': Chip(125 * T, 15.7 * T),
  't4': Chip(65 * T, 8.1 * T),
}


def peak(dtype: str = 'bf16') -> float:
  """FLOP/s of all devices of the run together.

  dtype: 'bf16' or 'f32'. On CPU, and on kinds that the table lacks, it is measured in f32; virtual CPU devices
  share one machine and count once.
  """
  device = jax.devices()[0]
  chip = None if device.platform == 'cpu' else find(device.device_kind)
  if chip is None:
    return measured() * (jax.process_count() if device.platform == 'cpu' else jax.device_count())
  return getattr(chip, dtype) / chip.devices * jax.device_count()


def find(kind: str) -> Chip | None:
  """The chip behind a `device_kind`, such as 'NVIDIA H100 80GB HBM3'; None if it is not in the table."""
  return next((chip for name, chip in CHIPS.items() if name in kind.lower()), None)


@functools.cache
def measured(size: int = 1024, repeats: int = 12) -> float:
  """FLOP/s of the fastest of a few f32 products of [size, size] on the first device; well below a second."""
  alone = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ('one',))
  product, times = jax.jit(jnp.matmul), []
  with jax.set_mesh(alone):  # whatever mesh the caller is in
    x = jax.device_put(np.full((size, size), 1.0, np.float32), alone.devices[0])
    product(x, x).block_until_ready()
    for _ in range(repeats):
      start = time.perf_counter()
      product(x, x).block_until_ready()
      times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


def revised(peak: float, reached: float) -> float:
  """The peak once `reached` FLOP/s have been: where it was measured, other work may have been in the way."""
  return max(peak, reached) if find(jax.devices()[0].device_kind) is None else peak


def utilisation(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
  """MFU: the part of the peak FLOP/s that the model's own products account for; recomputation does not count."""
  return flops_per_token * tokens_per_second / peak
