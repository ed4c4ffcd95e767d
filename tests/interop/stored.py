"""The references that lie here are those that the reference implementations give today: `make parity` makes them anew.

Only there is it run, not by `make test`. LLM_JAX_REFERENCE names the folder of the new ones.
"""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

TESTS = pathlib.Path(__file__).parents[1]
FRESH = os.environ['LLM_JAX_REFERENCE']
MOVED = {
  'decode/reference.safetensors': 'reference.safetensors',
  'objectives/reference.safetensors': 'preferences.safetensors',
  'objectives/policy.safetensors': 'policy.safetensors',
} | {
  f'interop/reference/{path.parent.name}/{path.name}': f'{path.parent.name}/{path.name}'
  for path in (TESTS / 'interop/reference').glob('*/*.safetensors')
}


@pytest.mark.parametrize('path', sorted(MOVED))
def test_arrays_are_todays(path):
  """Whole numbers to the last, floats to 1e-4 of the largest, for another build of torch sums in another order."""
  stored, fresh = load_file(TESTS / path), load_file(pathlib.Path(FRESH) / MOVED[path])
  assert stored.keys() == fresh.keys()
  for name, x in stored.items():
    if np.issubdtype(x.dtype, np.floating):
      size = np.abs(x[np.isfinite(x)]).max(initial=1.0)
      np.testing.assert_allclose(fresh[name], x, rtol=0, atol=1e-4 * size, err_msg=name)
    else:
      np.testing.assert_array_equal(fresh[name], x, err_msg=name)


def test_templates_are_todays():
  stored, fresh = (
    json.loads(gzip.decompress((pathlib.Path(folder) / 'templates.json.gz').read_bytes()))
    for folder in (TESTS / 'data', FRESH)
  )
  assert stored == fresh
