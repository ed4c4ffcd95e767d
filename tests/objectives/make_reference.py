"""What TRL's trainers say of a tiny LLaMA: losses, gradients and references for the objectives of preferences.

  python -m tests.objectives.make_reference MODELS FILE      # needs the extra `parity`, and trl

MODELS: the folder that tests/interop/make_reference.py wrote. FILE gets, as safetensors, under the name of each case
the loss and the gradients of four tensors, and the log-probabilities of the reference model. `make test` compares with
the stored `reference.safetensors`, `make parity` with a fresh one.
"""

import os
import sys
import tempfile

import numpy as np

VOCAB = 24
TENSORS = (
  'model.embed_tokens.weight',
  'model.layers.0.self_attn.q_proj.weight',
  'model.layers.1.mlp.down_proj.weight',
  'lm_head.weight',
)
REWARDED = (*TENSORS[:3], 'score.weight')

# name: arguments of DPOConfig
DPO = {
  'dpo': dict(loss_type=['sigmoid'], beta=0.3),
  'dpo_hinge': dict(loss_type=['hinge'], beta=0.3),
  'dpo_ipo': dict(loss_type=['ipo'], beta=0.3),
  'dpo_robust': dict(loss_type=['robust'], beta=0.3, label_smoothing=0.2),
}
KTO = {
  'kto': dict(beta=0.3),
  'kto_weighted': dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
}
CPO = {
  'cpo': dict(loss_type='sigmoid', beta=0.3, cpo_alpha=1.0),
  'cpo_smoothed': dict(loss_type='sigmoid', beta=0.3, cpo_alpha=0.0, label_smoothing=0.2),
  'simpo': dict(loss_type='simpo', beta=2.0, cpo_alpha=0.0, simpo_gamma=0.7),
}
REWARD = {
  'reward': dict(),
  'reward_margin': dict(),
  'reward_centred': dict(center_rewards_coefficient=0.05),
}


def pairs(prompt: int | None = None) -> list[dict]:
  """Four pairs of texts with all lengths different. prompt: the length of all prompts; TRL imitates prompts in ORPO."""
  rng = np.random.default_rng(11)
  ids = lambda n: rng.integers(2, VOCAB, n).tolist()
  sizes = ((3, 5, 7), (1, 4, 2), (4, 6, 6), (2, 1, 5))
  return [
    dict(prompt_ids=ids(prompt or p), chosen_ids=ids(w), rejected_ids=ids(l)) for p, w, l in sizes
  ]


LABELS = (True, False, True, True)
MARGINS = (0.5, 1.0, 0.0, 2.0)


def singles() -> list[dict]:
  """The same as single texts, good or bad, with the response of the text before each for the KL."""
  texts = [
    dict(prompt_ids=p['prompt_ids'], completion_ids=p['chosen_ids' if good else 'rejected_ids'], label=good)
    for p, good in zip(pairs(), LABELS, strict=True)
  ]  # fmt: skip
  return [dict(t, KL_completion_ids=texts[i - 1]['completion_ids']) for i, t in enumerate(texts)]


def tokenizer():
  """TRL wants one, though every text here is ids already."""
  import tokenizers
  import transformers

  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token='0')
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token='0', eos_token='1', bos_token='1', unk_token='0'
  )


def model(folder: str, kind: str = 'AutoModelForCausalLM', seed: int | None = None):
  """The tiny LLaMA. seed: of the noise that makes the reference another one, or of the head of a reward model."""
  import torch
  import transformers

  torch.manual_seed(seed or 0)
  extra = {} if kind == 'AutoModelForCausalLM' else dict(num_labels=1)
  made = getattr(transformers, kind).from_pretrained(
    os.path.join(folder, 'llama'), dtype=torch.float32, attn_implementation='eager', **extra
  )
  made.config.pad_token_id = 0
  if extra:
    made.score.weight.data = torch.randn_like(made.score.weight)
  elif seed is not None:
    for p in made.parameters():
      p.data += 0.2 * torch.randn_like(p)
  return made


def measured(trainer, inputs: list, tensors: tuple) -> dict:
  """The mean loss over `inputs` and its gradients."""
  import torch

  net = trainer.model.eval()
  net.zero_grad()
  total = 0.0
  for one in inputs:
    loss = trainer.compute_loss(net, dict(one)) / len(inputs)
    loss.backward()
    total += float(loss.detach())
  grads = dict(net.named_parameters())
  found = {f'gradient/{name}': grads[name].grad.clone() for name in tensors}
  return dict(found, loss=torch.tensor(total))


def trainer(kind, config, rows: list[dict], net, folder: str, **settings):
  """A trainer on the CPU. The dataset only has to be there: what is measured is handed in."""
  import datasets

  ref = dict(ref_model=settings.pop('ref_model')) if 'ref_model' in settings else {}
  told = config(
    output_dir=folder, use_cpu=True, bf16=False, report_to='none', gradient_checkpointing=False,
    per_device_train_batch_size=4, **settings,
  )  # fmt: skip
  return kind(
    model=net, args=told, processing_class=tokenizer(), train_dataset=datasets.Dataset.from_list(rows), **ref
  )  # fmt: skip


