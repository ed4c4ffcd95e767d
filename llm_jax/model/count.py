"""Parameters, FLOPs and bytes in closed form: what a model costs, before there is one.

Everything here is arithmetic on Python numbers, exact for 175B parameters too; a `card.Card`
has all that is needed. A FLOP is one addition or one multiplication, so a weight costs 2 FLOPs per
token forward and 4 backward. Kaplan et al. 2020 (arXiv:2001.08361, table 1); Chowdhery et al. 2022
(arXiv:2204.02311, appendix B); Rajbhandari et al. 2020 (arXiv:1910.02054, section 5).
"""

from typing import Any, NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.model.card import Attention, Card, Declared, Dense
from llm_jax.model.norms import NORMS

PF_DAY = 1e15 * 24 * 3600  # FLOPs in a petaFLOP/s-day: 8.64e19


class Cell(NamedTuple):
  """One row of Kaplan's table: parameters, and forward FLOPs per token."""

  parameters: int
  flops: int


def parameters(card: Card) -> dict[str, int]:
  """The number of parameters by part; the values sum to the size of `model.init`'s tree."""
  return _parameters(card, active=False)


def active(card: Card) -> dict[str, int]:
  """`parameters` without the experts that a token is not sent to, by part."""
  return _parameters(card, active=True)


def _parameters(card: Card, active: bool) -> dict[str, int]:
  d, kinds = card.embed, (*card.decoder, *card.encoder)
  mixers = [(kind.repeats, mixer) for kind in kinds for mixer in kind.mixers]
  norms = sum(kind.repeats * kind.norm * NORMS[kind.residual](kind.sublayers) for kind in kinds)
  stacks = 1 + bool(card.encoder)
  norms += stacks * (card.final_norm + card.stem_norm) + card.embedding_norm
  width, project = card.rank or d, (card.rank or 0) * d
  embedding = card.rows * width + project if card.spelled is None else card.spelled.parameters
  tables = stacks if card.stem_norm else 1  # of learned positions

  def sized(part: Any) -> int:
    matrices, vectors = weights(part, d, active=active)
    return matrices + vectors

  return dict(
    embedding=embedding + card.types * d,
    positions=tables * card.length * d if 'Learned' in card.positions.split('+') else 0,
    attention=sum(n * sized(m) for n, m in mixers if isinstance(m, Attention)),
    mixer=sum(n * sized(m) for n, m in mixers if isinstance(m, Declared)),
    ffn=sum(kind.repeats * sized(kind.ffn) for kind in kinds if kind.ffn is not None),
    norm=norms * d,
    buckets=card.buckets * sum(_heads(stack) for stack in (card.decoder, card.encoder)),
    head=_head(card, project) + card.head_more + card.pooled,
  )


def _head(card: Card, project: int) -> int:
  """The table and bias of the logits, less what is counted as the embedding."""
  bias = card.rows * card.head_bias
  return bias + (project if card.tied else card.rows * card.embed)


def _heads(kinds: tuple) -> int:
  """The heads that share a stack's position bias."""
  found = [
    m.heads for kind in kinds for m in kind.mixers if isinstance(m, Attention) and not m.cross
  ]
  return found[0] if found else 0


def weights(
  part: Attention | Dense | Declared, embed: int, *, active: bool = False
) -> tuple[int, int]:
  """(elements of the matrices, of the biases and other vectors) of a sublayer; active: of those a token meets."""
  if isinstance(part, Declared):
    return (part.active, part.active_vectors) if active else (part.weights, part.vectors)
  if isinstance(part, Dense):
    inward = 1 + part.gated
    biases = part.bias * (inward * part.hidden + embed)
    return (inward + 1) * embed * part.hidden, biases
  q, kv = part.heads * part.head_dim, 2 * part.groups * part.head_dim
  biases = part.bias * (q + kv) + part.out_bias * embed
  return embed * (2 * q + kv) + part.more.weights, biases + part.more.vectors


