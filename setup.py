"""llm_jax as a package: its floors, its extras and the `llm-jax` command. requirements.lock has the exact versions."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$", (HERE / 'llm_jax/__init__.py').read_text(), re.M)[1]

setup(
  name='llm_jax',
  version=VERSION,
  description='Large language models in JAX, from raw text to samples, as small pure functions.',
  long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  packages=find_packages(include=['llm_jax', 'llm_jax.*']),
  package_data={'llm_jax': ['py.typed', 'data/bundled/*/*', 'serve/page.html']},
  python_requires='>=3.11,<3.14',  # below: jax; above: the wheels of tensorflow-text
  install_requires=[
    'absl-py>=2.1',
    'einops>=0.8',
    'etils>=1.12',
    'flax>=0.12',
    'gguf>=0.17',
    'grain>=0.2.18',
    'jax>=0.10',
    'jinja2>=3.1',
    'matplotlib>=3.9',
    'ml-collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'pyarrow>=17',
    'pyyaml>=6',
    'safetensors>=0.6',
    'scipy>=1.15',
    'sentencepiece>=0.2.2',
    'seqio>=0.0.20',
    'tensorboard>=2.20',
    'tensorflow>=2.21',
    'tensorflow-datasets>=4.9.9',
    'tensorflow-text>=2.21',
    'tokenizers>=0.21',
    'tqdm>=4.66',
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'serve': [
      'fastapi>=0.115',
      'llguidance>=1.0',
      'prometheus-client>=0.21',
      'pydantic>=2.10',
      'starlette>=0.41',
      'uvicorn>=0.34',
    ],  # llm-jax serve; requirements.lock has them
    'parity': [
      'torch',
      'transformers',
    ],  # the peers that benchmarks and parity tests run beside ours
    'dev': [
      'httpx',
      'hypothesis',
      'import-linter',
      'ipykernel',
      'nbclient',
      'nbformat',
      'openai',  # its client asks our server
      'pdoc',
      'playwright',  # drives the Chromium of the system on the chat page
      'pre-commit',
      'pytest',
      'pytest-xdist',
      'ruff',
      'schemathesis',  # fuzzes the server from its OpenAPI document
      'uv',  # resolves the lock files for every platform at once: `make lock`
    ],
  },
  entry_points={'console_scripts': ['llm-jax = llm_jax.cli.main:main']},
)
