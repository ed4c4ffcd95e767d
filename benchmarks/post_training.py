r"""A step of fine-tuning, DPO and GRPO beside TRL on one tiny LLaMA (4 layers, 256 wide), in one interleaved run.

  pip install torch transformers trl==1.16.0
  python -m benchmarks.post_training                 # about ten minutes on two cores
  python -m benchmarks.post_training --only=dpo --steps=20

Both begin with the same weights, in f32, and read the same bundled instructions with the same tokenizer (byte-level
BPE, 2,048 pieces). A step is everything from asking for a batch to updated weights; steps are taken in turn, ours after
each of TRL's, and the median counts. What is compared is work done in a second:

  sft    tokens of examples, padding not counted: 24 examples a batch, padded by TRL to the longest; packed by us into 9
         rows of 256
  dpo    pairs of at most 160 tokens a side, the reference's log-probabilities computed in the step: 8 a batch, padded
         by TRL to the longest; packed by us into 4 rows of 256, each prompt read once
  grpo   answers: 8 prompts x 8 answers of at most 64 tokens, generated, scored by a function of the text, learned from

`compilations` are those of llm_jax after its first steps, which see every shape.
CPU-seconds are of all threads together, also of those that wait for one another; on a busy machine count with one
thread, OMP_NUM_THREADS=1 taskset -c 1.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VOCAB, LONGEST, RATE = 2048, 160, 1e-4
EXAMPLES, PAIRS, PROMPTS, GROUP, NEW = 24, 8, 8, 8, 64
ROWS, WIDTH = 4, 256  # of packed pairs
TEMPLATE = 'alpaca'
WARM = dict(sft=2, dpo=2, grpo=4)  # steps before the clock runs


def write(folder: str) -> Any:
  """A LLaMA with random weights and its tokenizer, for transformers; returns the tokenizer."""
  import tokenizers
  import torch
  import transformers as hf

  from llm_jax.data import examples

  words = tokenizers.Tokenizer(tokenizers.models.BPE())
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = tokenizers.decoders.ByteLevel()
  letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  told = dict(vocab_size=VOCAB, special_tokens=['<pad>', '<eos>'], initial_alphabet=letters)
  trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **told)
  words.train_from_iterator(examples.instructions(template=TEMPLATE).texts(), trainer)
  named = dict(pad_token='<pad>', eos_token='<eos>')
  tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **named)
  torch.manual_seed(0)
  config = hf.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
  )
  hf.LlamaForCausalLM(config).save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return tokenizer


# --- ours ---------------------------------------------------------------------------------------------


class Ours:
  """One kind of training, a step at a time. work(batch): what a batch is worth."""

  def __init__(self, run: str, source: Callable, objective: Callable, work: Callable):
    import jax
    import jax.numpy as jnp

    from llm_jax.cli import generate
    from llm_jax.core.config import build
    from llm_jax.model import stack
    from llm_jax.optim import chain, rules, schedules
    from llm_jax.train import state, step

    _, params, words = generate.load(run)
    model = build(generate.load_model(run)[0])(runner=stack.loop)
    self.source, self.work = source(model, words), work
    schedule = functools.partial(schedules.constant, peak=RATE)
    tx = chain.make(model.axes, rule=functools.partial(rules.adamw), schedule=schedule, clip=1.0)
    self.update = step.make(functools.partial(objective, model), tx)
    self.state = state.State(jnp.zeros((), jnp.int32), params, tx.init(params))
    self.key, self.compiled, self.losses, self.parts = jax.random.key(0), 0, [], []
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, seconds: float, **_: Any) -> None:
    self.compiled += event == '/jax/core/compile/backend_compile_duration'

  def __call__(self) -> float:
    """One step; returns the work that was done."""
    from llm_jax.core import mesh

    batch, begun = self.source(self.state), time.perf_counter()
    self.state, metrics = self.update(self.state, mesh.place(batch), self.key)
    self.losses.append(float(metrics['loss']))
    self.parts.append(
      getattr(self.source, 'seconds', {}) | dict(update=time.perf_counter() - begun)
    )
    return self.work(batch)


def sft(run: str) -> Ours:
  """Packed instructions."""
  from llm_jax.data import examples
  from llm_jax.objectives import language

  def source(model: Any, words: Any) -> Any:
    sets = (functools.partial(examples.instructions, template=TEMPLATE),)
    task = functools.partial(examples.task, sets=sets, vocab=lambda text: words)
    return examples.make(model, task=task, batch=9, length=256)

  return Ours(run, source, language.next_token, lambda b: float((b['segments'] > 0).sum()))


def dpo(run: str) -> Ours:
  """Polite and impolite answers."""
  from llm_jax.data import pairs
  from llm_jax.objectives import preference
  from llm_jax.rl import annotate

  def source(model: Any, words: Any) -> Any:
    packed = functools.partial(
      pairs.packed, data=_data(words), batch=ROWS, length=WIDTH, left_out=0.01
    )
    return annotate.with_reference(model, source=packed, ref=run)

  return Ours(run, source, preference.dpo, lambda b: float(b['compared'].sum()))


def _data(words: Any) -> Any:
  from llm_jax.data import pairs

  return functools.partial(pairs.politeness, template=TEMPLATE, vocab=lambda text: words)


def grpo(run: str) -> Ours:
  """Answers, drawn, scored and learned from."""
  from llm_jax.objectives import policy
  from llm_jax.rl import layout, rollout

  def source(model: Any, words: Any) -> Any:
    records = [dict(prompt=text) for text in prompts(words)]
    rows = PROMPTS * GROUP
    reward = lambda prompts, answers, told: np.array([scored(a) for a in answers], np.float32)
    sizes = dict(batch=rows, round=rows, group=GROUP, max_new=NEW, layout=layout.shared)
    return rollout.make(model, prompts=lambda: records, reward=reward, vocab=lambda: words, **sizes)

  return Ours(run, source, policy.grpo, lambda b: float(len(b['inputs'])))


def prompts(words: Any) -> list[str]:
  """Instructions of at most 64 tokens."""
  from llm_jax.data import examples

  found = list(examples.instructions(template=TEMPLATE).texts())
  return [text for text in found if len(words.encode(text)) <= 64]


def scored(text: str) -> float:
  """A reward that costs nothing: the share of letters that are vowels."""
  return sum(c in 'aeiou' for c in text) / max(len(text), 1)


# --- TRL ----------------------------------------------------------------------------------------------


def trainer(kind: str, folder: str, tokenizer: Any, run: str, steps: int, callback: Any) -> Any:
  """TRL's trainer with its defaults but for sizes, on the CPU, in f32."""
  import datasets
  import transformers as hf
  import trl

  from llm_jax.cli import generate

  model, _, words = generate.load(run)
  told = dict(
    output_dir=f'{folder}/{kind}',
    max_steps=steps,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy='no',
    logging_strategy='no',
    learning_rate=RATE,
    lr_scheduler_type='constant',
    disable_tqdm=True,
    gradient_checkpointing=False,
  )
  load = lambda: hf.AutoModelForCausalLM.from_pretrained(folder)
  rest = dict(processing_class=tokenizer, callbacks=[callback])
  if kind == 'sft':
    args = trl.SFTConfig(**told, per_device_train_batch_size=EXAMPLES, max_length=256)
    found = datasets.Dataset.from_list(single(model, words))
    return trl.SFTTrainer(load(), args=args, train_dataset=found, **rest)
  if kind == 'dpo':
    args = trl.DPOConfig(**told, per_device_train_batch_size=PAIRS, max_length=LONGEST)
    text = datasets.Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')] * 8)
    made = trl.DPOTrainer(load(), load(), args=args, train_dataset=text, **rest)
    made.train_dataset = datasets.Dataset.from_list(both(model, words))
    return made
  args = trl.GRPOConfig(
    **told,
    per_device_train_batch_size=PROMPTS * GROUP,
    num_generations=GROUP,
    max_completion_length=NEW,
  )
  reward = lambda completions, **_: [scored(text) for text in completions]
  found = datasets.Dataset.from_list([dict(prompt=text) for text in prompts(words)])
  return trl.GRPOTrainer(load(), reward_funcs=reward, args=args, train_dataset=found, **rest)


