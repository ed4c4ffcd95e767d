"""A model tuned with a template of ours answers in it: `train`, `generate --chat`, and what `serve` asks the engine."""

import os

import pytest

from llm_jax.cli import main
from llm_jax.data import templates, vocab
from llm_jax.serve import api, prepare, reading
from tests.cli import talk
from tests.variants import variants

CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'talk.py')


@pytest.mark.parametrize('template', variants(['chatml', 'alpaca'], ['chatml']))
def test_a_tuned_model_answers_in_its_template(template, tmp_path, capfd):
  folder = f'{tmp_path}/run'
  assert main.main(['train', f'--config={CONFIG}:{template}', f'--workdir={folder}']) == 0
  capfd.readouterr()
  flags = [f'--workdir={folder}', '--temperature=0', '--max_new=80', f'--prompt={talk.ASKED}']
  assert main.main(['generate', '--chat', *flags]) == 0
  assert capfd.readouterr().out == f'{talk.SAID}\n'
  assert main.main(['generate', *flags]) == 0  # it has learned the template, not the sentence
  assert talk.SAID not in capfd.readouterr().out

  words = vocab.load(f'{folder}/vocab')
  body = api.Chat(model='run', messages=[dict(role='user', content=talk.ASKED)])
  (prompt,) = prepare.conversation(body, words, reading.Causal(320), api.Limits()).prompts
  said = [dict(role='user', content=talk.ASKED), dict(role='assistant', content=talk.SAID)]
  program = templates.ALL[template]
  ids, _ = templates.encode(vocab.bytes_(extra_ids=0), said, program)
  answer = [*words.encode(talk.SAID), words.eos]
  at = len(prompt.ids)
  assert list(prompt.ids) == ids[:at].tolist() and ids[at : at + len(answer)].tolist() == answer
  assert prompt.samples[0].ends == (words.eos,)
