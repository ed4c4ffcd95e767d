"""Bodies that nobody would write, made from the OpenAPI document: never a 5xx."""

import pytest

from benchmarks import fuzz_server
from tests.serve.conftest import serving
from tests.variants import variants


@pytest.mark.parametrize('bodies', variants([300, 1000], [300]))
def test_no_body_makes_the_server_fail(bodies):
  with serving() as served:
    statuses, failed = fuzz_server.fuzz(served.url, bodies)
  print(dict(statuses))
  assert not failed and sum(statuses.values()) >= bodies
  for path in fuzz_server.POST:
    assert statuses[path, 200] > bodies / 50 and statuses[path, 400] > bodies / 10
