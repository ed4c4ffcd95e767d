"""A model that learns one conversation by heart, in a template of ours. `get_config('alpaca')` and so on."""

import json
import os
import tempfile

from llm_jax.core.config import use
from llm_jax.data import examples, formats, vocab
from llm_jax.optim import rules
from tests.cli import tiny

ASKED, SAID = 'Who is there?', 'A small model: it knows \u201cone\u201d answer.'


def get_config(template='chatml'):
  path = os.path.join(tempfile.mkdtemp(), 'talk.jsonl')
  said = [dict(role='user', content=ASKED), dict(role='assistant', content=SAID)]
  with open(path, 'w', encoding='utf-8') as f:
    f.write(json.dumps(dict(messages=said)) + '\n')
  c = tiny.get_config('steps=80,every=80,length=320')
  kept = use(
    examples.conversations, path=path, format=formats.messages, template=template, heldout=0.0
  )
  task = use(examples.task, sets=(kept,), vocab=use(vocab.bytes_, extra_ids=0))
  c.source = use(examples.make, task=task, batch=2, length=320)
  c.optimizer.rule = use(rules.adamw)
  c.model.block.dropout, c.hooks = 0.0, {}
  c.model.embed = 32
  return c
