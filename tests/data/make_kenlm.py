"""Makes kenlm.json: what KenLM reads off our Katz trigrams, written down for it in the ARPA format.

pip install numpy kenlm pytest && python -m tests.data.make_kenlm      # kenlm 0.3.0
"""

import json
import math
import os
import pathlib
import tempfile

import kenlm

from llm_jax.data import ngram
from tests.data.test_ngram import V, said

TEXTS = [[1, 2, 1, 1, 3, 5, 2, 6, 6, 4, 1, 7, 2, 1, 8], [4, 4, 1, 2, 3, 3, 3, 1, 1, 1, 5, 7, 8]]
END = V - 1
MADE = pathlib.Path(__file__).with_name('kenlm.json')


def name(word: int) -> str:
  """As KenLM wants them."""
  return {0: '<s>', END: '</s>'}.get(word, f'w{word}')


def arpa(made: ngram.NGram) -> str:
  """The model as text: log10 p, the n-gram, log10 backoff. Every word has a unigram, every history a row."""
  uniform = ngram.probabilities(made._replace(levels=made.levels[:1]), [[]])[0]
  rows = [{(w,): [math.log10(p), 0.0] for w, p in enumerate(uniform)}, {}, {}]
  digits = lambda key, n: tuple(int(key) // V**i % V for i in range(n - 1, -1, -1))
  for n, level in enumerate(made.levels, 1):
    for gram, p in zip(level.grams, level.p):
      rows[n - 1][digits(gram, n)] = [math.log10(p), 0.0]
    for history, backoff in zip(level.histories, level.backoff):
      if n > 1:
        rows[n - 2].setdefault(digits(history, n - 1), [-99.0, 0.0])[1] = math.log10(backoff)
  lines = ['\\data\\', *(f'ngram {n}={len(some) + (n == 1)}' for n, some in enumerate(rows, 1))]
  for n, some in enumerate(rows, 1):
    lines += ['', f'\\{n}-grams:', *['-99\t<unk>'] * (n == 1)]
    for gram, (p, backoff) in some.items():
      lines.append(f'{p:.9f}\t{" ".join(map(name, gram))}' + f'\t{backoff:.9f}' * (n < 3))
  return '\n'.join([*lines, '', '\\end\\', ''])


def main() -> None:
  """Writes log10 p of every token but the first, before which we have two starts and KenLM one."""
  texts = [[*map(int, text), END] for text in said(4)]
  made = ngram.katz(ngram.count(texts, order=3, vocab=V), cutoff=3)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'katz.arpa')
    pathlib.Path(path).write_text(arpa(made), encoding='utf-8')
    model = kenlm.Model(path)
  scores = [
    [round(row[0], 6) for row in model.full_scores(' '.join(map(name, text[:-1])))]
    for text in TEXTS
  ]
  told = dict(texts=TEXTS, log10=[row[1:] for row in scores])
  MADE.write_text(json.dumps(told) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
