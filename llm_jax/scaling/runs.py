"""Runs of others, as arrays: six collections that come with the package, and the digitised runs of Chinchilla.

Where they are from and under which licence: `data/bundled/scaling_laws/SOURCE.md`. Every function reads its file anew.
"""

import csv
import gzip
import json
import os
from typing import NamedTuple

import numpy as np

from llm_jax.core.errors import UserError, nearest
from llm_jax.data import records

_FOLDER = 'scaling_laws'
PLACE = (
  'LLM_JAX_SCALING_DATA'  # environment variable: a folder with epoch_chinchilla_svg_extracted.csv
)


class Runs(NamedTuple):
  """One entry per run: names, N, D, training FLOP and loss in nats per token, f64 [n] but for the names."""

  names: np.ndarray
  parameters: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray


class Scores(NamedTuple):
  """Task scores by run: what was scored, N, D, training FLOP, and the columns asked for, f64 [n] each."""

  names: np.ndarray
  parameters: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  scores: dict[str, np.ndarray]


def _table(name: str) -> list[dict[str, str]]:
  with gzip.open(records.bundled(f'{_FOLDER}/{name}.csv.gz'), 'rt', encoding='utf-8') as f:
    return list(csv.DictReader(f))


def _column(rows: list[dict[str, str]], key: str) -> np.ndarray:
  return np.array([float(row[key] or 'nan') for row in rows])


def _choose(name: str, known: dict[str, str]) -> str:
  if name not in known:
    raise UserError(f'no {name!r} here: {nearest(name, known)}')
  return known[name]


def chinchilla(path: str | None = None) -> Runs:
  """The 240 runs of Hoffmann et al.'s figure 4 that Besiroglu et al. (arXiv:2404.10102) digitised and fitted.

  path: epoch-research's svg_extracted_data.csv, which has no licence and is not bundled; default: the file of that name
  in the folder that LLM_JAX_SCALING_DATA names. Of its 245 rows the five highest losses are left out; D = C / (6 N).
  """
  path = path or os.path.join(os.environ.get(PLACE, ''), 'epoch_chinchilla_svg_extracted.csv')
  if not os.path.exists(path):
    raise UserError(
      f'no file {path!r}: take data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla'
      f' and name its place, or its folder with {PLACE}'
    )
  with open(path, encoding='utf-8') as f:
    rows = list(csv.DictReader(f))
  n, c, y = (_column(rows, key) for key in ('Model Size', 'Training FLOP', 'loss'))
  keep = np.sort(np.argsort(y, kind='stable')[:-5])
  n, c, y = n[keep], c[keep], y[keep]
  return Runs(np.array([f'{x:.3g}' for x in n]), n, c / (6 * n), c, y)


# the file that each text was evaluated on -> a name
_TEXTS = {
  'c4_val': 'training/eval_data/c4_val/shard-{0000000..0000010}.tar',
  'openlm': 'training/eval_data/val_tok_mult/openlm/shard_00000000.tar',
  'german_english': 'training/eval_data/val_tok_mult/de-en/val_de-en_100.tar',
  'code': 'training/eval_data/val_tok_mult/paloma_dolma_100_programing_languages/00000001.tar',
  'paloma_c4': 'training/eval_data/val_tok_mult/paloma_c4_en/00000001.tar',
  'paloma_refinedweb': 'training/eval_data/val_tok_mult/paloma_falcon-refinedweb/00000001.tar',
  'paloma_redpajama': 'training/eval_data/val_tok_mult/paloma_redpajama/00000001.tar',
  'penn_treebank': 'training/eval_data/val_tok_mult/paloma_ptb/00000001.tar',
}
_CORPORA = dict(c4='c4_original', redpajama='rpj', refinedweb='rw_original')


def overtraining(corpus: str = 'redpajama', text: str = 'c4_val') -> Runs:
  """Gadre et al.'s 104 models (arXiv:2403.08540) of one training corpus, 11M to 6.9B parameters, 5 to 640 tokens each.

  corpus: c4, redpajama or refinedweb; text: what the loss is on. N counts all parameters, FLOP are 6 N D.
  """
  corpus, text = _choose(corpus, _CORPORA), _choose(text, _TEXTS)
  rows = [
    row for row in _table('overtraining') if row['train_data'] == corpus and row['val_data'] == text
  ]
  n, d, y = (_column(rows, key) for key in ('params', 'tokens', 'loss'))
  return Runs(np.array([row['name'] for row in rows]), n, d, 6 * n * d, y)


def isoflops() -> Runs:
  """The nine IsoFLOP curves of Stanford CS336's third assignment, eight sizes each; synthetic, D = C / (6 N)."""
  with gzip.open(records.bundled(f'{_FOLDER}/isoflops.json.gz'), 'rt', encoding='utf-8') as f:
    rows = json.load(f)
  n, c, y = (
    np.array([row[key] for row in rows], np.float64)
    for key in ('parameters', 'compute_budget', 'final_loss')
  )
  return Runs(np.array([f'{x:.3g}' for x in n]), n, c / (6 * n), c, y)


