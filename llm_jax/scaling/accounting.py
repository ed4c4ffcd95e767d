"""What a run costs: FLOP by every convention, device-hours, energy, carbon, money, memory; which reports can be true.

Parameters, FLOP, MFU, bytes of keys and values, arithmetic intensity and ZeRO are in `model/count.py`; here is what
follows from them. Zhao et al. 2023 (arXiv:2303.18223); Touvron et al. 2023 (arXiv:2302.13971, section 6) for energy.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.model import count
from llm_jax.model.card import Card

WATTS = 400  # of an A100-80GB at its limit
PUE = 1.1  # power of the data centre over that of its GPUs
TONNES_PER_MWH = 0.385  # CO2 equivalent, the average of the United States
ERROR = 0.65  # no published run of a language model has a model FLOPs utilisation above this


class Flops(NamedTuple):
  """FLOP of training on a number of tokens, by convention. Which of them a paper means is rarely said."""

  all_parameters: float  # 6 N D, N with embeddings (Chinchilla)
  non_embedding: float  # 6 N D, N without embedding, positions and head (Kaplan)
  causal: float  # every product, the causal half of attention (Kaplan's table); head included
  square: float  # every product, the whole square of attention (PaLM's count for MFU)


class Bill(NamedTuple):
  """A planned or finished run: FLOP (exact, causal), PF-days, device-hours, MWh, tonnes of CO2 equivalent, price."""

  flops: float
  pf_days: float
  device_hours: float
  megawatt_hours: float
  tonnes: float
  price: float


class Reported(NamedTuple):
  """What a paper says of a run. peak: dense 16-bit FLOP/s of a device, see `core/peak.py`."""

  name: str
  parameters: float
  tokens: float
  devices: int
  hours: float
  peak: float


def flops(card: Card, tokens: float, *, length: int) -> Flops:
  """Training FLOP of `tokens` in sequences of `length`, by four conventions side by side."""
  parts = count.active(card)
  everything = sum(parts.values())
  inner = everything - parts['embedding'] - parts['positions'] - parts['head']
  return Flops(
    count.compute(parameters=everything, tokens=tokens),
    count.compute(parameters=inner, tokens=tokens),
    tokens * count.training_flops(card, length),
    tokens * count.training_flops(card, length, seen=1.0),
  )


def bill(
  total: float,
  *,
  peak: float,
  mfu: float = 0.4,
  watts: float = WATTS,
  pue: float = PUE,
  tonnes_per_mwh: float = TONNES_PER_MWH,
  price_per_hour: float = 0.0,
) -> Bill:
  """The cost of `total` FLOP on devices of `peak` FLOP/s that run at `mfu`; watts: per device."""
  if not 0 < mfu <= 1:
    raise UserError(f'mfu is the part of the peak that is used, between 0 and 1, got {mfu}')
  hours = total / (peak * mfu * 3600)
  energy = megawatt_hours(hours, watts=watts, pue=pue)
  return Bill(
    total,
    count.pf_days(total),
    hours,
    energy,
    tonnes(energy, per_mwh=tonnes_per_mwh),
    hours * price_per_hour,
  )


def device_hours(devices: int, *, days: float) -> float:
  """Hours that all devices together are busy."""
  return devices * days * 24


def megawatt_hours(hours: float, *, watts: float = WATTS, pue: float = PUE) -> float:
  """Energy of device-hours at the socket of the data centre."""
  return hours * watts * pue / 1e6


def tonnes(energy: float, *, per_mwh: float = TONNES_PER_MWH) -> float:
  """Tonnes of CO2 equivalent of so many MWh."""
  return energy * per_mwh


def utilisation(run: Reported) -> float:
  """MFU that a report implies: 6 N D over what its devices could have done."""
  total = count.compute(parameters=run.parameters, tokens=run.tokens)
  return count.mfu(total, seconds=3600 * run.hours, devices=run.devices, peak=run.peak)


def implausible(reports: Iterable[Reported], *, limit: float = ERROR) -> dict[str, float]:
  """name -> MFU of the reports that cannot all be true: often `tokens` is the size of the data, not what was seen."""
  found = {run.name: utilisation(run) for run in reports}
  return {name: value for name, value in found.items() if value > limit}


def quantised_bytes(
  linear: float, kept: float, *, bits: int, block: int | None = None, scale_bytes: int = 4
) -> float:
  """Bytes of a model whose `linear` parameters take `bits` each, a scale per `block`, and whose `kept` ones take 16."""
  scales = linear / block * scale_bytes if block else 0
  return linear * bits / 8 + scales + 2 * kept


def fewest_devices(needed: float, *, memory: float) -> int:
  """The smallest power of two of devices with `memory` bytes each that hold `needed` bytes."""
  if memory <= 0:
    raise UserError(f'a device has more than no memory, got {memory}')
  return 2 ** max(0, math.ceil(math.log2(needed / memory)))


def bubble(*, stages: int, microbatches: int) -> float:
  """The idle part of a pipeline: (p - 1) / (m + p - 1) (Huang et al. 2019, arXiv:1811.06965)."""
  return (stages - 1) / (microbatches + stages - 1)


def lora_parameters(*, embed: int, layers: int, rank: int, matrices: int = 2) -> int:
  """Trained parameters of LoRA on `matrices` square weights per layer: 2 r d each (Hu et al., arXiv:2106.09685)."""
  return 2 * rank * embed * matrices * layers


def prompt_parameters(*, embed: int, layers: int, length: int) -> int:
  """Trained parameters of `length` prompt vectors in each of `layers` layers: prefix tuning, LLaMA-Adapter."""
  return length * embed * layers
