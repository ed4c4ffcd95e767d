"""Text of the pre-training data beside the answers of a policy: PPO-ptx (InstructGPT, arXiv:2203.02155, eq. 2)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.core.errors import UserError


def with_ptx(model: Any, *, source: Callable, pretraining: Callable) -> 'WithPtx':
  """`source` with the batches of `pretraining` as the side `ptx/...`, both of the same number of rows.

  The weights of the text are scaled to sum to those of the answers, so that in the sum that the step divides by the
  answers' tokens the text counts as its mean per token, however many microbatches there are.
  """
  first, second = source(model), pretraining(model)
  if first.batch != second.batch:
    raise UserError(
      f'with_ptx: {first.batch} answers beside {second.batch} rows of text: give both the same batch'
    )
  return WithPtx(first, second)


class WithPtx:
  """Two sources as one."""

  def __init__(self, source: Any, pretraining: Any):
    self.batch, self.length, self.vocab = source.batch, source.length, source.vocab
    self.texts = 1 + pretraining.length / source.length  # of the source's length
    self._source, self._pretraining = source, pretraining

  def __call__(self, state: Any) -> dict[str, np.ndarray]:
    """This process' rows of both."""
    batch, text = self._source(state), self._pretraining(state)
    scale = batch['weights'].sum() / max(text['weights'].sum(), 1)
    text = dict(text, weights=(text['weights'] * scale).astype(np.float32))
    return batch | {f'ptx/{name}': x for name, x in text.items()}

  def __getattr__(self, name: str) -> Any:
    """What only a rollout has: its round, rows, answers."""
    return getattr(self._source, name)

  def state(self) -> dict[str, Any]:
    """Of both."""
    return dict(source=self._source.state(), ptx=self._pretraining.state())

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state()`."""
    self._source.restore(state['source'])
    self._pretraining.restore(state['ptx'])

  def skip(self, batches: int) -> None:
    """Leaves out the next batches of both."""
    self._source.skip(batches)
    self._pretraining.skip(batches)

  def close(self) -> None:
    """Stops what runs in the background."""
    self._source.close()
    self._pretraining.close()
