"""LLaMA and its descendants: pre-RMSNorm, RoPE, SwiGLU, no biases, an output matrix of their own."""

from llm_jax.model.published.row import HUGGINGFACE, Row

LLAMA = dict(
  norm=dict(fn='norms:RMSNorm', eps=1e-6),
  rotate='positions:rope',
  activation='ffn:silu',
  gated=True,
  head='heads:Untied',
  vocab=32_000,
)
LLAMA2 = dict(LLAMA, norm=dict(fn='norms:RMSNorm', eps=1e-5), length=4096)


def rope(base: float) -> dict:
  """RoPE of another base."""
  return dict(fn='positions:rope', base=base)


def sizes(layers: int, heads: int, embed: int, hidden: int, groups: int | None = None) -> dict:
  """The numbers that differ along a ladder."""
  return dict(layers=layers, heads=heads, embed=embed, hidden=hidden, groups=groups)


_7B, _13B = sizes(32, 32, 4096, 11008), sizes(40, 40, 5120, 13824)
_34B, _70B = sizes(48, 64, 8192, 22016, 8), sizes(80, 64, 8192, 28672, 8)
_1 = 'Touvron et al. 2023, arXiv:2302.13971, table 2'
_2 = 'Touvron et al. 2023, arXiv:2307.09288, table 1'
_3 = 'Grattafiori et al. 2024, arXiv:2407.21783, table 3'
_CODE = 'Rozière et al. 2023, arXiv:2308.12950, section 2'
_MIXTRAL = dict(sizes(32, 32, 4096, 14336, 8), experts=8, top_k=2)

CARDS = {
  **{
    f'llama_{name}': Row(
      _1, printed, figure, dict(LLAMA, **size, length=2048), HUGGINGFACE,
      note='no biases (the survey\'s table 5 says yes)',
    )
    for name, size, printed, figure in (
      ('7b', _7B, '6.7B', 6_738_415_616),
      ('13b', _13B, '13.0B', 13_015_864_320),
      ('33b', sizes(60, 52, 6656, 17920), '32.5B', 32_528_943_616),
      ('65b', sizes(80, 64, 8192, 22016), '65.2B', 65_285_660_672),
    )
  },
  **{
    f'llama2_{name}': Row(_2, printed, figure, dict(LLAMA2, **size), HUGGINGFACE)
    for name, size, printed, figure in (
      ('7b', _7B, '7B', 6_738_415_616),
      ('13b', _13B, '13B', 13_015_864_320),
      ('34b', _34B, '34B', 33_743_970_304),
      ('70b', _70B, '70B', 68_976_648_192),
    )
  },
  **{
    f'llama3_{name}': Row(
      _3, printed, figure, dict(LLAMA2, **size, rotate=rope(5e5), vocab=128_256, length=8192),
      HUGGINGFACE,
    )
    for name, size, printed, figure in (
      ('8b', sizes(32, 32, 4096, 14336, 8), '8B', 8_030_261_248),
      ('70b', _70B, '70B', 70_553_706_496),
    )
  },
  **{
    f'code_llama_{name}': Row(
      _CODE, printed, figure, dict(LLAMA2, **size, rotate=rope(1e6), vocab=vocab, length=16_384),
      HUGGINGFACE,
    )
    for name, size, vocab, printed, figure in (
      ('7b', _7B, 32_016, '7B', 6_738_546_688),
      ('13b', _13B, 32_016, '13B', 13_016_028_160),
      ('34b', _34B, 32_000, '34B', 33_743_970_304),
      ('70b', _70B, 32_016, '70B', 68_976_910_336),
    )
  },
  'mistral_7b': Row(
    'Jiang et al. 2023, arXiv:2310.06825, table 1',
    '7.24B',
    7_241_732_096,
    dict(
      LLAMA2, **sizes(32, 32, 4096, 14336, 8), window=4096, kernel='kernels:banded', length=8192
    ),
    HUGGINGFACE,
  ),
  'mixtral_8x7b': Row(
    'Jiang et al. 2024, arXiv:2401.04088, table 1',
    '46.7B',
    46_702_792_704,
    dict(LLAMA2, **_MIXTRAL, rotate=rope(1e6), length=32_768),
    HUGGINGFACE,
    active='12.9B',
    active_figure=12_879_925_248,
  ),
}  # fmt: skip
