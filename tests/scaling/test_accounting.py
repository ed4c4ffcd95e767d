"""Costs against the numbers of the survey's slides and of the papers, and against models of the machines."""

import pytest

from llm_jax.core.config import build
from llm_jax.core.errors import UserError
from llm_jax.model import count, presets
from llm_jax.scaling import accounting

A100, V100, TPU3, TPU4 = 312e12, 125e12, 123e12, 275e12


def sheet(name):
  """The card of a published model."""
  return build(presets.config(name))().card


# GPU-hours, MWh, tonnes of CO2 equivalent: the slide's table
SLIDE = {
  'OPT-175B': (809_472, 356.2, 137.1),
  'BLOOM-175B': (1_082_880, 476.5, 183.4),
  'LLaMA-7B': (82_432, 36.3, 14.0),
  'LLaMA-13B': (135_168, 59.5, 22.9),
  'LLaMA-33B': (530_432, 233.4, 89.9),
  'LLaMA-65B': (1_022_362, 449.8, 173.2),
}


@pytest.mark.parametrize('name', SLIDE)
def test_energy_and_carbon_are_those_of_the_slide(name):
  hours, energy, carbon = SLIDE[name]
  got = accounting.megawatt_hours(hours)
  assert round(got, 1) == energy
  assert round(accounting.tonnes(got), 1) == carbon


def test_gpu_hours():
  assert accounting.device_hours(992, days=34) == 809_472  # OPT, as the slide has it
  assert accounting.device_hours(2048, days=21) == 1_032_192  # LLaMA-65B reports 1,022,362
  assert (
    accounting.device_hours(384, days=117.5) == 1_082_880
  )  # BLOOM; its model card says 105 days
  assert accounting.device_hours(6000, days=12) == 1_728_000
  assert round(2e6 / 1_728_000, 2) == 1.16  # the lecture's 2 million dollars, per GPU-hour


# parameters, tokens, devices, hours, peak: the survey's table of resources, as far as it has all of them
REPORTS = [
  accounting.Reported('LLaMA', 65.2e9, 1.4e12, 2048, 21 * 24, A100),
  accounting.Reported('BLOOM', 176.247e9, 366e9, 384, 105 * 24, A100),
  accounting.Reported('GLM', 130e9, 400e9, 768, 60 * 24, A100),
  accounting.Reported('HyperCLOVA', 82e9, 300e9, 1024, 13.4 * 24, A100),
  accounting.Reported('AlexaTM', 20e9, 1.3e12, 128, 120 * 24, A100),
  accounting.Reported('Gopher', 280e9, 300e9, 4096, 920, TPU3),
  accounting.Reported('GLaM', 96.6e9, 280e9, 1024, 574, TPU4),
  accounting.Reported('LaMDA', 137e9, 2.81e12, 1024, 57.7 * 24, TPU3),
  accounting.Reported('OPT', 175e9, 180e9, 992, 34 * 24, A100),
  accounting.Reported('ERNIE 3.0 Titan', 260e9, 300e9, 2048, 28 * 24, V100),
]


def test_reports_that_cannot_be_true_are_found():
  """LaMDA's 2.81T tokens are its data set: at the reported time they would be 3.7 times what the chips can do."""
  found = accounting.implausible(REPORTS)
  assert set(found) == {'LaMDA', 'ERNIE 3.0 Titan'}
  assert found == pytest.approx({'LaMDA': 3.68, 'ERNIE 3.0 Titan': 0.756}, abs=5e-3)
  # with the 432B tokens that its 3.55e23 FLOP amount to, LaMDA is as others are
  assert accounting.implausible([REPORTS[7]._replace(tokens=432e9)]) == {}


def test_conventions_of_flops_side_by_side():
  """GPT-3: 6 N D of all parameters 3.14e23, as the paper; Kaplan's count of the products 3.18e23; PaLM's 3.26e23."""
  card = sheet('gpt3_175b')
  found = accounting.flops(card, 300e9, length=2048)
  assert found.all_parameters == 6 * 300e9 * count.total(card)
  assert found.all_parameters == pytest.approx(3.14e23, rel=3e-3)
  inner = 173_946_175_488 + 96 * 12288 * 13 + 2 * 12288  # Kaplan's N, and biases and norms
  assert found.non_embedding == pytest.approx(6 * 300e9 * inner)
  assert found.causal == pytest.approx(3 * 300e9 * (352_724_189_184 + 2 * 50257 * 12288))
  assert found.square - found.causal == pytest.approx(6 * 300e9 * 96 * 12288 * 2048)
  assert found.non_embedding < found.all_parameters < found.causal < found.square


def test_experts_that_a_token_does_not_meet_do_not_count():
  card = sheet('mixtral_8x7b')
  found = accounting.flops(card, 1.0, length=1)
  assert 2 < 6 * count.total(card) / found.all_parameters < 5
  assert found.all_parameters == 6 * sum(count.active(card).values())


