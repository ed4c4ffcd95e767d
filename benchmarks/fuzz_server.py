"""1,000 request bodies that schemathesis makes up from the server's OpenAPI document, right and wrong ones: no 5xx.

python -m benchmarks.fuzz_server --url=http://127.0.0.1:8000    # a server that runs: llm-jax serve --workdir=DIR
python -m benchmarks.fuzz_server --fake                         # one with the engine of tests/serve/fake.py

Prints how many answers had which status, and every body that got a 5xx; exits with 1 if there was one.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import subprocess
import sys

POST = 'chat/completions', 'completions', 'embeddings'


def fuzz(url: str, bodies: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:
  """(number of answers by path and status, requests that got a 5xx or none); half of the bodies break the schema."""
  import requests
  import schemathesis
  from schemathesis import GenerationMode

  document = requests.get(url + '/openapi.json', timeout=30).json()
  schema, session = schemathesis.openapi.from_dict(document), requests.Session()
  statuses, failed = collections.Counter(), []
  for path in POST:
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
      operation = schema[f'/v1/{path}']['POST']
      shots = bodies // (2 * len(POST)) + 1
      for case in _cases(operation.as_strategy(generation_mode=mode), shots, seed):
        told = f'{path} {json.dumps(case.body, default=repr)[:500]}'
        try:
          found = case.call(base_url=url, session=session, timeout=60)
        except requests.RequestException as e:
          failed.append(f'{type(e).__name__}: {told}')
          continue
        statuses[path, found.status_code] += 1
        silent = found.status_code >= 400 and not found.json()['error']['message']
        if found.status_code >= 500 or silent:
          failed.append(f'{found.status_code}: {told}')
  return statuses, failed


def _cases(strategy, number: int, seed: int) -> list:
  """So many examples of a strategy."""
  import hypothesis

  found = []

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=number,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    deadline=None,
    database=None,
  )
  @hypothesis.given(strategy)
  def collect(case):
    found.append(case)

  collect()
  return found


@contextlib.contextmanager
def fake():
  """The address of a server in a process of its own, without a model."""
  command = [sys.executable, '-m', 'tests.serve.fake', '--delay=0']
  root = pathlib.Path(__file__).parents[1]
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
    try:
      yield server.stdout.readline().split()[-1]
    finally:
      server.terminate()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--url', default='http://127.0.0.1:8000')
  parser.add_argument('--fake', action='store_true', help='start a server without a model')
  parser.add_argument('--bodies', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  with fake() if given.fake else contextlib.nullcontext(given.url) as url:
    statuses, failed = fuzz(url, given.bodies, given.seed)
  for (path, status), number in sorted(statuses.items()):
    print(f'{path:18}{status}{number:7}')
  print(
    f'{sum(statuses.values())} bodies answered, {len(failed)} of them wrongly', *failed, sep='\n'
  )
  return bool(failed)


if __name__ == '__main__':
  sys.exit(main())
