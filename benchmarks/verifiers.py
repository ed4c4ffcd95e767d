r"""How often the verifiable rewards agree with the flags of published data sets.

  python -m benchmarks.verifiers                                     # the bundled records, seconds
  python -m benchmarks.verifiers --gsm8k=example_model_solutions.jsonl --human_eval=HumanEval.jsonl --mbpp=mbpp.jsonl

gsm8k: solutions that four models wrote, with the flag that the authors' own checker gave each (the file of that name in
github.com/openai/grade-school-math): agreement of `verify.math` with the flags. human_eval, mbpp: the data sets' own
solutions, which must pass (`verify.code`), and the same without their last line, of which hardly any may. Files may be
gzipped. Every disagreement is printed, so that a person can say who is right.
"""

import argparse
import gzip
import json
import pathlib

from llm_jax.rl import verify

BUNDLED = pathlib.Path(__file__).parent.parent / 'tests/rl/verify.json'
SHOWN = 5  # disagreements of each kind


def lines(path: str) -> list[dict]:
  """The records of a JSONL file, gzipped or not."""
  opened = gzip.open if path.endswith('.gz') else open
  with opened(path, 'rt', encoding='utf-8') as f:
    return [json.loads(line) for line in f if line.strip()]


def gsm8k(records: list[dict]) -> list[dict]:
  """A record per solution: truth, solution, correct."""
  return [
    dict(truth=r['ground_truth'], solution=s['solution'], correct=s['is_correct'])
    for r in records
    for s in r.values()
    if isinstance(s, dict)
  ]


def mathematics(rows: list[dict]) -> None:
  """Prints the agreement with the flags."""
  told = [dict(answer=r['truth']) for r in rows]
  found = verify.math([''] * len(rows), [r['solution'] for r in rows], told) > 0
  wrong = [r | dict(found=bool(f)) for r, f in zip(rows, found, strict=True) if f != r['correct']]
  right = sum(r['correct'] for r in rows)
  print(
    f'gsm8k: {len(rows) - len(wrong)} of {len(rows)} solutions as flagged ({right} of them correct)'
  )
  for r in wrong[:SHOWN]:
    said, truth = verify.extract(r['solution']), verify.extract(r['truth'])
    print(f'  flagged {r["correct"]}, found {r["found"]}: said {said!r}, right {truth!r}')


def shortened(program: str) -> str:
  """The program without its last line that is not blank, but with something in its place."""
  kept = program.rstrip().splitlines()[:-1]
  indent = len(program.rstrip().splitlines()[-1]) - len(program.rstrip().splitlines()[-1].lstrip())
  return '\n'.join([*kept, ' ' * indent + 'pass']) + '\n'


def programs(name: str, problems: list[tuple[dict, str]]) -> None:
  """Prints how many solutions pass, as they are and shortened. problems: (fields of `verify.code`, solution)."""
  told = [fields for fields, _ in problems]
  for what, change in (('as they are', str), ('without their last line', shortened)):
    texts = [change(solution) for _, solution in problems]
    passed = verify.code([''] * len(texts), texts, told, seconds=10.0)
    print(f'{name}: {int(passed.sum())} of {len(texts)} solutions pass {what}')


def main() -> None:
  """Prints a line for each data set."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--gsm8k', help='example_model_solutions.jsonl')
  parser.add_argument('--human_eval', help='HumanEval.jsonl')
  parser.add_argument('--mbpp', help='mbpp.jsonl')
  given = parser.parse_args()
  bundled = json.loads(BUNDLED.read_text(encoding='utf-8'))
  mathematics(gsm8k(lines(given.gsm8k)) if given.gsm8k else bundled['gsm8k'])
  found = lines(given.human_eval) if given.human_eval else bundled['human_eval']
  programs('human_eval', [(verify.human_eval(r), r['canonical_solution']) for r in found])
  found = lines(given.mbpp) if given.mbpp else bundled['mbpp']
  programs('mbpp', [(verify.mbpp(r), r['code']) for r in found])


if __name__ == '__main__':
  main()
