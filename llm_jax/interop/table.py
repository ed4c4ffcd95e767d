"""What a family of checkpoints is: a config read as ours, and a table of tensors.

A `Family` is found by the `model_type` of a `config.json`. Its rows say where each tensor goes:

    Row('decoder/layer/mixer/query', 'layers.*.self_attn.q_proj.weight', '(h k) d -> d h k')

`decoder/layer/` stands for the place of every layer, whatever segment and pattern it lies in, and `*` for its number;
`#` is the number of an expert. The pattern is einops', from theirs to ours; read backwards it exports. Where one of
their tensors holds several of ours, `ours` names them all: the pattern then ends in their shape, put end to end on the
axis `n`, or one after the other on a leading axis `p`. A row does not apply to a model without its paths (no bias, tied
head); where several rows fill a path, the first that applies does. Letters as in `core/weights.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llm_jax.core.config import ConfigDict
from llm_jax.interop.settings import Settings


class Row(NamedTuple):
  """ours: path or paths in the parameters. theirs: name of the tensor, without the family's prefix.

  add: what is added to theirs (Gemma stores the scales of its norms less one). skip: rows of theirs before the first of
  ours (OPT's position table begins with two that padding uses); zeros when exported. needs: a path that the model must
  have too.
  """

  ours: str | tuple[str, ...]
  theirs: str
  pattern: str
  add: float = 0.0
  skip: int = 0
  needs: str | None = None


class Family(NamedTuple):
  """model: config.json -> `use` of a builder of model/transformer.py. rows: see above. prefix: of their names, absent
  from checkpoints of the bare model. ignored: endings of names that hold nothing of ours. sizes: letters of the
  patterns that are nobody's size. renamed: (ending, what it is called here) of names in older checkpoints.
  """

  model: Callable[[Settings], ConfigDict]
  rows: tuple[Row, ...]
  prefix: str
  ignored: tuple[str, ...] = ('rotary_emb.inv_freq', 'lm_head.weight')
  sizes: Mapping[str, int] = {}
  renamed: tuple[tuple[str, str], ...] = ()


LAYER, ENCODER = 'decoder/layer/', 'encoder/layer/'  # the places of the layers of a stack

# The shape of a projection in PyTorch's Linear (out, in), and in GPT-2's Conv1D (in, out).
IN, OUT, UP = '(h k) d -> d h k', 'd (h k) -> h k d', 'f d -> d f'
BIAS, SAME = '(h k) -> h k', 'd -> d'


def rows(under: str, table: Mapping[str, str], **kw: Any) -> tuple[Row, ...]:
  """Rows `ours: 'theirs | pattern'` below a path of ours; a pattern left out is that of a vector."""
  found = []
  for ours, told in table.items():
    theirs, _, pattern = told.partition(' | ')
    names = tuple(under + name for name in ours.split())
    found.append(Row(names if len(names) > 1 else names[0], theirs, pattern or SAME, **kw))
  return tuple(found)


def norm(ours: str, theirs: str, **kw: Any) -> tuple[Row, ...]:
  """Scale and bias of a norm."""
  return (
    Row(f'{ours}/scale', f'{theirs}.weight', SAME, **kw),
    Row(f'{ours}/bias', f'{theirs}.bias', SAME),
  )


def linear(
  ours: str, theirs: str, pattern: str, bias: str = SAME, under: str = LAYER
) -> tuple[Row, ...]:
  """A projection and its bias. ours: one path, or several separated by spaces, below `under`."""
  names = tuple(under + name for name in ours.split())
  biases = tuple(f'{name}_bias' for name in names)
  one = len(names) == 1
  return (
    Row(names[0] if one else names, f'{theirs}.weight', pattern),
    Row(biases[0] if one else biases, f'{theirs}.bias', bias),
  )


def ends(embedding: str, final: str, head: str = 'lm_head', **kw: Any) -> tuple[Row, ...]:
  """Embedding, final norm, head."""
  return (
    Row('embedding/table', f'{embedding}.weight', 'v d -> v d'),
    *norm('decoder/norm', final, **kw),
    Row('head/w', f'{head}.weight', 'v d -> d v'),
    Row('head/bias', f'{head}.bias', 'v -> v'),
  )


def split(attn: str, q: str, k: str, v: str, out: str) -> tuple[Row, ...]:
  """Attention with a tensor for each projection."""
  return (
    *linear('mixer/query', attn + q, IN, BIAS),
    *linear('mixer/key', attn + k, IN, BIAS),
    *linear('mixer/value', attn + v, IN, BIAS),
    *linear('mixer/out', attn + out, OUT),
  )


QKV = 'mixer/query mixer/key mixer/value'
# All queries, then all keys, then all values; and query, key, value of one head after another.
JOINED, JOINED_BIAS = '(n k) d -> d n k', '(n k) -> n k'
PER_HEAD, PER_HEAD_BIAS = '(h p k) d -> p d h k', '(h p k) -> p h k'


def mlp_rows(up: str, down: str) -> tuple[Row, ...]:
  """Two linear layers and their biases."""
  return (*linear('ffn/up', up, UP), *linear('ffn/down', down, 'd f -> f d'))


def without(table: tuple[Row, ...], *parts: str) -> tuple[Row, ...]:
  """The rows whose paths have none of these parts in them."""
  paths = lambda row: row.ours if isinstance(row.ours, tuple) else (row.ours,)
  return tuple(r for r in table if not any(part in path for part in parts for path in paths(r)))
