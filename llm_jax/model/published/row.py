"""What a row of the tables says."""

from typing import Any, NamedTuple

HUGGINGFACE = 'transformers'  # the size of its model class with the published config


class Row(NamedTuple):
  """A published model.

  sheet: keyword arguments of `presets.assemble`; a part is an import path below `llm_jax.model` ('norms:RMSNorm'), or a
  dict with that path as `fn` and its keyword arguments. paper: who and where. printed: the number of parameters as
  published, to its precision ('540.35B'). active: the same for the parameters that a token meets. figure: the number to
  the last digit, of the parameters whose path the regex `without` does not find. source: who published `figure`; empty
  when it is the sum of the published sizes. lacks: parameters of the original that the builders have no place for.
  note: why, and what the paper leaves open.
  """

  paper: str
  printed: str
  figure: int
  sheet: dict[str, Any]
  source: str = ''
  active: str = ''
  active_figure: int | None = None
  without: str = ''
  lacks: int = 0
  closes: bool = True
  note: str = ''
