"""Prompts in local files, for the policy to answer and for rewards to look up what is right."""

from typing import Any

from llm_jax.data import records


def files(*, path: str | tuple, prompt: str = 'prompt') -> list[dict[str, Any]]:
  """The records of `path` (see `records.read`) as `rollout.make` wants them.

  prompt: the key of the text that is answered, which becomes record['prompt']. The other fields are told to the reward;
  record['where'] is 'FILE:LINE' and stands in errors. Raises `UserError` for a prompt that is missing or empty.
  """
  return [
    one.fields | dict(prompt=records.text(one, prompt), where=one.where)
    for one in records.read(path)
  ]