def total(card: Card) -> int:
  """All parameters."""
  return sum(parameters(card).values())


def non_embedding(*, embed: int, layers: int, attention: int, ffn: int) -> int:
  """N = 2 d L (2 d_attn + d_ff): the weight matrices of the layers and nothing else (Kaplan et al., eq. 2.1)."""
  return 2 * embed * layers * (2 * attention + ffn)


def kaplan_table(
  *, embed: int, layers: int, attention: int, ffn: int, vocab: int, context: int
) -> dict[str, Cell]:
  """Table 1 of Kaplan et al.: parameters and forward FLOPs per token, by operation; `total` leaves the embeddings out.

  attention: d_attn = heads * head_dim. context: n_ctx; the `mask` row counts the causal half of the
  products with keys and values.
  """
  rows = dict(
    embed=Cell((vocab + context) * embed, 4 * embed),
    qkv=Cell(layers * embed * 3 * attention, 2 * layers * embed * 3 * attention),
    mask=Cell(0, 2 * layers * context * attention),
    project=Cell(layers * attention * embed, 2 * layers * attention * embed),
    feedforward=Cell(layers * 2 * embed * ffn, 2 * layers * 2 * embed * ffn),
    deembed=Cell(0, 2 * embed * vocab),
  )
  inner = ('qkv', 'mask', 'project', 'feedforward')
  return dict(
    rows, total=Cell(sum(rows[r].parameters for r in inner), sum(rows[r].flops for r in inner))
  )


def forward_flops(
  card: Card, length: int, encoder_length: int = 0, *, seen: float = 0.5
) -> dict[str, float]:
  """FLOPs of one forward pass over one sequence, by part: every product with a weight or between activations.

  length: decoder tokens; encoder_length: encoder tokens. seen: the part of the decoder's keys that
  a query is multiplied with: 0.5 for a causal mask (Kaplan), 1 when all products are computed
  (PaLM's count of MFU, and most kernels) and always in an encoder; of a window, the part of its beginning. Softmax,
  norms and activations are left out: they are below 2 % from embed = 256 on.
  """
  d, t, s = card.embed, length, encoder_length
  head = card.rows * d
  if card.tied and card.rank is not None:
    head = card.rank * (card.rows + 2 * d)  # the table's two projections are counted here
  seen = 1 if card.kind == 'encoder' else seen
  found = dict(attention=0, scores=0, mixer=0, ffn=0, head=2 * (head + card.head_more) * t)
  for kinds, tokens, share in ((card.decoder, t, seen), (card.encoder, s, 1)):
    for n, mixer in ((kind.repeats, mixer) for kind in kinds for mixer in kind.mixers):
      if isinstance(mixer, Declared):
        found['mixer'] += n * _declared_flops(mixer, tokens, d)
        continue
      width, kv = mixer.heads * mixer.head_dim, 2 * mixer.groups * mixer.head_dim
      keys, pairs = tokens, _pairs(tokens, mixer.window, share)
      if mixer.cross:
        keys, pairs = s, t * s
      own = d * (2 * width * tokens + kv * keys) + mixer.more.active * tokens
      found['attention'] += n * 2 * own
      found['scores'] += n * (4 + 2 * mixer.relative) * width * pairs
    for kind in kinds:
      if isinstance(kind.ffn, Declared):
        found['ffn'] += kind.repeats * _declared_flops(kind.ffn, tokens, d)
      elif kind.ffn is not None:
        found['ffn'] += kind.repeats * 2 * weights(kind.ffn, d)[0] * tokens
  if card.spelled is not None:
    found['embedding'] = card.spelled.flops * (t + s)
  return found


def _declared_flops(part: Declared, tokens: int, embed: int) -> float:
  return 2 * part.active * tokens + part.flops(tokens, embed)


def _pairs(length: int, window: int | None, seen: float) -> float:
  """How many pairs of a query and a key are multiplied."""
  near = length if window is None else min(window, length)
  return length * near - (1 - seen) * near * near