SAID = [dict(prompt='5 6', chosen='7 8', rejected='9 3')] * 4


def sft(models: str, folder: str) -> dict:
  from trl import SFTConfig, SFTTrainer

  rows = [
    dict(
      input_ids=p['prompt_ids'] + p['chosen_ids'],
      completion_mask=[0] * len(p['prompt_ids']) + [1] * len(p['chosen_ids']),
    )
    for p in pairs()
  ]
  made = trainer(SFTTrainer, SFTConfig, rows, model(models), folder, completion_only_loss=True)
  return {'sft': measured(made, [made.data_collator(list(made.train_dataset))], TENSORS)}


def dpo(models: str, folder: str) -> dict:
  from trl import DPOConfig, DPOTrainer

  found = {}
  for name, settings in DPO.items():
    ref = model(models, seed=1)
    made = trainer(DPOTrainer, DPOConfig, SAID, model(models), folder, ref_model=ref, **settings)
    inputs = made.data_collator(pairs())
    found[name] = measured(made, [inputs], TENSORS)
    chosen, rejected = made.compute_ref_log_probs(made.ref_model, inputs)
    found['reference'] = dict(chosen=chosen, rejected=rejected)
  return found


def kto(models: str, folder: str) -> dict:
  from trl import KTOConfig, KTOTrainer

  said = [
    dict(prompt='5 6', completion='7 8', label=True),
    dict(prompt='5', completion='7', label=False),
  ]
  found = {}
  for name, settings in KTO.items():
    ref = model(models, seed=1)
    made = trainer(
      KTOTrainer, KTOConfig, said * 2, model(models), folder, ref_model=ref, **settings
    )
    inputs = made.data_collator(singles())
    found[name] = measured(made, [inputs], TENSORS)
    logp, away = made.compute_ref_log_probs(made.ref_model, inputs)
    own = made._compute_kl_logps(made.model, inputs)
    found['kto_reference'] = dict(logp=logp, kl=(own - away).mean().clamp(min=0).reshape(1))
  return found


def alone(pair: dict) -> dict:
  """A batch of one pair, as CPO and ORPO read it: their means over tokens are then those of a response."""
  import torch

  found = {}
  for side in ('chosen', 'rejected'):
    ids = pair['prompt_ids'] + pair[f'{side}_ids']
    labels = [-100] * len(pair['prompt_ids']) + pair[f'{side}_ids']
    found[f'{side}_input_ids'] = torch.tensor([ids])
    found[f'{side}_attention_mask'] = torch.ones(1, len(ids), dtype=torch.int64)
    found[f'{side}_labels'] = torch.tensor([labels])
  return found


def cpo(models: str, folder: str) -> dict:
  from trl.experimental.cpo import CPOConfig, CPOTrainer
  from trl.experimental.orpo import ORPOConfig, ORPOTrainer

  found = {}
  for name, settings in CPO.items():
    made = trainer(CPOTrainer, CPOConfig, SAID, model(models), folder, **settings)
    found[name] = measured(made, [alone(p) for p in pairs()], TENSORS)
  made = trainer(ORPOTrainer, ORPOConfig, SAID, model(models), folder, beta=0.3)
  return found | {'orpo': measured(made, [alone(p) for p in pairs(prompt=1)], TENSORS)}


def reward(models: str, folder: str) -> dict:
  from trl import RewardConfig, RewardTrainer

  rows = [
    {f'{side}_ids': p['prompt_ids'] + p[f'{side}_ids'] for side in ('chosen', 'rejected')}
    for p in pairs()
  ]
  found = {}
  for name, settings in REWARD.items():
    net = model(models, 'AutoModelForSequenceClassification', seed=2)
    made = trainer(RewardTrainer, RewardConfig, SAID, net, folder, disable_dropout=True, **settings)
    margins = MARGINS if name == 'reward_margin' else None
    told = [dict(r, margin=m) for r, m in zip(rows, MARGINS, strict=True)] if margins else rows
    found[name] = measured(made, [made.data_collator(told)], REWARDED)
    found['head'] = dict(weight=net.score.weight.detach().clone())
  return found


def main() -> None:
  """All cases into one file."""
  from safetensors.torch import save_file

  models, path = sys.argv[1:]
  with tempfile.TemporaryDirectory() as folder:
    found = {}
    for kind in (sft, dpo, kto, cpo, reward):
      found |= kind(models, folder)
  arrays = {f'{case}/{name}': x for case, told in found.items() for name, x in told.items()}
  save_file({name: x.detach().contiguous() for name, x in arrays.items()}, path)
  print({case: round(float(told['loss']), 6) for case, told in found.items() if 'loss' in told})


if __name__ == '__main__':
  main()
