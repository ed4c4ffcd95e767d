"""Between the layers of a decoder: what looks at the residual stream there, or changes it.

model.hidden(params, batch, around=depth.exits((4, 8))).aux['around']      # [2, batch, length, embed]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Around(NamedTuple):
  """What is put around every repeat of a decoder's stack.

  start(x [batch, t, embed]) -> what is carried from layer to layer, from the stack's input.
  step(apply, layer, finish) -> the function run in place of a repeat's `apply` (see model/stack.py), over the pair (x,
    carried) in the place of x. layer(index) is the number of layers done after that repeat, finish the final norm.
  end(carried, finish) -> what `hidden` returns as aux['around'].
  at: the layers it asks for, each the end of a repeat; checked when it is used.
  """

  start: Callable[[jax.Array], Any]
  step: Callable[[Callable, Callable, Callable], Callable]
  end: Callable[[Any, Callable], Any]
  at: tuple[int, ...] = ()


def exits(layers: tuple[int, ...]) -> Around:
  """Keeps what the head would read after these numbers of layers (0: the embeddings): [n, batch, t, embed], after the
  final norm."""

  def there(done: Any) -> jax.Array:
    return (jnp.asarray(layers) == done)[:, None, None, None]

  def start(x: jax.Array) -> jax.Array:
    return jnp.where(there(0), x, jnp.zeros((len(layers), *x.shape), x.dtype))

  def step(apply: Callable, layer: Callable, finish: Callable) -> Callable:
    del finish

    def run(params: Any, carry: tuple, states: Any, index: Any) -> tuple:
      x, states, aux = apply(params, carry[0], states, index)
      return (x, jnp.where(there(layer(index)), x, carry[1])), states, aux

    return run

  return Around(start, step, lambda kept, finish: finish(kept), tuple(layers))
