"""All families of checkpoints by the `model_type` of their config.json.

A new one is a function that reads its config and a table of its tensors, in a file under `architectures/`.
"""

from llm_jax.core.errors import UserError, nearest
from llm_jax.interop import settings
from llm_jax.interop.architectures import bert, gpt, llama, moe, recurrent, t5
from llm_jax.interop.settings import Settings
from llm_jax.interop.table import Family

FAMILIES: dict[str, Family] = {
  **llama.FAMILIES,
  **gpt.FAMILIES,
  **bert.FAMILIES,
  **t5.FAMILIES,
  **moe.FAMILIES,
  **recurrent.FAMILIES,
}


def family(told: Settings) -> Family:
  """The family of a config.json. Raises `UserError` naming the nearest that there is."""
  name = settings.get(told, 'model_type')
  if name not in FAMILIES:
    raise UserError(f'the architecture {name!r} is not supported: {nearest(name, FAMILIES)}')
  return FAMILIES[name]
