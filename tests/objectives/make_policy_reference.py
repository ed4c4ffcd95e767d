"""What TRL's GRPO and RLOO trainers say of a tiny LLaMA: losses and gradients for the objectives of policies.

  python -m tests.objectives.make_policy_reference MODELS FILE      # needs the extra `parity`, and trl

MODELS: the folder that tests/interop/make_reference.py wrote. FILE gets, as safetensors, under the name of each case
the loss and the gradients of four tensors, and the log-probabilities `told/old` and `told/ref` that were handed in.
`make test` compares with the stored `policy.safetensors`, `make parity` with a fresh one.
"""

import os
import sys
import tempfile

import numpy as np

from tests.objectives.make_reference import VOCAB, tokenizer

LONGEST = 7
TENSORS = (
  'model.embed_tokens.weight',
  'model.layers.0.self_attn.q_proj.weight',
  'model.layers.1.mlp.down_proj.weight',
  'lm_head.weight',
)
# name: arguments of GRPOConfig; the surrogate and the entropy of PPO are TRL's `bnpo` with an advantage per token
GRPO = {
  'grpo': dict(loss_type='grpo', epsilon=0.2, beta=0.04, use_bias_correction_kl=False),
  'corrected': dict(loss_type='grpo', epsilon=0.2, beta=0.04, use_bias_correction_kl=True),
  'dr_grpo': dict(loss_type='dr_grpo', epsilon=0.2, beta=0.0, max_completion_length=LONGEST),
  'dapo': dict(loss_type='dapo', epsilon=0.2, epsilon_high=0.28, beta=0.0),
  'gspo': dict(
    loss_type='grpo',
    importance_sampling_level='sequence',
    epsilon=0.01,
    epsilon_high=0.02,
    beta=0.0,
  ),
  'ppo': dict(loss_type='bnpo', epsilon=0.2, beta=0.0, entropy_coef=0.05),
}
ADVANTAGES = (1.5, -0.5, -2.0, 1.0)


def texts() -> list[tuple[list[int], list[int]]]:
  """Four (prompt, answer) pairs of ids, all lengths different."""
  rng = np.random.default_rng(17)
  ids = lambda n: rng.integers(2, VOCAB, n).tolist()
  return [(ids(p), ids(a)) for p, a in ((3, 5), (1, 4), (4, LONGEST), (2, 2))]


def per_token() -> np.ndarray:
  """f32 [4, LONGEST]: an advantage for each token of the answers, for PPO."""
  return np.random.default_rng(18).normal(size=(4, LONGEST)).astype(np.float32)


def noise() -> tuple[np.ndarray, np.ndarray]:
  """f32 [4, LONGEST]: how far the policy that wrote and the reference are from the policy, so that some ratios clip."""
  rng = np.random.default_rng(23)
  return tuple(0.3 * rng.normal(size=(4, LONGEST)).astype(np.float32) for _ in range(2))


def inputs() -> dict:
  """The texts as TRL lays them out: prompts padded on the left, answers on the right."""
  import torch

  rows, width = texts(), max(len(p) for p, _ in texts())
  left = lambda x, fill: [fill] * (width - len(x)) + x
  right = lambda x: x + [0] * (LONGEST - len(x))
  return dict(
    prompt_ids=torch.tensor([left(p, 0) for p, _ in rows]),
    prompt_mask=torch.tensor([left([1] * len(p), 0) for p, _ in rows]),
    completion_ids=torch.tensor([right(a) for _, a in rows]),
    completion_mask=torch.tensor([right([1] * len(a)) for _, a in rows]),
    num_items_in_batch=torch.tensor(float(sum(len(a) for _, a in rows))),
  )


def model(models: str):
  import torch
  import transformers

  made = transformers.AutoModelForCausalLM.from_pretrained(
    os.path.join(models, 'llama'), dtype=torch.float32, attn_implementation='eager'
  )
  made.config.pad_token_id = 0
  return made


def trainer(kind, config, models: str, folder: str, **settings):
  """A trainer on the CPU. The dataset only has to be there: what is measured is handed in."""
  import datasets

  told = config(
    output_dir=folder, use_cpu=True, bf16=False, report_to='none', gradient_checkpointing=False,
    per_device_train_batch_size=4, num_generations=4, **settings,
  )  # fmt: skip
  made = kind(
    model=model(models),
    args=told,
    processing_class=tokenizer(),
    train_dataset=datasets.Dataset.from_list([dict(prompt='5 6')] * 4),
    reward_funcs=lambda completions, **_: [0.0] * len(completions),
  )
  made.model.eval()
  return made


def measured(made, told: dict) -> dict:
  """The loss over `told` and its gradients."""
  made.model.zero_grad()
  loss = made._compute_loss(made.model, told)
  loss.backward()
  grads = dict(made.model.named_parameters())
  return {f'gradient/{name}': grads[name].grad.clone() for name in TENSORS} | {
    'loss': loss.detach()
  }


def main() -> None:
  """All cases into one file."""
  import torch
  from safetensors.torch import save_file
  from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

  models, path = sys.argv[1:]
  told, found = inputs(), {}
  advantages = torch.tensor(ADVANTAGES)
  with tempfile.TemporaryDirectory() as folder:
    for name, settings in GRPO.items():
      made = trainer(GRPOTrainer, GRPOConfig, models, folder, **settings)
      ids = torch.cat([told['prompt_ids'], told['completion_ids']], 1)
      mask = torch.cat([told['prompt_mask'], told['completion_mask']], 1)
      now = made._get_per_token_logps_and_entropies(made.model, ids, mask, LONGEST)[0].detach()
      old, ref = (now + torch.tensor(n) for n in noise())
      each = torch.tensor(per_token()) if name == 'ppo' else advantages
      more = dict(advantages=each, old_per_token_logps=old, ref_per_token_logps=ref)
      found[name] = measured(made, told | more)
    made = trainer(RLOOTrainer, RLOOConfig, models, folder, epsilon=0.05, beta=0.0)
    whole = (old * told['completion_mask']).sum(1)
    found['rloo'] = measured(made, told | dict(advantages=advantages, old_logps=whole))
  arrays = {f'{case}/{name}': x for case, more in found.items() for name, x in more.items()}
  arrays |= {'told/old': old, 'told/ref': ref}
  save_file({name: x.detach().contiguous() for name, x in arrays.items()}, path)
  print({case: round(float(more['loss']), 6) for case, more in found.items()})


if __name__ == '__main__':
  main()