def kyo_takano() -> Runs:
  """The 234 runs that github.com/kyo-takano/chinchilla ships as its example of language models."""
  rows = _table('kyo_takano')
  n, d, c, y = (_column(rows, key) for key in ('N', 'D', 'C', 'loss'))
  return Runs(np.array([f'{x:.3g}' for x in n]), n, d, c, y)


# Parameters without embeddings, of the repository's table (OLMo-ladder, src/fitting)
_LADDER = {
  '190M': 190_354_176,
  '370M': 371_262_464,
  '760M': 758_220_288,
  '1B': 1_279_395_840,
  '3B': 3_169_537_280,
}
# Tasks of the paper that the ladder's runs were scored on: (columns averaged, accuracy of guessing)
_MMLU = ('stem', 'humanities', 'social_sciences', 'other')
TASKS = {
  'mmlu': (tuple(f'mmlu_{part}_test_rc_5shot' for part in _MMLU), 0.25),
  'hellaswag': (('hellaswag_val_rc_5shot',), 0.25),
  'arc_easy': (('arc_easy_test_rc_5shot',), 0.25),
  'arc_challenge': (('arc_challenge_test_rc_5shot',), 0.25),
  'piqa': (('piqa_val_rc_5shot',), 0.5),
  'csqa': (('csqa_val_rc_5shot',), 0.2),
  'socialiqa': (('socialiqa_val_rc_5shot',), 1 / 3),
  'openbookqa': (('openbookqa_test_rc_5shot',), 0.25),
}


def olmo_ladder(task: str = 'hellaswag') -> Scores:
  """The last step of OLMo's 30 ladder runs (Bhagia et al. 2024, arXiv:2412.04403), 190M to 3B parameters.

  scores: `c4` nats per token, and of the task `bits` per byte of the right answers and `accuracy` of ranking answers by
  likelihood per character, five examples before the question. MMLU is the mean of its four parts weighted alike.
  """
  if task not in TASKS:
    raise UserError(f'the ladder has no task {task!r}: {nearest(task, TASKS)}')
  rows, (columns, _) = _table('olmo_ladder'), TASKS[task]
  sizes = np.array([_LADDER[row['size']] for row in rows], np.float64)
  scores = dict(
    c4=_column(rows, 'eval/c4_en-validation/CrossEntropyLoss'),
    bits=np.mean([_column(rows, f'eval/downstream_bpb/{c}_bpb') for c in columns], axis=0),
    accuracy=np.mean([_column(rows, f'eval/downstream/{c}_len_norm') for c in columns], axis=0),
  )
  tokens, flops = (
    _column(rows, f'throughput/total_{key}') for key in ('tokens', 'training_Gflops')
  )
  return Scores(np.array([row['run'] for row in rows]), sizes, tokens, 1e9 * flops, scores)


# All parameters, from the models' cards; 143,000 steps of 2,097,152 tokens
_PYTHIA = {
  '70m': 70_426_624,
  '160m': 162_322_944,
  '410m': 405_334_016,
  '1b': 1_011_781_632,
  '1.4b': 1_414_647_808,
  '2.8b': 2_775_208_960,
  '6.9b': 6_857_302_016,
  '12b': 11_846_072_320,
}
_PYTHIA_BATCH = 2_097_152


def pythia(task: str = 'lambada_openai', *, deduplicated: bool = True) -> Scores:
  """Pythia's checkpoints (Biderman et al. 2023, arXiv:2304.01373) on a task without examples, by size and step.

  scores: `accuracy`, and for lambada_openai `loss`, nats of the whole last word. deduplicated: of the models that
  were trained on the deduplicated Pile (the other set lacks the 1B model). Checkpoint 0 has seen nothing: its FLOP are
  zero.
  """
  table = _table('pythia')
  rows = [
    row
    for row in table
    if row['task'] == task and row['model'].endswith('-deduped') == deduplicated
  ]
  if not rows:
    raise UserError(
      f'Pythia was not scored on {task!r}: {nearest(task, {r["task"] for r in table})}'
    )
  sizes = [row['model'].removeprefix('pythia-').removesuffix('-deduped') for row in rows]
  n = np.array([_PYTHIA[size] for size in sizes], np.float64)
  d = _column(rows, 'step') * _PYTHIA_BATCH
  scores = dict(accuracy=_column(rows, 'acc'))
  if task == 'lambada_openai':
    scores['loss'] = np.log(_column(rows, 'ppl'))
  return Scores(np.array(sizes), n, d, 6 * n * d, scores)


def observations() -> Scores:
  """Base models of many families on eight benchmarks (Ruan et al. 2024, arXiv:2405.10938): those with known FLOP.

  scores: accuracies by benchmark, NaN where it was not measured. FLOP as the authors list them.
  """
  rows = [row for row in _table('observations') if row['FLOPs (1E21)']]
  benchmarks = list(rows[0])[5:]
  n, d, c = (
    _column(rows, key) for key in ('Model Size (B)', 'Pretraining Data Size (T)', 'FLOPs (1E21)')
  )
  names = np.array([row['Model Family'] for row in rows])
  return Scores(names, 1e9 * n, 1e12 * d, 1e21 * c, {b: _column(rows, b) for b in benchmarks})
