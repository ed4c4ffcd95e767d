"""Parameters, FLOPs and bytes in closed form: what a model costs, before there is one.

Everything here is arithmetic on Python numbers, exact for 175B parameters too; a `transformer.Card`
has all that is needed. A FLOP is one addition or one multiplication, so a weight costs 2 FLOPs per
token forward and 4 backward. Kaplan et al. 2020 (arXiv:2001.08361, table 1); Chowdhery et al. 2022
(arXiv:2204.02311, appendix B); Rajbhandari et al. 2020 (arXiv:1910.02054, section 5).
"""

from typing import NamedTuple

from llm_jax.core.errors import UserError
from llm_jax.model.norms import NORMS
from llm_jax.model.transformer import Card

PF_DAY = 1e15 * 24 * 3600  # FLOPs in a petaFLOP/s-day: 8.64e19


class Cell(NamedTuple):
  """One row of Kaplan's table: parameters, and forward FLOPs per token."""

  parameters: int
  flops: int


def parameters(card: Card) -> dict[str, int]:
  """The number of parameters by part; the values sum to the size of `model.init`'s tree.

  Assumes that all blocks of a stack have the sizes of the first, and that both stacks of an
  encoder-decoder have the same.
  """
  d, stacks = card.embed, 2 if card.encoder_layers else 1
  attentions = card.encoder_layers + card.layers * stacks  # a decoder block with an encoder has two
  norms = (
    card.encoder_layers * _norms(card, 2)
    + card.layers * _norms(card, 1 + stacks)
    + stacks * card.final_norm
    + card.embedding_norm
  )
  return dict(
    embedding=card.rows * d,
    positions=card.length * d if 'Learned' in card.positions.split('+') else 0,
    attention=attentions * sum(_attention(card)),
    ffn=(card.layers + card.encoder_layers) * sum(_ffn(card)),
    norm=norms * d * (1 + card.norm_bias),
    buckets=stacks * card.buckets * (card.heads or 0),
    head=0 if card.tied else card.rows * (d + card.head_bias),
  )


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
  (PaLM's count of MFU, and most kernels). Softmax, norms and activations are left out: they are
  below 2 % from embed = 256 on.
  """
  width = (card.heads or 0) * (card.head_dim or 0)
  kv = 2 * card.embed * (card.groups or 0) * (card.head_dim or 0)  # weights on the side of the keys
  q = 2 * card.embed * width
  t, s = length, encoder_length
  attention = card.layers * (q + kv) * t + card.encoder_layers * (q + kv) * s
  scores = 2 * width * (card.layers * t * t * seen + card.encoder_layers * s * s)
  if card.encoder_layers:
    attention += card.layers * (q * t + kv * s)
    scores += 2 * width * card.layers * t * s
  ffn = _ffn(card)[0] * (card.layers * t + card.encoder_layers * s)
  return dict(
    attention=2 * attention, scores=2 * scores, ffn=2 * ffn, head=2 * card.embed * card.rows * t
  )


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
  """Bytes of keys and values per token of context, `width` a number; cross-attention has as many per encoder token."""
  return 2 * card.layers * (card.groups or 0) * (card.head_dim or 0) * width


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


def _attention(card: Card) -> tuple[int, int]:
  """(weights, biases) of one attention."""
  if card.heads is None:
    raise UserError('this model has no attention in its first block: no closed form counts it')
  q, kv = card.heads * card.head_dim, 2 * card.groups * card.head_dim
  biases = card.attention_bias * (q + kv) + card.attention_out_bias * card.embed
  return card.embed * (2 * q + kv), biases


def _ffn(card: Card) -> tuple[int, int]:
  """(weights, biases) of one feed-forward."""
  if card.ffn is None:
    raise UserError(
      'this model has no dense feed-forward in its first block: no closed form counts it'
    )
  inward = 1 + card.gated
  return (inward + 1) * card.embed * card.ffn, card.ffn_bias * (inward * card.ffn + card.embed)


def _norms(card: Card, sublayers: int) -> int:
  """Norms in a block of so many sublayers."""
  return NORMS[card.residual](sublayers)