def single(model: Any, words: Any) -> list[dict]:
  """The same examples as ids, one by one."""
  from llm_jax.data import batch as batch_lib
  from llm_jax.data import examples

  sets = (functools.partial(examples.instructions, template=TEMPLATE),)
  task = functools.partial(examples.task, sets=sets, vocab=lambda text: words)
  source = examples.make(model, task=task, rows=batch_lib.pad, batch=64, length=256, shuffle=False)
  found = []
  for batch in source.once():
    for targets, weights in zip(batch['targets'], batch['weights'], strict=True):
      size = int(np.flatnonzero(weights)[-1]) + 1 if weights.any() else 0
      if size:
        mask = (weights[:size] > 0).astype(int).tolist()
        found.append(dict(input_ids=targets[:size].tolist(), completion_mask=mask))
  return found


def both(model: Any, words: Any) -> list[dict]:
  """The same pairs as ids."""
  from llm_jax.data import pairs

  told = dict(data=_data(words), batch=PAIRS, length=LONGEST, left_out=0.1)
  found = []
  for batch in pairs.pairs(model, **told).once():
    for row in range(len(batch['chosen/inputs'])):
      ids = {}
      for side in ('chosen', 'rejected'):
        said = np.flatnonzero(batch[f'{side}/weights'][row])
        if len(said):
          ids['prompt_ids'] = batch[f'{side}/targets'][row][: said[0]].tolist()
          ids[f'{side}_ids'] = batch[f'{side}/targets'][row][said].tolist()
      if len(ids) == 3:
        found.append(ids)
  return found


