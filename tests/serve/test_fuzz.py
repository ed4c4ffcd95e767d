"""Bodies that nobody would write, made from the OpenAPI document: never a 5xx."""

from benchmarks import fuzz_server
from tests.serve.conftest import serving


def test_no_body_makes_the_server_fail():
  with serving() as served:
    statuses, failed = fuzz_server.fuzz(served.url, 1000)
  print(dict(statuses))
  assert not failed and sum(statuses.values()) >= 1000
  for path in fuzz_server.POST:
    assert statuses[path, 200] > 20 and statuses[path, 400] > 100
