"""One environment for all tests: CPU, eight virtual devices, compiled programs kept between runs.

Most of a test's time is compilation, so nothing is optimised here; the commands that tests start as processes are
compiled as users have them. `LLM_JAX_TEST_CACHE` names the folder of the compiled programs (default: pytest's cache);
data caches live in a temporary folder.
"""

import gc
import os
import shutil
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # those of several workers wait for one another
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  ).strip()


def pytest_configure(config):
  """The cache folders have to be named before anything imports jax."""
  config.llm_jax_cache = os.environ['LLM_JAX_CACHE'] = tempfile.mkdtemp(prefix='llm_jax_tests_')
  kept = config.cache.mkdir('jax') if hasattr(config, 'cache') else f'{config.llm_jax_cache}/jax'
  os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ.get('LLM_JAX_TEST_CACHE') or str(kept)


def pytest_unconfigure(config):
  shutil.rmtree(config.llm_jax_cache, ignore_errors=True)


def pytest_collection_modifyitems(items):
  """The longest first, or one worker would be at them when the others are done."""
  items.sort(key=lambda item: item.path.name != 'test_notebooks.py')


@pytest.fixture(autouse=True, scope='module')
def mappings():
  """Lets go of compiled programs before a process has more memory mappings than Linux allows (65,530 by default).

  Every program on a CPU takes a few, and what comes after the last one allowed is a segmentation fault. They are in the
  cache on disk.
  """
  yield
  if os.path.exists('/proc/self/maps'):
    with open('/proc/self/maps', 'rb') as f:
      many = sum(1 for _ in f) > 20_000
    if many:
      import jax

      jax.clear_caches()
      gc.collect()
