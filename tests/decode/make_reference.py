"""What transformers' `generate` says with three of the tiny models of tests/interop, and its logits processors.

  python -m tests.decode.make_reference MODELS FILE      # needs the extra `parity`

MODELS: the folder that tests/interop/make_reference.py wrote. FILE gets, as safetensors, the tokens of every strategy
for 20 prompts, the scores of beams, and random logits before and after each processor. `make test` compares with the
stored `reference.safetensors`, `make parity` with a fresh one.
"""

import os
import sys

import numpy as np

VOCAB, PROMPTS, LONGEST, NEW = 24, 20, 8, 12
EOS = dict(gpt2=21, llama=16, t5=11)  # ids that these weights say now and then
PENALTY = dict(repetition_penalty=1.3, no_repeat_ngram_size=3)
BEAMS = dict(num_beams=4, length_penalty=0.6, num_return_sequences=4)
PAIRS = dict(num_beams=2, length_penalty=1.0, num_return_sequences=2)
DRAWN = dict(do_sample=True, temperature=1.3, top_k=15, top_p=0.9, **PENALTY)

# name: arguments of GenerationConfig
STRATEGIES = {
  'greedy': dict(),
  'greedy_penalised': PENALTY,
  'beams': dict(BEAMS, early_stopping=False),
  'beams_early': dict(BEAMS, early_stopping=True),
  'beams_never': dict(BEAMS, early_stopping='never'),
  'beams_penalised': dict(BEAMS, early_stopping=False, **PENALTY),
  'beams_mean': dict(BEAMS, early_stopping=False, length_penalty=1.0, num_beams=7),
  # where the three ways to stop early find different answers
  'pairs': dict(PAIRS, early_stopping=False),
  'pairs_early': dict(PAIRS, early_stopping=True),
  'pairs_never': dict(PAIRS, early_stopping='never'),
  'drawn': DRAWN,
  'drawn_whole': dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
  'drawn_min_p': dict(do_sample=True, top_k=0, min_p=0.1, typical_p=0.95),
}

# name: (class of transformers, its arguments); those of words see `text()`
BIAS = {(3,): 1.5, (7,): -2.0}
PROCESSORS = {
  'temperature': ('TemperatureLogitsWarper', (0.7,)),
  'top_k': ('TopKLogitsWarper', (5,)),
  'top_p': ('TopPLogitsWarper', (0.8,)),
  'min_p': ('MinPLogitsWarper', (0.1,)),
  'typical': ('TypicalLogitsWarper', (0.7,)),
  'epsilon': ('EpsilonLogitsWarper', (0.03,)),
  'eta': ('EtaLogitsWarper', (0.2,)),
  'repetition': ('RepetitionPenaltyLogitsProcessor', (1.4,)),
  'no_repeat_ngram': ('NoRepeatNGramLogitsProcessor', (2,)),
  'banned': ('NoBadWordsLogitsProcessor', ([[3], [4, 5], [1, 2, 6]],)),
  'bias': ('SequenceBiasLogitsProcessor', (BIAS,)),
}


def prompts() -> tuple[np.ndarray, np.ndarray]:
  """int32 [PROMPTS, LONGEST], right-padded, and their lengths."""
  rng = np.random.default_rng(5)
  return rng.integers(3, VOCAB, (PROMPTS, LONGEST)), rng.integers(2, LONGEST + 1, PROMPTS)


def uniforms() -> np.ndarray:
  """The numbers that the samples are drawn with."""
  return np.random.default_rng(6).random((PROMPTS, NEW), np.float32)


def text() -> np.ndarray:
  """What has been said in front of the logits that the processors are given, int [8, 9]: many repetitions."""
  return np.random.default_rng(7).integers(1, 7, (8, 9))


def logits() -> np.ndarray:
  return np.random.default_rng(8).normal(0, 2, (8, VOCAB)).astype(np.float32)


def generated(folder: str, name: str) -> dict:
  """tokens int32 [PROMPTS, n, NEW] of every strategy, 0 after the end, and f32 [PROMPTS, n] of the scores."""
  import torch
  import transformers

  torch.set_num_threads(1)  # the models are tiny
  kind = 'AutoModelForSeq2SeqLM' if name == 't5' else 'AutoModelForCausalLM'
  model = getattr(transformers, kind).from_pretrained(os.path.join(folder, name)).float().eval()
  found, draw = {}, torch.multinomial
  for strategy, settings in STRATEGIES.items():
    n = settings.get('num_return_sequences', 1)
    tokens, scores = np.zeros((PROMPTS, n, NEW), np.int32), np.zeros((PROMPTS, n), np.float32)
    ends = dict(eos_token_id=EOS[name], pad_token_id=0, max_new_tokens=NEW)
    told = transformers.GenerationConfig(**ends, **settings)
    told.decoder_start_token_id = 0 if name == 't5' else None
    told.return_dict_in_generate = told.output_scores = True
    for i, (prompt, length) in enumerate(zip(*prompts(), strict=True)):
      stream = iter(uniforms()[i])

      def inverse(p, num_samples, u=stream):
        del num_samples
        mass = p.cumsum(-1)
        return (mass <= float(next(u)) * mass[:, -1:]).sum(-1, keepdim=True)

      torch.multinomial = inverse
      ids = torch.tensor(prompt[None, :length])
      out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=told)
      rows = out.sequences[:, 1 if name == 't5' else length :].numpy()
      ended = np.cumsum(rows == EOS[name], axis=1) - (rows == EOS[name]) > 0
      tokens[i, :, : rows.shape[1]] = np.where(ended, 0, rows)  # beams are filled up with eos
      if 'num_beams' in settings:
        scores[i] = out.sequences_scores.numpy()
    torch.multinomial = draw
    found[f'{name}/{strategy}/tokens'] = tokens
    if 'num_beams' in settings:
      found[f'{name}/{strategy}/scores'] = scores
  return found


def processed() -> dict:
  """f32 [8, VOCAB] of each processor."""
  import torch
  import transformers

  found = {}
  for name, (kind, arguments) in PROCESSORS.items():
    if name in ('bias', 'banned'):
      arguments = (
        ({k: float(v) for k, v in BIAS.items()},) if name == 'bias' else (*arguments, None)
      )
    made = getattr(transformers, kind)(*arguments)
    found[f'processors/{name}'] = made(torch.tensor(text()), torch.tensor(logits())).numpy()
  return found


def main() -> None:
  """Writes the file."""
  from safetensors.numpy import save_file

  folder, file = sys.argv[1:]
  found = processed()
  for name in EOS:
    found |= generated(folder, name)
  save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, file)
  print(file)


if __name__ == '__main__':
  main()