def training_flops(card: Card, length: int, encoder_length: int = 0, *, seen: float = 0.5) -> float:
  """FLOPs of forward and backward pass per decoder token: 3 times the forward pass, recomputation not counted."""
  return 3 * sum(forward_flops(card, length, encoder_length, seen=seen).values()) / length


def compute(*, parameters: float, tokens: float) -> float:
  """C = 6 N D: FLOPs of training on `tokens`, 2 N forward and 4 N backward per token (Kaplan et al., eq. 2.2)."""
  return 6 * parameters * tokens


def pf_days(flops: float) -> float:
  """FLOPs in petaFLOP/s-days."""
  return flops / PF_DAY


def mfu(flops: float, *, seconds: float, devices: int, peak: float) -> float:
  """Model FLOPs utilisation: `flops` over what `devices` of `peak` FLOP/s can do in `seconds` (PaLM, app. B)."""
  return flops / (seconds * devices * peak)


def kv_bytes(card: Card, *, width: int = 2) -> int:
  """Bytes of keys and values per token of context, `width` a number; cross-attention has as many per encoder token.

  Layers with a window count until it is full; layers without keys do not (see `context_bytes`).
  """
  return sum(
    kind.repeats * 2 * mixer.groups * mixer.head_dim * width
    for kind in card.decoder
    for mixer in kind.mixers
    if isinstance(mixer, Attention) and not mixer.cross
  )


def context_bytes(card: Card, length: int, encoder_length: int = 0, *, width: int = 2) -> int:
  """Bytes that the decoder keeps of one sequence of `length` tokens: what decoding needs besides the weights.

  Keys and values of every token, of a layer with a window those it still looks at, the state of layers without them,
  and the keys and values of the encoder's tokens.
  """
  found = 0
  for kind in card.decoder:
    for mixer in kind.mixers:
      if isinstance(mixer, Declared):
        found += kind.repeats * mixer.state_bytes(length, card.embed, width)
        continue
      tokens = encoder_length if mixer.cross else min(length, mixer.window or length)
      found += kind.repeats * 2 * mixer.groups * mixer.head_dim * width * tokens
  return found


def intensity(
  *, queries: int, keys: int, head_dim: int, flops_per_mac: int = 4, score_bytes: int = 8
) -> float:
  """FLOPs per byte that attention moves when its scores go through memory.

  Below a device's ridge (A100: 156 FLOPs per byte) it waits for memory.

  With the survey's conventions (Zhao et al. 2023, arXiv:2303.18223): 8 q s d FLOPs over 8 q s + 4 s d
  + 4 q d bytes per head, which counts 4 FLOPs for each of the 2 q s d multiply-adds; the usual count is
  `flops_per_mac=2` with `score_bytes=4`. queries: 1 when decoding, = keys in prefill.
  """
  moved = score_bytes * queries * keys + 4 * keys * head_dim + 4 * queries * head_dim
  return 2 * flops_per_mac * queries * keys * head_dim / moved


def zero_bytes(
  parameters: float,
  *,
  devices: int,
  stage: int,
  weights: int = 2,
  gradients: int = 2,
  optimizer: int = 12,
) -> float:
  """Bytes per device that weights, gradients and optimizer state take under ZeRO stage 0 (none), 1, 2 or 3.

  weights, gradients, optimizer: bytes per parameter; the defaults are Adam in mixed precision,
  whose state is an f32 copy and two moments. `mesh.ZERO1`, `ZERO2`, `ZERO3` are these stages.
  """
  if stage not in range(4):
    raise UserError(f'ZeRO has the stages 0, 1, 2, 3, got {stage}')
  parts = (weights, gradients, optimizer)
  whole, split = sum(parts[: 3 - stage]), sum(parts[3 - stage :])
  return parameters * (whole + split / devices)


def zero_traffic(parameters: float, *, stage: int) -> float:
  """Numbers each device sends per step: 2 per parameter (reduce-scatter, all-gather), in stage 3 half as many again."""
  return parameters * (3 if stage == 3 else 2)
