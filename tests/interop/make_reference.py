"""Tiny models of every family with random weights, as transformers computes them.

  python -m tests.interop.make_reference FOLDER      # needs the extra `parity`

Each gets a folder: the model as `save_pretrained` writes it, and `expected.safetensors` with ids, logits, the losses of
three AdamW steps and after them, and the gradients of the first. The tests of this package compare llm_jax with them:
with the stored ones under `reference/` in `make test`, with fresh ones in `make parity`.
"""

import os
import sys
import tempfile

SMALL = dict(vocab_size=24, tie_word_embeddings=False)
LLAMA = dict(
  SMALL,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
)
GPT = dict(vocab_size=24, n_embd=16, n_layer=2, n_head=4, n_positions=32)
NO_DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
T5 = dict(vocab_size=24, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0)
# RoPE for contexts longer than those of training; the base makes all pairs turn within ten tokens
LINEAR = dict(rope_theta=100.0, rope_type='linear', factor=2.0)
DYNAMIC = dict(rope_theta=100.0, rope_type='dynamic', factor=2.0)
LLAMA3 = dict(
  rope_theta=100.0, rope_type='llama3', factor=4.0, low_freq_factor=0.3, high_freq_factor=1.0,
  original_max_position_embeddings=8,
)  # fmt: skip
YARN = dict(
  rope_theta=100.0, rope_type='yarn', factor=4.0, beta_fast=1.0, beta_slow=0.1,
  original_max_position_embeddings=8,
)  # fmt: skip
QWEN_MOE = dict(
  LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20
)  # fmt: skip
SWITCH = dict(T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
STEPS, RATE, EPS = 3, 1e-2, 1e-3

# folder: (name of the config's class, its arguments)
MODELS = {
  'gpt2': ('GPT2Config', GPT | NO_DROPOUT),
  'gpt1': ('OpenAIGPTConfig', GPT | NO_DROPOUT),
  'gpt_bigcode': ('GPTBigCodeConfig', GPT | NO_DROPOUT | dict(multi_query=True)),
  'llama': ('LlamaConfig', LLAMA),
  'llama_tied': ('LlamaConfig', LLAMA | dict(tie_word_embeddings=True, rope_theta=500.0, head_dim=6)),
  'llama_linear': ('LlamaConfig', LLAMA | dict(rope_parameters=LINEAR)),
  'llama_dynamic': ('LlamaConfig', LLAMA | dict(rope_parameters=DYNAMIC, max_position_embeddings=4)),
  'llama_llama3': ('LlamaConfig', LLAMA | dict(rope_parameters=LLAMA3, head_dim=8)),
  'llama_yarn': ('LlamaConfig', LLAMA | dict(rope_parameters=YARN, head_dim=8)),
  'mistral': ('MistralConfig', LLAMA | dict(sliding_window=None)),
  'mistral_window': ('MistralConfig', LLAMA | dict(sliding_window=4)),
  'qwen2': ('Qwen2Config', LLAMA),
  'qwen2_window': (
    'Qwen2Config',
    LLAMA | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=2),
  ),
  'qwen3': ('Qwen3Config', LLAMA | dict(head_dim=8)),
  'glm': ('GlmConfig', LLAMA | dict(head_dim=8, pad_token_id=0, rms_norm_eps=1e-5)),
  'glm4': ('Glm4Config', LLAMA | dict(head_dim=8, pad_token_id=0, rms_norm_eps=1e-5)),
  'gemma2': (
    'Gemma2Config',
    LLAMA | dict(head_dim=8, tie_word_embeddings=True, sliding_window=4, query_pre_attn_scalar=12,
                 num_hidden_layers=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  ),
  'gpt_neo': (
    'GPTNeoConfig',
    dict(
      vocab_size=24, hidden_size=16, num_layers=4, attention_types=[[['global', 'local'], 2]],
      num_heads=4, window_size=4, max_position_embeddings=32, resid_dropout=0.0,
    ),
  ),
  'gemma': ('GemmaConfig', LLAMA | dict(head_dim=8, tie_word_embeddings=True)),
  'phi3': ('Phi3Config', LLAMA | dict(pad_token_id=0, original_max_position_embeddings=32)),
  'phi3_long': (
    'Phi3Config',
    LLAMA | dict(
      pad_token_id=0, original_max_position_embeddings=8,
      rope_parameters=dict(rope_theta=100.0, rope_type='longrope', short_factor=[1.0, 1.5], long_factor=[1.5, 4.0]),
    ),
  ),
  'stablelm': ('StableLmConfig', LLAMA | dict(partial_rotary_factor=0.5)),
  'starcoder2': ('Starcoder2Config', LLAMA | dict(tie_word_embeddings=True, sliding_window=None)),
  'opt': (
    'OPTConfig',
    dict(
      vocab_size=24, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
      max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
    ),
  ),
  'opt_350m': (
    'OPTConfig',
    dict(
      vocab_size=24, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
      max_position_embeddings=32, word_embed_proj_dim=8, dropout=0.0, do_layer_norm_before=False,
    ),
  ),
  'gpt_neox': ('GPTNeoXConfig', LLAMA | dict(rotary_pct=0.5)),
  'gpt_neox_sequential': ('GPTNeoXConfig', LLAMA | dict(use_parallel_residual=False, rotary_pct=1.0)),
  'gptj': ('GPTJConfig', GPT | NO_DROPOUT | dict(rotary_dim=2, tie_word_embeddings=False)),
  'codegen': (
    'CodeGenConfig',
    dict(GPT, n_head=8, n_embd=32, n_ctx=32, rotary_dim=2, tie_word_embeddings=False) | NO_DROPOUT,
  ),
  'phi': ('PhiConfig', LLAMA | dict(partial_rotary_factor=0.5)),
  'falcon': (
    'FalconConfig',
    dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=True, bias=False),
  ),
  'falcon_40b': (
    'FalconConfig',
    dict(
      vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
      new_decoder_architecture=True, bias=True,
    ),
  ),
  'bloom': (
    'BloomConfig',
    dict(vocab_size=24, hidden_size=16, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
  ),
  'mpt': (
    'MptConfig', dict(vocab_size=24, d_model=16, n_layers=2, n_heads=4, max_seq_len=32),
  ),
  'bart': (
    'BartConfig',
    dict(
      vocab_size=24, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
      decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=32,
      dropout=0.0,
    ),
  ),
  'mbart': (
    'MBartConfig',
    dict(
      vocab_size=24, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
      decoder_attention_heads=4, encoder_ffn_dim=20, decoder_ffn_dim=24, max_position_embeddings=32,
      dropout=0.0, scale_embedding=True,
    ),
  ),
  'bert': (
    'BertConfig',
    dict(
      vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
      max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
  ),
  't5': ('T5Config', T5),
  't5_gated': (
    'T5Config',
    T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False, num_decoder_layers=1, d_kv=6),
  ),
  'ul2': ('T5Config', T5 | dict(feed_forward_proj='gated-silu', tie_word_embeddings=False)),
  'mixtral': (
    'MixtralConfig', LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
  ),
  'qwen2_moe': ('Qwen2MoeConfig', QWEN_MOE),
  'qwen2_moe_sparse': (
    'Qwen2MoeConfig', QWEN_MOE | dict(num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=True),
  ),
  'switch': ('SwitchTransformersConfig', SWITCH),
  # every layer of the decoder a mixture, three of five of the encoder's pattern, tokens dropped
  'switch_dropping': (
    'SwitchTransformersConfig',
    SWITCH | dict(num_layers=5, num_sparse_encoder_layers=2, num_decoder_layers=2, num_sparse_decoder_layers=2,
                  expert_capacity=2, tie_word_embeddings=False),
  ),
  'mamba': (
    'MambaConfig',
    dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=3, use_bias=True),
  ),
  'mamba2': (
    'Mamba2Config',
    dict(
      vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8,
      n_groups=2, chunk_size=4, pad_token_id=0, use_bias=True,
    ),
  ),
  'rwkv': (
    'RwkvConfig',
    dict(
      vocab_size=24, hidden_size=16, num_hidden_layers=2, intermediate_size=24, context_length=32,
      rescale_every=0, use_cache=False,
    ),
  ),
  'mt5': ('MT5Config', T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
}  # fmt: skip


def write(folder: str, config: str, arguments: dict) -> None:
  """One model and what is expected of it."""
  import torch
  import transformers
  from safetensors.torch import save_file

  torch.manual_seed(0)
  told = getattr(transformers, config)(**arguments)
  # T5's config of transformers 5 ties whatever it is told; published ones of T5 1.1 say that they are not
  told.tie_word_embeddings = arguments.get('tie_word_embeddings', told.tie_word_embeddings)
  if getattr(told, 'is_encoder_decoder', False):
    told.tie_encoder_decoder = False
    model = transformers.AutoModelForSeq2SeqLM.from_config(told, attn_implementation='eager')
  elif told.model_type == 'bert':
    model = transformers.BertForPreTraining._from_config(told, attn_implementation='eager')
  else:
    model = transformers.AutoModelForCausalLM.from_config(told, attn_implementation='eager')
  model.set_input_embeddings(
    model.get_input_embeddings()
  )  # T5: one table for both sides, tied head or not
  model = model.float().eval()
  for p in model.parameters():
    p.data += 0.2 * torch.randn_like(p)
  model.save_pretrained(folder)
  # small ids pad in some models, whose embeddings then have no gradient
  ids, targets = torch.randint(4, 24, (2, 10)), torch.randint(24, (2, 10))
  encoder = torch.randint(4, 24, (2, 13))
  inputs = dict(input_ids=ids)
  if told.is_encoder_decoder:
    inputs = dict(input_ids=encoder, decoder_input_ids=ids)
  expected = dict(ids=ids, targets=targets, encoder=encoder)
  if told.model_type == 'bert':  # two sentences, the second begins elsewhere in each row
    expected['types'] = (torch.arange(10) >= torch.tensor([[4], [7]])).long()
    inputs['token_type_ids'] = expected['types']
  tx = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
  losses = []
  for step in range(STEPS + 1):
    found = model(**inputs)
    logits = found.prediction_logits if told.model_type == 'bert' else found.logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    tx.zero_grad()
    loss.backward()
    for p in model.parameters():  # of experts that nobody met: AdamW would leave them out
      p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    losses.append(loss.detach())
    if step == 0:
      expected['logits'] = logits.detach().clone()
      if told.model_type == 'bert':
        expected['classes'] = found.seq_relationship_logits.detach().clone()
      expected |= {f'gradient/{name}': g for name, g in gradients(model).items()}
    tx.step()
  expected['losses'] = torch.stack(losses)
  save_file(expected, os.path.join(folder, 'expected.safetensors'))


def gradients(model) -> dict:
  """The gradients under the names that `save_pretrained` gives the parameters, which it may split and rename."""
  from safetensors.torch import load_file

  values = {name: p.data for name, p in model.named_parameters()}
  for p in model.parameters():
    p.data = p.grad.clone()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    found = load_file(os.path.join(folder, 'model.safetensors'))
  for name, p in model.named_parameters():
    p.data = values[name]
  buffers = {name for name, _ in model.named_buffers()}
  return {name: g.clone() for name, g in found.items() if name not in buffers}


def main() -> None:
  """All of them, or those named after the folder."""
  root, *names = sys.argv[1:]
  for name in names or MODELS:
    folder = os.path.join(root, name)
    os.makedirs(folder, exist_ok=True)
    write(folder, *MODELS[name])
    for extra in set(os.listdir(folder)) - {
      'config.json',
      'model.safetensors',
      'expected.safetensors',
    }:
      os.remove(os.path.join(folder, extra))
    print(folder)


if __name__ == '__main__':
  main()
