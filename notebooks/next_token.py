"""What SmolLM2-135M-Instruct says after the prompt of the survey's Figure 10: notebooks/next_token.json.

python -m notebooks.next_token --workdir=runs/smollm2          # make smollm2 first
"""

import argparse
import json
import pathlib

PROMPT, KEPT = 'I am sleepy. I start a pot of', 1000


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/smollm2')
  given = parser.parse_args()
  import jax
  import numpy as np

  from llm_jax.cli import generate

  model, params, words = generate.load(given.workdir)
  x = model.hidden(params, dict(inputs=np.array([words.encode(PROMPT)]))).x[:, -1:]
  logp = np.asarray(jax.nn.log_softmax(model.logits(params, x)[0, 0]))
  best = np.argsort(-logp)[:KEPT]
  found = [[words.decode([int(i)]), round(float(logp[i]), 4)] for i in best]
  told = dict(prompt=PROMPT, mass=round(float(np.exp(logp[best]).sum()), 4), logp=found)
  path = pathlib.Path(__file__).with_suffix('.json')
  path.write_text(json.dumps(told, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
