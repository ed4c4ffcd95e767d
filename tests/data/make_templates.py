r"""Writes a `templates.json.gz`: conversations as ids and masks, by transformers' `apply_chat_template`.

  python -m tests.data.make_templates tests/data/templates.json.gz     # needs the extra `parity`
  python -m tests.data.make_templates runs/smollm2/vocab               # compares ours on that tokenizer instead

The tokenizer is a small byte-level BPE, trained here on the conversations. `{% generation %}` tells transformers what
the assistant says (`return_assistant_tokens_mask`); ours ignores it and finds out by rendering prefixes.
"""

import gzip
import json
import os
import pathlib
import random
import sys

import tokenizers
import transformers

from llm_jax.data import formats, records, vocab
from llm_jax.data import templates as ours

SAID = '{% generation %}{{ message["content"] + eos_token }}{% endgeneration %}'
TEMPLATES = dict(
  smollm2=(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  ),
  llama2=(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (told if loop.first else '') + message['content'] + ' [/INST]' }}{% else %}"
    "{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
  ),
  plain=(
    "{%- for message in messages -%}\n  {%- if message['role'] == 'assistant' -%}\n"
    f'    {SAID}\n'
    "  {%- else -%}\n    {{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\n  {%- endif -%}\n"
    '{%- endfor -%}'
  ),
  spaced=(
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant:"
    "{% generation %}{{ ' ' + message['content'] + '\n' }}{% endgeneration %}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}Assistant:{% endif %}'
  ),
)


def conversations() -> list[list[dict]]:
  """200 of them: one to three turns, with and without a system message, other scripts, white space, special tokens."""
  rng = random.Random(0)
  path = records.bundled('identity/dummy_conversation.json.gz')
  chats = [formats.sharegpt(r)[0].messages for r in records.read(path)]
  path = records.bundled('instructions/instruction-data-with-preference.json.gz')
  tasks = [formats.alpaca(r)[0].messages for r in records.read(path)]
  odd = [
    'naïve café',
    '日本語の文',
    'emoji 🙂👍🏽',
    ' spaces  in \t it',
    'a\n\nb\n',
    '<|im_end|> said',
    '1+1=2',
    'السلام',
  ]
  found = rng.sample(chats, 70) + rng.sample(tasks, 70)
  for _ in range(60):
    turns = [
      dict(
        role=('user', 'assistant')[i % 2], content=' '.join(rng.choices(odd, k=rng.randint(1, 3)))
      )
      for i in range(2 * rng.randint(1, 4))
    ]
    found.append(turns)
  for i, one in enumerate(found):
    one = [dict(role=m['role'], content=m['content']) for m in one]
    found[i] = [dict(role='system', content='Be brief.'), *one] if i % 3 == 0 else one
  rng.shuffle(found)
  return found


def trained(texts: list[str]) -> str:
  """A byte-level BPE of 600 ids, as a tokenizer.json."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<s>']
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  return made.to_str()


def asked(tokenizer, messages: list[dict], template: str) -> dict:
  """What transformers makes of a conversation, and of all but its last answer."""
  said = tokenizer.apply_chat_template(
    messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
  )
  before = messages[:-1] if messages[-1]['role'] == 'assistant' else messages
  prompt = tokenizer.apply_chat_template(
    before, chat_template=template, add_generation_prompt=True, return_dict=True
  )
  return dict(ids=said['input_ids'], mask=said['assistant_masks'], prompt=prompt['input_ids'])


def main() -> None:
  """Stores the reference, or compares on a tokenizer of a run."""
  talks = conversations()
  if os.path.isdir(sys.argv[1]):
    words = vocab.load(sys.argv[1])
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(words.description), **words.spelling
    )
    for name, template in TEMPLATES.items():
      words.template = template
      same = []
      for messages in talks:
        want, (ids, weights) = asked(tokenizer, messages, template), ours.encode(words, messages)
        same.append(ids.tolist() == want['ids'] and weights.tolist() == want['mask'])
      print(f'{name}: {sum(same)} of {len(same)} conversations have the same ids and mask')
    return
  description = trained([m['content'] for one in talks for m in one])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(description),
    bos_token='<s>',
    eos_token='<|im_end|>',
  )
  names = list(TEMPLATES)
  cases = [
    dict(template=names[i % len(names)], messages=one)
    | asked(tokenizer, one, TEMPLATES[names[i % len(names)]])
    for i, one in enumerate(talks)
  ]
  stored = dict(
    transformers=transformers.__version__, tokenizer=description, templates=TEMPLATES, cases=cases
  )
  text = json.dumps(stored, ensure_ascii=False, separators=(',', ':'))
  pathlib.Path(sys.argv[1]).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == '__main__':
  main()
