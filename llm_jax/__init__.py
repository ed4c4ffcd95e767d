"""llm_jax: large language models in JAX, from raw text to samples.

Importing this package is light: it pulls in nothing beyond the standard library. Import the part you
need (`from llm_jax.model import transformer`).
"""

__version__ = '0.1.0'