def clocks() -> tuple[float, float]:
  """Wall time and the CPU time of all threads, in seconds."""
  return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
  """What lies between two readings."""
  return end[0] - start[0], end[1] - start[1]


def compare(kind: str, folder: str, tokenizer: Any, run: str, steps: int) -> None:
  """Prints one line."""
  import transformers as hf

  ours = dict(sft=sft, dpo=dpo, grpo=grpo)[kind](run)
  times: dict[str, list[tuple[float, float]]] = dict(trl=[], ours=[])
  work: dict[str, list[float]] = dict(trl=[], ours=[])

  class Turns(hf.TrainerCallback):
    """Takes one of our steps after each of theirs."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
      for _ in range(WARM[kind]):
        ours()
      ours.compiled, self.start = 0, clocks()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
      now = clocks()
      times['trl'].append(since(self.start, now))
      work['ours'].append(ours())
      times['ours'].append(since(now, clocks()))
      self.start = clocks()

  peer = trainer(kind, folder, tokenizer, run, steps, Turns())
  collate = peer.data_collator

  def counted(items: list) -> Any:
    batch = collate(items)
    tokens = kind == 'sft'
    work['trl'].append(float(batch['attention_mask'].sum()) if tokens else float(len(items)))
    return batch

  peer.data_collator = counted
  peer.train()
  speed, wall, cpu = {}, {}, {}
  for name, taken in times.items():
    done = statistics.fmean(work[name][1 : len(taken)])
    wall[name], cpu[name] = (statistics.median(t) for t in zip(*taken[1:], strict=True))
    speed[name] = done / wall[name]
  unit = dict(sft='tokens', dpo='pairs', grpo='answers')[kind]
  ratio = speed['ours'] / speed['trl']
  print(
    f'{kind:5} TRL {speed["trl"]:9.1f} {unit}/s, llm_jax {speed["ours"]:9.1f}: {ratio:.2f} times as fast; '
    f'steps {wall["trl"]:.2f} and {wall["ours"]:.2f} s, {cpu["trl"]:.2f} and {cpu["ours"]:.2f} CPU-seconds; '
    f'compilations {ours.compiled}; our loss {ours.losses[0]:.3f} to {ours.losses[-1]:.3f}',
    flush=True,
  )
  told = {name: [part[name] for part in ours.parts[WARM[kind] :]] for name in ours.parts[-1]}
  medians = ', '.join(f'{name} {statistics.median(taken):.2f}' for name, taken in told.items())
  print(f'{kind:5} of a step of llm_jax, s: {medians}', flush=True)


def main() -> None:
  """Prints a line for each kind."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--only', default='sft,dpo,grpo')
  parser.add_argument('--steps', type=int, default=12)
  given = parser.parse_args()
  from llm_jax.cli import main as command

  print(f'load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores')
  with tempfile.TemporaryDirectory() as folder:
    tokenizer, run = write(folder), f'{folder}/run'
    if command.main(['convert', '--from=huggingface', f'--path={folder}', f'--to={run}']):
      sys.exit('the weights could not be converted')
    for kind in given.only.split(','):
      compare(kind, folder, tokenizer, run, given.steps)


if __name__ == '__main__':
  main()
