"""The loop: batches in, updates out, hooks around. Every kind of training is this loop with other arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from llm_jax.core import mesh
from llm_jax.train.state import State

Hook = Callable[[int, State, dict[str, jax.Array]], State | None]


def train(
  state: State,
  source: Callable,
  update: Callable,
  *,
  steps: int,
  key: jax.Array,
  hooks: Sequence[Hook] = (),
  rescue: Hook | None = None,
) -> State:
  """Trains until `steps` updates have been made in all; returns the last state.

  source: state -> batch (this process's rows). update: see `step.make`. hooks: called as `hook(step, state, metrics)`
  after each update, and once before the first of a fresh run with step 0 and no metrics. A hook that returns a state
  sends the loop back to it. rescue: called likewise when the source fails instead of giving the next batch, such as a
  reward in its hundredth round; the state is that of the last step, whole, and the error goes on.
  """
  step = int(state.step)
  metrics: dict[str, Any] = {}
  while True:
    if metrics or step == 0:
      for hook in hooks:
        rewound = hook(step, state, metrics)
        if rewound is not None:
          state, step = rewound, int(rewound.step)
          break  # the other hooks are spared metrics of a step that was undone
    if step >= steps:
      return state
    try:
      batch = source(state)
    except Exception:
      if metrics and rescue is not None:
        rescue(step, state, metrics)
      raise
    state, metrics = update(state, mesh.place(batch), key)
    step += 1