def test_a_bill_is_made_of_its_parts():
  """LLaMA-65B: 5.48e23 FLOP at its 47.8 % are its reported GPU-hours and 2.4 tonnes per percent of them."""
  total = count.compute(parameters=65_285_660_672, tokens=1.4e12)
  got = accounting.bill(total, peak=A100, mfu=0.4776, price_per_hour=1.5)
  assert got.flops == total
  assert got.device_hours == pytest.approx(1_022_362, rel=1e-3)
  assert got.pf_days == pytest.approx(total / 8.64e19)
  assert got.megawatt_hours == pytest.approx(449.8, rel=1e-3)
  assert got.tonnes == pytest.approx(173.2, rel=1e-3)
  assert got.price == pytest.approx(1.5 * got.device_hours)
  assert accounting.bill(total, peak=A100, mfu=0.2388).device_hours == pytest.approx(
    2 * got.device_hours, rel=1e-3
  )
  with pytest.raises(UserError, match='between 0 and 1, got 40'):
    accounting.bill(total, peak=A100, mfu=40)


@pytest.mark.parametrize(
  'name, half, eight, four', [('llama_7b', 12.55, 6.52, 3.88), ('llama_13b', 24.24, 12.43, 7.26)]
)
def test_memory_of_quantised_weights(name, half, eight, four):
  """The survey's Table 10 has 12.58, 6.65, 3.94 and 24.40, 12.53, 7.34 GiB, with what the libraries add."""
  card = sheet(name)
  parts = count.parameters(card)
  kept = parts['embedding'] + parts['head'] + parts['norm']
  linear = count.total(card) - kept
  sizes = [
    accounting.quantised_bytes(linear, kept, bits=16),
    accounting.quantised_bytes(linear, kept, bits=8),
    accounting.quantised_bytes(linear, kept, bits=4, block=64),
  ]
  assert [round(s / 2**30, 2) for s in sizes] == [half, eight, four]
  assert sizes[0] == 2 * count.total(card)


def test_a_file_of_140_gigabytes():
  assert accounting.quantised_bytes(70e9, 0, bits=16) == 140e9


LLAMA = [6_738_415_616, 13_015_864_320, 32_528_943_616, 65_285_660_672]


def test_devices_that_the_survey_needed():
  """Table 8: full tuning on A800s with 16 bytes per parameter, inference on A800s and RTX 3090s."""
  full = [accounting.fewest_devices(16 * n, memory=80e9) for n in LLAMA]
  assert full == [2, 4, 8, 16]
  assert [accounting.fewest_devices(2 * n, memory=80e9) for n in LLAMA] == [1, 1, 1, 2]
  assert [accounting.fewest_devices(2 * n, memory=24e9) for n in LLAMA] == [1, 2, 4, 8]
  assert [accounting.fewest_devices(n, memory=24e9) for n in LLAMA] == [1, 1, 2, 4]
  assert (
    count.zero_bytes(LLAMA[3], devices=16, stage=3)
    < 80e9
    < count.zero_bytes(LLAMA[3], devices=8, stage=3)
  )
  with pytest.raises(UserError, match='memory'):
    accounting.fewest_devices(1, memory=0)


@pytest.mark.parametrize('stages, microbatches', [(1, 3), (2, 1), (4, 4), (12, 20)])
def test_the_bubble_is_that_of_a_simulated_pipeline(stages, microbatches):
  """Every microbatch goes through every stage, each a tick, forward and then backward, as soon as it can."""
  start, busy = 0, 0
  for order in (
    range(stages),
    reversed(range(stages)),
  ):  # the backward pass begins when all have gone forward
    order, free = list(order), [start] * stages
    for _ in range(microbatches):
      at = start
      for stage in order:
        at = free[stage] = max(at, free[stage]) + 1
        busy += 1
    start = max(free)
  idle = 1 - busy / (stages * start)
  assert accounting.bubble(stages=stages, microbatches=microbatches) == pytest.approx(idle)


def test_parallelism_of_bloom_is_a_product():
  assert 8 * 4 * 12 == 384  # data, tensor, pipeline: its GPUs
  assert accounting.bubble(stages=12, microbatches=256) < 0.05


@pytest.mark.parametrize(
  'embed, layers, rank, printed',
  [(768, 12, 8, 294_912), (1024, 24, 8, 786_432), (1536, 48, 16, 4_718_592)],
)
def test_parameters_of_lora(embed, layers, rank, printed):
  """RoBERTa base and large, DeBERTa XXL: 0.3M, 0.8M and 4.7M, two matrices of each layer."""
  assert accounting.lora_parameters(embed=embed, layers=layers, rank=rank) == printed


def test_parameters_of_llama_adapter():
  assert accounting.prompt_parameters(embed=4096, layers=30, length=10) == 1_228_800
